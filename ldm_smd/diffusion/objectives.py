"""Training objectives, which compare M draws of the prediction with the target.

All take ``predictions`` (B, M, C, H, W), one for each draw of eta, and ``target`` (B, C, H, W), and return (B,) losses in
float32 or better. All act in the space of the prediction; for v that is the distance of x_0 from its prediction over s_t.

Where the mixture has K components with weights that the network gives, the M = K R draws are R of each component, a
component's in consecutive columns, and ``log_weights`` (B, K) are the weights' logarithms: the sums over components are then
exact, where independent draws would estimate them. One component of weight 1, the default, is M independent draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .process import GaussianPath, x0_per_prediction
from .settings import LOSSES

MIN_SNR_GAMMA = 5.0
EPSILON = 1e-8
"""Under the square root of squared distances per element: its gradient stays finite where two draws agree."""


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
    """What the loss at t is to be multiplied with, (B,), where it is the ``exponent``-th power of a prediction's error.

    A proper score stays proper under any positive weight of t. "prediction" is 1. The others say in which space the error
    counts, whatever the network predicts; with x_0's error e_0 they are

        v, epsilon, x0: e_0 / |dx_0 / dp| for that p,    min_snr: e_0 min(snr, 5)^(1/2)  (arXiv 2303.09556)

    the first three e_0 / s_t, e_0 a_t / s_t and e_0 where the path preserves variance.
    """
    a, s = path.signal_and_noise(t, t)
    if weighting == "prediction":
        return torch.ones_like(a)
    e_0 = x0_per_prediction(prediction_type, a, s).abs()  # for one unit of the prediction's error
    if weighting == "min_snr":
        return (e_0 * (a / s).clamp_max(MIN_SNR_GAMMA**0.5)) ** exponent
    space = {"v": "v_prediction", "epsilon": "epsilon", "x0": "sample"}[weighting]
    return (e_0 / x0_per_prediction(space, a, s).abs()) ** exponent


def mse(predictions: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The paper's loss (SMD, arXiv 2309.14068): mean over draws and elements of (prediction - target)^2.

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
    log_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Energy score of the draws p_j for the target y (De Bortoli et al., arXiv 2502.02483):

        1/M sum_j d(y, p_j) - diversity / (2 M (M - 1)) sum_{j != k} d(p_j, p_k),     d(a, b) = rms(a - b)^beta

    and with R draws p_kr of each of K components of weight w_k

        sum_k w_k/R sum_r d(y, p_kr) - diversity/2 sum_{(k,r) != (l,q)} w_k w_l c_kl d(p_kr, p_lq)

    with c_kl = 1/R^2, and c_kk = 1/(R (R - 1)).

    Strictly proper for 0 < beta < 2 and diversity = 1: only the true conditional distribution minimises it. The root mean
    square is taken over the whole picture (patch size 0) or over every n x n patch, then averaged over patches; several
    sizes are averaged. A sum of proper scores is proper, and with the whole picture among them strictly so.

    Args:
        beta: exponent of the distance. In the Fourier transform of the error of the distribution the score weighs frequency
            f with |f|^-(D + beta): the smaller, the sharper the modes it can tell from what lies between them
            (benchmarks/gmm_lab.py), and the noisier its gradients.
        diversity: lambda of the paper, in [0, 1]; with 0 it is the distance alone.
        patches: sides of the patches the distance is taken over, 0 for the whole picture.
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
    if repeats == 1:  # a component has no distance from itself
        first, second, same = first[~same], second[~same], same[~same]
    pairs = torch.where(same, 1.0 / max(repeats * (repeats - 1), 1), 1.0 / repeats**2)
    to_target = distance(predictions, target.unsqueeze(1).expand_as(predictions), beta, patches)
    between = pair_distance(predictions, first, second, beta, patches)
    near = (weights.repeat_interleave(repeats, dim=1) * to_target).sum(dim=1) / repeats
    return near - diversity * (pairs * weights[:, first // repeats] * weights[:, second // repeats] * between).sum(dim=1)


def component_weights(log_weights: torch.Tensor | None, predictions: torch.Tensor) -> torch.Tensor:
    """Return the weights (B, K), checked; one component of weight 1 where there are none."""
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

    for the n elements of the image or patch (as in ``energy``, averaged over patches): per element and up to a constant,
    scaled so that h -> infinity gives the squared error. It is the likelihood of SMD's own equation, with the step's
    standard deviation as h. With few draws it is a bound, and in many dimensions one draw takes all the weight.
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
    """Convert half precision to float32; float32 and float64 stay."""
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
            # All pairs at once: their differences, larger than the draws by M / 2, are never stored.
            flat = predictions.flatten(2)
            apart = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")[:, first, second]
            total = total + (apart.square() / flat.shape[2] + EPSILON).pow(0.5 * beta)
        else:
            total = total + distance(predictions[:, first], predictions[:, second], beta, (side,))
    return total / len(patches)


def patch_sums(x: torch.Tensor, side: int) -> tuple[torch.Tensor, int]:
    """Sum (B, M, H, W) over every side x side window, or all of it for side 0; return also the number of positions in one."""
    height, width = (side, side) if side else x.shape[2:]
    kernel = (min(height, x.shape[2]), min(width, x.shape[3]))
    return F.avg_pool2d(x, kernel, stride=1, divisor_override=1), kernel[0] * kernel[1]
