"""The ring of eight modes, sampled in a few steps: with the exact posterior, its mean, and a trained mixture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from gmm_cells import Budget, components
from gmm_data import Problem
from gmm_training import train

from drawing.style import EXACT, GAUSSIAN, INK, MIXTURE, save, styled
from ldm_smd.diffusion.gaussian_mixture import GaussianMixture

STEPS = 3
POINTS, DRAWS, MODES = 1500, 150, 10
PLACE = (0.55, 0.35)
"""x_t of the last column, between modes."""
Draw = Callable[[torch.Tensor, int], torch.Tensor]
"""x_t (N, D), t -> a draw or a prediction of x_0 for each, (N, D)."""


def posterior(problem: Problem, x_t: torch.Tensor, t: int) -> GaussianMixture:
    a, s = (float(each) for each in problem.process.signal_and_noise(torch.tensor([t]), torch.zeros(1)))
    return problem.normalised.posterior(x_t.double(), a, s)


def denoisers(problem: Problem, updates: int, generator: torch.Generator) -> dict[str, tuple[str, Draw]]:
    """What each row of the figure puts in the place of x_0, with its colour. A Gaussian model that has learned all it can
    predicts the exact posterior's mean."""
    network = train(problem, components(MODES), Budget(updates), seeds=1)

    def exact(x_t: torch.Tensor, t: int) -> torch.Tensor:
        return posterior(problem, x_t, t).sample(1, generator)[:, 0].float()

    def mean(x_t: torch.Tensor, t: int) -> torch.Tensor:
        return posterior(problem, x_t, t).mean().float()

    @torch.no_grad()
    def mixture(x_t: torch.Tensor, t: int) -> torch.Tensor:
        return problem.draw(network, x_t[None], t, 1, generator)[0]

    return {
        "exact posterior": (EXACT, exact),
        "Gaussian model\n(its optimum)": (GAUSSIAN, mean),
        "mixture\n(trained)": (MIXTURE, mixture),
    }


def ring(path: Path, updates: int = 3000) -> Path:
    """Draw it: a column for the noise and for every step, and one for the x_0 of a single x_t after the first."""
    problem, generator = Problem("ring of 8", STEPS), torch.Generator().manual_seed(0)
    rows = denoisers(problem, updates, generator)
    noise = torch.randn(POINTS, 2, generator=generator)
    with styled():
        figure, axes = plt.subplots(len(rows), STEPS + 2, figsize=(2.1 * (STEPS + 2), 2.1 * len(rows)))
        for line, (name, (colour, draw)) in zip(axes, rows.items()):
            x = noise
            line[0].set_ylabel(name)
            scatter(line[0], x, colour)
            for column, t in enumerate(range(STEPS - 1, -1, -1), start=1):
                x = problem.step(x, draw(x, t), t, generator)
                scatter(line[column], x, colour)
            x_t = torch.tensor(PLACE).expand(DRAWS, 2)
            line[-1].plot(*problem.normalised.means.T, "o", mfc="none", mec=INK, ms=7, mew=0.8)
            line[-1].plot(*PLACE, "x", color=INK, ms=8, mew=2)
            scatter(line[-1], draw(x_t, STEPS - 2), colour, size=10)
        titles = ["noise", *(f"after step {step}" for step in range(1, STEPS + 1)), "clean x for the cross"]
        for axis, title in zip(axes[0], titles):
            axis.set_title(title, fontsize=11)
        for axis in axes.flat:
            axis.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), xticks=[], yticks=[], aspect="equal")
            axis.spines[:].set(visible=True, alpha=0.5)
        figure.tight_layout(pad=0.4)
        return save(figure, path)


def scatter(axis: plt.Axes, points: torch.Tensor, colour: str, size: float = 2.0) -> None:
    """Points as an image inside the SVG: thousands of them as shapes would be a megabyte."""
    axis.scatter(*points.T, s=size, color=colour, linewidths=0, alpha=0.8, rasterized=True)
