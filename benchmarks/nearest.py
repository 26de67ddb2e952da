"""Distances to the nearest training image in pixels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

CANDIDATES = 16
SEARCHED, COMPARED = 128, 2048
"""Images per block, of the queries and of the training images."""
BY_PRODUCTS = "use_mm_for_euclid_dist"


class NearestImage:
    """Exact distances to the nearest one of a set of images.

    Args:
        images: uint8 (N, 3, H, W), H and W even.
    """

    def __init__(self, images: torch.Tensor, device: torch.device) -> None:
        self.images, self.device = images.to(device), device
        self._small = torch.cat([small(self._values(part)) for part in self.images.split(SEARCHED)])

    def __call__(self, pixels: torch.Tensor, exclude_self: bool = False) -> torch.Tensor:
        """Return the root mean square difference, over colours and pixels in [0, 1], to the nearest image.

        With S the mean over squares of 2 x 2 pixels,

            |a - b|^2 >= 4 |S a - S b|^2,

        so it is enough to compare with a few candidates, the nearest images by this bound, if the distance found is at most the
        bound of the last candidate. Other rows are compared with all images at full size.

        Args:
            pixels: uint8 (M, 3, H, W).
            exclude_self: for ``pixels`` that are among the images: return the distance to the second nearest.

        Returns:
            Distances (M,).
        """
        k = 2 if exclude_self else 1
        parts = [self._among_candidates(rows.to(self.device), k) for rows in pixels.split(SEARCHED)]
        found, bound = (torch.cat(values) for values in zip(*parts))
        uncertain = (found > bound).cpu()
        if uncertain.any():
            found[uncertain.to(self.device)] = self._among_all(pixels[uncertain].to(self.device), k)
        return found.cpu() / math.sqrt(pixels[0].numel())

    def _among_candidates(self, rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the distance to the k-th nearest candidate, and the lower bound for all other images, (m,) each."""
        bounds = 2.0 * torch.cdist(small(self._values(rows)), self._small, compute_mode=BY_PRODUCTS)
        smallest, candidates = bounds.topk(min(CANDIDATES, bounds.shape[1]), dim=1, largest=False)
        near = self.images[candidates.flatten()].view(*candidates.shape, -1).float()
        found = torch.linalg.vector_norm(near.sub_(rows.flatten(1)[:, None]), dim=2) / 255.0
        last = smallest[:, -1] if bounds.shape[1] > CANDIDATES else torch.full_like(smallest[:, -1], torch.inf)
        return found.kthvalue(k, dim=1).values, last

    def _among_all(self, rows: torch.Tensor, k: int) -> torch.Tensor:
        values = self._values(rows).flatten(1)
        parts = [
            torch.cdist(values, self._values(part).flatten(1), compute_mode=BY_PRODUCTS).topk(k, dim=1, largest=False).values
            for part in self.images.split(COMPARED)
        ]
        return torch.cat(parts, dim=1).kthvalue(k, dim=1).values

    @staticmethod
    def _values(pixels: torch.Tensor) -> torch.Tensor:
        """Scale to [-1/2, 1/2], because products lose the fewest digits around 0."""
        return pixels.float() / 255.0 - 0.5


def small(values: torch.Tensor) -> torch.Tensor:
    """Average over squares of 2 x 2 pixels: (N, 3, H, W) -> (N, 3 H W / 4)."""
    return F.avg_pool2d(values, 2).flatten(1)
