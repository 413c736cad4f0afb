"""Invariance objectives: a loss over embeddings and the published heads, one method a file, no flax."""
