"""The nearest training picture, in pixels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

CANDIDATES = 16
SEARCHED, COMPARED = 128, 2048
"""Pictures at a time."""
BY_PRODUCTS = "use_mm_for_euclid_dist"


class NearestPicture:
    """Finds distances to the nearest of some pictures, exactly.

    Args:
        pictures: uint8 (N, 3, H, W), H and W even.
    """

    def __init__(self, pictures: torch.Tensor, device: torch.device) -> None:
        self.pictures, self.device = pictures.to(device), device
        self._small = torch.cat([small(self._values(part)) for part in self.pictures.split(SEARCHED)])

    def __call__(self, pixels: torch.Tensor, itself: bool = False) -> torch.Tensor:
        """Root mean square, over colours and pixels in [0, 1], of the difference to the nearest picture; to the second nearest
        where ``pixels`` are some of the pictures and ``itself`` does not count. uint8 (M, 3, H, W) -> (M,).

        With S the mean over squares of 2 x 2 pixels,

            |a - b|^2 >= 4 |S a - S b|^2,

        so the nearest among the candidates by small pictures is right where the last candidate is by this bound not nearer; the
        other rows are compared with all pictures at full size.
        """
        wanted = 2 if itself else 1
        parts = [self._among_candidates(rows.to(self.device), wanted) for rows in pixels.split(SEARCHED)]
        found, least = (torch.cat(values) for values in zip(*parts))
        unsure = (found > least).cpu()
        if unsure.any():
            found[unsure.to(self.device)] = self._among_all(pixels[unsure].to(self.device), wanted)
        return found.cpu() / math.sqrt(pixels[0].numel())

    def _among_candidates(self, rows: torch.Tensor, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Distance to the ``wanted``-th nearest candidate, and the bound for all others, (m,) each."""
        bounds = 2.0 * torch.cdist(small(self._values(rows)), self._small, compute_mode=BY_PRODUCTS)
        least, candidates = bounds.topk(min(CANDIDATES, bounds.shape[1]), dim=1, largest=False)
        near = self.pictures[candidates.flatten()].view(*candidates.shape, -1).float()
        found = torch.linalg.vector_norm(near.sub_(rows.flatten(1)[:, None]), dim=2) / 255.0
        last = least[:, -1] if bounds.shape[1] > CANDIDATES else torch.full_like(least[:, -1], torch.inf)
        return found.kthvalue(wanted, dim=1).values, last

    def _among_all(self, rows: torch.Tensor, wanted: int) -> torch.Tensor:
        values = self._values(rows).flatten(1)
        parts = [
            torch.cdist(values, self._values(part).flatten(1), compute_mode=BY_PRODUCTS)
            .topk(wanted, dim=1, largest=False)
            .values
            for part in self.pictures.split(COMPARED)
        ]
        return torch.cat(parts, dim=1).kthvalue(wanted, dim=1).values

    @staticmethod
    def _values(pixels: torch.Tensor) -> torch.Tensor:
        """In [-1/2, 1/2]: around 0 products lose the fewest digits."""
        return pixels.float() / 255.0 - 0.5


def small(values: torch.Tensor) -> torch.Tensor:
    """Means over squares of 2 x 2 pixels, (N, 3 H W / 4)."""
    return F.avg_pool2d(values, 2).flatten(1)
