"""Autoencoders at full size with random weights, since neither time nor memory depends on the weights."""

from diffusers import AutoencoderDC, AutoencoderKL


def stable_diffusion() -> AutoencoderKL:
    """Build the autoencoder of Stable Diffusion: reduction by 8, 4 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )


def deep_compression() -> AutoencoderDC:
    """Build a deep compression autoencoder: reduction by 32, 32 channels."""
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    return AutoencoderDC(encoder_block_types=blocks, decoder_block_types=blocks)
