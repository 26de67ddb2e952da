"""Supported schedulers of diffusers, the settings they need for our models, and the reasons why others are refused.

Covers every scheduler that diffusers exports (tests/schedulers/test_support.py). docs/samplers.md compares them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import SchedulerMixin
from diffusers.utils import logging

from .conversion import is_flow

logger = logging.get_logger(__name__)

EVERYWHERE = {
    "clip_sample": False,  # latents are not in [-1, 1]
    "timestep_spacing": "trailing",  # starts from pure noise (arXiv 2305.08891)
}
"""Defaults for every scheduler, unless the model's own scheduler sets another value."""
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
"""Settings that space the noise levels. At most one may be on."""
KARRAS = {"use_karras_sigmas": True}
"""With twenty steps evenly spaced in t, the first goes from sigma = 1,300 to 13. That is too far for a second-order correction
in sigma, and images come out dark. With the spacing of Karras et al. (arXiv 2206.00364) sigma falls by a quarter there."""

SUPPORTED: dict[str, dict] = {
    "DDIMParallelScheduler": {},
    "DDIMScheduler": {},
    "DDPMParallelScheduler": {},
    "DDPMScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    # The last step, to zero noise, must be of first order.
    "DPMSolverSinglestepScheduler": {"lower_order_final": True},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": KARRAS,
    "KDPM2AncestralDiscreteScheduler": KARRAS,
    "KDPM2DiscreteScheduler": KARRAS,
    "LMSDiscreteScheduler": {},
    # One evaluation per step from the start (Runge-Kutta takes four), and a last step to zero noise.
    "PNDMScheduler": {"skip_prk_steps": True, "set_alpha_to_one": True},
    "SASolverScheduler": {},
    "UniPCMultistepScheduler": {},
    # Without CogVideoX's shift of the noise schedule.
    "CogVideoXDDIMScheduler": {"snr_shift_scale": 1.0},
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
}
"""Class -> settings it needs for the noise schedule of our models, in addition to EVERYWHERE."""

WITHOUT_SAMPLE_PREDICTION = (
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "PNDMScheduler",
)
"""They cannot take a prediction of x_0. Such a network is converted to v (conversion.py)."""

OTHER_FLOW = "only flow matching along straight lines is supported, by FlowMatchEulerDiscreteScheduler"
REASONS = {
    f"it is made for a specific model or another kind of flow; {OTHER_FLOW}": (
        "FlowMapEulerDiscrete HeliosDMD Helios LTXEulerAncestralRF MiniMaxH3 Piflow RFD4Proteina"
    ),
    "it samples discrete tokens, not latents": "Amused BlockRefinement DiscreteDDIM EntropyBound VQDiffusion",
    "it inverts sampling, from an image to noise": "DDIMInverse DPMSolverMultistepInverse",
    "it needs a network distilled for few steps": "CMStochasticIterative FlowMatchLCM LCM SCM TCD",
    "it has its own noise schedule, without alphas_cumprod": "DDPMWuerstchen IPNDM ScoreSdeVe",
    "it has its own noise schedule, without alphas_cumprod; EulerDiscreteScheduler:use_karras_sigmas=true is similar": (
        "CosineDPMSolverMultistep EDMDPMSolverMultistep EDMEuler KarrasVe"
    ),
    "it draws noise from one seed for the whole batch, not one per image": "DPMSolverSDE",
    "its step needs two predictions, as the CogVideoX pipeline passes them": "CogVideoXDPM",
    "it is for inpainting": "RePaint",
    "it supports a single noise schedule and no v_prediction": "UnCLIP",
}
"""Reason why a scheduler is refused -> names of these classes, without "Scheduler"."""
REFUSED = {f"{name}Scheduler": reason for reason, names in REASONS.items() for name in names.split()}


def refused(name: str, reason: str) -> str:
    """Return the error message for a scheduler that is not supported."""
    return (
        "scheduler: expected a scheduler with a noise schedule (alphas_cumprod), such as DDIMScheduler, or for flow matching, "
        f"such as FlowMatchEulerDiscreteScheduler, found {name}: {reason}"
    )


def learns_variance(config: Mapping[str, Any]) -> bool:
    return str(config.get("variance_type", "")).startswith("learned")


def without_learned_variance(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a scheduler without a learned variance, which predictions of denoisers do not contain."""
    left_out = {"variance_type"} if learns_variance(config) else set()
    return {key: value for key, value in config.items() if key not in left_out}


def defaults(name: str, chosen: dict) -> dict:
    """Return the settings that class ``name`` needs, except those in ``chosen``."""
    left_out = {*chosen, *(SPACINGS if any(chosen.get(spacing) for spacing in SPACINGS) else ())}
    return {key: value for key, value in SUPPORTED.get(name, {}).items() if key not in left_out}


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Raise ValueError for an unsupported scheduler; warn if one lacks the settings that it needs."""
    name, bases = type(scheduler).__name__, (cls.__name__ for cls in type(scheduler).__mro__)
    reason = next((REFUSED[base] for base in bases if base in REFUSED), None)
    if reason is None and not (is_flow(scheduler) or hasattr(scheduler, "alphas_cumprod")):
        reason = "it has neither"
    if reason is not None:
        raise ValueError(refused(name, reason))
    config = scheduler.config
    for setting in ("use_flow_sigmas", "use_dynamic_shifting", "invert_sigmas"):
        if config.get(setting):
            raise ValueError(refused(f"{name} with {setting}", OTHER_FLOW))
    if config.get("timestep_type") == "continuous":
        raise ValueError(refused(f"{name} with timestep_type=continuous", "networks take timesteps, not log sigmas"))
    if not is_flow(scheduler) and config.prediction_type == "flow_prediction":
        raise ValueError(refused(f"{name} with flow_prediction", OTHER_FLOW))
    if learns_variance(config) and "variance_type" in inspect.signature(type(scheduler)).parameters:
        expected = "scheduler: expected one without a learned variance, as make_scheduler makes it"
        raise ValueError(f"{expected}, found {name} with variance_type={config.variance_type}")
    if config.get("prediction_type") == "sample" and name in WITHOUT_SAMPLE_PREDICTION:
        expected = f"scheduler: expected {name} with another prediction_type, as make_scheduler makes it"
        raise ValueError(f"{expected}, found prediction_type=sample")
    if not is_flow(scheduler) and (levels := len(scheduler.alphas_cumprod)) != config.num_train_timesteps:
        expected = f"scheduler: expected {name} with num_train_timesteps={levels}, as its noise schedule has"
        raise ValueError(f"{expected}, found {config.num_train_timesteps}")
    spaced = any(config.get(spacing) for spacing in SPACINGS)
    for key, value in SUPPORTED.get(name, {}).items():
        if config[key] != value and not (key in SPACINGS and spaced):
            warn_once(f"scheduler: expected {name} with {key}={value}, as make_scheduler sets it, found {config[key]}")


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)
