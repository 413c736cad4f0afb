"""Charts: marks stand where the numbers are, words say the numbers, and every color scheme is
readable."""

import pathlib
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from reports import HOSTILE

from equivariant_ssl.report import charts, maps, page, svg


def elements(chart: str, kind: str) -> list[dict]:
  """The attributes of the elements of a class, in order."""
  return [
    e.attrib for e in ElementTree.fromstring(chart).iter() if kind in e.get('class', '').split()
  ]


def about(chart: str) -> str:
  return ElementTree.fromstring(chart)[1].text


def points(path: str) -> np.ndarray:
  return np.array([[float(v) for v in p.split()] for p in re.findall(r'[ML]([-\d. ]+)', path)])


def test_lines_go_where_the_numbers_do():
  chart = charts.line_chart(
    't',
    {'a': ([0, 5, 10], [1.0, 3.0, 2.0]), 'b': ([0, 5, 10], [2.0, None, 4.0])},
    rules={'limit': 2.0},
  )
  a, b = (e['d'] for e in elements(chart, 'line') if 'h15' not in e['d'])
  x, y = points(a).T
  assert np.diff(x)[0] == pytest.approx(np.diff(x)[1], abs=0.11)
  assert y[0] - y[1] == pytest.approx(2 * (y[2] - y[1]), abs=0.2)
  assert b.count('M') == 2 and 'L' not in b  # broken where nothing is finite
  level = float(elements(chart, 'ref')[-1]['y1'])
  assert level == pytest.approx(y[2], abs=0.1) == pytest.approx(points(b)[0, 1], abs=0.1)
  assert 'a: 1 at 0, 2 at 10, lowest 1, highest 3.' in about(
    chart
  ) and 'Line at 2: limit.' in about(chart)
  decades = charts.line_chart('t', {'a': ([0, 1, 2], [1.0, 10.0, 100.0])}, log_y=True)
  assert (
    np.diff(points(elements(decades, 'line')[-1]['d'])[:, 1]).std() < 0.1
    and 'logarithmic' in decades
  )
  long = charts.line_chart('t', {'a': (list(range(9000)), list(np.arange(9000.0)))})
  assert len(points(elements(long, 'line')[-1]['d'])) == charts.POINTS
  for odd in ({'a': ([0, 1], [None, None])}, {'a': ([3], [2.0])}, {'a': ([0, 1], [0.0, 0.0])}):
    assert 'nan' not in charts.line_chart('t', odd) and 'nan' not in charts.line_chart('t', odd, log_y=True)


def test_dots_lie_on_their_axis():
  rows = [
    charts.Dot('a', 2.0, 1.0, 4.0, {'chance': -1.0}, 'g'),
    charts.Dot('b', 0.0, group='g'),
    charts.Dot('c', 4.0, group='h'),
  ]
  chart = charts.dot_plot('t', rows, 'points')
  a, b, c = (float(e['cx']) for kind in ('dot', 'ring') for e in elements(chart, kind))
  low, high = map(
    float, re.match(r'M([\d.]+) [\d.]+H([\d.]+)', elements(chart, 'range')[0]['d']).groups()
  )
  unit = (c - b) / 4.0
  assert [a - b, low - b, high - b] == pytest.approx([2 * unit, unit, 4 * unit], abs=0.2)
  assert (
    float(elements(chart, 'zero')[0]['x1']) == pytest.approx(b, abs=0.1)
    and len(elements(chart, 'ring')) == 2
  )  # no interval
  assert 'g, a: +2.0 [1.0, 4.0], chance -1.0.' in about(chart) and 'h, c: +4.0.' in about(chart)
  assert not elements(charts.dot_plot('t', rows, '%', zero=False), 'zero')


def test_heat_is_as_strong_as_the_number():
  chart = charts.heat_map('t', ['r', 's'], ['x', 'y'], [[1.0, -0.5], [None, 0.0]])
  cells = [
    (e['class'], float(e['fill-opacity']))
    for e in (*elements(chart, 'up'), *elements(chart, 'down'))
  ]
  assert cells == [('up', 1.0), ('up', 0.0), ('up', 0.0), ('down', 0.5)]
  assert about(chart) == 'r: x 1.00, y -0.50; s: x none, y 0.00.' and '>-0.50<' in chart
  assert 'class="wide"' in charts.heat_map('t', ['r'], [f'column {i}' for i in range(12)], [[1.0] * 12])
  capped = charts.heat_map('t', ['r'], ['x', 'y'], [[9.0, 1.0]], most=2.0)
  assert [float(e['fill-opacity']) for e in elements(capped, 'up')] == [1.0, 0.5]


def test_scatter_keeps_distances():
  at = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [1.0, 2.0]])
  chart = charts.scatter_plot(
    't', at, np.array([0, 0, 11, 11]), [f'class {i}' for i in range(12)], 'Four points.'
  )
  groups = [
    points(e['d'].replace('h0', '')) for e in elements(chart, 'spot') if 'key' not in e['class']
  ]
  far, near = (np.linalg.norm(groups[0][0] - other) for other in (groups[1][0], groups[0][1]))
  assert far == pytest.approx(2 * near, rel=0.01)
  assert (
    groups[1][0, 1] < groups[0][0, 1] and len(elements(chart, 'square')) == 2
  )  # up is up; a second shape after 10 colors
  assert about(chart) == 'Four points. 4 points: class 0 2, class 11 2.'
  at = np.random.default_rng(0).normal(size=(2000, 2))
  many = charts.scatter_plot('t', at, np.arange(2000) % 100, [str(i) for i in range(100)])
  assert len(many) < 50_000 and 'and 80 more; colors repeat' in many


