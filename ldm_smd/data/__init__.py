"""Image sources, latent shards and batches of latents."""
