"""SMDPipeline: the sampling loop (smd), conditions and guidance, decoding, and loading of model folders."""

from .loading import load_pipeline
from .smd import SMDPipeline, seeded_generators

__all__ = ["SMDPipeline", "load_pipeline", "seeded_generators"]
