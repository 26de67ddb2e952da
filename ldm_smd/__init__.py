"""Latent diffusion with soft mixture denoising."""
