"""SimCLR on CIFAR-10 as EquiMod's authors trained their baseline: ResNet-18, LARS, 800 epochs.

Command:   eqssl data prepare cifar10
           eqssl train --config cifar10_simclr --workdir runs/c10_simclr
           eqssl eval runs/c10_simclr --protocol equimod
Published: linear top-1 90.96 % (EquiMod's README; github.com/ADevillers/EquiMod, arXiv 2211.01244).
Measured:  docs/results.md, once a GPU has run it; benchmarks/gpu/README.md lists the runs that are
           owed.
Differs:   The networks compute in bfloat16; the official code computes in float16 with loss
           scaling. Colors are not rounded to 8 bits after each change (augment.jitter.quantize and
           augment.gray.quantize would do so).
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 32,
      'batch': 512,
      'epochs': 800.,
      'dtype': 'bfloat16',
      'data': {'name': 'cifar10'},
      'encoder': {'name': 'resnet', 'depth': 18, 'stem': 'cifar', 'width': 64, 'init': 'stem'},
      'augment': {
          'order': ('crop', 'flip', 'jitter', 'gray'),
          'crop': {'role': 'both', 'scale': (.2, 1.), 'method': 'bicubic'},
          'flip': {'role': 'both', 'p': .5},
          'jitter': {'role': 'both', 'p': .8, 'brightness': .4, 'contrast': .4, 'saturation': .4, 'hue': .1},
          'gray': {'role': 'both', 'p': .2},
      },
      'invariance': {'name': 'simclr', 'temperature': .5},
      'equivariance': {'name': 'none'},
      'optimizer': {'name': 'lars', 'lr': 4., 'weight_decay': 1e-6, 'momentum': .9, 'trust': 1e-3,
                    'warmup_epochs': 10., 'end': 1e-8},
      'log_every': 97,
  })
