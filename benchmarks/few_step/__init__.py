"""Few-step methods that are trained from a Gaussian model, as alternatives to a mixture."""

from .adversarial import DDGAN, DMD2
from .consistency import ECT
from .consistency_first import ConsistencyThenDistillation
from .flow_maps import AlphaFlow, MeanFlow, Shortcut
from .gaussian import Gaussian, GuidedGaussian
from .method import Method
from .mixtures import Energy, EnergyThenDistillation, Folder, PosteriorDistillation, WhiteNoiseDistillation
from .moment_matching import IMM

METHODS: dict[str, type[Method]] = {
    "gaussian": Gaussian,
    "gaussian-guided": GuidedGaussian,
    "ect": ECT,
    "meanflow": MeanFlow,
    "alphaflow": AlphaFlow,
    "shortcut": Shortcut,
    "imm": IMM,
    "dmd2": DMD2,
    "ddgan": DDGAN,
    "energy": Energy,
    "distillation": PosteriorDistillation,
    "folder": Folder,
    "distillation-iid": WhiteNoiseDistillation,
    "energy-distillation": EnergyThenDistillation,
    "consistency-distillation": ConsistencyThenDistillation,
}
