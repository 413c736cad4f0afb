"""Augmentations that return what they did: one op a file, and the algebra that composes them."""
from equivariant_ssl.augment.algebra import (
  augment,
  chain,
  class_of,
  normalized,
  only,
  reference,
  relative,
  sometimes,
  unite,
  views,
)

__all__ = ['augment', 'chain', 'class_of', 'normalized', 'only', 'reference', 'relative',
           'sometimes', 'unite', 'views']
