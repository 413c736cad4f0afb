"""What the tests of reports share: folders of runs and studies that are written without training,
and a parser of pages."""

import html.parser
import json
import pathlib
import re
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from equivariant_ssl.config import config_to_json, load_config
from equivariant_ssl.report import maps, neighbor_tiles, pictures

HOSTILE = '</script><img src=x onerror=alert(1)>"\'&'
ENV = {
  'python': '3.11',
  'jax': '0.10.2',
  'flax': '0.12.8',
  'cpu': f'cpu {HOSTILE}',
  'cores': 2,
  'backend': 'cpu',
  'devices': ['cpu', 'cpu'],
  'processes': 1,
  'xla_flags': '',
  'git': 'abcdef0123456789',
  'time': '2026-11-25T10:00:00+0000',
}
SVG = '{http://www.w3.org/2000/svg}'
VOID = {'meta', 'link', 'img', 'br', 'hr', 'input', 'wbr'}


def result(protocol: str, numbers: dict, controls: dict, **more) -> dict:
  """Return a result file; every number of the untrained network is half of the trained one's."""
  half = lambda v: (
    {k: x if k == 'n' else x / 2 for k, x in v.items()} if isinstance(v, dict) else v / 2
  )
  one = lambda n: {
    'name': protocol,
    'numbers': n,
    'controls': controls,
    'detail': more.get('detail'),
    'missing': [],
  }
  return {
    'protocol': protocol,
    'checkpoint': 40,
    'steps': 40,
    'seeds': [0],
    'options': {},
    'environment': ENV,
    'trained': [one(numbers)],
    'untrained': [one({k: half(v) for k, v in numbers.items()})],
  }


def interval(mean: float, half: float, n: int = 50) -> dict:
  return {'mean': mean, 'low': mean - half, 'high': mean + half, 'n': n}


def results(top1: float = 0.4321, gain: float = 0.0567) -> dict[str, dict]:
  """Return the result files of a run with an objective that predicts."""
  return {
    'knn': result(
      'knn', {'top1': top1, 'top5': 0.9}, {'top1': {'chance': 0.1}, 'top5': {'chance': 0.5}}
    ),
    'episodes': result(
      'episodes', {'5-way 1-shot': interval(0.3, 0.01, 2000)}, {'5-way 1-shot': {'chance': 0.2}}
    ),
    'gains': result(
      'gains',
      {'equimod all': interval(gain, 0.01), 'equimod crop': interval(-0.02, 0.01)},
      {
        row: {
          'shuffled': interval(-0.1, 0.02),
          'zeroed': interval(-0.03, 0.01),
          'identity': 0.0,
          'ratio of means': interval(1.5, 0.1),
        }
        for row in ('equimod all', 'equimod crop')
      },
    ),
    'profile': result(
      'profile',
      {'crop': interval(0.25, 0.02), 'rotate': interval(1.25, 0.02)},
      {op: {'to another image': interval(0.99, 0.01)} for op in ('crop', 'rotate')},
    ),
    'retrieval': result(
      'retrieval',
      {'equimod all mrr': interval(0.38, 0.01), 'equimod all h1': interval(0.2, 0.01)},
      {'equimod all mrr': {'chance': 0.09}, 'equimod all h1': {'chance': 0.02}},
    ),
    'health': result(
      'health', {'rankme': 60.5, 'std': 0.64}, {}, detail={'spectrum': [9.0, 3.0, 1.0, 0.0]}
    ),
  }


def run(
  folder: pathlib.Path,
  seed: int = 0,
  result_files: dict[str, dict] | None = None,
  rows: int = 20,
  **overrides,
) -> pathlib.Path:
  """Write a run's folder: config smoke with `overrides`, a log of `rows` rows, and result files.

  result_files: {name: content}; None means those of `results`.
  """
  folder.mkdir(parents=True)
  fields = {'seed': str(seed), **overrides}
  config = load_config('smoke', fields)
  (folder / 'config.json').write_text(json.dumps(config_to_json(config)))
  (folder / 'env.json').write_text(json.dumps(ENV))
  typed = ' '.join(f'--config.{k}={v}' for k, v in fields.items())
  (folder / 'command.txt').write_text(f'eqssl train --config smoke --workdir {folder} {typed}\n')
  line = lambda i: {
    'step': 2 * i + 2,
    'loss': 8.0 / (i + 1) + seed,
    'invariance': 5.0 / (i + 1),
    'equimod': 3.0 / (i + 1),
    'gradient': 2.0,
    'lr': 0.1,
    'std': 0.9,
    'images_per_s': 32.0,
    'data_wait': 0.01,
    'epoch': i / 10,
    'knn_top1': 0.1 + i / 100,
  }
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line(i)) + '\n' for i in range(rows)))
  (folder / 'eval').mkdir()
  for name, content in (results() if result_files is None else result_files).items():
    (folder / 'eval' / f'{name}.json').write_text(json.dumps(content))
  return folder


