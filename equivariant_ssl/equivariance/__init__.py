"""Equivariance objectives: a head and a loss over pairs, one method a file."""