def oklab(color: str) -> tuple[float, np.ndarray]:
  """The relative luminance (WCAG) of a color '#rrggbb', and its coordinates in OKLab (Ottosson 2020)."""
  c = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
  linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
  cones = np.cbrt(np.array([[0.41222, 0.53633, 0.05145], [0.2119, 0.6807, 0.1074], [0.0883, 0.28172, 0.62998]]) @ linear)
  to_lab = np.array([[0.21045, 0.79362, -0.00407], [1.978, -2.42859, 0.45059], [0.0259, 0.78277, -0.80868]])
  return float(linear @ [0.2126, 0.7152, 0.0722]), to_lab @ cones


@pytest.mark.parametrize('mode', [0, 1], ids=['light', 'dark'])
def test_ten_classes_have_colors_that_can_be_told_apart(mode):
  """In OKLab no two are nearer than .12 (two blues were .09), and each has a contrast of 3 with its ground."""
  css = pathlib.Path(charts.__file__).with_name('page.html').read_text()
  colors = [re.findall(rf'--c{i}: (#\w{{6}});', css)[mode] for i in range(svg.COLORS)]
  ground = oklab(re.findall(r'--panel: (#\w{6});', css)[mode])[0]
  assert len(set(colors)) == svg.COLORS >= maps.CLASSES and f'range({svg.COLORS})' in css
  luminance, lab = zip(*map(oklab, colors), strict=True)
  distances = np.linalg.norm(np.array(lab)[:, None] - np.array(lab)[None], axis=-1) + np.eye(svg.COLORS)
  assert distances.min() > 0.12
  assert all((max(v, ground) + 0.05) / (min(v, ground) + 0.05) >= 3 for v in luminance)
  chart = charts.scatter_plot('t', np.eye(10), np.arange(10), [str(i) for i in range(10)])
  assert not elements(chart, 'square') and len({e['class'] for e in elements(chart, 'spot')}) == 20  # points and keys


def test_hostile_names_stay_text():
  bad = HOSTILE + '\x00\x1b'
  drawings = [
    charts.line_chart(bad, {bad: ([0, 1], [1.0, 2.0])}, bad, rules={bad: 1.0}),
    charts.heat_map(bad, [bad], [bad], [[1.0]]),
    charts.dot_plot(bad, [charts.Dot(bad, 1.0, 0.0, 2.0, {bad: 1.0}, bad)], bad),
    charts.scatter_plot(bad, np.eye(2), np.array([0, 1]), [bad, bad], bad),
  ]
  for chart in drawings:
    root = ElementTree.fromstring(chart)
    assert (
      root[0].text.startswith(HOSTILE)
      and '<img' not in chart
      and not any('img' in e.tag for e in root.iter())
    )


def test_ticks_are_round_and_hold_the_range():
  for low, high in ((0, 1), (-0.3, 0.021), (3.8, 11.8), (0, 390), (1e-5, 2e-5), (-7, 1e6)):
    levels = np.array(svg.ticks(low, high))
    assert (
      levels[0] <= low + 1e-12 and levels[-1] >= high - 1e-9 * abs(high) and 2 <= len(levels) <= 7
    )
    assert np.allclose(np.diff(levels), levels[1] - levels[0])
  assert svg.log_ticks(1, 1000) == [1, 10, 100, 1000] and svg.log_ticks(1, 9) == [1, 2, 5]
  assert [svg.short(v) for v in (0.0, 0.25, 999.6, 1170, 9999.6, 12000, 2e-5, 3e6)] == [
    '0',
    '0.25',
    '1000',
    '1170',
    '10k',
    '12k',
    '2e-5',
    '3M',
  ]


def test_colors_can_be_read():
  """The WCAG contrast is 4.5 for text, also on the strongest cell of a heat map, and 3 for marks.

  This holds for the light and the dark color scheme.
  """
  text = (pathlib.Path(page.__file__).parent / 'page.html').read_text()
  for theme in re.findall(r':root \{(.*?)\}', text, re.S):
    colors = dict(re.findall(r'--([\w-]+): (#\w+)', theme))

    def luminance(name, colors=colors):
      code = colors[name][1:]
      code = ''.join(2 * c for c in code) if len(code) == 3 else code
      parts = np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)]) / 255
      return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [
        0.2126,
        0.7152,
        0.0722,
      ]

    def contrast(a, b):
      high, low = sorted((luminance(a), luminance(b)), reverse=True)
      return (high + 0.05) / (low + 0.05)

    for ink, grounds in {
      'ink': ('paper', 'panel', 'note', 'up', 'down'),
      'muted': ('paper', 'panel'),
      'link': ('paper', 'panel'),
    }.items():
      assert all(contrast(ink, ground) >= 4.5 for ground in grounds), ink
    assert all(contrast(f'c{i}', 'panel') >= 3 for i in range(svg.COLORS))


def test_ticks_that_differ_print_differently():
  assert svg.tick_labels([1.0001, 1.0002, 1.0003]) == ['1.0001', '1.0002', '1.0003']
  assert svg.tick_labels([0., .5, 1.]) == ['0', '0.5', '1'] and svg.tick_labels([2., 2.]) == ['2', '2']


def test_the_zero_line_crosses_no_label():
  """It stands in pieces at the axes of the dots; the labels are above these."""
  drawn = charts.dot_plot('t', [charts.Dot('one', 1., .5, 1.5), charts.Dot('two', -1.)], 'points')
  pieces = [(float(a), float(b)) for a, b in re.findall(r'class="zero" x1="[^"]*" y1="([^"]*)" x2="[^"]*" y2="([^"]*)"', drawn)]
  labels = [float(y) for y in re.findall(r'y="([^"]*)" class="halo"', drawn)]
  assert len(pieces) == 2 and labels and not any(top < y and y - 8 < bottom for top, bottom in pieces for y in labels)
