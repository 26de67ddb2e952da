"""Maps an objective to its learner."""

from __future__ import annotations

from collections.abc import Callable

from .distillation import Distillation
from .regression import PosteriorRegression
from .run import Run
from .step import Denoising, Learner


def learner_for(run: Run) -> Learner:
    """Make the learner for the objective of a run."""
    kinds: dict[str, Callable[[Run], Learner]] = {"distillation": Distillation, "regression": PosteriorRegression}
    return kinds.get(run.config.objective.name, Denoising)(run)