SENTENCES = (
  'rotate: sensitive beats invariant by 5.0 +- 2.0 points of kNN (3 seeds)',
  f'crop: {HOSTILE} both and off differ by +5.0 points (1 seed: no interval)',
  'rotate: no difference seen between both and off; the smallest that could have been seen is '
  '2.0 points',
)


def study(folder: pathlib.Path) -> pathlib.Path:
  """Write a study's folder with a failed run, a waiting run, an effect of one seed, and a hostile
  error."""
  folder.mkdir(parents=True)
  content = {
    'config': 'digits_study',
    'overrides': {'epochs': '30'},
    'augs': ['rotate', 'crop'],
    'arms': ['invariant', 'sensitive'],
    'objective': ['equimod'],
    'seeds': [0, 1],
    'design': 'one-at-a-time',
    'epochs': 30.0,
    'equal': 'images',
    'readout': 'validation',
    'command': f'eqssl study --workdir {folder}',
    'environment': ENV,
    'made': [
      {
        'name': 'base',
        'config': config_to_json(load_config('digits_study', {'validation': '.2'})),
      }
    ],
  }
  one = lambda arm, seed, status='done', error='': {
    'arm': arm,
    'roles': {'rotate': arm.removeprefix('rotate='), 'crop': 'both'},
    'seed': seed,
    'workdir': f'runs/{arm}/{seed}',
    'status': status,
    'error': error,
    'seconds': 60.0 if status == 'done' else 0.0,
    'readouts': {'linear': 0.93, 'knn': 0.91, 'transfer cifar100 (top1)': 0.8},
    'profile': {'rotate': 0.3 + 0.1 * seed, 'crop': 0.22},
    'gains': {
      'equimod all': {
        'true': 0.05,
        'shuffled': -0.1,
        'zeroed': -0.02,
        'identity': 0.0,
        'ratio of means': 1.5,
      }
    },
    'retrieval': {'equimod all mrr': {'true': 0.38, 'chance': 0.09}},
    'more': {
      'care': {'crop gamma': {'true': 0.5, 'ignores it': 1.0}},
      'regression': {
        'crop absolute pooled': {'true': 0.6, 'chance': 0.0},
        'flip absolute pooled': {'true': 0.9, 'chance': 0.1},
      },
    },
    'git': f'{seed}' * 16,
  }
  unread = lambda run: {
    k: v for k, v in run.items() if k in ('arm', 'roles', 'seed', 'workdir', 'status', 'error')
  }
  runs = {
    'rotate=invariant/0': one('rotate=invariant', 0),
    'rotate=invariant/1': one('rotate=invariant', 1),
    'rotate=sensitive/0': unread(
      one('rotate=sensitive', 0, 'failed', f'the loss {HOSTILE} is not finite')
    ),
    'rotate=sensitive/1': unread(one('rotate=sensitive', 1, 'waiting')),
    'rotate=invariant/0@.125': {**one('rotate=invariant', 9), 'share': 0.125},
  }
  effect = lambda aug, low, high, n, sentence: {
    'aug': aug,
    'contrast': 'sensitive - invariant',
    'readout': 'knn',
    'mean': 0.05,
    'low': low,
    'high': high,
    'n': n,
    'holm': 0.0213 if n > 1 else None,
    'smallest': 0.02 if n > 1 else None,
    'sentence': sentence,
  }
  study_results = {
    'recommendation': ['Recommended: rotate=invariant, of 2 arms the best'],
    'test': [
      {
        'arm': 'rotate=invariant',
        'readout': 'knn',
        'split': 'test',
        'n': 2,
        'mean': 0.88,
        'std': 0.01,
      }
    ],
    'verdict': ['No difference seen, as invariances: crop'],
    'runs': runs,
    'untrained': {'linear': 0.85, 'knn': 0.64, 'few': 0.5},
    'chance': dict.fromkeys(('linear', 'knn', 'few'), 0.1),
    'table': [
      {'arm': 'rotate=invariant', 'readout': 'knn', 'n': 2, 'mean': 0.9123, 'std': 0.0148},
      {'arm': 'rotate=sensitive', 'readout': 'knn', 'n': 1, 'mean': 0.95, 'std': None},
    ],
    'effects': [
      effect('rotate', 0.03, 0.07, 3, SENTENCES[0]),
      effect('crop', None, None, 1, SENTENCES[1]),
      effect('rotate', -0.01, 0.11, 3, SENTENCES[2]),
    ],
    'proxies': [
      {
        'budget': 0.125,
        'readout': 'knn',
        'rank': 0.83,
        'low': 0.5,
        'high': 0.95,
        'n': 12,
        'signs': 0.75,
        'repeat': 0.9,
        'effects': 0.6,
      },
      {
        'budget': 0.5,
        'readout': 'knn',
        'rank': 0.97,
        'low': None,
        'high': None,
        'n': 2,
        'signs': None,
      },
    ],
  }
  for r in (r for r in runs.values() if r['status'] == 'done'):
    log = folder / r['workdir'] / 'metrics.jsonl'
    log.parent.mkdir(parents=True)
    row = lambda step, seed: (
      json.dumps({'step': step, 'loss': 9.0, 'invariance': 4.0 / step + seed, 'std': 0.9}) + '\n'
    )
    log.write_text(''.join(row(step, r['seed']) for step in (1, 2)))
  (folder / 'study.json').write_text(json.dumps(content))
  (folder / 'results.json').write_text(json.dumps(study_results))
  return folder


