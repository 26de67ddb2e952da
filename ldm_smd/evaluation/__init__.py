"""Measuring what the models make."""
