"""Charts as SVG text: lines, dots with intervals, heat maps and scatter plots.

Each chart has a text alternative that says its numbers, or a summary of them, in words.
"""
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from equivariant_ssl.report.svg import (
  COLORS,
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
  tick_labels,
  ticks,
)

POINTS = 300  # a line has at most so many points; of more, neighboring points are averaged
NAMED = 20    # a scatter plot's legend names so many classes: colors x shapes

# Rising x, and y. A y that is not finite is None.
Series = tuple[Sequence[float], Sequence[float | None]]


class Dot(NamedTuple):
  """A row of a dot plot.

  low, high: the ends of the interval of `mean`; None where there is no interval.
  beside: {name: a value to compare with}.
  group: the rows of one group stand under its name.
  """
  label: str
  mean: float
  low: float | None = None
  high: float | None = None
  beside: Mapping[str, float] = {}
  group: str = ''


def _thinned(series: Series) -> tuple[np.ndarray, np.ndarray]:
  """Return x and y of a series with at most POINTS points; None becomes NaN."""
  x, y = (np.array([np.nan if v is None else v for v in values], np.float64) for values in series)
  if len(x) > POINTS:
    parts = np.array_split(np.arange(len(x)), POINTS)
    x, y = (np.array([values[p].mean() for p in parts]) for values in (x, y))
  return x, y


def _summary(name: str, x: np.ndarray, y: np.ndarray) -> str:
  """Return a sentence with the first, last, lowest and highest value of a line."""
  finite = np.isfinite(y)
  if not finite.any():
    return f'{name}: no finite value.'
  x, y = x[finite], y[finite]
  return (f'{name}: {short(y[0])} at {short(x[0])}, {short(y[-1])} at {short(x[-1])}, '
          f'lowest {short(y.min())}, highest {short(y.max())}.')


def _path(px: np.ndarray, py: np.ndarray) -> str:
  """Return an SVG path through the points; it breaks where a point is not finite."""
  commands, command = [], 'M'
  for x, y in zip(px, py, strict=True):
    if math.isfinite(y):
      commands.append(f'{command}{x:.1f} {y:.1f}')
    command = 'L' if math.isfinite(y) else 'M'
  return ''.join(commands)


def _y_range(values: np.ndarray, log_y: bool) -> tuple[float, float]:
  """Return the lowest and the highest of finite `values`; a wider range where they are equal."""
  low, high = (float(values.min()), float(values.max())) if values.size else (1., 2.)
  if low < high:
    return low, high
  if log_y:
    return low / 2, high * 2
  return low - .5 * (abs(low) or 1.), high + .5 * (abs(high) or 1.)


def line_chart(title: str, series: Mapping[str, Series], x_label: str = 'step', log_y: bool = False,
               rules: Mapping[str, float] | None = None) -> str:
  """Return a chart with one line per series.

  rules: {name: y} of horizontal lines to compare with. log_y: values <= 0 are left out.
  """
  curves, rules = {name: _thinned(one) for name, one in series.items()}, rules or {}
  if log_y:
    curves = {name: (x, np.where(y > 0, y, np.nan)) for name, (x, y) in curves.items()}
  low, high = _y_range(np.concatenate([*(y[np.isfinite(y)] for _, y in curves.values()),
                                       np.array(list(rules.values()), np.float64)]), log_y)
  last_x = float(np.concatenate([x for x, _ in curves.values()]).max()) or 1.
  y_ticks, x_ticks = log_ticks(low, high) if log_y else ticks(low, high), ticks(0., last_x)
  low, high = (low, high) if log_y else (y_ticks[0], y_ticks[-1])

  def mark(i: int, x: float, y: float) -> str:
    if i >= len(curves):
      return rule(x, y, x + 15, y, 'ref')
    return (f'<path class="line c{i % COLORS}" stroke-dasharray="{DASHES[i % 4]}" '
            f'd="M{x} {y:.1f}h15"/>')

  body, top = legend([*curves, *rules], mark, 4, 11)
  left, right, bottom = 42., WIDTH - 12, top + 150
  scale = math.log10 if log_y else float
  y0, y1 = scale(low), scale(high)

  def x_pixel(x):
    return left + x / last_x * (right - left)

  def y_pixel(scaled):
    return bottom - (scaled - y0) / (y1 - y0) * (bottom - top)

  def level(y: float, kind: str = 'grid') -> str:
    return rule(left, y_pixel(scale(y)), right, y_pixel(scale(y)), kind)

  for t, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
    body += [level(t), text(left - 5, y_pixel(scale(t)) + 4, label, 'tick', 'end')]
  x_ticks = [t for t in x_ticks if t <= 1.001 * last_x]
  body += [text(x_pixel(t), bottom + 15, label, 'tick', 'middle')
           for t, label in zip(x_ticks, tick_labels(x_ticks), strict=True)]
  body.append(text(right, bottom + 30, x_label + (', y logarithmic' if log_y else ''), 'tick',
                   'end'))
  body += [level(y, 'ref') for y in rules.values()]
  for i, (x, y) in enumerate(curves.values()):
    with np.errstate(divide='ignore', invalid='ignore'):
      path = _path(x_pixel(x), y_pixel(np.log10(y) if log_y else y))
    single = np.isfinite(y).sum() == 1
    body.append(f'<path class="{"spot" if single else "line"} c{i % COLORS}" '
                f'stroke-dasharray="{DASHES[i % 4]}" d="{path}{"h0" if single else ""}"/>')
  about = [_summary(name, *xy) for name, xy in curves.items()]
  about += [f'Line at {short(y)}: {name}.' for name, y in rules.items()]
  return figure(title, ' '.join(about), body, bottom + 34)


