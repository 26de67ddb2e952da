"""Samplers with the interface of diffusers schedulers."""

from diffusers import SchedulerMixin

from .factory import scheduler_from
from .gms import GMSScheduler
from .smd import SMDScheduler
from .teleport import TeleportScheduler

__all__ = ["GMSScheduler", "SMDScheduler", "TeleportScheduler", "make_scheduler"]

CUSTOM = (GMSScheduler, SMDScheduler, TeleportScheduler)


def make_scheduler(name: str, current: SchedulerMixin) -> SchedulerMixin:
    """Make the scheduler ``name``, a class of diffusers or of this package, with the noise schedule of ``current``.

    Settings may follow the name: DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++,solver_order=2.
    Raises UserError for an unknown class or setting.
    """
    return scheduler_from(name, current.config, {each.__name__: each for each in CUSTOM})
