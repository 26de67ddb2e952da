"""Networks that few-step methods train. They start from one Gaussian model and equal it before the first step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ldm_smd.diffusion.process import DiffusionProcess
from ldm_smd.diffusion.settings import DiffusionConfig
from ldm_smd.models.gaussian import LatentGaussians
from ldm_smd.models.mixture import Draws
from ldm_smd.models.unet import SMDUNet2DModel
from ldm_smd.schedulers.schedule import build_scheduler
from ldm_smd.training.critics import extended_copy

SECOND_DIMENSIONS = 64
MAX_FREQUENCY = 50.0
"""Highest frequency of the features of the second number, in radians. Higher ones would dominate derivatives."""
HEAD_CHANNELS = 64
BLUR = 10.0
"""Width of the blur of time features, in timesteps. A network trained at integer timesteps oscillates between them: its
derivative in t was three times the slope over 20 timesteps. A blur of 10 changed the denoising loss of the emoji model by no
more than 0.1 %."""


@dataclass
class Start:
    """Starting point of a method.

    Attributes:
        unet: a Gaussian model that predicts v. It is never changed.
        alphas_cumprod: cumulative product of its noise schedule.
        latents, labels: the data, (N, C, h, w) and (N,); None if no method fits anything to them.
        gaussians: a mixture fitted to the data by tools/fit_gaussian.py. Sampling may start from its drafts.
    """

    unet: SMDUNet2DModel
    alphas_cumprod: torch.Tensor
    latents: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    gaussians: LatentGaussians | None = None

    def draft(self, noise: torch.Tensor, sigma: float, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Map pure noise (N, C, h, w) to x_t = a x_0 + s eps with s / a = sigma, where x_0 is a sample of ``gaussians``."""
        assert self.gaussians is not None
        a = (1 + sigma**2) ** -0.5
        end = float(self.alphas_cumprod[-1])
        uniform = torch.rand(len(noise), generator=generator, device=noise.device)
        return self.gaussians.transport(noise, (end**0.5, (1 - end) ** 0.5), (a, sigma * a), labels, uniform)

    @property
    def device(self) -> torch.device:
        return self.alphas_cumprod.device

    @property
    def channels(self) -> int:
        return self.unet.config.out_channels


def load_start(folder: str | Path, device: torch.device) -> Start:
    """Load a Gaussian model that was trained with the default noise schedule of the package."""
    unet = SMDUNet2DModel.from_pretrained(folder, use_safetensors=True)
    return start_from(unet.to(device).eval().requires_grad_(False))


def start_from(unet: SMDUNet2DModel) -> Start:
    return Start(unet, build_scheduler(DiffusionConfig()).alphas_cumprod.to(unet.device))


