"""Compares the code of this checkout with that of another one on the shipped UNets: predictions, gradients and speed.

The two take turns. A training step is a forward and a backward pass with 4 draws of the mixture; a sampling step is a forward
pass with one draw.

    git worktree add ../before v0.1
    python benchmarks/against.py ../before

Writes benchmarks/results/against.json.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from targets import target

from ldm_smd.models.unet import SMDUNet2DModel

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/against.json"
SHIPPED = ("unet-emoji-smd", "unet-emoji-256-gaussian", "unet-emoji-vanilla")
SIDES, BATCH, DRAWS, ROUNDS = (8, 16), 8, 4, 40


def other_class(checkout: Path) -> type[SMDUNet2DModel]:
    """Load SMDUNet2DModel from another checkout, under another package name."""
    package = checkout.resolve() / "ldm_smd"
    spec = importlib.util.spec_from_file_location(
        "ldm_before", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    if spec is None or spec.loader is None or not package.is_dir():
        sys.exit(f"checkout: expected a folder with ldm_smd, found {checkout}")
    sys.modules["ldm_before"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["ldm_before"])
    return importlib.import_module("ldm_before.models.unet").SMDUNet2DModel


def timed_step(model: SMDUNet2DModel, inputs: tuple[torch.Tensor, ...], trains: bool) -> tuple[float, torch.Tensor]:
    """Return the processor time of one step, and its result: a gradient in training, else a prediction."""
    x, t, labels, eta = inputs
    started = time.process_time()
    with torch.set_grad_enabled(trains):
        prediction = model(x, t, labels, eta).sample
        if trains:
            prediction.square().mean().backward()
    taken = time.process_time() - started
    if not trains:
        return taken, prediction
    gradient = model.conv_in.weight.grad.clone()
    model.zero_grad()
    return taken, gradient


def compare(name: str, before: type[SMDUNet2DModel], side: int, trains: bool) -> dict:
    """Return the speed relative to the other checkout (median over rounds) and the largest difference of the results."""
    models = [cls.from_pretrained(ROOT / "checkpoints" / name) for cls in (before, SMDUNet2DModel)]
    generator = torch.Generator().manual_seed(0)
    draws = DRAWS if trains else 1
    x, eta = (torch.randn(rows, 16, side, side, generator=generator) for rows in (BATCH, BATCH * draws))
    inputs = (x, torch.arange(BATCH) * 120, torch.arange(BATCH) % models[0].config.num_classes, eta)
    ratios, difference = [], 0.0
    for number in range(ROUNDS):
        order = (0, 1) if number % 2 else (1, 0)
        found = {index: timed_step(models[index], inputs, trains) for index in order}
        ratios.append(found[0][0] / found[1][0])
        difference = max(difference, float((found[0][1] - found[1][1]).abs().max() / found[0][1].abs().max()))
    return {
        "network": name,
        "side": side,
        "step": "training" if trains else "sampling",
        "speed": round(statistics.median(ratios[2:]), 4),
        "quartiles": [round(value, 4) for value in statistics.quantiles(ratios[2:], n=4)],
        "largest_difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of another checkout")
    before = other_class(parser.parse_args().checkout)
    git = ["git", "-C", parser.parse_args().checkout, "rev-parse", "--short", "HEAD"]
    cases = [compare(name, before, side, trains) for name in SHIPPED for side in SIDES for trains in (True, False)]
    targets = [target(f"{c['network']}, {c['step']}, {c['side']}x{c['side']}", ">= 0.97", c["speed"]) for c in cases]
    worst = max(case["largest_difference"] for case in cases)
    targets.append(target("largest relative difference of predictions and gradients", "<= 1e-4", worst, digits=8))
    result = {
        "command": "python benchmarks/against.py ../before",
        "before": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "threads": torch.get_num_threads(),
        "cases": cases,
        "targets": targets,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for each in targets:
        print(f"{each['name']}: {each['measured']} ({each['target']})")


if __name__ == "__main__":
    main()
