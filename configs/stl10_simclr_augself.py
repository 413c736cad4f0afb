"""SimCLR + AugSelf on STL-10 at the official settings: ResNet-18, SGD, 200 epochs; AugSelf is about
the crop and the jitter.

Command:   eqssl train --config stl10_simclr_augself --workdir runs/stl10_simclr_augself
Published: linear top-1 84.99 +- 1.05 %, against 84.74 +- .18 % without AugSelf (3 seeds, measured
           by STL's authors: their Table 11, arXiv 2501.08712). The settings are those of
           github.com/hankook/AugSelf, arXiv 2111.09613.
Measured:  nothing yet.
Differs:   the mirrored center of the crop is right for both views; the code mirrors the second
           view's center by the first view's flips. 100,000 of the training images have no label, so
           eqssl eval uses the images and labels of the split `train` (data.labeled).
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 96,
      'batch': 256,
      'epochs': 200.,
      'batchnorm': 'view',
      'data': {'name': 'tfds', 'dataset': 'stl10', 'train': 'train+unlabelled', 'labeled': 'train',
               'test': 'test'},
      'mean': (.43, .42, .39),
      'std': (.27, .26, .27),
      'encoder': {'name': 'resnet', 'depth': 18, 'stem': 'imagenet', 'width': 64, 'init': 'torch'},
      'augment': {
          'order': ('crop', 'flip', 'jitter', 'gray', 'blur'),
          'crop': {'role': 'both', 'scale': (.2, 1.), 'method': 'bilinear'},
          'flip': {'role': 'invariant', 'p': .5},
          'jitter': {'role': 'both', 'p': .8, 'brightness': .4, 'contrast': .4, 'saturation': .4, 'hue': .1},
          'gray': {'role': 'invariant', 'p': .2},
          'blur': {'role': 'invariant', 'p': .5, 'kernel': 9, 'sigma': (.1, 2.)},
      },
      'invariance': {'name': 'simclr', 'temperature': .2,
                     'projector': {'hidden': (512,), 'out': 128, 'last_bias': True, 'last_norm': 'none'}},
      'equivariance': {'name': 'augself', 'weight': 1., 'augmentations': ('crop', 'jitter')},
      # .03 x 256 / 256
      'optimizer': {'name': 'sgd', 'lr': .03, 'weight_decay': 5e-4, 'momentum': .9, 'decay_all': True, 'warmup_epochs': 0.,
                    'cosine': 'epoch'},
      'log_every': 410,
  })
