"""A part of the training images that is held out to choose on, so that nothing is chosen on the test split."""
import numpy as np

from equivariant_ssl.data import stream
from equivariant_ssl.data.source import Source, Split
from equivariant_ssl.errors import UserError

HELD_OUT = .2
READOUTS = 'validation', 'test'  # what the images that a network is read out on are called


def rank_in_class(labels: np.ndarray, noise: np.ndarray) -> np.ndarray:
  """The place [N], from 0, of each image among those of its class, by rising `noise` [N]."""
  order = np.lexsort((noise, labels))
  rank = np.empty(len(labels), np.int64)
  rank[order] = np.concatenate([np.arange(c) for c in np.bincount(labels)])
  return rank


def held_out(labels: np.ndarray, fraction: float = HELD_OUT) -> np.ndarray:
  """A mask [N]: floor(fraction x its size) of every class, by a fixed seed: the same for every network and run."""
  rank = rank_in_class(labels, np.random.RandomState(0).rand(len(labels)))
  return rank < np.floor(np.bincount(labels) * fraction)[labels]


def named(share: float, readout: str = '') -> str:
  """Which of READOUTS a run that holds `share` out of its training is read out on. readout: 'test': there nonetheless."""
  if readout not in ('', *READOUTS):
    raise UserError(f'--readout {readout} is neither.', f'Give {" or ".join(READOUTS)}.')
  if readout == 'validation' and not share:
    raise UserError('--readout validation: this run held no images out of its training.',
                    'Train with --config.validation=.2; its test split: --readout test.')
  return READOUTS[0] if share and readout != 'test' else READOUTS[1]


def split(source: Source, share: float, readout: str = '') -> Source:
  """`source` without `share` of the training images of each class (of all, where there are no labels), always the same,
  which stand in the place of its test split; with `readout` 'test' that stays. Where a split of its own is `labelled`, of
  that one alone. mean and std stay those of all: six numbers that know no label. Raises UserError where no class has enough
  images."""
  if not share:
    return source
  if not 0 < share < 1:
    raise UserError(f'config.validation is {share:g}: it is a share of the training images of each class, 0 for none.',
                    'e.g. --config.validation=.2')
  bank = source.bank
  out = held_out(np.zeros(len(bank.images), np.int32) if bank.labels is None else bank.labels, share)
  if not out.any():
    raise UserError(f'config.validation is {share:g}: no class has the {np.ceil(1 / share):.0f} images of which one '
                    'could be held out.', 'A larger share, e.g. --config.validation=.5; or 0: read out on the test split.')

  def part(rows: np.ndarray) -> Split:
    return stream.some(bank, np.flatnonzero(rows))
  source = source._replace(test=source.test if readout == 'test' else part(out))
  if source.labelled:
    return source._replace(labelled=part(~out))
  return source._replace(train=part(~out), names=source.names and tuple(
      n for n, held in zip(source.names, out, strict=True) if not held))
