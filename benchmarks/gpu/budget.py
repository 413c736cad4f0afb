"""The arithmetic of a lease: how many epochs of both arms fit into the rest of a call, and which flags are the best."""
import math
from typing import NamedTuple

MARGIN = .05  # the share of the rest for checkpoints and what a timing does not measure; and
SPARE = 4.    # seconds, kept free at the end


class Needs(NamedTuple):
  """Seconds that a part takes. epoch: an epoch of each arm. start: a training until its first step. bring: reading a
  checkpoint and writing its encoder. knn: the kNN of the last arm, after which nothing else must be done."""
  epoch: tuple[float, ...]
  start: float
  bring: float = 12.
  knn: float = 25.


def fixed(needs: Needs, left: float) -> float:
  """The seconds of `left` that are not for epochs."""
  return len(needs.epoch) * (needs.start + needs.bring) + needs.knn + MARGIN * left + SPARE


def epochs(needs: Needs, left: float, most: int) -> int:
  """The number of epochs, equal for all arms, that fit into `left` seconds: at least 0, at most `most`."""
  return max(0, min(most, math.floor((left - fixed(needs, left)) / sum(needs.epoch))))


def best(base: dict, tried: dict[str, dict], least: float = .01, apart: float = .02) -> str | None:
  """The name of the fastest of `tried` {name: what `speed` found}, or None. It is faster than `base` by more than `least`
  and by more than the base's own spread, and its loss after the same steps differs by at most `apart`."""
  speeds = base['images_per_s']
  spread = (max(speeds) - min(speeds)) / max(speeds)
  sound = {name: f for name, f in tried.items()
           if f.get('images_per_s') and abs(f['loss'] / base['loss'] - 1) <= apart}
  name = max(sound, key=lambda n: middle(sound[n]['images_per_s']), default=None)
  if name is None or middle(sound[name]['images_per_s']) < (1 + max(least, spread)) * middle(speeds):
    return None
  return name


def middle(values: list[float]) -> float:
  """The median of some numbers."""
  ordered = sorted(values)
  return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
