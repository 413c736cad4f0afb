"""Self-supervised learning of images that keeps what augmentations do.

Dimension letters, used as name suffixes where the order is not obvious (`z_BVE`) and in docstrings:

  B  images of the global batch (always leads)   V  views of one image     H W C  pixels, channels
  D  encoder features                            E  embedding              A      encoded action
  N  pairs (= B x V, B-major)                    K  classes                S      side of a square view

Words: `action` = what an augmentation drew and applied (its returned parameters); `params`, `stats` =
network weights and BatchNorm statistics; `view` = an image after an action; `reference` = the view whose
action is the identity; `pair` = (source, target, the action between them).
"""

__version__ = '0.1.0'
