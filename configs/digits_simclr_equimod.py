"""SimCLR + EquiMod on scikit-learn's bundled digits. The crop is an invariance. EquiMod is
conditioned on the quarter turn, which only its own views have (role `sensitive`), so that the
features keep it.

Command:   eqssl train --config digits_simclr_equimod --workdir runs/digits_equimod && eqssl eval runs/digits_equimod
           With --config.augment.rotate.role=both the invariance sees the turns as well (EquiMod's published wiring).
Published: nothing; see digits_simclr.
Measured:  docs/results.md, section "Demo".
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
          'order': ('crop', 'rotate'),
          'crop': {'role': 'invariant', 'scale': (.3, 1.), 'method': 'bilinear'},
          'rotate': {'role': 'sensitive'},
      },
      'invariance': {'name': 'simclr', 'temperature': .2, 'projector': {'hidden': (128,), 'out': 64}},
      'equivariance': {'name': 'equimod', 'weight': 1., 'temperature': .2, 'hidden': (128,), 'dim': 64,
                       'action_dim': 64},
      'optimizer': {'name': 'adamw', 'lr': 3e-3, 'weight_decay': 1e-4, 'warmup_epochs': 5.},
  })
