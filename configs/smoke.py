"""Eight steps of SimCLR + EquiMod on the digits, with the smallest network: a check that everything
still fits together.

Command:   eqssl train --config smoke --workdir runs/smoke
Published: nothing.
Measured:  nothing; the tests train it.
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 16,
      'batch': 16,
      'steps': 8,
      'data': {'name': 'digits'},
      'encoder': {'name': 'resnet', 'depth': 10, 'stem': 'cifar', 'width': 4},
      'augment': {
          'order': ('crop', 'flip', 'rotate'),
          'crop': {'role': 'both', 'scale': (.3, 1.), 'method': 'bilinear'},
          'flip': {'role': 'invariant'},
          'rotate': {'role': 'both'},
      },
      'invariance': {'name': 'simclr', 'projector': {'hidden': (16,), 'out': 8}},
      'equivariance': {'name': 'equimod', 'hidden': (16,), 'dim': 8, 'action_dim': 8},
      'optimizer': {'name': 'sgd', 'lr': .05, 'warmup_epochs': 0.},
      'log_every': 1,
      'checkpoint_every': 4,
  })
