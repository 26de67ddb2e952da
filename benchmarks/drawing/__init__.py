"""The figures of README and docs, in one style (benchmarks/figures.py)."""
