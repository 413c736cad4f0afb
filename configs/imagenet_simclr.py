"""SimCLR on ImageNet as EquiMod's authors trained their baseline: ResNet-50, LARS, 800 epochs.

Command:   eqssl train --config imagenet_simclr --workdir runs/in_simclr
           eqssl eval runs/in_simclr --protocol equimod
Published: linear top-1 71.57 % (EquiMod's README; github.com/ADevillers/EquiMod, arXiv 2211.01244).
           SimCLR's own code, with other settings, has 64.5 % after 100 epochs (README of
           github.com/google-research/simclr).
Planned:   32.17 million parameters, 197 TFLOP a step, 49.2 EFLOP in all. 40.1 GiB of 71.2 on each
           of 8 x NVIDIA H100 SXM 80 GB: fits; 9.0 GiB of 16.0 on each of 32 x TPU v5e: fits (eqssl
           train --config imagenet_simclr --plan --on h100:8 or v5e:4x8; jax 0.10.2,
           jax-cuda13-plugin 0.10.2; jax 0.10.2, libtpu 0.0.42.1).
Measured:  nothing yet, for want of an accelerator.
Differs:   Crops are cut from the image squashed to 256 x 256. The networks compute in bfloat16; the
           official code computes in float16 with loss scaling. Colors are not rounded to 8 bits
           after each change (augment.jitter.quantize and augment.gray.quantize would do so).
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 224,
      'batch': 4096,
      'epochs': 800.,
      'dtype': 'bfloat16',
      'data': {'name': 'tfds', 'dataset': 'imagenet2012', 'train': 'train', 'test': 'validation', 'size': 256},
      'encoder': {'name': 'resnet', 'depth': 50, 'stem': 'imagenet', 'width': 64},
      'augment': {
          'order': ('crop', 'flip', 'jitter', 'gray', 'blur'),
          'crop': {'role': 'both', 'scale': (.08, 1.), 'method': 'bicubic'},
          'flip': {'role': 'both', 'p': .5},
          'jitter': {'role': 'both', 'p': .8, 'brightness': .8, 'contrast': .8, 'saturation': .8, 'hue': .2},
          'gray': {'role': 'both', 'p': .2},
          'blur': {'role': 'both', 'p': .5, 'kernel': 23, 'sigma': (.1, 2.)},
      },
      'invariance': {'name': 'simclr', 'temperature': .2},
      'equivariance': {'name': 'none'},
      'optimizer': {'name': 'lars', 'lr': 2.4, 'weight_decay': 1e-6, 'momentum': .9, 'trust': 1e-3,
                    'warmup_epochs': 10., 'end': 1e-8},
      'log_every': 100,
      'checkpoint_every': 500,
  })
