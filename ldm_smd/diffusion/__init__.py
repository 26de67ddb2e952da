"""The mathematics of diffusion. Depends on torch only, without input or output."""
