"""CIFAR-10, from the TFDS directory that `eqssl data prepare cifar10` writes."""
from equivariant_ssl.data import tfds
from equivariant_ssl.data.source import Source

NORMAL = (.4914, .4822, .4465), (.247, .243, .261)   # mean and deviation in EquiMod's official code


def make(root: str = '') -> Source:
  """50,000 train and 10,000 test images of 32x32 in 10 classes: TFDS's cifar10/3.0.2.

  Source: Krizhevsky 2009.

  root: the folder of TFDS data sets; '' for $TFDS_DATA_DIR, else ~/tensorflow_datasets.
  """
  return tfds.read_tfds('cifar10:3.0.2', root, 'train', 'test', 32, NORMAL)
