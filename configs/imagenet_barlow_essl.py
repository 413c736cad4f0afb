"""Barlow Twins + E-SSL on ImageNet at the official settings: ResNet-50, LARS, 100 epochs (or 200, 300).

Command:   eqssl train --config imagenet_barlow_essl --workdir runs/in_barlow_essl
           eqssl eval runs/in_barlow_essl --protocol equimod
Published: linear top-1 after 100, 200, 300 epochs 67.5, 70.9, 71.8 %, against 66.7, 69.8, 70.9 % without
           (github.com/rdangovs/essl, arXiv 2111.00899).
Measured:  none yet: no accelerator.
Differs:   Crops are of the image squashed to 256 x 256. The views change places, for the turned crop has the first
           one's chances: blur .1 as in the code, and solarize .2 where that has 0; it is resampled by bicubic
           (bilinear in the code). The blur is a Gaussian cut off at 23 pixels (Pillow's approximation in the code);
           bfloat16 in place of float16 with loss scaling. Colors are not rounded to 8 bits between their changes
           (augment.jitter.quantize and augment.gray.quantize do it).
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 224,
      'batch': 4096,
      'epochs': 100.,
      'dtype': 'bfloat16',
      'batchnorm': 'view',
      'data': {'name': 'tfds', 'dataset': 'imagenet2012', 'train': 'train', 'test': 'validation', 'size': 256},
      'encoder': {'name': 'resnet', 'depth': 50, 'stem': 'imagenet', 'width': 64},
      'augment': {
          'order': ('crop', 'flip', 'jitter', 'gray', 'blur', 'solarize', 'rotate'),
          'second': {'blur': {'p': 1.}, 'solarize': {'p': 0.}},
          'crop': {'role': 'invariant', 'scale': (.08, 1.), 'method': 'bicubic'},
          'flip': {'role': 'invariant', 'p': .5},
          'jitter': {'role': 'invariant', 'p': .8, 'brightness': .4, 'contrast': .4, 'saturation': .2, 'hue': .1},
          'gray': {'role': 'invariant', 'p': .2},
          'blur': {'role': 'invariant', 'p': .1, 'kernel': 23, 'sigma': (.1, 2.)},
          'solarize': {'role': 'invariant', 'p': .2},
          'rotate': {'role': 'sensitive'},
      },
      'invariance': {'name': 'barlow', 'redundancy': .0051},
      'equivariance': {'name': 'essl', 'weight': 8., 'size': 96, 'crop_scale': (.05, .14), 'hidden': (2048, 2048, 256),
                       'hidden_activation_last': False},
      # .2 x 4096 / 256, biases and BatchNorm .0048 x 4096 / 256; both end at .001 of that
      'optimizer': {'name': 'lars', 'lr': 3.2, 'weight_decay': 1e-6, 'momentum': .9, 'trust': 1e-3, 'lr_outside': True,
                    'bias_scale': .0048 / .2, 'warmup_epochs': 10., 'end': 3.2e-3},
      'log_every': 100,
      'checkpoint_every': 500,
  })
