"""SimSiam on ImageNet at the official settings: ResNet-50, SGD, 100 epochs.

Command:   eqssl train --config imagenet_simsiam --workdir runs/in_simsiam
           eqssl eval runs/in_simsiam --protocol equimod
Published: linear top-1 68.1 % (README of github.com/facebookresearch/simsiam, arXiv 2011.10566).
Measured:  nothing yet, for want of an accelerator.
Differs:   Crops are cut from the image squashed to 256 x 256. The blur is a Gaussian cut off at 23
           pixels; the code's is Pillow's approximation of one. Colors are not rounded to 8 bits
           after each change (augment.jitter.quantize and augment.gray.quantize would do so).
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 224,
      'batch': 512,
      'epochs': 100.,
      'batchnorm': 'view',
      'data': {'name': 'tfds', 'dataset': 'imagenet2012', 'train': 'train', 'test': 'validation', 'size': 256},
      'encoder': {'name': 'resnet', 'depth': 50, 'stem': 'imagenet', 'width': 64},
      'augment': {
          'order': ('crop', 'flip', 'jitter', 'gray', 'blur'),
          'crop': {'role': 'both', 'scale': (.2, 1.), 'method': 'bilinear'},
          'flip': {'role': 'both', 'p': .5},
          'jitter': {'role': 'both', 'p': .8, 'brightness': .4, 'contrast': .4, 'saturation': .4, 'hue': .1},
          'gray': {'role': 'both', 'p': .2},
          'blur': {'role': 'both', 'p': .5, 'kernel': 23, 'sigma': (.1, 2.)},
      },
      'invariance': {'name': 'simsiam'},
      'equivariance': {'name': 'none'},
      # .05 x 512 / 256
      'optimizer': {'name': 'sgd', 'lr': .1, 'weight_decay': 1e-4, 'momentum': .9, 'decay_all': True, 'warmup_epochs': 0.,
                    'cosine': 'epoch'},
      'log_every': 100,
      'checkpoint_every': 500,
  })
