"""Measures few-step models on Gaussian mixtures, whose posteriors are known exactly.

For every data set, number of steps T and model, three seeds of a small network are trained on the same samples. Then 20,000
samples (5,000 for T > 10) are compared with the data, and the one-step kernel p(x_s | x_t) with the exact q(x_s | x_t).

    python benchmarks/gmm_lab.py                 # all parts; over an hour on one core
    python benchmarks/gmm_lab.py --quick         # the ring at T = 2 with one seed, some minutes
    python benchmarks/gmm_lab.py --part targets  # one of: targets, objectives, sweep, distill

Writes benchmarks/results/gmm_lab-PART.json, .md and .png (gmm_lab-quick.* with --quick).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from gmm_cells import PARTS, Distilled, cells
from gmm_data import Problem
from gmm_distill import distil
from gmm_measures import measure
from gmm_models import parameters_per_model
from gmm_report import distill_targets, line, plot, plot_sweep, table, targets
from gmm_training import train

RESULTS = Path(__file__).parent / "results"
SEEDS = 3
MAX_PLOTTED = 8
CHECKS = {"targets": targets, "distill": distill_targets}


def run(part: str, seeds: int, resume: bool) -> None:
    """Train and measure every cell of a part; write the results and the plot."""
    path = RESULTS / f"gmm_lab-{part}.json"
    done = json.loads(path.read_text(encoding="utf-8"))["cells"] if resume and path.is_file() else []
    known = {(entry["data"], entry["T"], entry["model"], entry["updates"], entry["batch"]) for entry in done}
    trained = {}
    for name, steps, model, budget in cells(part):
        if (name, steps, model.name, budget.updates, budget.batch) in known:
            continue
        problem = Problem(name, steps)
        started = time.perf_counter()
        network = (distil if isinstance(model, Distilled) else train)(problem, model, budget, seeds)
        rows = measure(name, problem, network, time.perf_counter() - started)
        done.append(
            {
                "data": name,
                "T": steps,
                "model": model.name,
                "parameters": parameters_per_model(network),
                "updates": budget.updates,
                "batch": budget.batch,
                "measures": {key: [round(value, 5) for value in values] for key, values in rows.items()},
            }
        )
        print(line(done[-1]), flush=True)
        if problem.dimensions == 2 and part != "sweep" and model.objective != "mixture_nll" and len(trained) < MAX_PLOTTED:
            trained[(name, steps, model.name)] = (problem, network)
        write(part, seeds, done)
    if part == "sweep":
        plot_sweep(done, path.with_suffix(".png"))
    else:
        plot(trained, path.with_suffix(".png"))


def write(part: str, seeds: int, done: list[dict]) -> None:
    """Write the results so far, so that a crash loses one cell only."""
    RESULTS.mkdir(exist_ok=True)
    command = "python benchmarks/gmm_lab.py " + ("--quick" if part == "quick" else f"--part {part}")
    result = {
        "command": command,
        "seeds": seeds,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "models": sorted({entry["model"] for entry in done}),
        "cells": done,
        "targets": CHECKS[part](done) if part in CHECKS else [],
    }
    path = RESULTS / f"gmm_lab-{part}"
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(result), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the ring at T = 2, one seed")
    parser.add_argument("--part", choices=PARTS, help="part to run; default: all")
    parser.add_argument(
        "--resume", action="store_true", help="keep the cells of the result file, if it was made with the same code"
    )
    arguments = parser.parse_args()
    parts = ["quick"] if arguments.quick else [arguments.part] if arguments.part else PARTS
    for part in parts:
        run(part, 1 if arguments.quick else SEEDS, arguments.resume)


if __name__ == "__main__":
    main()
