"""Sampling from trained models: the tool, and functions for other tools."""
