"""SimCLR + STL on STL-10 at the official settings: ResNet-18, SGD, 200 epochs; STL has no
conditioning.

Command:   eqssl train --config stl10_simclr_stl --workdir runs/stl10_simclr_stl
Published: linear top-1 84.83 %, against 84.74 +- .18 % without STL (3 seeds, the paper's Table 11,
           arXiv 2501.08712; github.com/jaemyung-u/stl).
Measured:  nothing yet.
Differs:   neighboring images share the flip and the blur too; in the code they share only crop,
           jitter and gray. The weight of the transformation loss is .1, as in the README; it is .2
           in the paper. The hypernetwork has a bias. 100,000 of the training images have no label,
           so eqssl eval uses the images and labels of the split `train` (data.labeled).
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 96,
      'batch': 256,
      'epochs': 200.,
      'batchnorm': 'view',
      'data': {'name': 'tfds', 'dataset': 'stl10', 'train': 'train+unlabelled', 'labeled': 'train',
               'test': 'test'},
      'mean': (.43, .42, .39),
      'std': (.27, .26, .27),
      'encoder': {'name': 'resnet', 'depth': 18, 'stem': 'imagenet', 'width': 64},
      'augment': {
          'order': ('crop', 'flip', 'jitter', 'gray', 'blur'),
          'crop': {'role': 'both', 'scale': (.2, 1.), 'method': 'bilinear'},
          'flip': {'role': 'both', 'p': .5},
          'jitter': {'role': 'both', 'p': .8, 'brightness': .4, 'contrast': .4, 'saturation': .4, 'hue': .1},
          'gray': {'role': 'both', 'p': .2},
          'blur': {'role': 'both', 'p': .5, 'kernel': 9, 'sigma': (.1, 2.)},
      },
      'invariance': {'name': 'simclr', 'temperature': .2,
                     'projector': {'hidden': (512,), 'out': 128, 'last_norm': 'none'}},
      'equivariance': {'name': 'stl', 'weight': 1., 'temperature': .2, 'equivariant': 1., 'transformation': .1,
                       'aligned': 'views', 'hidden': (512,)},
      'optimizer': {'name': 'sgd', 'lr': .03, 'weight_decay': 5e-4, 'momentum': .9, 'decay_all': True, 'warmup_epochs': 0.,
                    'cosine': 'epoch'},
      'log_every': 410,
  })
