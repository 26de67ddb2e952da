"""The progress bar of every tool, in images."""

from __future__ import annotations

from tqdm import tqdm


def progress(total_images: int, images_seen: int, description: str, disable: bool = False) -> tqdm:
    """Make a progress bar that counts images and shows the rate in images/s and the remaining time."""
    return tqdm(total=total_images, initial=images_seen, desc=description, unit="img", disable=disable, dynamic_ncols=True)
