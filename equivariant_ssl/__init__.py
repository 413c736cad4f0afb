"""Self-supervised learning of images that keeps what augmentations do.

Capital letters are dimensions, in docstrings, and as suffixes of names where the order is not
obvious (`z_BVE`):

  B  images of the global batch (always first)  V  views of one image  H W C  pixels, channels
  D  features of the encoder                    E  embedding           A      conditioning
  N  pairs (= B x V, B-major)                   K  classes             S      side of a square view

`docs/glossary.md` has one sentence for each word. The first ones: an `action` is what an
augmentation drew and applied (the parameters that it returns); a `view` is an image after an
action; the `reference` is the view whose action is the identity; a `pair` is (source, target, the
actions that made them); `params` and `stats` are the weights of the networks and their BatchNorm
statistics.
"""

__version__ = '0.1.0'
