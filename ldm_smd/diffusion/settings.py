"""Settings of the forward process and of the objective."""

from dataclasses import dataclass, field
from typing import Optional

from ..schema import Settings, check, choice, number

LOSSES = ("mse", "energy", "mixture_nll")
"""Objectives that compare predictions with a target (objectives.py)."""
OBJECTIVES = (*LOSSES, "regression", "distillation")
"""The last two train on a Gaussian teacher."""
VIEWS = ("conditional", "joined", "marginal")
WEIGHTINGS = ("prediction", "v", "epsilon", "x0", "min_snr")
PATHS = ("variance_preserving", "flow")
PREDICTION_TYPES = ("v_prediction", "epsilon", "sample", "flow_prediction")
"""Names as in diffusers: v = a_t eps - s_t x_0, eps, x_0, and the velocity eps - x_0."""
BETA_SCHEDULES = ("cosine", "squaredcos_cap_v2", "linear", "scaled_linear")


@dataclass
class DiffusionConfig(Settings):
    """The forward process, with diffusers' names."""

    path: str = choice("variance_preserving", PATHS)
    """variance_preserving: a noise schedule, as in DDPM. flow: flow matching along straight lines (rectified flow, arXiv
    2209.03003), x_t = (1 - t / T) x_0 + (t / T) eps, with uniform t. Models of both paths work with the schedulers of both."""
    num_train_timesteps: int = number(1000, 2, 10**5)
    beta_schedule: str = choice("cosine", BETA_SCHEDULES)
    """As in diffusers. cosine is squaredcos_cap_v2 with a last step to sigma = 1,300 instead of 20,000, where schedulers that
    work in sigma (EulerAncestralDiscreteScheduler) give NaN in float32. Ignored for path=flow."""
    beta_start: float = number(1e-4, above=0, below=1)
    """First beta of linear and scaled_linear. Stable Diffusion: scaled_linear from 0.00085 to 0.012."""
    beta_end: float = number(0.02, above=0, below=1)
    """Last beta of linear and scaled_linear."""
    prediction_type: str = choice("v_prediction", ("v_prediction", "epsilon", "sample"))
    """v_prediction, epsilon or sample (x_0). Ignored for path=flow, which predicts the velocity eps - x_0."""

    @property
    def predicts(self) -> str:
        """Return the prediction type, with diffusers' name."""
        return "flow_prediction" if self.path == "flow" else self.prediction_type


@dataclass
class DistillationConfig(Settings):
    """Settings of objective.name=distillation (ldm_smd/training/distillation.py). objective.name=regression uses
    ``teacher`` and ``pure_noise_fraction`` too."""

    RENAMED = {"pure_noise": "pure_noise_fraction"}

    teacher: Optional[str] = None
    """Folder (RUN/model/unet) or hub id of the Gaussian teacher; null: init_from."""
    views: str = choice("conditional", VIEWS)
    """Input of the critic. conditional: the noised draw and the x_t it was made from. joined: only the combination of both that
    the teacher sees; cheaper, but wrong on problems with a known answer. marginal: only the noised draw, as in DMD."""
    marginal_above: Optional[float] = number(None, above=0, maximum=1e9)
    """Noise level sigma of x_t above which ``views`` are marginal. Low values give better images at one and two steps, and
    worse ones at eight (docs/few-steps.md). null: nowhere."""
    backward_simulation_fraction: float = number(0.0, 0, 1)
    """Fraction of the images whose x_t comes from the mixture's own sampling in few steps, as in DMD2. Their views are
    marginal, so the mixture learns to correct its earlier steps (docs/few-steps.md)."""
    critic_learning_rate: float = number(5e-4, above=0, maximum=1)
    """Peak learning rate of the critic. It follows the schedule of the model's learning rate."""
    adversarial_weight: float = number(0.0, 0, 100)
    """Weight of the adversarial loss: the critic also learns to tell draws from true latents of the same x_t. 0: none."""
    energy_weight: float = number(0.0, 0, 100)
    """Weight of the energy score of objective.draws draws, in addition, except above ``marginal_above``. Keeps the draws from
    becoming alike. 0: none."""
    second_view_shift: float = number(1.0, above=0, maximum=1e3)
    """How far the timestep of the draw's second noisy view is shifted to noise: its signal-to-noise ratio is divided by the
    square of this. Noisy views say which image a draw is, clean ones how good its details are. Raise it if the draws become
    alike, as for large latents."""
    critic_updates: int = number(1, 1, 100)
    """Critic updates per model update. Raise it if the critic cannot follow the model."""
    guidance_scale: float = number(1.0, 0, 100)
    """Guidance of the teacher, classifier-free or away from ``guide``. The mixture learns the guided distribution and needs no
    guidance itself."""
    guide: Optional[str] = None
    """Autoguidance of the teacher: folder (RUN/model/unet) or hub id of a weaker Gaussian model, smaller or less trained. null:
    classifier-free guidance."""
    pure_noise_fraction: float = number(0.3, 0, 1)
    """Fraction of the images with t at the last timestep, where sampling starts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        scale = self.guidance_scale
        check(self.guide is None or scale > 1, "objective.distillation.guidance_scale", "a scale above 1 for the guide", scale)


@dataclass
class ObjectiveConfig(Settings):
    """The training objective (ldm_smd/diffusion/objectives.py)."""

    RENAMED = {"patches": "patch_sizes", "flow_steps": "teacher_steps"}

    name: str = choice("energy", OBJECTIVES)
    """energy: energy score, a strictly proper score that learns the mixture. mixture_nll: likelihood under a kernel density of
    the draws. mse: for Gaussian models; a mixture trained with it (as in the SMD paper) collapses. regression, distillation:
    train on a Gaussian teacher; the former covers all modes, the latter gives sharper samples (ldm_smd/training/)."""
    draws: int = number(4, 1, 1024)
    """M, draws of the mixture per training image; at least 2 for energy."""
    beta: float = number(1.0, above=0, below=2)
    """Exponent of the energy score. Smaller values give sharper samples and noisier gradients."""
    diversity: float = number(1.0, 0, 1)
    """Weight of the distance between draws in the energy score. Below 1, the mixture is narrower than the data."""
    patch_sizes: list[int] = number([0, 4, 2, 1], 0, 1024, min_length=1)
    """Sides of the patches, in latent positions, for the distances in energy and mixture_nll. 0: the whole image."""
    bandwidth: float = number(0.2, above=0, maximum=1e6)
    """Standard deviation of the Gaussians in mixture_nll, in units of the prediction."""
    weighting: str = choice("prediction", WEIGHTINGS)
    """Weighting of timesteps. prediction, v, epsilon, x0: errors in this space have equal weight at all timesteps. min_snr: as
    in arXiv 2303.09556."""
    teacher_steps: int = number(8, 1, 1000)
    """Steps of the teacher for each target of regression."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        scored = self.name == "energy" or (self.name == "distillation" and self.distillation.energy_weight > 0)
        check(self.draws > 1 or not scored, "objective.draws", "at least 2 for the energy score", self.draws)
