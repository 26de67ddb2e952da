"""Settings of the forward process and of the objective."""

from dataclasses import dataclass, field
from typing import Optional

from ..schema import Settings, check, choice, number

LOSSES = ("mse", "energy", "mixture_nll")
"""They compare predictions with a target (objectives.py)."""
OBJECTIVES = (*LOSSES, "regression", "distillation")
"""The last two learn from a trained Gaussian model."""
VIEWS = ("conditional", "joined", "marginal")
WEIGHTINGS = ("prediction", "v", "epsilon", "x0", "min_snr")
PATHS = ("variance_preserving", "flow")
PREDICTION_TYPES = ("v_prediction", "epsilon", "sample", "flow_prediction")
"""diffusers' names: v = a_t eps - s_t x_0, eps, x_0, and the velocity eps - x_0."""
BETA_SCHEDULES = ("cosine", "squaredcos_cap_v2", "linear", "scaled_linear")


@dataclass
class DiffusionConfig(Settings):
    """The forward process, in diffusers' words."""

    path: str = choice("variance_preserving", PATHS)
    """variance_preserving: a noise schedule, as in DDPM. flow: flow matching along straight lines (rectified flow, arXiv
    2209.03003), x_t = (1 - t / T) x_0 + (t / T) eps, with t uniform. The schedulers of either sample a model of the other."""
    num_train_timesteps: int = number(1000, 2, 10**5)
    beta_schedule: str = choice("cosine", BETA_SCHEDULES)
    """cosine: squaredcos_cap_v2 but for its last step, which ends at sigma = 1,300 and not 20,000, where float32 schedulers
    that work in sigma (EulerAncestralDiscreteScheduler) give NaN. Or squaredcos_cap_v2, linear, scaled_linear. Not read where
    path=flow."""
    prediction_type: str = choice("v_prediction", ("v_prediction", "epsilon", "sample"))
    """v_prediction, epsilon or sample (x_0). Not read where path=flow: it predicts the velocity eps - x_0."""

    @property
    def predicts(self) -> str:
        """What the network predicts, by diffusers' name."""
        return "flow_prediction" if self.path == "flow" else self.prediction_type


@dataclass
class DistillationConfig(Settings):
    """What objective.name=distillation needs beside the model (ldm_smd/training/distillation.py), and of it
    objective.name=regression: the teacher and ``pure_noise_fraction``."""

    RENAMED = {"pure_noise": "pure_noise_fraction"}

    teacher: Optional[str] = None
    """Folder or hub id of the Gaussian denoiser that is learnt from, as RUN/model/unet; null: init_from."""
    views: str = choice("conditional", VIEWS)
    """conditional: a draw is judged together with the x_t it was made from, which the critic sees. joined: the critic sees both
    only as the one view that they are worth to the teacher; cheaper, but wrong where the truth is known. marginal: a draw is
    judged by itself, as in DMD."""
    critic_learning_rate: float = number(5e-4, above=0, maximum=1)
    """Learning rate of the critic at the peak of the model's; it rises and falls with that."""
    adversarial_weight: float = number(0.0, 0, 100)
    """Weight of an adversarial term: the critic also tells draws from true images of the same x_t. 0: none."""
    critic_updates: int = number(1, 1, 100)
    """Updates of the critic for each of the model's: it has to follow the model."""
    guidance_scale: float = number(1.0, 0, 100)
    """Classifier-free guidance of the teacher: the mixture learns to draw as it does with guidance, and needs none itself."""
    pure_noise_fraction: float = number(0.3, 0, 1)
    """Share of the images whose t is the last, where sampling begins."""


@dataclass
class ObjectiveConfig(Settings):
    """How the draws of the prediction are compared with the target (ldm_smd/diffusion/objectives.py)."""

    RENAMED = {"patches": "patch_sizes", "flow_steps": "teacher_steps"}

    name: str = choice("energy", OBJECTIVES)
    """energy: a strictly proper score, learns the mixture. mixture_nll: likelihood of the draws' mixture. mse: the paper's
    loss, which collapses; the one for Gaussian models. regression and distillation learn from a trained Gaussian model: one
    covers all of its modes, the other gives sharper samples (ldm_smd/training/regression.py and distillation.py)."""
    draws: int = number(4, 1, 1024)
    """M, predictions per picture (energy: at least 2)."""
    beta: float = number(1.0, above=0, below=2)
    """Exponent of the energy score's distance: smaller is sharper and noisier."""
    diversity: float = number(1.0, 0, 1)
    """Weight of the distance between draws; below 1 the mixture is narrower than the data."""
    patch_sizes: list[int] = number([0, 4, 2, 1], 0, 1024, min_length=1)
    """Sides of the patches, in latent positions, that energy and mixture_nll measure distances over; 0: the whole image."""
    bandwidth: float = number(0.2, above=0, maximum=1e6)
    """Standard deviation of mixture_nll's Gaussians, in units of the prediction."""
    weighting: str = choice("prediction", WEIGHTINGS)
    """Weighting of the timesteps: the space in which errors weigh the same at each (prediction, v, epsilon, x0), or min_snr."""
    teacher_steps: int = number(8, 1, 1000)
    """Evaluations of the teacher for each draw that regression learns."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.draws > 1 or self.name != "energy", "objective.draws", "at least 2 for the energy score", self.draws)