def _number(dot: Dot, sign: bool, digits: int) -> str:
  """Return '+5.0 [3.0, 7.0]', or '+5.0' where there is no interval."""
  mean = f'{dot.mean:{"+" if sign else ""}.{digits}f}'
  return mean if dot.low is None else f'{mean} [{dot.low:.{digits}f}, {dot.high:.{digits}f}]'


def _dot_sentence(dot: Dot, sign: bool, digits: int) -> str:
  """Return all numbers of a row of a dot plot in words."""
  label = f'{dot.group}, {dot.label}' if dot.group else dot.label
  others = ''.join(f', {name} {value:.{digits}f}' for name, value in dot.beside.items())
  return f'{label}: {_number(dot, sign, digits)}{others}.'


def _other(i: int, x: float, y: float) -> str:
  """Return the upright mark of value `i` that dots are compared with."""
  return f'<path class="other c{1 + i % (COLORS - 1)}" d="M{x:.1f} {y - 5:.1f}v10"/>'


def dot_plot(title: str, rows: Sequence[Dot], unit: str, zero: bool = True, digits: int = 1) -> str:
  """Return a dot plot with one row per Dot: its label and number, and under them the dot with its
  interval on an axis.

  zero: the numbers are differences. They have signs, a line marks 0, and a dot without an interval
  is a ring.
  """
  others = list(dict.fromkeys(name for dot in rows for name in dot.beside))
  values = [v for dot in rows for v in (dot.mean, dot.low, dot.high, *dot.beside.values())
            if v is not None] + [0.]
  low, high = min(values), max(values)
  marks = ticks(low, high if high > low else low + 1.)
  low, high, left, right = marks[0], marks[-1], 10., WIDTH - 10

  def x_pixel(value: float) -> float:
    return left + (value - low) / (high - low) * (right - left)

  body, y = [], 4.
  if others:
    body, y = legend(others, lambda i, x, y: _other(i, x + 8, y), 4, 11)
  group = ''
  for dot in rows:
    if dot.group != group:
      group, y = dot.group, y + 20
      body.append(text(left, y - 3, cut(group, right - left), 'strong'))
    number, axis = _number(dot, zero, digits), y + 23
    label = cut(dot.label, right - left - LETTER * (len(number) + 2))
    body += ['<g>', f'<title>{escape(dot.label)}</title>', text(left, y + 11, label, 'halo'),
             '</g>', text(right, y + 11, number, 'halo', 'end'), rule(left, axis, right, axis)]
    body += [_other(others.index(name), x_pixel(v), axis) for name, v in dot.beside.items()]
    if zero:  # only beside the dot, so that it crosses no label
      body.append(rule(x_pixel(0.), axis - 8, x_pixel(0.), axis + 8, 'zero'))
    if dot.low is not None and dot.high is not None:
      body.append(f'<path class="range" d="M{x_pixel(dot.low):.1f} {axis:.1f}'
                  f'H{x_pixel(dot.high):.1f}"/>')
    kind = 'ring' if zero and dot.low is None else 'dot'
    body.append(f'<circle class="{kind}" cx="{x_pixel(dot.mean):.1f}" cy="{axis:.1f}" r="4.5"/>')
    y += 36
  body += [text(x_pixel(t), y + 13, label, 'tick', {low: 'start', high: 'end'}.get(t, 'middle'))
           for t, label in zip(marks, tick_labels(marks), strict=True)]
  body.append(text(right, y + 28, unit, 'tick', 'end'))
  about = [_dot_sentence(dot, zero, digits) for dot in rows]
  return figure(title, ' '.join([f'In {unit}.', *about]), body, y + 32)


