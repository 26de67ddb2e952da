"""Sampling from trained models: tools/sample.py, and functions that other tools use."""
