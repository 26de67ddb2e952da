"""Tables, targets and a plot of a contest."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial
from itertools import cycle, product
from pathlib import Path

import matplotlib.pyplot as plt
from targets import target
from yardstick import plain_log_ticks

NOISE, DRAFTS = "steps", "steps_from_drafts"
TO_IMAGES, TO_RECONSTRUCTIONS = "frechet", "frechet_reconstructed"
REFERENCES = {TO_IMAGES: "training images", TO_RECONSTRUCTIONS: "training images that were encoded and decoded"}
OURS, WHITE, AFTER, START = "distillation", "distillation-iid", "energy-distillation", "Gaussian start"
TRAINED = "gaussian", "gaussian-guided"
"""The Gaussian model trained further with the denoising loss, for the same time, and the same with guidance."""
SHIPPED = "checkpoints/unet-emoji-smd"
COMPARED_STEPS = (1, 2, 4, 8)
"""Numbers of steps at which methods are compared with the best rival."""
Cell = Callable[[dict], float]


def first_frechet(cell: dict) -> float:
    """Return the Frechet distance to training images in the first feature network."""
    return next(iter(cell["features"].values()))["frechet"]


def of_network(network: str, measure: str = "frechet") -> Cell:
    """Return a function that reads a measure in one network from a cell."""
    return lambda cell: cell["features"][network][measure]


class Row:
    """Results of all seeds of one method with one set of settings.

    Attributes:
        name: the method, the folder of a model from elsewhere, or the scheduler of the initial Gaussian model.
        images: cost of the training, in images of the denoising loss; 0 if nothing was trained for the contest.
        title: the name and, if it has several rows, the settings that they do not share.
    """

    def __init__(self, results: list[dict]) -> None:
        first = results[0]
        self.results, self.settings, self.images, self.cost = results, first["settings"], first["images"], first["cost"]
        self.name = first["method"]
        if not self.images:
            from_folder = self.name == "folder"
            self.name = self.settings["folder"] if from_folder else f"{START}, {self.settings.get('scheduler', 'UniPC')}"
        self.title = self.name

    def values(self, start: str, steps: int | str, cell: Cell) -> list[float]:
        return [cell(each[start][str(steps)]) for each in self.results if str(steps) in each.get(start, {})]

    def mean(self, start: str, steps: int | str, cell: Cell) -> float:
        """Return the mean over seeds, or infinity if it was not measured."""
        values = self.values(start, steps, cell)
        return statistics.mean(values) if values else float("inf")

    def counts(self, start: str) -> list[int]:
        return sorted({int(steps) for each in self.results for steps in each.get(start, {})})

    def text(self, start: str, steps: int | str, cell: Cell) -> str:
        values = self.values(start, steps, cell)
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}" if values else ""


def rows_of(results: list[dict]) -> list[Row]:
    groups: dict[str, list[dict]] = {}
    for result in results:
        if not result.get("failed"):
            key = f"{result['method']} {json.dumps(result['settings'], sort_keys=True)} {result['images']}"
            groups.setdefault(key, []).append(result)
    rows = [Row(group) for group in groups.values()]
    for row in rows:
        named = [other.settings for other in rows if other.name == row.name]
        own = {name: value for name, value in row.settings.items() if any(other.get(name) != value for other in named)}
        row.title = ", ".join([row.name, *(f"{name}={value}" for name, value in own.items())])
    return rows


def networks_of(rows: list[Row]) -> list[str]:
    return list(next(iter(rows[0].results[0][NOISE].values()))["features"])


def references_of(rows: list[Row]) -> list[str]:
    """Return the images that all results were compared with, as names of measures."""
    cells = [cell["features"] for row in rows for each in row.results for cell in each[NOISE].values()]
    return [name for name in REFERENCES if all(name in measures for cell in cells for measures in cell.values())]


def tables(content: dict) -> list[str]:
    """Format as Markdown a table for each feature network, one for recall and copies, and one for the search."""
    lines: list[str] = []
    rows = rows_of(content["contest"])
    if rows:
        noise, drafts = (sorted({n for row in rows for n in row.counts(start)}) for start in (NOISE, DRAFTS))
        head = ["method", "cost of a step", "images", "seeds", *(f"{n}" for n in noise), *(f"{n}, drafts" for n in drafts)]
        for network, reference in product(networks_of(rows), references_of(rows)):
            cell = of_network(network, reference)
            lines += [
                "",
                f"{content['name']}: Frechet distance to {REFERENCES[reference]}, in the features of `{network}`, by number of "
                f"network evaluations, from noise and from drafts; mean ± standard deviation over training seeds, "
                f"{content['samples']} samples. Every training costs as much as {content['budget']:,} images of the denoising "
                "loss. The cost of a step is per image and relative to the denoising loss.",
                "",
                *table(head, [[*about(row), *distances(row, noise, drafts, cell)] for row in rows]),
            ]
            if content.get("reconstructed"):
                lines += ["", f"Held-out images that were encoded and decoded: {cell(content['reconstructed']):.2f}"]
        lines += diversity(rows, networks_of(rows))
    if content["search"]:
        searched = rows_of(content["search"])
        counts = sorted({n for row in searched for n in row.counts(NOISE)})
        settings = [[row.name, settings_text(row), *distances(row, counts, [], first_frechet)] for row in searched]
        lines += ["", "Search of settings, best first, one seed each:", ""]
        lines += table(["method", "settings", *(f"{n}" for n in counts)], settings)
    return lines


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)]


def about(row: Row) -> list[str]:
    trained = f"{row.results[0]['trained_images']:,}" if row.images else ""
    return [row.title, f"{row.cost:.2f}" if row.images else "", trained, str(len(row.results)) if row.images else ""]


def settings_text(row: Row) -> str:
    return ", ".join(f"{name}={value}" for name, value in row.settings.items()) or "default"


def distances(row: Row, noise: list[int], drafts: list[int], cell: Cell) -> list[str]:
    return [row.text(start, n, cell) for start, counts in ((NOISE, noise), (DRAFTS, drafts)) for n in counts]


def diversity(rows: list[Row], networks: list[str]) -> list[str]:
    """Format recall, coverage and copies at four evaluations from noise and one from drafts."""
    lines = [
        "",
        "Recall in both networks, coverage in the first network, and copies: the fraction of samples within a root mean ",
    ]
    lines[-1] += "square distance of 0.1 of a training image. Four evaluations from noise, then one from drafts."
    head = ["method"]
    for start in ("noise, 4", "drafts, 1"):
        head += [f"recall ({start})", "coverage", "copies"]
    found = []
    for row in rows:
        cells = [row.title]
        for start, steps in ((NOISE, 4), (DRAFTS, 1)):
            recall = " / ".join(row.text(start, steps, of_network(network, "recall")) for network in networks)
            coverage = row.text(start, steps, of_network(networks[0], "coverage"))
            cells += [recall, coverage, row.text(start, steps, lambda cell: cell["copies"])]
        found.append(cells)
    return [*lines, "", *table(head, found)]


def targets(content: dict) -> list[dict]:
    """Check the targets for which there are results: from noise alone, and from noise or drafts, whichever is better; with
    distances to training images and, if measured, to those that were encoded and decoded."""
    rows = rows_of(content["contest"])
    by_name = {row.name: row for row in reversed(rows)}  # the best settings of a method come first
    untrained = [row for row in rows if row.name.startswith(START)]
    gaussians = [*untrained, *(row for row in rows if row.name in TRAINED)]
    rivals = [row for row in rows if row.images and row.name not in (OURS, WHITE, AFTER)]
    trained = [name for name in (OURS, AFTER) if name in by_name]
    ours = [name for name in (*trained, SHIPPED) if name in by_name]
    found: list[dict] = []
    for network, reference in product(networks_of(rows), references_of(rows)) if gaussians else []:
        cell = of_network(network, reference)
        measured = f"`{network}`{', to reconstructions' if reference == TO_RECONSTRUCTIONS else ''}"
        for start, starts in (("noise", [NOISE]), ("either start", [NOISE, DRAFTS])):
            where = f"{measured}, {start}"
            best = partial(lowest, starts=starts, cell=cell)
            gaussian = min(best(row, n) for row in gaussians for each in starts for n in row.counts(each))
            for name in ours:
                for steps, wanted in ((4, "<= 0.55"), (2, "<= 0.8"), (1, "<= 1")):
                    ratio = best(by_name[name], steps) / gaussian
                    found.append(target(f"{name}, {steps} steps / Gaussian at any, {where}", wanted, ratio))
            for name in trained if rivals else ():
                ratios = {
                    n: at_most(best, by_name[name], n) / min(at_most(best, row, n) for row in rivals) for n in COMPARED_STEPS
                }
                found += [
                    target(f"{name}, at most {n} steps / best rival, {where}", "<= 1", ratio) for n, ratio in ratios.items()
                ]
                third = sorted(ratios.values())[2]
                found.append(target(f"{name} / best rival, third lowest of the four ratios, {where}", "<= 0.9", third))
        for name in ours:
            ratio = by_name[name].mean(NOISE, 16, cell) / by_name[name].mean(NOISE, 4, cell)
            found.append(target(f"{name}, 16 steps / 4 steps, {measured}, noise", "<= 1.05", ratio))
        if WHITE in by_name:
            ratio = by_name[WHITE].mean(NOISE, 1, cell) / min(row.mean(NOISE, 1, cell) for row in untrained)
            found.append(target(f"{WHITE}, 1 step / Gaussian, 1 step, {measured}, noise", "<= 0.15", ratio))
        if reference == TO_IMAGES:
            found += recall_targets(by_name, gaussians, network)
    for name in trained:
        found.append(target(f"{name}, training step / denoising step", "<= 2.5", by_name[name].cost))
    return found


def lowest(row: Row, steps: int, starts: list[str], cell: Cell) -> float:
    return min(row.mean(start, steps, cell) for start in starts)


def at_most(best: Callable[[Row, int], float], row: Row, steps: int) -> float:
    """Return the lowest distance with at most this number of steps. A user of a method that more steps harm takes fewer."""
    return min(best(row, n) for n in COMPARED_STEPS if n <= steps)


def recall_targets(by_name: dict[str, Row], starts: list[Row], network: str) -> list[dict]:
    """Compare recall and coverage at 4 steps with those of the Gaussian model where its Frechet distance is lowest."""
    frechet = of_network(network)
    row, steps = min(
        ((row, n) for row in starts for n in row.counts(NOISE)), key=lambda each: each[0].mean(NOISE, each[1], frechet)
    )
    found = []
    for name in (OURS, AFTER, SHIPPED):
        for measure in ("recall", "coverage"):
            if name in by_name:
                cell = of_network(network, measure)
                difference = by_name[name].mean(NOISE, 4, cell) - row.mean(NOISE, steps, cell)
                title = f"{name}, 4 steps, {measure} - that of the best Gaussian, `{network}`"
                found.append(target(title, ">= -0.02", difference))
    return found


def draw(content: dict, path: Path) -> None:
    """Plot Frechet distances over network evaluations, with a panel for each feature network. Dashed lines are from drafts."""
    rows = rows_of(content["contest"])
    if not rows:
        return
    networks = networks_of(rows)
    figure, axes = plt.subplots(1, len(networks), figsize=(6.5 * len(networks), 5), squeeze=False)
    for axis, network in zip(axes[0], networks):
        cell = of_network(network)
        colours = cycle(f"C{index}" for index in range(10))
        for row in rows:
            colour = "0.6" if row.name.startswith(START) else next(colours)
            width = 2.5 if row.name in (OURS, AFTER, SHIPPED) else 1.0
            for start, style in ((NOISE, "-"), (DRAFTS, "--")):
                counts = row.counts(start)
                if counts:
                    values = [row.values(start, n, cell) for n in counts]
                    spread = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
                    label = row.title if start == NOISE else None
                    means = [statistics.mean(each) for each in values]
                    axis.errorbar(counts, means, spread, label=label, ls=style, color=colour, marker=".", lw=width)
        axis.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="Frechet distance", title=network)
        plain_log_ticks(axis.xaxis, axis.yaxis)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
