"""SimCLR with a ViT-S/16 on ImageNet, at MoCo v3's settings: AdamW, 300 epochs.

Command:   eqssl train --config imagenet_simclr_vit_s --workdir runs/in_simclr_vit_s
           eqssl eval runs/in_simclr_vit_s --protocol equimod
Published: nothing for this very recipe. MoCo v3 itself, whose target is a moving average, has
           linear top-1 73.2 % (README of github.com/facebookresearch/moco-v3, arXiv 2104.02057);
           its learning rate is 1.5e-4 x B / 256.
Planned:   41.08 million parameters, 229 TFLOP a step, 21.4 EFLOP in all. 57.3 GiB of 71.2 on each
           of 8 x NVIDIA H100 SXM 80 GB: fits; 11.5 GiB of 16.0 on each of 32 x TPU v5e: fits (eqssl
           train --config imagenet_simclr_vit_s --plan --on h100:8 or v5e:4x8; jax 0.10.2,
           jax-cuda13-plugin 0.10.2; jax 0.10.2, libtpu 0.0.42.1).
Measured:  nothing yet, for want of an accelerator.
Differs:   from MoCo v3. There is no target network and no predictor. The loss is NT-Xent, whose
           negatives are of both views; in MoCo v3's code they are of the other view. The positions
           and the patch projection are learned; the code has fixed sines and a frozen projection.
           Crops are cut from the image squashed to 256 x 256. Biases, norms and the class token do
           not decay; in the code all that is trained decays. Colors are not rounded to 8 bits after
           each change (augment.jitter.quantize and augment.gray.quantize would do so).
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 224,
      'batch': 4096,
      'epochs': 300.,
      'dtype': 'bfloat16',
      'data': {'name': 'tfds', 'dataset': 'imagenet2012', 'train': 'train', 'test': 'validation', 'size': 256},
      'encoder': {'name': 'vit', 'variant': 'small'},
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
      'invariance': {'name': 'simclr', 'temperature': .2, 'projector': {'hidden': (4096, 4096), 'out': 256}},
      'equivariance': {'name': 'none'},
      # 1.5e-4 x 4096 / 256
      'optimizer': {'name': 'adamw', 'lr': 2.4e-3, 'weight_decay': .1, 'warmup_epochs': 40.},
      'log_every': 100,
      'checkpoint_every': 500,
  })
