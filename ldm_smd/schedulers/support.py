"""Which schedulers of diffusers sample our models, with which settings, and why the others do not. Every one that diffusers
exports is here (tests/schedulers/test_support.py); docs/samplers.md compares them."""

from __future__ import annotations

import functools

from diffusers import SchedulerMixin
from diffusers.utils import logging

from .conversion import is_flow

logger = logging.get_logger(__name__)

EVERYWHERE = {
    "clip_sample": False,  # latents are not in [-1, 1]
    "timestep_spacing": "trailing",  # begins where there is only noise (arXiv 2305.08891)
}
"""Settings of any scheduler, where the model's own has no other."""
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
"""Settings that space the noise levels; at most one is on."""
KARRAS = {"use_karras_sigmas": True}
"""Twenty steps even in t begin with one from sigma = 1,300 to 13: too far for a correction of second order in sigma, and
pictures come out dark. As Karras et al. space them (arXiv 2206.00364) sigma falls by a quarter there."""

SUPPORTED: dict[str, dict] = {
    "DDIMParallelScheduler": {},
    "DDIMScheduler": {},
    "DDPMParallelScheduler": {},
    "DDPMScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    # The last step, which leaves no noise, is of first order.
    "DPMSolverSinglestepScheduler": {"lower_order_final": True},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": KARRAS,
    "KDPM2AncestralDiscreteScheduler": KARRAS,
    "KDPM2DiscreteScheduler": KARRAS,
    "LMSDiscreteScheduler": {},
    # One evaluation a step from the first on, where Runge-Kutta takes four; and the last step leaves no noise.
    "PNDMScheduler": {"skip_prk_steps": True, "set_alpha_to_one": True},
    "SASolverScheduler": {},
    "UniPCMultistepScheduler": {},
    # No shift of the noise schedule, which is CogVideoX's own.
    "CogVideoXDDIMScheduler": {"snr_shift_scale": 1.0},
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
}
"""Class -> settings that it needs for the noise schedule of our models beside those of EVERYWHERE."""

OTHER_FLOW = "FlowMatchEulerDiscreteScheduler samples flow matching along straight lines here"
REASONS = {
    f"it is made for one model, or for other flows; {OTHER_FLOW}": (
        "FlowMapEulerDiscrete HeliosDMD Helios LTXEulerAncestralRF MiniMaxH3 Piflow RFD4Proteina"
    ),
    "it is for tokens, not for latents": "Amused BlockRefinement DiscreteDDIM EntropyBound VQDiffusion",
    "it goes from a picture to noise": "DDIMInverse DPMSolverMultistepInverse",
    "it is for networks distilled to few steps": "CMStochasticIterative FlowMatchLCM LCM SCM TCD",
    "it has its own noise schedule, without alphas_cumprod": "DDPMWuerstchen IPNDM ScoreSdeVe",
    "it has its own noise schedule, without alphas_cumprod; EulerDiscreteScheduler:use_karras_sigmas=true is of its kind": (
        "CosineDPMSolverMultistep EDMDPMSolverMultistep EDMEuler KarrasVe"
    ),
    "its noise is of one seed for a whole batch, not of one for each picture": "DPMSolverSDE",
    "its step asks for two predictions, which the pipeline of CogVideoX hands it": "CogVideoXDPM",
    "it fills a masked part of a picture": "RePaint",
    "it knows one noise schedule only, and no v_prediction": "UnCLIP",
}
"""Why a scheduler does not sample our models -> the names of those classes, without "Scheduler"."""
REFUSED = {f"{name}Scheduler": reason for reason, names in REASONS.items() for name in names.split()}


def refused(name: str, reason: str) -> str:
    """Return the message for a scheduler that cannot be used."""
    return (
        "scheduler: expected one of a noise schedule (alphas_cumprod), as DDIMScheduler or UniPCMultistepScheduler, or of flow "
        f"matching, as FlowMatchEulerDiscreteScheduler, found {name}: {reason}"
    )


def defaults(name: str, chosen: dict) -> dict:
    """Return the settings that class ``name`` needs, but for what is ``chosen``."""
    left_out = {*chosen, *(SPACINGS if any(chosen.get(spacing) for spacing in SPACINGS) else ())}
    return {key: value for key, value in SUPPORTED.get(name, {}).items() if key not in left_out}


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Raise ValueError for a scheduler that cannot sample our models; warn of one without the settings that it needs."""
    name, bases = type(scheduler).__name__, (cls.__name__ for cls in type(scheduler).__mro__)
    reason = next((REFUSED[base] for base in bases if base in REFUSED), None)
    if reason is None and not (is_flow(scheduler) or hasattr(scheduler, "alphas_cumprod")):
        reason = "it has none"
    if reason is not None:
        raise ValueError(refused(name, reason))
    config = scheduler.config
    for setting in ("use_flow_sigmas", "use_dynamic_shifting", "invert_sigmas"):
        if config.get(setting):
            raise ValueError(refused(f"{name} with {setting}", OTHER_FLOW))
    if not is_flow(scheduler) and config.prediction_type == "flow_prediction":
        raise ValueError(refused(f"{name} with flow_prediction", OTHER_FLOW))
    spaced = any(config.get(spacing) for spacing in SPACINGS)
    for key, value in SUPPORTED.get(name, {}).items():
        if config[key] != value and not (key in SPACINGS and spaced):
            warn_once(f"scheduler: expected {name} with {key}={value}, as make_scheduler sets it, found {config[key]}")


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)
