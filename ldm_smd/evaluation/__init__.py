"""Measures of samples, mixtures and autoencoders."""
