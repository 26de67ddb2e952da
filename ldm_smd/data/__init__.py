"""Pictures in, latents on disk, batches out."""
