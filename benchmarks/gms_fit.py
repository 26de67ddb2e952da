"""Compares two ways to find the kernel of Gaussian mixture solvers: in closed form, and by the optimizer of the paper.

The closed form is in ldm_smd/diffusion/central_moments.py. The paper (arXiv 2311.00941) finds the two means and the shared
variance for every element by 70 iterations of an optimizer, starting with nearly equal means. A start with separated means is
measured too. All get the same moments, which a mixture of weights 1/3 and 2/3 can have, in float32 tensors of the size of a
batch of latents.

    python benchmarks/gms_fit.py          # under a minute

Writes benchmarks/results/gms_fit.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from targets import target

from ldm_smd.diffusion.central_moments import CentralMoments, moments_of, two_gaussians
from ldm_smd.schedulers.kernel_fit import PAPER_ITERATIONS, fit_two_gaussians

RESULT = Path(__file__).parent / "results" / "gms_fit.json"
SHAPE = (64, 16, 8, 8)
ROUNDS = 5
FIT_FLOOR = torch.tensor(1e-3)


def feasible_moments() -> CentralMoments:
    """Draw moments of random mixtures with normal means and variances from 0.05 to 1.05."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, *SHAPE, generator=generator)
    variance = 0.05 + torch.rand(SHAPE, generator=generator)
    return moments_of(first, second, variance)


def residual(moments: CentralMoments, kernel: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> float:
    """Return the root mean square error of the three central moments, in float64."""
    found = moments_of(*(part.double() for part in kernel))
    pairs = [(getattr(found, name), getattr(moments, name).double()) for name in ("mean", "variance", "third")]
    return float(sum((a - b).square().mean() for a, b in pairs).div(3).sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    moments = feasible_moments()
    solvers = {
        "solved": lambda: two_gaussians(moments, torch.zeros(())),
        "fitted, the paper's start": lambda: fit_two_gaussians(moments, FIT_FLOOR),
        "fitted, means apart": lambda: fit_two_gaussians(moments, FIT_FLOOR, separation=1.0),
    }
    rows = {name: {"residual": residual(moments, solve()), "seconds": []} for name, solve in solvers.items()}
    for _ in range(ROUNDS):  # in turn, so that a slow moment of the machine affects all
        for name, solve in solvers.items():
            started = time.perf_counter()
            solve()
            rows[name]["seconds"].append(time.perf_counter() - started)
    fitted = [row for name, row in rows.items() if name != "solved"]
    best, fastest = min(row["residual"] for row in fitted), min(statistics.median(row["seconds"]) for row in fitted)
    speedup = fastest / statistics.median(rows["solved"]["seconds"])
    targets = [
        {
            "name": "residual, solved",
            "target": f"<= {best:.3g}, that of the best fit",
            "measured": rows["solved"]["residual"],
            "holds": rows["solved"]["residual"] <= best,
        },
        target("speed relative to the fit", ">= 100", speedup, digits=1),
    ]
    result = {
        "command": "python benchmarks/gms_fit.py",
        "shape": list(SHAPE),
        "iterations": PAPER_ITERATIONS,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": version("torch"),
        "rows": rows,
        "targets": targets,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, row in rows.items():
        print(f"{name}: residual {row['residual']:.2e}, {1e3 * statistics.median(row['seconds']):.2f} ms")
    for each in targets:
        print(f"{each['name']}: {each['measured']:.3g} ({each['target']})")


if __name__ == "__main__":
    main()
