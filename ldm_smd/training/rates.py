"""Learning rates as a function of the share of the training that is done."""

import math


def warmup_cosine(peak: float, done: float, warmup: float) -> float:
    """Linear up to ``peak`` over the first ``warmup`` of the training, then a half cosine to zero; done in [0, 1]."""
    return peak * done / warmup if done < warmup else peak * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