class Denoiser(nn.Module):
    """A network that predicts v of x_t = a x_0 + s eps for continuous noise levels sigma = s / a > 0.

    It may have a second input in [0, 1], such as the time to step to. Sigmas outside the range of the process are clipped.
    """

    alphas_cumprod: torch.Tensor

    def __init__(self, unet: SMDUNet2DModel, alphas_cumprod: torch.Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("alphas_cumprod", alphas_cumprod.clone(), persistent=False)

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return DiffusionProcess(self.alphas_cumprod).timestep_of(sigma**-2)

    def forward(
        self, x_t: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor, second: torch.Tensor | None = None
    ) -> torch.Tensor:
        embeds = None if second is None else features_of(second)
        return self.unet(x_t, self.timestep(sigma), labels, return_dict=False, image_embeds=embeds)[0]

    def clean(
        self, x_t: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor, second: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return x_0 = a x_t - s v. If x_t has more channels than v, the first ones are used."""
        v = self(x_t, sigma, labels, second)
        a, s = levels(sigma)
        return a * x_t[:, : v.shape[1]] - s * v

    def guided(self, x_t: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
        """Return x_0 with classifier-free guidance: other + scale (own - other), where ``other`` is without a label."""
        own = self.clean(x_t, sigma, labels)
        if scale == 1.0:
            return own
        return self.clean(x_t, sigma, torch.full_like(labels, self.unet.config.num_classes)).lerp(own, scale)

    def clean_and_features(
        self, x_t: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x_0, and features of the network (N, C', h', w')."""
        trunk = self.unet.trunk(x_t, self.timestep(sigma), labels, None)
        a, s = levels(sigma)
        return a * x_t - s * self.unet.tail(trunk, Draws()), trunk.features

    def features(
        self, x_t: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor, second: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return features of the network alone, (N, C', h', w')."""
        embeds = None if second is None else features_of(second)
        return self.unet.trunk(x_t, self.timestep(sigma), labels, embeds).features


class Critic(nn.Module):
    """A classifier on the features of a denoiser, whose logit is positive for real images."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.head = feature_head(denoiser)

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor, second: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.head(self.denoiser.features(x, sigma, labels, second))


def feature_head(denoiser: Denoiser) -> nn.Sequential:
    """Build a small network from features of a denoiser to a logit, (N,)."""
    config = denoiser.unet.config
    channels = config.block_out_channels[-1]
    return nn.Sequential(
        nn.GroupNorm(config.norm_num_groups, channels),
        nn.Conv2d(channels, HEAD_CHANNELS, 1),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(HEAD_CHANNELS, 1),
        nn.Flatten(0),
    ).to(denoiser.alphas_cumprod.device)


class BlurredTime(nn.Module):
    """Sines and cosines of t, averaged over a normal distribution of width BLUR around t.

    This multiplies each with exp(-(frequency BLUR)^2 / 2), so that high frequencies vanish.
    """

    def __init__(self, features: nn.Module, channels: int) -> None:
        super().__init__()
        self.features = features
        frequencies = torch.exp(-math.log(10_000) * torch.arange(channels // 2) / (channels // 2))
        self.register_buffer("factors", torch.exp(-((frequencies * BLUR) ** 2) / 2).repeat(2), persistent=False)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.features(t) * self.factors


def denoiser(start: Start, second: bool = False, more_channels: int = 0, smooth: bool = False) -> Denoiser:
    """Make a trainable copy of the Gaussian model.

    Args:
        second: add a second input in [0, 1], as an image embedding, through a layer that is initialized with zeros.
        more_channels: number of additional input channels, whose weights are initialized with zeros.
        smooth: make the network smooth in time, for methods that take derivatives in time.
    """
    unet = extended_copy(start.unet, more_channels, SECOND_DIMENSIONS if second else 0, 0)
    if smooth:
        unet.time_proj = BlurredTime(unet.time_proj, unet.config.block_out_channels[0])
    return Denoiser(unet.train().requires_grad_(True), start.alphas_cumprod)


def features_of(number: torch.Tensor) -> torch.Tensor:
    """Return sines and cosines of a number in [0, 1], (N, SECOND_DIMENSIONS), normalised to length 1."""
    count = SECOND_DIMENSIONS // 2
    frequencies = torch.logspace(0, math.log10(MAX_FREQUENCY), count, device=number.device)
    angles = number[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1) / math.sqrt(count)


def levels(sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a = 1 / sqrt(1 + sigma^2) and s = sigma a, each (N, 1, 1, 1)."""
    a = (1 + sigma**2).rsqrt()
    return a.view(-1, 1, 1, 1), (sigma * a).view(-1, 1, 1, 1)


def trailing(denoiser: Denoiser, steps: int) -> torch.Tensor:
    """Return the sigmas of diffusers' "trailing" spacing for ``steps`` steps, largest first, (steps,)."""
    count = len(denoiser.alphas_cumprod)
    t = [round(count - i * count / steps) - 1 for i in range(steps)]
    alphabar = denoiser.alphas_cumprod[t]
    return (1 / alphabar - 1).sqrt()


@torch.no_grad()
def resample(
    clean: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Alternate denoising and adding fresh noise of the next sigma, the multistep sampling of consistency models and DMD2.

    Args:
        clean: (x_t, sigma (N,)) -> x_0.
    """
    x = noise
    for index, sigma in enumerate(sigmas):
        each = sigma.expand(len(noise))
        if index:
            a, s = levels(each)
            x = a * x + s * torch.randn(noise.shape, generator=generator, device=noise.device)
        x = clean(x, each)
    return x
