"""SimCLR, or SimCLR + EquiMod, on a folder of your own photographs, with a small ResNet for a CPU or one GPU.

Command:   eqssl train --config photos --config.data.path=FOLDER --workdir runs/photos
           eqssl train --config photos --config.data.path=FOLDER --workdir runs/photos_equimod --config.equivariance=equimod
           eqssl report runs/photos
           eqssl embed runs/photos FOLDER --out photos.npz
           eqssl neighbors photos.npz PHOTOGRAPH --run runs/photos
Published: nothing; the settings are those of cifar10_quick for larger images, and nothing was tuned.
Measured:  nothing.

FOLDER may have class folders or none (docs/data.md). A tenth of the images is held out as a test. 64 training
images or more make a batch of 64; fewer make a smaller one. 100 epochs of 200 photographs are 200 steps; of 10,000 they are 14,000:
give --config.epochs=10 there.
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict({
      'seed': 0,
      'size': 64,
      'batch': 64,
      'fit_batch': True,
      'epochs': 100.,
      'data': {'name': 'folder', 'size': 80},
      'encoder': {'name': 'resnet', 'depth': 10, 'stem': 'imagenet', 'width': 32, 'zero_init': False},
      'augment': {
          'order': ('crop', 'flip', 'jitter', 'gray'),
          'crop': {'role': 'both', 'scale': (.2, 1.), 'method': 'bicubic'},
          'flip': {'role': 'both', 'p': .5},
          'jitter': {'role': 'both', 'p': .8, 'brightness': .4, 'contrast': .4, 'saturation': .4, 'hue': .1},
          'gray': {'role': 'both', 'p': .2},
      },
      'invariance': {'name': 'simclr', 'temperature': .2, 'projector': {'hidden': (256,), 'out': 64}},
      'equivariance': {'name': 'none'},
      'optimizer': {'name': 'adamw', 'lr': 1e-3, 'weight_decay': 1e-4, 'warmup_epochs': 5.},
  })
