"""What may differ between processors, numbers of threads, batch sizes and places in memory: the rounding of floats."""

import torch


def alike(found: torch.Tensor, expected: torch.Tensor, share: float = 1e-4) -> bool:
    """Equal but for rounding: no number is off by more than ``share`` of the largest.

    One evaluation of a tiny network by other kernels is off by 1e-6 of it; a sampling, whose steps add up, by up to 1e-5.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return bool((found - expected).abs().max() <= share * expected.abs().max())
