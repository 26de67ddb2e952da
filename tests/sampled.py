"""Samples of a pipeline, as most tests of it take them."""

import torch

from ldm_smd.pipelines import SMDPipeline, seeded_generators


def latents(pipeline: SMDPipeline, labels: list[int] | None, seeds: list[int], **options) -> torch.Tensor:
    """Three steps to latents, one seed for each image."""
    options = {"num_inference_steps": 3, "output_type": "latent", **options}
    return pipeline(labels, generator=seeded_generators(seeds), **options).images
