"""VICReg on ImageNet at the official settings: ResNet-50, LARS, 1000 epochs.

Command:   eqssl train --config imagenet_vicreg --workdir runs/in_vicreg
           eqssl eval runs/in_vicreg --protocol equimod
Published: linear top-1 73.2 % (README of github.com/facebookresearch/vicreg, arXiv 2105.04906).
Measured:  nothing yet, for want of an accelerator.
Differs:   Crops are cut from the image squashed to 256 x 256. The blur is a Gaussian cut off at 23
           pixels; the code's is Pillow's approximation of one. The networks compute in bfloat16;
           the official code computes in float16 with loss scaling. The similarity is a mean over
           dimensions too, as in the code and not as in the paper. Colors are not rounded to 8 bits
           after each change (augment.jitter.quantize and augment.gray.quantize would do so).
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 224,
      'batch': 2048,
      'epochs': 1000.,
      'dtype': 'bfloat16',
      'batchnorm': 'view',
      'data': {'name': 'tfds', 'dataset': 'imagenet2012', 'train': 'train', 'test': 'validation', 'size': 256},
      'encoder': {'name': 'resnet', 'depth': 50, 'stem': 'imagenet', 'width': 64},
      'augment': {
          'order': ('crop', 'flip', 'jitter', 'gray', 'blur', 'solarize'),
          'second': {'blur': {'p': .1}, 'solarize': {'p': .2}},
          'crop': {'role': 'both', 'scale': (.08, 1.), 'method': 'bicubic'},
          'flip': {'role': 'both', 'p': .5},
          'jitter': {'role': 'both', 'p': .8, 'brightness': .4, 'contrast': .4, 'saturation': .2, 'hue': .1},
          'gray': {'role': 'both', 'p': .2},
          'blur': {'role': 'both', 'p': 1., 'kernel': 23, 'sigma': (.1, 2.)},
          'solarize': {'role': 'both', 'p': 0.},
      },
      'invariance': {'name': 'vicreg', 'similarity': 25., 'std': 25., 'cov': 1.},
      'equivariance': {'name': 'none'},
      # .2 x 2048 / 256, which ends at .001 of that
      'optimizer': {'name': 'lars', 'lr': 1.6, 'weight_decay': 1e-6, 'momentum': .9, 'trust': 1e-3, 'lr_outside': True,
                    'warmup_epochs': 10., 'end': 1.6e-3},
      'log_every': 100,
      'checkpoint_every': 500,
  })
