"""Figures of README and docs (benchmarks/figures.py)."""
