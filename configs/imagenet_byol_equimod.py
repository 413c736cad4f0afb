"""BYOL + EquiMod on ImageNet at the official settings: every augmentation has the role `both`.

Command:   eqssl train --config imagenet_byol_equimod --workdir runs/in_byol_equimod
           eqssl eval runs/in_byol_equimod --protocol equimod
Published: linear top-1 73.22 %, against 74.03 % without EquiMod: worse, at 1000 epochs (EquiMod's
           README; github.com/ADevillers/EquiMod, arXiv 2211.01244). The baseline is this file with
           --config.equivariance=none, and not imagenet_byol.
Planned:   43.75 million parameters, 361 TFLOP a step, 113 EFLOP in all. 59.2 GiB of 71.2 on each of
           8 x NVIDIA H100 SXM 80 GB: fits; 13.7 GiB of 16.0 on each of 32 x TPU v5e: fits (eqssl
           train --config imagenet_byol_equimod --plan --on h100:8 or v5e:4x8; jax 0.10.2,
           jax-cuda13-plugin 0.10.2; jax 0.10.2, libtpu 0.0.42.1).
Measured:  nothing yet, for want of an accelerator.
Differs:   Crops are cut from the image squashed to 256 x 256. The conditioning has the crop in
           fractions of the image. The head's conditioning is in units measured for these
           augmentations; the code's BYOL branch keeps the constants of augmentations with other
           strengths and chances. The networks compute in bfloat16; the official code computes in
           float16 with loss scaling. Colors are not rounded to 8 bits after each change
           (augment.jitter.quantize and augment.gray.quantize would do so).
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 224,
      'batch': 4096,
      'epochs': 1000.,
      'dtype': 'bfloat16',
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
      'invariance': {'name': 'byol', 'decay': .996, 'update': 'before',
                     'projector': {'hidden': (4096,), 'out': 256, 'bias': False, 'last_bias': True},
                     'predictor': {'hidden': (4096,), 'out': 256, 'bias': False, 'last_bias': True}},
      'equivariance': {'name': 'equimod', 'weight': 1., 'temperature': .2, 'reference_side': .875},
      'optimizer': {'name': 'lars', 'lr': 4.8, 'weight_decay': 1.5e-6, 'momentum': .9, 'trust': 1e-3,
                    'warmup_epochs': 10., 'end': 1e-8},
      'log_every': 100,
      'checkpoint_every': 500,
  })
