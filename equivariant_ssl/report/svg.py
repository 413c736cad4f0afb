"""SVG as text: escaped words, lines, axis ticks and legends.

A color is a CSS class of page.html, because light, dark and printed pages have different colors.
"""
import html
import math
import re
from collections.abc import Callable, Sequence

# The width of a chart in its own units is that of a phone's column, so that text keeps its size.
WIDTH = 320.
TEXT = 11.    # height of text
LETTER = 5.9  # mean width of a character of text, slightly overestimated
SMALL = 5.4   # mean width of a character of a tick's label
COLORS = 10   # the classes c0 .. c9 of page.html
DASHES = ('', '6 3', '2 2', '8 3 2 3')  # dashes tell lines apart where colors cannot
HIDDEN = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]')  # the characters that XML forbids

Mark = Callable[[int, float, float], str]  # (index of a name, x, y) -> the SVG of its mark


def escape(text: object) -> str:
  """Return `text` escaped for the inside of an element or of a quoted attribute."""
  return html.escape(HIDDEN.sub('\ufffd', str(text)))


def cut(text: str, room: float) -> str:
  """Return `text`, or its beginning and an ellipsis where it is wider than `room` units."""
  most = max(int(room / LETTER), 4)
  return text if len(text) <= most else text[:most - 1] + '…'


def short(value: float) -> str:
  """Return a number for an axis: '0.25', '12k', '2e-5'."""
  size = abs(value)
  if size >= 1e6:
    return f'{value / 1e6:.4g}M'
  if size >= 9999.5:
    return f'{value / 1e3:.4g}k'
  if size >= 999.5:
    return f'{value:.0f}'
  return f'{value:.0e}'.replace('e-0', 'e-') if 0 < size < 1e-3 else f'{value:.3g}'


def tick_labels(values: Sequence[float]) -> list[str]:
  """Return the numbers of an axis as text, with as many digits as tell different ones apart."""
  labels, digits = [short(value) for value in values], 4
  while len(set(labels)) < len(set(values)) and digits < 17:
    labels, digits = [f'{value:.{digits}g}' for value in values], digits + 1
  return labels


def text(x: float, y: float, content: object, kind: str = '', anchor: str = 'start') -> str:
  """Return a text element. kind: its CSS class. anchor: the side of the text that is at x."""
  attributes = f' class="{kind}"' if kind else ''
  attributes += f' text-anchor="{anchor}"' if anchor != 'start' else ''
  return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{escape(content)}</text>'


def rule(x0: float, y0: float, x1: float, y1: float, kind: str = 'grid') -> str:
  """Return a straight line. kind: its CSS class."""
  return f'<line class="{kind}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'


def figure(title: str, about: str, body: Sequence[str], height: float, width: float = WIDTH) -> str:
  """Return the SVG element around the elements `body`. title, about: its text alternative.

  A chart of WIDTH grows and shrinks with its column. A wider chart keeps its size and scrolls.
  """
  style = (f'style="max-width:{1.4 * WIDTH:.0f}px"' if width <= WIDTH
           else f'class="wide" style="width:{width:.0f}px"')
  return (f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {style} '
          f'viewBox="0 0 {width:.0f} {height:.0f}"><title>{escape(title)}</title>'
          f'<desc>{escape(about)}</desc>{"".join(body)}</svg>')


def ticks(low: float, high: float, count: int = 4) -> list[float]:
  """Return about `count` round numbers, in equal steps, that enclose `low` < `high`.

  The first is at or under `low`, the last at or over `high`.
  """
  rough = (high - low) / count
  power = 10. ** math.floor(math.log10(rough))
  step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * (1 - 1e-9))
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [0. if i == 0 else i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
  """Return 1, 2 and 5 times each power of ten between two positive numbers.

  Where these are more than six, the powers of ten alone are returned, at most about six of them.
  """
  decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  powers = [10. ** d for d in decades]
  for factors in ((1, 2, 5), (1,)):
    levels = [f * p for p in powers for f in factors if low * .999 <= f * p <= high * 1.001]
    if len(levels) <= 6:
      break
  return levels[::max(len(levels) // 5, 1)]


def legend(names: Sequence[str], mark: Mark, x: float, y: float, width: float = WIDTH
           ) -> tuple[list[str], float]:
  """Return the elements of a legend in rows from (x, y), and the y below them.

  mark: makes the SVG of the mark that stands before a name.
  """
  elements, left = [], x
  for i, name in enumerate(names):
    name = cut(name, width - x - 24)
    room = 24 + LETTER * len(name)
    if left > x and left + room > width:
      left, y = x, y + 15
    elements += [mark(i, left, y - 4), text(left + 19, y, name)]
    left += room + 8
  return elements, y + 15
