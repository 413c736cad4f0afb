"""SimSiam on scikit-learn's bundled digits, with a narrow network; see digits_simclr.

Command:   eqssl train --config digits_simsiam --workdir runs/digits_simsiam && eqssl eval runs/digits_simsiam
Published: nothing; the data set is 1,797 scans of 8x8 pixels, of which 1,000 are for training here.
Measured:  docs/results.md, section "Methods on the digits".
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 16,
      'batch': 125,
      'epochs': 40.,
      'data': {'name': 'digits'},
      'encoder': {'name': 'resnet', 'depth': 10, 'stem': 'half', 'width': 12, 'zero_init': False},
      'augment': {
          'order': ('crop',),
          'crop': {'role': 'invariant', 'scale': (.3, 1.), 'method': 'bilinear'},
      },
      'invariance': {'name': 'simsiam', 'projector': {'hidden': (128,), 'out': 64},
                     'predictor': {'hidden': (32,), 'out': 64}},
      'equivariance': {'name': 'none'},
      'optimizer': {'name': 'adamw', 'lr': 3e-3, 'weight_decay': 1e-4, 'warmup_epochs': 5.},
  })
