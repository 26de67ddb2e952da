"""A tiny network and batch for few-step methods."""

import torch

from ldm_smd.models.unet import SMDUNet2DModel


def tiny_unet(side=4, channels=3):
    torch.manual_seed(0)
    unet = SMDUNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(16, 16),
        layers_per_block=1,
        attention_levels=(),
        attention_head_dim=8,
        num_classes=2,
        norm_num_groups=4,
        z_channels=0,
    )
    for parameter in unet.parameters():  # weights that are initially zero would hide errors
        torch.nn.init.normal_(parameter, std=0.1)
    return unet


def batch(count=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 4, 4, generator=generator), torch.arange(count) % 3
