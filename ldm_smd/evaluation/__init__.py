"""Evaluation of samples, mixtures and autoencoders."""
