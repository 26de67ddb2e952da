"""The progress bar of every tool, in images."""

from __future__ import annotations

from tqdm import tqdm


def progress(total: int, done: int, description: str, disable: bool = False, unit: str = "img") -> tqdm:
    """Make a progress bar that counts images, or another unit, and shows the rate and the remaining time."""
    return tqdm(total=total, initial=done, desc=description, unit=unit, disable=disable, dynamic_ncols=True)
