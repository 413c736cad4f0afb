"""Networks in flax.linen, which is imported here and in `equivariance/` alone."""
