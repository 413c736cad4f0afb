"""Config `smoke` with a ResNet of one block: where a test is about the run, not the network, most of its time was XLA's."""
import pathlib

from ml_collections import ConfigDict

from equivariant_ssl.config import load_config
from equivariant_ssl.nets import resnet

resnet.DEPTHS[4] = ((1,), False)
NAME = str(pathlib.Path(__file__))


def get_config() -> ConfigDict:
  config = load_config('smoke')
  config.encoder.depth = 4
  return config
