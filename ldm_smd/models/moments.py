"""MomentHeads: variance and skew of the step, from the features of a frozen Gaussian UNet (GMS, arXiv 2311.00941)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .blocks import ResidualBlock, assign_modulation_slices, zero_init
from .denoiser import predict
from .unet import SMDUNet2DModel

START = 0.5413248546129181
"""softplus(START) = 1."""


class MomentHeads(ModelMixin, ConfigMixin):
    """Predicts the variance and the third central moment of v given x_t, from the input of the UNet's last convolution.

    The heads in the paper predict E[eps^2 | x_t] and E[eps^3 | x_t]. The central moments of v = a_t eps - s_t x_0 are
    equivalent,

        E[eps^2] = E[eps]^2 + a_t^2 Var(v),    E[eps^3] = E[eps]^3 + 3 E[eps] a_t^2 Var(v) + a_t^3 third(v),

    but avoid the cancellation in E[eps^2] - E[eps]^2 where eps is almost known, and have the same scale at all t. They are
    the means of r^2 and r^3 for the error r of the network's v, so they are learned by regression on these.

    Args:
        feature_channels: input channels of the last convolution of the UNet.
        channels: channels of the latents.
        norm_num_groups: groups of every GroupNorm.
    """

    @register_to_config
    def __init__(self, feature_channels: int, channels: int, norm_num_groups: int = 8) -> None:
        super().__init__()
        width = 4 * feature_channels
        self.time_proj = Timesteps(feature_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(feature_channels, width)
        self.block = ResidualBlock(feature_channels, feature_channels, norm_num_groups)
        self.modulation = nn.Linear(width, assign_modulation_slices(self))
        self.norm_out = nn.GroupNorm(norm_num_groups, feature_channels)
        self.conv_out = zero_init(nn.Conv2d(feature_channels, 2 * channels, 3, padding=1))

    @classmethod
    def for_unet(cls, unet: SMDUNet2DModel | UNet2DModel) -> MomentHeads:
        """Make untrained heads for a UNet. Raises ValueError for a denoiser that does not end in a convolution."""
        if not hasattr(unet, "conv_out"):
            raise ValueError(f"unet: expected a UNet with a conv_out, found {type(unet).__name__}")
        return cls(unet.conv_out.in_channels, unet.config.in_channels, unet.config.norm_num_groups)

    def forward(self, features: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map features (B, feature_channels, H, W), timestep (B,) to variance and third central moment, each (B, C, H, W)."""
        embedding = F.silu(self.time_embedding(self.time_proj(timestep).to(features.dtype)))
        h = self.block(features, self.modulation(embedding))
        variance, third = self.conv_out(F.silu(self.norm_out(h))).float().chunk(2, dim=1)
        return F.softplus(variance + START), third

    def predict(
        self,
        unet: SMDUNet2DModel | UNet2DModel,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the input of GMSScheduler from one pass of the UNet: (B, 3 C, H, W), its prediction and the two moments."""
        wanted, found = (self.config.feature_channels, self.config.channels), (unet.conv_out.in_channels, sample.shape[1])
        if wanted != found:
            raise ValueError(
                f"unet: expected the one these heads were trained on, with (features, latents) of {wanted} channels, found "
                f"{found}; train heads for another with tools/train_moments.py"
            )
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        read: list[torch.Tensor] = []
        hook = unet.conv_out.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            prediction = predict(unet, sample, timestep, class_labels, image_embeds=image_embeds)
        finally:
            hook.remove()
        variance, third = self(read[0].to(self.dtype), timestep)
        return torch.cat((prediction.float(), variance, third), dim=1)
