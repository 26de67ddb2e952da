"""Which learner an objective has."""

from __future__ import annotations

from .distillation import Distillation
from .run import Run
from .step import Denoising, Learner


def learner_for(run: Run) -> Learner:
    """Choose by the objective."""
    return Distillation(run) if run.config.objective.name == "distillation" else Denoising(run)
