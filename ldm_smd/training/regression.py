"""Regression: a mixture learns to reproduce the posterior flow of a Gaussian model."""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange

from ..autoencoder import sample_latents
from ..data.stream import LatentBatch
from ..diffusion.process import x0_per_prediction
from ..diffusion.two_views import posterior_flow
from ..models.blocks import repeat
from ..models.denoiser import predict
from ..schema import check
from .run import Run
from .step import Denoising, model_conditions
from .step_noise import StepNoise
from .teacher import draw_with_pure_noise, load_teacher


class PosteriorRegression(Denoising):
    """The teacher's posterior flow (diffusion/two_views.py) maps eta to a draw of q(x_0 | x_t). The mixture learns this map in
    one evaluation:

        loss = |D(x_t, eta) - flow(x_t, eta)|^2 / s_t^2

    Every eta has its own target, so no mode is dropped, and no critic is needed. The network averages targets that it cannot
    distinguish, so draws are blurred; distillation sharpens them.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        network = self.model.network
        rank = network.config.noise_rank
        check(rank == 0, "model.noise_rank", "0 (white noise) for objective.name=regression", rank)
        self.teacher = load_teacher(run, network)

    def draw(self, batch: LatentBatch, images_seen: int) -> StepNoise:
        return draw_with_pure_noise(self.run, self.process, batch, images_seen, self.draws)

    def losses(self, batch: LatentBatch, noise: StepNoise) -> torch.Tensor:
        """Return the loss of each image, (b,)."""
        run, path, t = self.run, self.process, noise.t.clamp_min(1)
        prediction_type, many = run.config.diffusion.predicts, partial(repeat, draws=self.draws)
        x0 = run.autoencoder.normalise(sample_latents(batch.moments, noise=noise.posterior))
        x_t, eta = path.noise(x0, noise.eps, t), rearrange(noise.eta, "b m ... -> (b m) ...")
        conditions = model_conditions(run, batch, noise, self.model.network.config.num_classes)
        each = {name: value if value is None else many(value) for name, value in conditions.items()}

        def denoise(x_u: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            with run.accelerator.autocast():
                prediction = predict(self.teacher, x_u, u, **each).float()
            return path.to_x0(prediction, x_u, u, prediction_type)

        with torch.no_grad():
            goal = posterior_flow(denoise, path, many(x_t), many(t), eta, run.config.objective.teacher_steps)
        with run.accelerator.autocast():
            prediction = self.model.forward(x_t, t, eta=eta, return_dict=False, **conditions)[0].float()
        x = path.to_x0(prediction, many(x_t), many(t), prediction_type)
        errors = (x - goal) / x0_per_prediction(prediction_type, *path.signal_and_noise(many(t), x))
        return rearrange(errors.square(), "(b m) ... -> b (m ...)", m=self.draws).mean(dim=1)
