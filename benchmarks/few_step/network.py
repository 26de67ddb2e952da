"""The networks that few-step methods train, all started from one Gaussian model and equal to it before the first step."""

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
FASTEST = 50.0
"""Radians that the fastest feature of the second number turns by: no more, or its derivative drowns that of the network."""
HEAD_CHANNELS = 64
BLUR = 10.0
"""Timesteps. A network trained at whole timesteps wiggles between them: the derivative in t was three times what it is over
20 timesteps. Blurred by 10, the features of the time leave the denoising loss of the emoji model as it was, to 0.1 %."""


@dataclass
class Start:
    """Starting point of a method.

    Attributes:
        unet: a Gaussian model that predicts v, on the device; never changed.
        alphas_cumprod: those of its process, on the device.
        latents, labels: the data, (N, C, h, w) and (N,); None where no method fits anything to them.
        gaussians: a mixture fitted to the data, of tools/fit_gaussian.py; its drafts are where sampling may start.
    """

    unet: SMDUNet2DModel
    alphas_cumprod: torch.Tensor
    latents: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    gaussians: LatentGaussians | None = None

    def draft(self, noise: torch.Tensor, sigma: float, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """x_t = a x_0 + s eps with s / a = sigma, were x_0 of the Gaussians, from pure noise, (N, C, h, w)."""
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
    """The Gaussian model of a folder, with the package's own noise schedule, which it was trained with."""
    unet = SMDUNet2DModel.from_pretrained(folder, use_safetensors=True)
    return start_from(unet.to(device).eval().requires_grad_(False))


def start_from(unet: SMDUNet2DModel) -> Start:
    return Start(unet, build_scheduler(DiffusionConfig()).alphas_cumprod.to(unet.device))


class Denoiser(nn.Module):
    """v of x_t = a x_0 + s eps, where the noise is given as sigma = s / a > 0, any real number; and perhaps of a second number
    in [0, 1], such as the time to go to. Sigmas beyond the process' ends are the ends to the network."""

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
        """x_0 = a x_t - s v; of what x_t has more channels than v, the first."""
        v = self(x_t, sigma, labels, second)
        a, s = levels(sigma)
        return a * x_t[:, : v.shape[1]] - s * v

    def clean_and_features(
        self, x_t: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x_0, and the network's features (N, C', h', w')."""
        trunk = self.unet.trunk(x_t, self.timestep(sigma), labels, None)
        a, s = levels(sigma)
        return a * x_t - s * self.unet.tail(trunk, Draws()), trunk.features


class Critic(nn.Module):
    """A number for each picture, from the features of a denoiser: positive where it thinks the picture real."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.head = feature_head(denoiser)

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor, second: torch.Tensor | None = None
    ) -> torch.Tensor:
        embeds = None if second is None else features_of(second)
        trunk = self.denoiser.unet.trunk(x, self.denoiser.timestep(sigma), labels, embeds)
        return self.head(trunk.features)


def feature_head(denoiser: Denoiser) -> nn.Sequential:
    """A small network from a denoiser's features to one number, (N,)."""
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
    """The sines and cosines of a time that is normal around t, with deviation BLUR: each is multiplied with
    exp(-(speed BLUR)^2 / 2), so that the fast ones vanish."""

    def __init__(self, features: nn.Module, channels: int) -> None:
        super().__init__()
        self.features = features
        speeds = torch.exp(-math.log(10_000) * torch.arange(channels // 2) / (channels // 2))
        self.register_buffer("factors", torch.exp(-((speeds * BLUR) ** 2) / 2).repeat(2), persistent=False)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.features(t) * self.factors


def denoiser(start: Start, second: bool = False, more_channels: int = 0, smooth: bool = False) -> Denoiser:
    """A copy of the Gaussian model that can be trained.

    Args:
        second: take a second number. It goes where embeddings of images go, through a layer that starts at zero.
        more_channels: of the input, whose weights start at zero.
        smooth: make it smooth in time, for what takes derivatives in it.
    """
    unet = extended_copy(start.unet, more_channels, SECOND_DIMENSIONS if second else 0, 0)
    if smooth:
        unet.time_proj = BlurredTime(unet.time_proj, unet.config.block_out_channels[0])
    return Denoiser(unet.train().requires_grad_(True), start.alphas_cumprod)


def features_of(number: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of a number in [0, 1], (N, SECOND_DIMENSIONS), of length 1."""
    count = SECOND_DIMENSIONS // 2
    speeds = torch.logspace(0, math.log10(FASTEST), count, device=number.device)
    angles = number[:, None] * speeds
    return torch.cat((angles.sin(), angles.cos()), dim=1) / math.sqrt(count)


def levels(sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a = 1 / sqrt(1 + sigma^2), s = sigma a, each (N, 1, 1, 1)."""
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
    """Denoise, add fresh noise of the next sigma, denoise again: how consistency models and DMD2 take several steps.

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
