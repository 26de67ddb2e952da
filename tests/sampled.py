"""Short sampling, for most tests of pipelines."""

import torch

from ldm_smd.pipelines import SMDPipeline, seeded_generators
from ldm_smd.schedulers.support import SUPPORTED

SCHEDULERS = [*SUPPORTED, "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++"]


def latents(pipeline: SMDPipeline, labels: list[int] | None, seeds: list[int], **options) -> torch.Tensor:
    """Sample latents with three steps and one seed for each image."""
    options = {"num_inference_steps": 3, "output_type": "latent", **options}
    return pipeline(labels, generator=seeded_generators(seeds), **options).images
