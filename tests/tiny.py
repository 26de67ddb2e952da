"""Sizes and settings of the tiny models of the tests."""

from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel

MIXTURE = {"z_channels": 8, "identifier_channels": 8, "hypernetwork_width": 8}
SIZES = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "up_layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    **MIXTURE,
}
"""Arguments of an SMDUNet2DModel, without those of latents and classes."""

TINY_MODEL = [f"model.{name}={list(value) if isinstance(value, tuple) else value}" for name, value in SIZES.items()]
"""SIZES as settings of tools/train.py."""

TINY_AUTOENCODER = ["model.block_out_channels=[8,8]", "model.latent_channels=4", "model.norm_num_groups=4"]
"""Settings of tools/train_autoencoder.py, 16x16 pixels -> 4x8x8 latents."""


def training(shards, autoencoder, output, *overrides):
    """Return settings of tools/train.py for 8 steps with two checkpoints and four reports."""
    return [
        f"shards={shards}",
        f"autoencoder={autoencoder}",
        f"output={output}",
        "images_total=64",
        "batch_size=8",
        "objective.draws=2",
        "warmup_images=16",
        "ema_halflife_images=32",
        "log_every_images=16",
        "sample_every_images=1000000",
        "checkpoint_every_images=32",
        "sample_steps=2",
        *TINY_MODEL,
        *overrides,
    ]


def diffusers_unet(**changes):
    """Build an untrained UNet2DModel of diffusers for 4x8x8 latents of three classes, or of two and the null class."""
    sizes = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "num_class_embeds": 3,
    }
    return UNet2DModel(**{**sizes, **changes})


def diffusers_dit(**changes):
    """Build an untrained DiTTransformer2DModel of diffusers for 4x8x8 latents of three classes."""
    sizes = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_embeds_ada_norm": 3,
    }
    return DiTTransformer2DModel(**{**sizes, **changes})


def diffusers_condition(**changes):
    """Build an untrained UNet2DConditionModel of diffusers for 4x8x8 latents, with the layout of Stable Diffusion."""
    sizes = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 12,
    }
    return UNet2DConditionModel(**{**sizes, **changes})


def diffusers_sd3(**changes):
    """Build an untrained SD3Transformer2DModel of diffusers for 4x8x8 latents."""
    sizes = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 8,
    }
    return SD3Transformer2DModel(**{**sizes, **changes})
