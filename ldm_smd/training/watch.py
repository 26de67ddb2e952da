"""Monitors the losses of a distillation and warns if it fails."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

LEAST, MOST = 0.5, 2.0
"""Normal range of the critic's error over the teacher's, on the same draws and noise. Usual values are 0.8 to 1.1."""
REPORTS = 3
"""Warn after this many consecutive reports outside the range. A single report may have few images."""
FAR = "the draws are far from the teacher's", "the mixture has collapsed or diverged; lower learning_rate"
LOST = "the critic does not follow the draws", "raise objective.distillation.critic_updates"


class CriticWatch:
    """Warns if the critic is far better or far worse than the teacher at denoising the mixture's draws.

    Far better: the draws do not look like data. This happens when the mixture has collapsed, because its draws are then a
    function of x_t, which the critic sees. Far worse: the critic does not follow the draws.
    """

    def __init__(self) -> None:
        self.outside, self.warned = 0, False

    def ratio(self, values: dict[str, float]) -> dict[str, float]:
        """Return {"critic_ratio": ...} for the means of a report, or {} without a critic. Warns once."""
        if not {"critic_loss", "teacher_loss"} <= values.keys():
            return {}
        found = values["critic_loss"] / max(values["teacher_loss"], 1e-12)
        self.outside = 0 if LEAST <= found <= MOST else self.outside + 1
        if self.outside >= REPORTS and not self.warned:
            self.warned = True
            what, advice = FAR if found < LEAST else LOST
            logger.warning(
                "%s: the critic's error is %.2f times the teacher's (usually 0.8 to 1.1); %s",
                what,
                found,
                advice,
            )
        return {"critic_ratio": found}
