"""Invariance objectives: a loss over embeddings with its published heads, one method a file."""
