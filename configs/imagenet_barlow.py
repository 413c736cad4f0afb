"""Barlow Twins on ImageNet at the official settings: ResNet-50, LARS, 1000 epochs.

Command:   eqssl train --config imagenet_barlow --workdir runs/in_barlow
           eqssl eval runs/in_barlow --protocol equimod
Published: linear top-1 73.5 % in the README, 73.2 % in the paper (github.com/facebookresearch/barlowtwins, arXiv
           2103.03230).
Planned:   174.54 million parameters, 103 TFLOP a step, 64.3 EFLOP in all. 22.0 GiB of 71.2 on each
           of 8 x NVIDIA H100 SXM 80 GB: fits; 7.5 GiB of 16.0 on each of 32 x TPU v5e: fits (eqssl
           train --config imagenet_barlow --plan --on h100:8 or v5e:4x8; jax 0.10.2,
           jax-cuda13-plugin 0.10.2; jax 0.10.2, libtpu 0.0.42.1).
Measured:  nothing yet, for want of an accelerator.
Differs:   Crops are cut from the image squashed to 256 x 256. The blur is a Gaussian cut off at 23
           pixels; the code's is Pillow's approximation of one. The networks compute in bfloat16;
           the official code computes in float16 with loss scaling. Colors are not rounded to 8 bits
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
      'invariance': {'name': 'barlow', 'redundancy': .0051},
      'equivariance': {'name': 'none'},
      # .2 x 2048 / 256, biases and BatchNorm .0048 x 2048 / 256; both end at .001 of that
      'optimizer': {'name': 'lars', 'lr': 1.6, 'weight_decay': 1e-6, 'momentum': .9, 'trust': 1e-3, 'lr_outside': True,
                    'bias_scale': .0048 / .2, 'warmup_epochs': 10., 'end': 1.6e-3},
      'log_every': 100,
      'checkpoint_every': 500,
  })
