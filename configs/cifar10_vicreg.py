"""VICReg on CIFAR-10 at solo-learn's tuned settings: ResNet-18, LARS, 1000 epochs.

Command:   eqssl data prepare cifar10
           eqssl train --config cifar10_vicreg --workdir runs/c10_vicreg
           eqssl eval runs/c10_vicreg --protocol equimod
Published: online top-1 92.07 %. This is the accuracy of a classifier that trains along with the
           network on augmented images, and not that of a linear evaluation (solo-learn's README;
           github.com/vturrisi/solo-learn, scripts/pretrain/cifar). VICReg's own code is for
           ImageNet only.
Measured:  docs/results.md, once a GPU has run it; benchmarks/gpu/README.md lists the runs that are
           owed.
Differs:   The networks compute in bfloat16; the official code computes in float16 with loss
           scaling. The warm-up goes from 0 at step 0 to the peak at step 1950; solo-learn's goes
           from 3e-5 at step 0 to the peak one step earlier. std is 50, because solo-learn's
           variance term is 25 (V1 + V2); the term of VICReg's own code is 25 (V1 + V2) / 2, and
           here std multiplies (V1 + V2) / 2. Colors are not rounded to 8 bits after each change
           (augment.jitter.quantize and augment.gray.quantize would do so).
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
          'crop': {'role': 'both', 'scale': (.2, 1.), 'method': 'bicubic'},
          'flip': {'role': 'both', 'p': .5},
          'jitter': {'role': 'both', 'p': .8, 'brightness': .4, 'contrast': .4, 'saturation': .2, 'hue': .1},
          'gray': {'role': 'both', 'p': .2},
          'solarize': {'role': 'both', 'p': .1},
      },
      'invariance': {'name': 'vicreg', 'similarity': 25., 'std': 50., 'cov': 1.,  # std: see cifar10_vicreg
                     'projector': {'hidden': (2048, 2048), 'out': 2048, 'bias': True, 'last_bias': True}},
      'equivariance': {'name': 'none'},
      'optimizer': {'name': 'lars', 'lr': .3, 'weight_decay': 1e-4, 'momentum': .9, 'trust': .02, 'lr_outside': True,
                    'clip': True, 'warmup_epochs': 10.},
      'log_every': 195,
  })
