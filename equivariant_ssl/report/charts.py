"""Charts as SVG text, each with its numbers' gist in words: lines, dots with intervals, heat maps, scatters."""
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from equivariant_ssl.report.svg import (
  COLOURS,
  DASHES,
  LETTER,
  SMALL,
  WIDTH,
  cut,
  escape,
  figure,
  legend,
  log_ticks,
  rule,
  short,
  text,
  ticks,
)

POINTS = 300   # of a line; more are averaged in runs of neighbours
NAMED = 16     # classes that a scatter's legend names: colours x shapes

Series = tuple[Sequence[float], Sequence[float | None]]  # x rising, y; None where it is not finite


class Dot(NamedTuple):
  """A row of a dot plot. low, high: of its interval, None where there is none. beside: {name: a value to compare with}.
  group: rows of one group stand under its name."""
  label: str
  mean: float
  low: float | None = None
  high: float | None = None
  beside: Mapping[str, float] = {}
  group: str = ''


def _thinned(series: Series) -> tuple[np.ndarray, np.ndarray]:
  x, y = (np.array([np.nan if v is None else v for v in values], np.float64) for values in series)
  if len(x) > POINTS:
    parts = np.array_split(np.arange(len(x)), POINTS)
    x, y = (np.array([values[p].mean() for p in parts]) for values in (x, y))
  return x, y


def _gist(name: str, x: np.ndarray, y: np.ndarray) -> str:
  kept = np.isfinite(y)
  if not kept.any():
    return f'{name}: no finite value.'
  x, y = x[kept], y[kept]
  return (f'{name}: {short(y[0])} at {short(x[0])}, {short(y[-1])} at {short(x[-1])}, '
          f'lowest {short(y.min())}, highest {short(y.max())}.')


def _path(px: np.ndarray, py: np.ndarray) -> str:
  """A path through the points, broken where one is not finite."""
  out, pen = [], 'M'
  for x, y in zip(px, py, strict=True):
    if math.isfinite(y):
      out.append(f'{pen}{x:.1f} {y:.1f}')
    pen = 'L' if math.isfinite(y) else 'M'
  return ''.join(out)


def lines(title: str, series: Mapping[str, Series], x_label: str = 'step', log_y: bool = False,
          rules: Mapping[str, float] | None = None) -> str:
  """A line a series. rules: {name: y} of horizontal lines to compare with. log_y: values <= 0 are left out."""
  thin, rules = {k: _thinned(s) for k, s in series.items()}, rules or {}
  if log_y:
    thin = {k: (x, np.where(y > 0, y, np.nan)) for k, (x, y) in thin.items()}
  every = np.concatenate([*(y[np.isfinite(y)] for _, y in thin.values()), np.array(list(rules.values()), np.float64)])
  xs = np.concatenate([x for x, _ in thin.values()])
  low, high = (float(every.min()), float(every.max())) if every.size else (1., 2.)
  if low == high:
    low, high = (low / 2, high * 2) if log_y else (low - .5 * (abs(low) or 1.), high + .5 * (abs(high) or 1.))
  y_ticks, x_ticks = log_ticks(low, high) if log_y else ticks(low, high), ticks(0., float(xs.max()) or 1.)
  low, high = (low, high) if log_y else (y_ticks[0], y_ticks[-1])
  x1 = float(xs.max()) or 1.
  mark = lambda i, x, y: f'<path class="line c{i % COLOURS}" stroke-dasharray="{DASHES[i % 4]}" d="M{x} {y:.1f}h15"/>'
  names = [*thin, *rules]
  body, top = legend(names, lambda i, x, y: mark(i, x, y) if i < len(thin) else rule(x, y, x + 15, y, 'ref'), 4, 11)
  left, right, bottom = 42., WIDTH - 12, top + 150
  scale = math.log10 if log_y else float
  a, b = scale(low), scale(high)
  fx = lambda x: left + x / x1 * (right - left)
  fy = lambda y: bottom - (y - a) / (b - a) * (bottom - top)
  for t in y_ticks:
    body += [rule(left, fy(scale(t)), right, fy(scale(t))), text(left - 5, fy(scale(t)) + 4, short(t), 'tick', 'end')]
  body += [text(fx(t), bottom + 15, short(t), 'tick', 'middle') for t in x_ticks if t <= 1.001 * x1]
  body.append(text(right, bottom + 30, x_label + (', y logarithmic' if log_y else ''), 'tick', 'end'))
  body += [rule(left, fy(scale(v)), right, fy(scale(v)), 'ref') for v in rules.values()]
  for i, (x, y) in enumerate(thin.values()):
    with np.errstate(divide='ignore', invalid='ignore'):
      d = _path(fx(x), fy(np.log10(y) if log_y else y))
    single = np.isfinite(y).sum() == 1
    body.append(f'<path class="{"spot" if single else "line"} c{i % COLOURS}" stroke-dasharray="{DASHES[i % 4]}" '
                f'd="{d}{"h0" if single else ""}"/>')
  about = [_gist(k, *s) for k, s in thin.items()] + [f'Line at {short(v)}: {k}.' for k, v in rules.items()]
  return figure(title, ' '.join(about), body, bottom + 34)


