"""SMDPipeline: sampling loop, conditions and guidance, decoding, loading of model folders."""

from .loading import load_pipeline
from .smd import SMDPipeline, seeded_generators

__all__ = ["SMDPipeline", "load_pipeline", "seeded_generators"]
