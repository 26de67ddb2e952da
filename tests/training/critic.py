"""A learner with two networks, for tests. The training loop runs it without special cases, on any number of processes."""

import dataclasses

import torch

from ldm_smd.diffusion.settings import ObjectiveConfig
from ldm_smd.training.build import build_model
from ldm_smd.training.step import Denoising
from ldm_smd.training.trained import TrainedNetwork


class WithCritic:
    """Trains the denoiser, and a Gaussian one that learns its predictions, with two updates per step."""

    def __init__(self, run):
        self.denoising, self.accelerator = Denoising(run), run.accelerator
        shape = dataclasses.replace(run.config.model, z_channels=0)
        config = dataclasses.replace(run.config, model=shape, objective=ObjectiveConfig(name="mse"))
        network = build_model(config, run.manifest).to(run.accelerator.device)
        self.critic = TrainedNetwork(network, torch.optim.AdamW(network.parameters(), fused=True))
        self.networks = {**self.denoising.networks, "critic": self.critic}

    def step(self, batch, images_seen, learning_rate):
        metrics = self.denoising.step(batch, images_seen, learning_rate)
        x, t = batch.moments[:, 0].float(), batch.labels + 500
        for _ in range(2):
            with torch.no_grad():
                target = self.denoising.model.forward(x, t, batch.labels, x, return_dict=False)[0]
            self.critic.network.zero_grad()
            loss = (self.critic.forward(x, t, batch.labels, return_dict=False)[0] - target).square().mean()
            self.accelerator.backward(loss)
            norm = self.critic.descend(10 * learning_rate, gradient_clip=1.0)
        return metrics | {"critic_loss": loss.detach(), "critic_norm": norm}
