"""SimSiam + E-SSL on CIFAR-10 at the official settings.

Command:   eqssl data prepare cifar10
           eqssl train --config cifar10_simsiam_essl --workdir runs/c10_simsiam_essl
           eqssl eval runs/c10_simsiam_essl --protocol essl --seeds 0,1,2,3,4
Published: nothing that we could read, because the README shows its table as a picture
           (github.com/rdangovs/essl, arXiv 2111.00899, cifar10/).
Measured:  docs/results.md, once a GPU has run it; benchmarks/gpu/README.md lists the runs that are
           owed.
Differs:   The networks compute in bfloat16; the official code computes in float16 with loss
           scaling. The baseline, cifar10_simsiam, has half the learning rate. The head has no ReLU
           after its second LayerNorm, as in the SimSiam branch of the code; the SimCLR branch has
           one. Colors are not rounded to 8 bits after each change (augment.jitter.quantize and
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
      'batchnorm': 'view',
      'data': {'name': 'cifar10'},
      'mean': (.4914, .4822, .4465),
      'std': (.2023, .1994, .2010),
      'encoder': {'name': 'resnet', 'depth': 18, 'stem': 'cifar', 'width': 64, 'zero_init': False},
      'augment': {
          'order': ('crop', 'flip', 'jitter', 'gray', 'rotate'),
          'crop': {'role': 'invariant', 'scale': (.2, 1.), 'method': 'bilinear'},
          'flip': {'role': 'invariant', 'p': .5},
          'jitter': {'role': 'invariant', 'p': .8, 'brightness': .4, 'contrast': .4, 'saturation': .4, 'hue': .1},
          'gray': {'role': 'invariant', 'p': .2},
          'rotate': {'role': 'sensitive'},
      },
      'invariance': {'name': 'simsiam', 'projector': {'hidden': (2048,), 'out': 2048}},
      'equivariance': {'name': 'essl', 'weight': .4, 'hidden_activation_last': False},
      # .06 x 512 / 256
      'optimizer': {'name': 'sgd', 'lr': .12, 'weight_decay': 5e-4, 'momentum': .9, 'decay_all': True,
                    'warmup_epochs': 10.},
      'log_every': 97,
  })
