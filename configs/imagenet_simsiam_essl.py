"""SimSiam + E-SSL on ImageNet at the official settings: ResNet-50, SGD, 100 epochs.

Command:   eqssl train --config imagenet_simsiam_essl --workdir runs/in_simsiam_essl
           eqssl eval runs/in_simsiam_essl --protocol equimod
Published: linear top-1 68.5 %, against 67.9 % without E-SSL (github.com/rdangovs/essl, arXiv
           2111.00899). The baseline is this file with --config.equivariance=none. Its augmentations
           are other ones than SimSiam's own.
Measured:  nothing yet, for want of an accelerator.
Differs:   Crops are cut from the image squashed to 256 x 256. The two views have changed places,
           because the turned crop has the chances of the first view: it is blurred with chance .1,
           as in the code, and solarized with chance .2, which is 0 in the code. It is resampled by
           bicubic interpolation; the code's is bilinear. The blur is a Gaussian cut off at 23
           pixels; the code's is Pillow's approximation of one. The networks compute in bfloat16;
           the official code computes in float16 with loss scaling. Colors are not rounded to 8 bits
           after each change (augment.jitter.quantize and augment.gray.quantize would do so).
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 224,
      'batch': 512,
      'epochs': 100.,
      'dtype': 'bfloat16',
      'batchnorm': 'view',
      'data': {'name': 'tfds', 'dataset': 'imagenet2012', 'train': 'train', 'test': 'validation', 'size': 256},
      'encoder': {'name': 'resnet', 'depth': 50, 'stem': 'imagenet', 'width': 64},
      'augment': {
          'order': ('crop', 'flip', 'jitter', 'gray', 'blur', 'solarize', 'rotate'),
          'second': {'blur': {'p': 1.}, 'solarize': {'p': 0.}},
          'crop': {'role': 'invariant', 'scale': (.08, 1.), 'method': 'bicubic'},
          'flip': {'role': 'invariant', 'p': .5},
          'jitter': {'role': 'invariant', 'p': .8, 'brightness': .4, 'contrast': .4, 'saturation': .2, 'hue': .1},
          'gray': {'role': 'invariant', 'p': .2},
          'blur': {'role': 'invariant', 'p': .1, 'kernel': 23, 'sigma': (.1, 2.)},
          'solarize': {'role': 'invariant', 'p': .2},
          'rotate': {'role': 'sensitive'},
      },
      'invariance': {'name': 'simsiam'},
      'equivariance': {'name': 'essl', 'weight': .08, 'size': 96, 'crop_scale': (.05, .14), 'hidden': (2048, 2048, 256),
                       'hidden_activation_last': False},
      # .05 x 512 / 256
      'optimizer': {'name': 'sgd', 'lr': .1, 'weight_decay': 1e-4, 'momentum': .9, 'decay_all': True, 'warmup_epochs': 0.,
                    'cosine': 'epoch'},
      'log_every': 100,
      'checkpoint_every': 500,
  })
