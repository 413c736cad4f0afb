"""Barlow Twins on CIFAR-10 at solo-learn's tuned settings: ResNet-18, LARS, 1000 epochs.

Command:   eqssl data prepare cifar10
           eqssl train --config cifar10_barlow --workdir runs/c10_barlow
           eqssl eval runs/c10_barlow --protocol equimod
Published: online top-1 92.10 %. This is the accuracy of a classifier that trains along with the
           network on augmented images, and not that of a linear evaluation (solo-learn's README;
           github.com/vturrisi/solo-learn, scripts/pretrain/cifar). Barlow Twins's own code is for
           ImageNet only.
Measured:  docs/results.md, once a GPU has run it; benchmarks/gpu/README.md lists the runs that are
           owed.
Differs:   The networks compute in bfloat16; the official code computes in float16 with loss
           scaling. The warm-up goes from 0 at step 0 to the peak at step 1950; solo-learn's goes
           from 3e-5 at step 0 to the peak one step earlier. Colors are not rounded to 8 bits after
           each change (augment.jitter.quantize and augment.gray.quantize would do so).
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 32,
      'batch': 256,
      'epochs': 1000.,
      'dtype': 'bfloat16',
      'batchnorm': 'view',
      'data': {'name': 'cifar10'},
      'mean': (.4914, .4822, .4465),
      'std': (.2470, .2435, .2616),
      'encoder': {'name': 'resnet', 'depth': 18, 'stem': 'solo', 'width': 64, 'zero_init': False, 'init': 'stem'},
      'augment': {
          'order': ('crop', 'flip', 'jitter', 'gray', 'solarize'),
          'second': {'solarize': {'p': .2}},
          'crop': {'role': 'both', 'scale': (.08, 1.), 'method': 'bicubic'},
          'flip': {'role': 'both', 'p': .5},
          'jitter': {'role': 'both', 'p': .8, 'brightness': .4, 'contrast': .4, 'saturation': .2, 'hue': .1},
          'gray': {'role': 'both', 'p': .2},
          'solarize': {'role': 'both', 'p': 0.},
      },
      'invariance': {'name': 'barlow', 'redundancy': .0051, 'scale': .1,
                     'projector': {'hidden': (2048, 2048), 'out': 2048, 'bias': True, 'last_bias': True}},
      'equivariance': {'name': 'none'},
      'optimizer': {'name': 'lars', 'lr': .3, 'weight_decay': 1e-4, 'momentum': .9, 'trust': .02, 'lr_outside': True,
                    'clip': True, 'warmup_epochs': 10.},
      'log_every': 195,
  })
