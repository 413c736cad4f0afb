"""BYOL on ImageNet at the official settings: ResNet-50, LARS, 1000 epochs.

Command:   eqssl train --config imagenet_byol --workdir runs/in_byol
           eqssl eval runs/in_byol --protocol equimod
Published: linear top-1 74.3 % in the paper, 74.4 % in the README
           (github.com/google-deepmind/deepmind-research, byol/; arXiv 2006.07733). The code also
           has presets for 40, 100 and 300 epochs: learning rates of .45, .45 and .3 x B / 256,
           decays of the target of .97, .99 and .99, and a weight decay of 1e-6.
Planned:   35.07 million parameters, 262 TFLOP a step, 81.8 EFLOP in all. 44.4 GiB of 71.2 on each
           of 8 x NVIDIA H100 SXM 80 GB: fits; 9.4 GiB of 16.0 on each of 32 x TPU v5e: fits (eqssl
           train --config imagenet_byol --plan --on h100:8 or v5e:4x8; jax 0.10.2, jax-cuda13-plugin
           0.10.2; jax 0.10.2, libtpu 0.0.42.1).
Measured:  nothing yet, for want of an accelerator.
Differs:   Crops are cut from the image squashed to 256 x 256. They are antialiased. Colors change
           as in torchvision: brightness multiplies (the code adds), contrast is about the mean gray
           (in the code about each channel's mean), and saturation is a blend with gray (in the code
           it changes in HSV). The networks compute in bfloat16. Weights start as in torch and
           torchvision (in the code from a truncated normal by the fan in, and biases from 0).
           Convolutions of stride 2 pad zeros on every side (the code's padding is TensorFlow's).
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 224,
      'batch': 4096,
      'epochs': 1000.,
      'dtype': 'bfloat16',
      'batchnorm': 'view',
      'data': {'name': 'tfds', 'dataset': 'imagenet2012', 'train': 'train', 'test': 'validation', 'size': 256},
      'encoder': {'name': 'resnet', 'depth': 50, 'stem': 'imagenet', 'width': 64},
      'augment': {
          'order': ('crop', 'flip', 'jitter', 'gray', 'blur', 'solarize'),
          'second': {'blur': {'p': .1}, 'solarize': {'p': .2}},
          'crop': {'role': 'both', 'scale': (.08, 1.), 'method': 'bicubic'},
          'flip': {'role': 'both', 'p': .5},
          'jitter': {'role': 'both', 'p': .8, 'brightness': .4, 'contrast': .4, 'saturation': .2, 'hue': .1},
          'gray': {'role': 'both', 'p': .2},
          'blur': {'role': 'both', 'p': 1., 'kernel': 23, 'sigma': (.1, 2.)},
          'solarize': {'role': 'both', 'p': 0.},
      },
      'invariance': {'name': 'byol', 'decay': .996},
      'equivariance': {'name': 'none'},
      # .2 x 4096 / 256
      'optimizer': {'name': 'lars', 'lr': 3.2, 'weight_decay': 1.5e-6, 'momentum': .9, 'trust': 1e-3, 'lr_outside': True,
                    'warmup_epochs': 10.},
      'log_every': 100,
      'checkpoint_every': 500,
  })
