"""BYOL + E-SSL on ImageNet: BYOL's published settings, and E-SSL's head as it was published with SimCLR.

Command:   eqssl train --config imagenet_byol_essl --workdir runs/in_byol_essl
           eqssl eval runs/in_byol_essl --protocol equimod
Published: nothing; E-SSL's ImageNet results are with SimCLR and SimSiam (arXiv 2111.00899). The
           baseline is this file with --config.equivariance=none, which is imagenet_byol with its
           views in the other order.
Planned:   43.73 million parameters, 333 TFLOP a step, 104 EFLOP in all. What a device needs, its own compiler says:
           eqssl train --config imagenet_byol_essl --plan --on h100:8
Measured:  nothing yet, for want of an accelerator.
Differs:   Crops are cut from the image squashed to 256 x 256. The two views have changed places,
           because the turned crop has the chances of the first view: it is blurred with chance .1
           and solarized with chance .2. Colors, crops and precision are as in imagenet_byol.
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 224,
      'batch': 4096,
      'epochs': 1000.,
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
      'invariance': {'name': 'byol', 'decay': .996},
      'equivariance': {'name': 'essl', 'weight': .4, 'size': 96, 'crop_scale': (.05, .14), 'hidden': (2048, 2048, 128),
                       'hidden_activation_last': False},
      # .2 x 4096 / 256
      'optimizer': {'name': 'lars', 'lr': 3.2, 'weight_decay': 1.5e-6, 'momentum': .9, 'trust': 1e-3, 'lr_outside': True,
                    'warmup_epochs': 10.},
      'log_every': 100,
      'checkpoint_every': 500,
  })
