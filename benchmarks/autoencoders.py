"""Autoencoders of the sizes that are used, with random weights, on which neither time nor memory depends."""

from diffusers import AutoencoderDC, AutoencoderKL


def stable_diffusion() -> AutoencoderKL:
    """f8, 4 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )


def deep_compression() -> AutoencoderDC:
    """f32, 32 channels."""
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    return AutoencoderDC(encoder_block_types=blocks, decoder_block_types=blocks)