def fake_panels(patch, side: int = 32) -> None:
  """Replace what needs data and a checkpoint by as many pictures of noise, with hostile words."""
  from equivariant_ssl.report import run_page
  from equivariant_ssl.storage import checkpoint
  from equivariant_ssl.training import runs

  rng = np.random.default_rng(0)
  tile = lambda: pictures.Tile(
    rng.integers(0, 256, (side, side, 3), np.uint8), (f'crop 62 % {HOSTILE}', 'flip')
  )
  tiles = lambda n, m: [[tile() for _ in range(m)] for _ in range(n)]

  class Group(NamedTuple):
    chains: tuple
    size: int

  class Recipe(NamedTuple):
    groups: dict

  class Run(NamedTuple):
    recipe: Recipe
    config: object

  groups = {name: Group((), side) for name in ('views', 'reference', 'rotated')}
  patch.setattr(runs, 'reopen_run', lambda *_: Run(Recipe(groups), None))
  patch.setattr(runs, 'abstract_state', lambda run: None)
  patch.setattr(checkpoint, 'load_checkpoint', lambda *_: (40, None, {}))
  patch.setattr(run_page, 'frozen', lambda *_: None)
  patch.setattr(
    pictures,
    'gallery',
    lambda run: {k: tiles(4, n) for k, n in zip(groups, (3, 2, 5), strict=True)},
  )
  patch.setattr(pictures, 'strips', lambda *_: {'equimod': tiles(4, 7)})
  patch.setattr(neighbor_tiles, 'neighbors', lambda *_: tiles(6, 9))
  one_map = maps.Map(
    rng.normal(size=(600, 2)).astype(np.float32),
    np.arange(600) % 10,
    tuple(f'class {i} {HOSTILE}' for i in range(10)),
    'PCA: 600 images.',
  )
  by = [f'{how} by {what}' for how in ('PCA', 't-SNE') for what in ('class', 'action')]
  patch.setattr(maps, 'maps', lambda *_: dict.fromkeys(by, one_map))


class Parsed(html.parser.HTMLParser):
  """A parsed page. It fails on an element that is not closed.

  elements: (name, attributes) in order. tables: {caption: rows of cells}.
  words: (element, text) in order. svgs: parsed as XML.
  """

  def __init__(self, text: str):
    super().__init__()
    self.elements, self.words, self.open, self.tables, self.rows = [], [], [], {}, None
    self.feed(text)
    assert not self.open, self.open
    self.svgs = [ElementTree.fromstring(s) for s in re.findall(r'<svg.*?</svg>', text, re.S)]
    self.text = ' '.join(
      ' '.join(w for name, w in self.words if name not in ('style', 'script')).split()
    )

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in VOID and not self.get_starttag_text().endswith('/>'):
      self.open.append(tag)
    if tag == 'caption':
      self.rows = []
    if tag == 'tr':
      self.rows.append([])
    if tag in ('td', 'th'):
      self.rows[-1].append('')

  def handle_startendtag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag, (tag, self.open)

  def handle_data(self, data):
    self.words.append((self.open[-1] if self.open else '', data))
    if 'caption' in self.open and data.strip():
      self.rows = self.tables.setdefault(data.strip(), [])
    elif 'td' in self.open or 'th' in self.open:
      self.rows[-1][-1] += data

  def table(self, start: str) -> list[list[str]]:
    """The rows of the table whose caption begins so, the header first."""
    return next(rows for caption, rows in self.tables.items() if caption.startswith(start))

  def data(self) -> dict:
    """What the page embeds."""
    return json.loads(next(w for name, w in self.words if name == 'script'))