def _shown(dot: Dot, sign: bool, digits: int) -> str:
  """'+5.0 [3.0, 7.0]'; '+5.0' where there is no interval."""
  mean = f'{dot.mean:{"+" if sign else ""}.{digits}f}'
  return mean if dot.low is None else f'{mean} [{dot.low:.{digits}f}, {dot.high:.{digits}f}]'


def dots(title: str, rows: Sequence[Dot], unit: str, zero: bool = True, digits: int = 1) -> str:
  """A row a Dot: its label and number, under them the dot on the axis with its interval. zero: differences, which have
  a line at 0, signs, and a ring where there is no interval."""
  others = list(dict.fromkeys(k for r in rows for k in r.beside))
  every = [v for r in rows for v in (r.mean, r.low, r.high, *r.beside.values()) if v is not None] + [0.]
  low, high = min(every), max(every)
  marks = ticks(low, high if high > low else low + 1.)
  low, high, left, right = marks[0], marks[-1], 10., WIDTH - 10
  fx = lambda v: left + (v - low) / (high - low) * (right - left)
  other = lambda i, x, y: f'<path class="other c{1 + i % (COLOURS - 1)}" d="M{x:.1f} {y - 5:.1f}v10"/>'
  body, y = legend(others, lambda i, x, y: other(i, x + 8, y), 4, 11) if others else ([], 4.)
  top, group = y, ''
  for r in rows:
    if r.group != group:
      group, y = r.group, y + 20
      body.append(text(left, y - 3, cut(group, right - left), 'strong'))
    number = _shown(r, zero, digits)
    label, at = cut(r.label, right - left - LETTER * (len(number) + 2)), y + 23
    body += ['<g>', f'<title>{escape(r.label)}</title>', text(left, y + 11, label, 'halo'), '</g>',
             text(right, y + 11, number, 'halo', 'end'), rule(left, at, right, at)]
    body += [other(others.index(k), fx(v), at) for k, v in r.beside.items()]
    if r.low is not None:
      body.append(f'<path class="range" d="M{fx(r.low):.1f} {at:.1f}H{fx(r.high):.1f}"/>')
    kind = 'ring' if zero and r.low is None else 'dot'
    body.append(f'<circle class="{kind}" cx="{fx(r.mean):.1f}" cy="{at:.1f}" r="4.5"/>')
    y += 36
  body += [text(fx(t), y + 13, short(t), 'tick', {low: 'start', high: 'end'}.get(t, 'middle')) for t in marks]
  body.append(text(right, y + 28, unit, 'tick', 'end'))
  if zero:
    body.insert(0, rule(fx(0.), top, fx(0.), y, 'zero'))
  about = [f'{f"{r.group}, " if r.group else ""}{r.label}: {_shown(r, zero, digits)}' +
           ''.join(f', {k} {v:.{digits}f}' for k, v in r.beside.items()) + '.' for r in rows]
  return figure(title, ' '.join([f'In {unit}.', *about]), body, y + 32)


