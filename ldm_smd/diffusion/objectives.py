"""Training objectives that compare M draws of the prediction with the target.

All take ``predictions`` (B, M, C, H, W), one per draw of eta, and ``target`` (B, C, H, W), and return losses (B,) in float32 or
better. They act in the space of the prediction; for v, an error is that of x_0 divided by s_t.

By default the M draws are independent. If the network predicts weights of K components, the M = K R draws are R per component,
in consecutive columns, and ``log_weights`` (B, K) are the log weights. Sums over components are then exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .process import GaussianPath, x0_per_prediction
from .settings import LOSSES

MIN_SNR_GAMMA = 5.0
EPSILON = 1e-8
"""Added to squared distances per element, so that the gradient of the root stays finite for equal draws."""


def objective(
    name: str, beta: float = 1.0, diversity: float = 1.0, patches: Sequence[int] = (0,), bandwidth: float = 0.2
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the objective called ``name``, as a function of (predictions, target)."""
    if name == "mse":
        return mse
    if name == "energy":
        return lambda predictions, target: energy(predictions, target, beta, diversity, patches)
    if name == "mixture_nll":
        return lambda predictions, target: mixture_nll(predictions, target, bandwidth, patches)
    raise ValueError(f"objective: expected one of {', '.join(LOSSES)}, found {name!r}")


