"""SimCLR + E-SSL on ImageNet at the official settings: ResNet-50, LARS, 100 epochs (or 200, 300, 800).

Command:   eqssl train --config imagenet_simclr_essl --workdir runs/in_simclr_essl
           eqssl eval runs/in_simclr_essl --protocol equimod
Published: linear top-1 after 100, 200, 300, 800 epochs 68.2, 70.2, 71.3, 72.5 %, against 67.6,
           69.7, 70.4, 71.9 % without E-SSL (github.com/rdangovs/essl, arXiv 2111.00899).
Planned:   40.83 million parameters, 268 TFLOP a step, 8.38 EFLOP in all. What a device needs, its own compiler says:
           eqssl train --config imagenet_simclr_essl --plan --on h100:8
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
      'batch': 4096,
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
      'invariance': {'name': 'simclr', 'temperature': .2, 'negatives': 'cross',
                     'projector': {'last_norm': 'batch'}},
      'equivariance': {'name': 'essl', 'weight': .4, 'size': 96, 'crop_scale': (.05, .14), 'hidden': (2048, 2048, 128),
                       'hidden_activation_last': False},
      # an absolute rate, which ends at .001 of that
      'optimizer': {'name': 'lars', 'lr': 4.8, 'weight_decay': 1e-6, 'momentum': .9, 'trust': 1e-3, 'lr_outside': True,
                    'warmup_epochs': 10., 'end': 4.8e-3},
      'log_every': 100,
      'checkpoint_every': 500,
  })