def heat(title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]],
         form: str = '.2f', most: float | None = None) -> str:
  """A cell a value, its number in it: one colour above 0, another below, stronger the further from 0.

  values: [rows][columns], None where there is none. form: of the numbers. most: the size from which on the colour is
  full; None: the largest."""
  heads = [textwrap.wrap(c, 10) or [''] for c in columns]
  top, high = 6 + 13. * max(map(len, heads)), 22.
  left = min(max((LETTER * len(r) for r in rows), default=0.), 230.) + 10
  wide = max(38., 6 + SMALL * max(len(line) for head in heads for line in head),
             8 + LETTER * max((len(f'{v:{form}}') for row in values for v in row if v is not None), default=1))
  wide = max(wide, min((WIDTH - left - 2) / len(columns), 72.))
  most = most or max((abs(v) for row in values for v in row if v is not None), default=0.) or 1.
  body = [text(left + wide * (j + .5), top - 5 - 13 * (len(head) - 1 - k), line, 'tick', 'middle')
          for j, head in enumerate(heads) for k, line in enumerate(head)]
  for i, (label, row) in enumerate(zip(rows, values, strict=True)):
    y = top + i * high
    body.append(f'<g><title>{escape(label)}</title>{text(0, y + 15, cut(label, left - 8))}</g>')
    for j, v in enumerate(row):
      x = left + j * wide
      strength = 0. if v is None else min(abs(v) / most, 1.)
      body.append(f'<rect class="{"up" if (v or 0.) >= 0 else "down"}" x="{x:.1f}" y="{y:.1f}" width="{wide - 2:.1f}" '
                  f'height="{high - 2:.0f}" fill-opacity="{strength:.3f}"/>')
      body.append(text(x + wide / 2 - 1, y + 14.5, 'none' if v is None else f'{v:{form}}', 'number', 'middle'))
  about = '; '.join(f'{r}: ' + ', '.join(f'{c} {"none" if v is None else f"{v:{form}}"}'
                                         for c, v in zip(columns, row, strict=True))
                    for r, row in zip(rows, values, strict=True))
  return figure(title, about + '.', body, top + high * len(rows) + 2, max(left + wide * len(columns), WIDTH))


def scatter(title: str, points: np.ndarray, labels: np.ndarray, names: Sequence[str], about: str = '') -> str:
  """Points [N 2] in the colour and shape of their label int [N], of `names`; equal units on both axes."""
  points, labels = np.asarray(points, np.float64), np.asarray(labels)
  low, high = points.min(0), points.max(0)
  height = 250.
  unit = min((WIDTH - 16) / max(high[0] - low[0], 1e-9), (height - 16) / max(high[1] - low[1], 1e-9))
  middle = (low + high) / 2
  at = np.stack([WIDTH / 2 + unit * (points[:, 0] - middle[0]), height / 2 - unit * (points[:, 1] - middle[1])], 1)
  kind = lambda i: f'spot c{i % COLOURS}{" square" if i // COLOURS % 2 else ""}'
  body = [f'<rect class="frame" width="{WIDTH:.0f}" height="{height:.0f}"/>']
  counts = {}
  for i in np.unique(labels):
    own = at[labels == i]
    counts[int(i)] = len(own)
    body.append(f'<path class="{kind(i)}" d="{"".join(f"M{x:.1f} {y:.1f}h0" for x, y in own)}"/>')
  named = list(counts)[:NAMED]
  rest = len(counts) - len(named)
  texts = [names[i] for i in named] + ([f'and {rest} more, colours repeated'] if rest else [])
  mark = lambda k, x, y: f'<path class="{kind(named[k])} key" d="M{x + 8:.1f} {y:.1f}h0"/>' if k < len(named) else ''
  keys, bottom = legend(texts, mark, 0, height + 17)
  told = ', '.join(f'{names[i]} {n}' for i, n in counts.items())
  return figure(title, f'{about} {len(points)} points: {told}.'.strip(), body + keys, bottom - 6)