def heat_map(title: str, rows: Sequence[str], columns: Sequence[str],
             values: Sequence[Sequence[float | None]], form: str = '.2f', most: float | None = None
             ) -> str:
  """Return a heat map with one cell per value, which also holds the number.

  Values above 0 have one color, values below 0 another, and the color is stronger the further a
  value is from 0.

  values: [rows][columns]; a missing value is None. form: the format of the numbers.
  most: the color is full from this size on; None means the largest size of all values.
  """
  headers = [textwrap.wrap(c, 10) or [''] for c in columns]
  top, height = 6 + 13. * max(map(len, headers)), 22.
  left = min(max((LETTER * len(r) for r in rows), default=0.), 230.) + 10
  numbers = [[None if v is None else f'{v:{form}}' for v in row] for row in values]
  width = max(38., 6 + SMALL * max(len(line) for header in headers for line in header),
              8 + LETTER * max((len(n) for row in numbers for n in row if n is not None),
                               default=1))
  width = max(width, min((WIDTH - left - 2) / len(columns), 72.))
  most = most or max((abs(v) for row in values for v in row if v is not None), default=0.) or 1.
  body = [text(left + width * (j + .5), top - 5 - 13 * (len(header) - 1 - k), line, 'tick',
               'middle')
          for j, header in enumerate(headers) for k, line in enumerate(header)]
  for i, (label, row) in enumerate(zip(rows, values, strict=True)):
    y = top + i * height
    body.append(f'<g><title>{escape(label)}</title>{text(0, y + 15, cut(label, left - 8))}</g>')
    for j, v in enumerate(row):
      x = left + j * width
      strength = 0. if v is None else min(abs(v) / most, 1.)
      body.append(f'<rect class="{"up" if (v or 0.) >= 0 else "down"}" x="{x:.1f}" y="{y:.1f}" '
                  f'width="{width - 2:.1f}" height="{height - 2:.0f}" '
                  f'fill-opacity="{strength:.3f}"/>')
      body.append(text(x + width / 2 - 1, y + 14.5, numbers[i][j] or 'none', 'number', 'middle'))
  sentences = [f'{label}: ' + ', '.join(f'{c} {n or "none"}'
                                        for c, n in zip(columns, row, strict=True))
               for label, row in zip(rows, numbers, strict=True)]
  return figure(title, '; '.join(sentences) + '.', body, top + height * len(rows) + 2,
                max(left + width * len(columns), WIDTH))


def scatter_plot(title: str, points: np.ndarray, labels: np.ndarray, names: Sequence[str],
                 about: str = '') -> str:
  """Return a scatter plot with equal units on both axes.

  points: [N 2]. labels: int [N], indices of `names`; each label has a color and a shape.
  """
  points, labels = np.asarray(points, np.float64), np.asarray(labels)
  low, high = points.min(0), points.max(0)
  height = 250.
  unit = min((WIDTH - 16) / max(high[0] - low[0], 1e-9),
             (height - 16) / max(high[1] - low[1], 1e-9))
  middle = (low + high) / 2
  pixels = np.stack([WIDTH / 2 + unit * (points[:, 0] - middle[0]),
                     height / 2 - unit * (points[:, 1] - middle[1])], 1)

  def kind(label: int) -> str:
    return f'spot c{label % COLORS}{" square" if label // COLORS % 2 else ""}'

  body = [f'<rect class="frame" width="{WIDTH:.0f}" height="{height:.0f}"/>']
  counts: dict[int, int] = {}
  for label in map(int, np.unique(labels)):
    members = pixels[labels == label]
    counts[label] = len(members)
    path = ''.join(f'M{x:.1f} {y:.1f}h0' for x, y in members)
    body.append(f'<path class="{kind(label)}" d="{path}"/>')
  named = list(counts)[:NAMED]
  rest = len(counts) - len(named)
  words: list[str] = [names[label] for label in named]
  words += [f'and {rest} more; colors repeat'] if rest else []

  def mark(i: int, x: float, y: float) -> str:
    return (f'<path class="{kind(named[i])} key" d="M{x + 8:.1f} {y:.1f}h0"/>'
            if i < len(named) else '')

  keys, bottom = legend(words, mark, 0, height + 17)
  sizes = ', '.join(f'{names[label]} {n}' for label, n in counts.items())
  return figure(title, f'{about} {len(points)} points: {sizes}.'.strip(), body + keys, bottom - 6)
