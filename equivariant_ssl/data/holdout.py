"""Training images that are held out to choose on, so that nothing is chosen on the test split."""
import numpy as np

from equivariant_ssl.data import stream
from equivariant_ssl.data.source import Source, Split
from equivariant_ssl.errors import UserError

HELD_OUT = .2
READOUTS = 'validation', 'test'  # the names of the images that a network is read out on


def rank_in_class(labels: np.ndarray, noise: np.ndarray) -> np.ndarray:
  """The rank [N], from 0, of each image among the images of its class, by rising `noise` [N]."""
  order = np.lexsort((noise, labels))
  rank = np.empty(len(labels), np.int64)
  rank[order] = np.concatenate([np.arange(count) for count in np.bincount(labels)])
  return rank


def held_out_mask(labels: np.ndarray, fraction: float = HELD_OUT) -> np.ndarray:
  """A mask [N] of the images to hold out: floor(fraction x its size) images of every class.

  The seed is fixed, so that the mask is the same for every network and run.
  """
  rank = rank_in_class(labels, np.random.RandomState(0).rand(len(labels)))
  return rank < np.floor(np.bincount(labels) * fraction)[labels]


def readout_name(share: float, readout: str = '') -> str:
  """The one of READOUTS on which a run is read out.

  share:   the share of the training images that the run holds out.
  readout: '' for the run's choice; 'test' reads out on the test split in any case.
  """
  if readout not in ('', *READOUTS):
    raise UserError(f'--readout {readout} is neither {" nor ".join(READOUTS)}.',
                    f'e.g. --readout {READOUTS[0]}')
  if readout == 'validation' and not share:
    raise UserError('--readout validation: this run held no images out of its training.',
                    'Train with --config.validation=.2, or read out on the test split: '
                    '--readout test.')
  return READOUTS[0] if share and readout != 'test' else READOUTS[1]


def hold_out(source: Source, share: float, readout: str = '') -> Source:
  """`source` with `share` of the training images of each class held out in place of its test split.

  The same images are always held out. Without labels they are a share of all images. With `readout`
  'test' the test split stays. Where the source has a `labeled` split, the images are held out of
  that split alone. The mean and the standard deviation stay those of all images: they are six
  numbers that know no label. Raises UserError where no class has enough images.
  """
  if not share:
    return source
  if not 0 < share < 1:
    raise UserError(f'config.validation is {share:g}, but it is a share of the training images of '
                    'each class: 0 for none, and below 1.', 'e.g. --config.validation=.2')
  bank = source.bank
  labels = np.zeros(len(bank.images), np.int32) if bank.labels is None else bank.labels
  out = held_out_mask(labels, share)
  if not out.any():
    raise UserError(
        f'config.validation is {share:g}, but no class has the {np.ceil(1 / share):.0f} images of '
        'which one could be held out.', 'Use a larger share, e.g. --config.validation=.5, or 0 to '
        'read out on the test split.')

  def part(rows: np.ndarray) -> Split:
    return stream.take_rows(bank, np.flatnonzero(rows))

  source = source._replace(test=source.test if readout == 'test' else part(out))
  if source.labeled:
    return source._replace(labeled=part(~out))
  names = source.names and tuple(
      name for name, held in zip(source.names, out, strict=True) if not held)
  return source._replace(train=part(~out), names=names)
