"""What the losses of a distillation say about its mixture, while it trains."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

LEAST, MOST = 0.5, 2.0
"""Of the critic's error in the teacher's, on the same draws and noise: 0.8 to 1.1 where all is well."""
REPORTS = 3
"""One after another that are outside before it is said: one may have few images."""
FAR = "the draws are far from what the teacher makes", "the mixture has collapsed or diverged, lower learning_rate"
LOST = "the critic has lost the draws", "raise objective.distillation.critic_updates"


class CriticWatch:
    """A critic that is far better than the teacher knows what the teacher does not: draws that no data look like. It is so
    where the mixture has collapsed: its draws then follow from x_t, which the critic sees. A critic that is far worse has lost
    them."""

    def __init__(self) -> None:
        self.outside, self.warned = 0, False

    def ratio(self, values: dict[str, float]) -> dict[str, float]:
        """From the means of a report to what it logs beside them, nothing without a critic and a teacher; warns once."""
        if not {"critic_loss", "teacher_loss"} <= values.keys():
            return {}
        found = values["critic_loss"] / max(values["teacher_loss"], 1e-12)
        self.outside = 0 if LEAST <= found <= MOST else self.outside + 1
        if self.outside >= REPORTS and not self.warned:
            self.warned = True
            what, advice = FAR if found < LEAST else LOST
            logger.warning(
                "%s: on them the critic's error is %.2f of the teacher's, usual are 0.8 to 1.1; %s",
                what,
                found,
                advice,
            )
        return {"critic_ratio": found}
