"""What is trained on what: the models of the Gaussian mixture lab, and the cells of each of its parts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gmm_data import DATA

ALL_STEPS = (2, 5, 10, 50, 100, 500)


@dataclass(frozen=True)
class Model:
    """One way to model the step and to train it."""

    name: str
    objective: str = "energy"
    draws: int = 4
    beta: float = 0.25
    bandwidth: float = 0.15
    components: int = 1
    """K > 1: a discrete part of z; then ``draws`` are of each component."""
    mixture: bool = True
    frozen: bool = False
    """z is frozen: eta is 0, so that the mixture's layers are there and the mixture is not."""


@dataclass(frozen=True)
class Budget:
    updates: int
    batch: int = 128
    learning_rate: float = 4e-3


GAUSSIAN = Model("Gaussian", "mse", 1, mixture=False)
PAPER = Model("SMD, squared error (the paper)", "mse", 1)
FROZEN = Model("SMD, z frozen", "mse", 1, frozen=True)
SMD = Model("SMD, energy, beta 0.25, M = 4")
SWEEP, SHORT = Budget(1200, learning_rate=2e-3), Budget(1500, learning_rate=2e-3)


def components(count: int) -> Model:
    return Model(f"SMD, energy, beta 0.25, {count} components", draws=2, components=count)


OBJECTIVES = (
    GAUSSIAN,
    PAPER,
    FROZEN,
    *(replace(PAPER, name=f"SMD, squared error, M = {m}", draws=m) for m in (5, 10, 20)),
    *(Model(f"SMD, mixture NLL, M = {m}", "mixture_nll", m) for m in (5, 10, 20)),
    *(Model(f"SMD, energy, beta {beta:g}, M = 5", draws=5, beta=beta) for beta in (1.0, 0.5)),
    *(Model(f"SMD, energy, beta 0.25, M = {m}", draws=m) for m in (2, 5, 10, 20)),
    components(10),
)
# For the targets: components, a few more than the data have modes; and small batches where components are many. The grid has
# 12,000 updates: with 3,000 its 25 modes' shares were off by as much again as those of 20,000 samples are by chance.
TARGETS = {
    ("ring of 8", 2): (components(10), Budget(2000)),
    ("ring of 8", 5): (components(10), Budget(3000)),
    ("5x5 grid", 5): (components(28), Budget(12_000, batch=64)),
    ("mixture in 64-D", 5): (components(20), Budget(5000, batch=32, learning_rate=5e-3)),
    ("one Gaussian", 5): (components(2), Budget(2000)),
}


def cells(part: str) -> list[tuple[str, int, Model, Budget]]:
    """(data, T, model, budget) of one part of the benchmark."""
    if part == "quick":
        return [("ring of 8", 2, model, Budget(1500)) for model in (GAUSSIAN, PAPER, SMD, components(10))]
    if part == "targets":
        return [
            cell
            for (name, steps), (model, budget) in TARGETS.items()
            for cell in (
                # An update of the Gaussian costs a tenth: it gets four times the points, and the rate that suits it.
                (name, steps, GAUSSIAN, replace(budget, batch=4 * budget.batch, learning_rate=2e-3)),
                (name, steps, model, budget),
            )
        ]
    if part == "objectives":
        # At T = 5 only some: the others cost as much and say the same.
        few = [model for model in OBJECTIVES if model.draws in (1, 5) or model.components > 1]
        return [("ring of 8", T, model, SHORT) for T, models in ((2, OBJECTIVES), (5, few)) for model in models]
    return [(name, T, model, SWEEP) for T in ALL_STEPS for name in DATA for model in (GAUSSIAN, SMD)]
