"""The base of a study on scikit-learn's bundled digits: SimCLR with crops, on which EquiMod is
conditioned. Four augmentations are off until `eqssl study` gives them a role. The half turn
makes a 9 of a 6.

Command:   eqssl study --config digits_study --augs rotate,flip,blur,erase --out runs/study
Published: nothing; the data set is 1,797 scans of 8x8 pixels, of which 1,000 are for training here.
Measured:  docs/results.md, section "A study of digits".
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 16,
      'batch': 125,
      'epochs': 20.,
      'data': {'name': 'digits'},
      'encoder': {'name': 'resnet', 'depth': 10, 'stem': 'half', 'width': 12, 'zero_init': False},
      'augment': {
          'order': ('crop', 'flip', 'blur', 'erase', 'rotate'),
          'crop': {'role': 'both', 'scale': (.3, 1.), 'method': 'bilinear'},
          'flip': {'role': 'off'},
          'blur': {'role': 'off'},
          'erase': {'role': 'off'},
          'rotate': {'role': 'off', 'fold': 2},
      },
      'invariance': {'name': 'simclr', 'temperature': .2, 'projector': {'hidden': (128,), 'out': 64}},
      'equivariance': {'name': 'equimod', 'weight': 1., 'temperature': .2, 'hidden': (128,), 'dim': 64,
                       'action_dim': 64},
      'optimizer': {'name': 'adamw', 'lr': 3e-3, 'weight_decay': 1e-4, 'warmup_epochs': 3.},
      'checkpoint_every': 80,  # a run takes a minute
  })
