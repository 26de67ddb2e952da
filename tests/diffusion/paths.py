"""Parameters of the tests of the mathematics: both kinds of paths, and all prediction types."""

from ldm_smd.diffusion.process import DiffusionProcess, RectifiedFlow
from ldm_smd.diffusion.settings import PREDICTION_TYPES, DiffusionConfig
from ldm_smd.schedulers.schedule import build_scheduler

SCHEDULER = build_scheduler(DiffusionConfig())
PROCESS = DiffusionProcess(SCHEDULER.alphas_cumprod.double())
PATHS = (PROCESS, RectifiedFlow(1000))
KINDS = (*PREDICTION_TYPES, "flow_prediction")
