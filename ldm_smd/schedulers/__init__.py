"""Samplers in the form of diffusers schedulers."""
