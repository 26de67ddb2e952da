"""Training objectives: what M draws of the prediction are compared with the target by.

All take ``predictions`` (B, M, C, H, W), one for each draw of eta, and ``target`` (B, C, H, W), and return (B,) losses in
float32 or better. All act in the space of the prediction; for v that is the distance of x_0 from its prediction over s_t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

OBJECTIVES = ("mse", "energy")
EPSILON = 1e-8
"""Under the square root of squared distances per number: its gradient stays finite where two draws agree."""


def objective(
    name: str, beta: float = 1.0, diversity: float = 1.0, patches: Sequence[int] = (0,)
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The objective called ``name``, as a function of (predictions, target)."""
    if name == "mse":
        return mse
    if name == "energy":
        return lambda predictions, target: energy(predictions, target, beta, diversity, patches)
    raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, found {name!r}")


def mse(predictions: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The paper's loss (SMD, arXiv 2309.14068): mean over draws and numbers of (prediction - target)^2.

    eta is independent of the target given x_t, so the minimiser is the posterior mean for every eta: it collapses to a
    Gaussian model. It is here for comparison, and for Gaussian models.
    """
    return (exact(predictions) - exact(target).unsqueeze(1)).square().flatten(1).mean(dim=1)


def energy(
    predictions: torch.Tensor,
    target: torch.Tensor,
    beta: float = 1.0,
    diversity: float = 1.0,
    patches: Sequence[int] = (0,),
) -> torch.Tensor:
    """Energy score of the draws p_j for the target y (De Bortoli et al., arXiv 2502.02483):

        1/M sum_j d(y, p_j) - diversity / (2 M (M - 1)) sum_{j != k} d(p_j, p_k),     d(a, b) = rms(a - b)^beta

    Strictly proper for 0 < beta < 2 and diversity = 1: only the true conditional distribution minimises it. The root mean
    square is taken over the whole picture (patch size 0) or over every n x n patch, then averaged over patches; several
    sizes are averaged. A sum of proper scores is proper, and with the whole picture among them strictly so.

    Args:
        beta: exponent of the distance.
        diversity: lambda of the paper, in [0, 1]; with 0 it is the distance alone.
        patches: sides of the patches the distance is taken over, 0 for the whole picture.
    """
    predictions, target = exact(predictions), exact(target)
    draws = predictions.shape[1]
    if draws < 2:
        raise ValueError(f"draws: expected at least 2 for the energy score, found {draws}")
    first, second = torch.triu_indices(draws, draws, offset=1, device=predictions.device)
    to_target = distance(predictions, target.unsqueeze(1).expand_as(predictions), beta, patches).mean(dim=1)
    between = distance(predictions[:, first], predictions[:, second], beta, patches).mean(dim=1)
    return to_target - 0.5 * diversity * between


def exact(x: torch.Tensor) -> torch.Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def distance(a: torch.Tensor, b: torch.Tensor, beta: float, patches: Sequence[int]) -> torch.Tensor:
    """d(a, b) for (B, M, C, H, W) pairs -> (B, M), averaged over patch sizes."""
    squared = (a - b).square().mean(dim=2)  # (B, M, H, W), mean over channels
    total = 0.0
    for side in patches:
        if side == 0:
            means = squared.mean(dim=(2, 3), keepdim=True)
        else:
            means = F.avg_pool2d(squared, min(side, *squared.shape[2:]), stride=1)
        total = total + (means + EPSILON).pow(0.5 * beta).mean(dim=(2, 3))
    return total / len(patches)
