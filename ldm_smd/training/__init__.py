"""Training loops and their common parts."""
