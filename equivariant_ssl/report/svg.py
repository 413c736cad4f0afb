"""SVG as text: escaped, scaled and ticked. Colours are classes of page.html: light, dark and print have their own."""
import html
import math
import re
from collections.abc import Sequence

WIDTH = 320.      # of a chart in its own units: a phone's column, so that text is as large as it says
TEXT = 11.        # height of text
LETTER = 5.9      # mean width of a character of it, a little generous
SMALL = 5.4       # the same of a tick's
COLOURS = 8       # c0 .. c7 of page.html
DASHES = ('', '6 3', '2 2', '8 3 2 3')  # lines are told apart without colour too
HIDDEN = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]')  # what XML cannot hold


def escape(text: object) -> str:
  """`text` for the inside of an element or a quoted attribute."""
  return html.escape(HIDDEN.sub('\ufffd', str(text)))


def cut(text: str, room: float) -> str:
  """`text`, or its beginning with an ellipsis, in `room` units."""
  most = max(int(room / LETTER), 4)
  return text if len(text) <= most else text[:most - 1] + '…'


def short(value: float) -> str:
  """A number for an axis: '0.25', '12k', '2e-5'."""
  size = abs(value)
  if size >= 1e6:
    return f'{value / 1e6:.4g}M'
  if size >= 9999.5:
    return f'{value / 1e3:.4g}k'
  if size >= 999.5:
    return f'{value:.0f}'
  return f'{value:.0e}'.replace('e-0', 'e-') if 0 < size < 1e-3 else f'{value:.3g}'


def text(x: float, y: float, content: object, kind: str = '', anchor: str = 'start') -> str:
  more = (f' class="{kind}"' if kind else '') + (f' text-anchor="{anchor}"' if anchor != 'start' else '')
  return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{escape(content)}</text>'


def rule(x0: float, y0: float, x1: float, y1: float, kind: str = 'grid') -> str:
  return f'<line class="{kind}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'


def figure(title: str, about: str, body: Sequence[str], height: float, width: float = WIDTH) -> str:
  """The SVG of `body`. title, about: its text alternative. A chart of WIDTH grows and shrinks with its column; a wider
  one keeps its size and scrolls."""
  style = f'style="max-width:{1.4 * WIDTH:.0f}px"' if width <= WIDTH else f'class="wide" style="width:{width:.0f}px"'
  return (f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {style} viewBox="0 0 {width:.0f} {height:.0f}">'
          f'<title>{escape(title)}</title><desc>{escape(about)}</desc>{"".join(body)}</svg>')


def ticks(low: float, high: float, count: int = 4) -> list[float]:
  """About `count` round numbers, the first at or under `low`, the last at or over `high` > `low`."""
  rough = (high - low) / count
  power = 10. ** math.floor(math.log10(rough))
  step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * (1 - 1e-9))
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [0. if i == 0 else i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
  """1, 2 and 5 of each decade between two positive numbers; the decades alone where those are many."""
  decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  for parts in ((1, 2, 5), (1,)):
    found = [p * 10. ** d for d in decades for p in parts if low * .999 <= p * 10. ** d <= high * 1.001]
    if len(found) <= 6:
      break
  return found[::max(len(found) // 5, 1)]


def legend(names: Sequence[str], mark, x: float, y: float, width: float = WIDTH) -> tuple[list[str], float]:
  """(the marks `mark(i, x, y)` and `names` in rows from (x, y), the y below them)."""
  out, at = [], x
  for i, name in enumerate(names):
    name = cut(name, width - x - 24)
    wide = 24 + LETTER * len(name)
    if at > x and at + wide > width:
      at, y = x, y + 15
    out += [mark(i, at, y - 4), text(at + 19, y, name)]
    at += wide + 8
  return out, y + 15
