"""Samplers in the form of diffusers schedulers."""

from .gms import GMSScheduler

__all__ = ["GMSScheduler"]