def timestep_weight(weighting: str, exponent: float, path: GaussianPath, t: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """Return the weight of the loss at t, (B,), for a loss that is the ``exponent``-th power of the prediction error.

    A proper score stays proper under any positive weighting of t. "prediction" is 1. The others choose the space in which
    errors have equal weight, for any prediction type; with the error e_0 of x_0 they are

        v, epsilon, x0: e_0 / |dx_0 / dp| for that p,    min_snr: e_0 min(snr, 5)^(1/2)  (arXiv 2303.09556)

    For variance-preserving paths, the first three are e_0 / s_t, e_0 a_t / s_t and e_0.
    """
    a, s = path.signal_and_noise(t, t)
    if weighting == "prediction":
        return torch.ones_like(a)
    e_0 = x0_per_prediction(prediction_type, a, s).abs()  # per unit of the prediction error
    if weighting == "min_snr":
        return (e_0 * (a / s).clamp_max(MIN_SNR_GAMMA**0.5)) ** exponent
    space = {"v": "v_prediction", "epsilon": "epsilon", "x0": "sample"}[weighting]
    return (e_0 / x0_per_prediction(space, a, s).abs()) ** exponent


def mse(predictions: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The loss of SMD (arXiv 2309.14068): mean over draws and elements of (prediction - target)^2.

    eta is independent of the target given x_t, so the minimiser is the posterior mean for every eta: a mixture collapses to a
    Gaussian model. For Gaussian models, and for comparison.
    """
    return (exact(predictions) - exact(target).unsqueeze(1)).square().flatten(1).mean(dim=1)


def energy(
    predictions: torch.Tensor,
    target: torch.Tensor,
    beta: float = 1.0,
    diversity: float = 1.0,
    patches: Sequence[int] = (0,),
    log_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Energy score of the draws p_j for the target y (De Bortoli et al., arXiv 2502.02483):

        1/M sum_j d(y, p_j) - diversity / (2 M (M - 1)) sum_{j != k} d(p_j, p_k),     d(a, b) = rms(a - b)^beta

    and, with R draws p_kr per component and K components of weight w_k,

        sum_k w_k/R sum_r d(y, p_kr) - diversity/2 sum_{(k,r) != (l,q)} w_k w_l c_kl d(p_kr, p_lq)

    with c_kl = 1/R^2 for k != l and c_kk = 1/(R (R - 1)).

    It is strictly proper for 0 < beta < 2 and diversity = 1: only the true conditional distribution minimises it. The root mean
    square is taken over the whole image (patch size 0) or over every n x n patch, then averaged over patches and patch sizes. A
    sum of proper scores is proper, and strictly proper if the whole image is included.

    Args:
        beta: exponent of the distance. The score weights frequency f of the error of the distribution by |f|^-(D + beta). A
            smaller beta resolves sharper modes (benchmarks/gmm_lab.py), with noisier gradients.
        diversity: lambda of the paper, in [0, 1]; 0 leaves the distance to the target only.
        patches: sides of the patches for the distance, 0 for the whole image.
    """
    predictions, target = exact(predictions), exact(target)
    draws = predictions.shape[1]
    if draws < 2:
        raise ValueError(f"draws: expected at least 2 for the energy score, found {draws}")
    weights = component_weights(log_weights, predictions)
    components = weights.shape[1]
    repeats = draws // components  # R
    first, second = torch.triu_indices(draws, draws, offset=1, device=predictions.device)
    same = first // repeats == second // repeats
    if repeats == 1:  # no pairs within a component
        first, second, same = first[~same], second[~same], same[~same]
    pairs = torch.where(same, 1.0 / max(repeats * (repeats - 1), 1), 1.0 / repeats**2)
    to_target = distance(predictions, target.unsqueeze(1).expand_as(predictions), beta, patches)
    between = pair_distance(predictions, first, second, beta, patches)
    near = (weights.repeat_interleave(repeats, dim=1) * to_target).sum(dim=1) / repeats
    return near - diversity * (pairs * weights[:, first // repeats] * weights[:, second // repeats] * between).sum(dim=1)


def component_weights(log_weights: torch.Tensor | None, predictions: torch.Tensor) -> torch.Tensor:
    """Return the weights (B, K); a single component of weight 1 for None. Raises ValueError for a wrong shape."""
    if log_weights is None:
        return predictions.new_ones(len(predictions), 1)
    if len(log_weights) != len(predictions) or predictions.shape[1] % log_weights.shape[1]:
        raise ValueError(
            f"log_weights: expected (B, K) with B = {len(predictions)} and K a divisor of {predictions.shape[1]} draws, "
            f"found {tuple(log_weights.shape)}"
        )
    return exact(log_weights).exp()


def mixture_nll(
    predictions: torch.Tensor,
    target: torch.Tensor,
    bandwidth: float,
    patches: Sequence[int] = (0,),
    log_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Negative log likelihood of the target y under the mixture of M Gaussians around the draws p_j:

        - (2 h^2 / n) log( sum_j w_j exp( - |y - p_j|^2 / (2 h^2) ) ),    h = bandwidth, in units of the prediction,

    for the n elements of the image or patch (averaged over patches as in ``energy``). It is per element and up to a constant,
    and scaled so that h -> infinity gives the squared error. With the step's standard deviation as h, it is the likelihood of
    the SMD mixture. With few draws it is a bound, and in many dimensions a single draw takes all the weight.
    """
    predictions, target = exact(predictions), exact(target)
    draws, channels = predictions.shape[1:3]
    weights = component_weights(log_weights, predictions)
    repeats = draws // weights.shape[1]
    log_weight_per_draw = (weights / repeats).log().repeat_interleave(repeats, dim=1)[..., None, None]
    squared = (predictions - target.unsqueeze(1)).square().sum(dim=2)  # (B, M, H, W), sum over channels
    total = predictions.new_zeros(())
    for side in patches:
        sums, positions = patch_sums(squared, side)
        log_density = (log_weight_per_draw - sums / (2 * bandwidth**2)).logsumexp(dim=1)
        total = total - 2 * bandwidth**2 / (positions * channels) * log_density.mean(dim=(1, 2))
    return total / len(patches)


def exact(x: torch.Tensor) -> torch.Tensor:
    """Convert half precision to float32; leave float32 and float64."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def distance(a: torch.Tensor, b: torch.Tensor, beta: float, patches: Sequence[int]) -> torch.Tensor:
    """d(a, b) for (B, M, C, H, W) pairs -> (B, M), averaged over patch sizes."""
    squared = (a - b).square().mean(dim=2)  # (B, M, H, W), mean over channels
    total = a.new_zeros(())
    for side in patches:
        sums, positions = patch_sums(squared, side)
        total = total + (sums / positions + EPSILON).pow(0.5 * beta).mean(dim=(2, 3))
    return total / len(patches)


def pair_distance(
    predictions: torch.Tensor, first: torch.Tensor, second: torch.Tensor, beta: float, patches: Sequence[int]
) -> torch.Tensor:
    """Compute d between the draws ``first`` and ``second`` (P,) of each row -> (B, P), averaged over patch sizes."""
    total = predictions.new_zeros(())
    for side in patches:
        if side == 0:
            # All pairs at once, without storing their differences, which are M / 2 times larger than the draws.
            flat = predictions.flatten(2)
            distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")[:, first, second]
            total = total + (distances.square() / flat.shape[2] + EPSILON).pow(0.5 * beta)
        else:
            total = total + distance(predictions[:, first], predictions[:, second], beta, (side,))
    return total / len(patches)


def patch_sums(x: torch.Tensor, side: int) -> tuple[torch.Tensor, int]:
    """Sum (B, M, H, W) over every side x side window, or the whole for side 0. Also returns the positions per window."""
    height, width = (side, side) if side else x.shape[2:]
    kernel = (min(height, x.shape[2]), min(width, x.shape[3]))
    return F.avg_pool2d(x, kernel, stride=1, divisor_override=1), kernel[0] * kernel[1]
