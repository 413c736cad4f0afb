"""A report as one HTML file.

The page consists of sections of blocks, which page.html renders, and holds its data as JSON.
"""
import base64
import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape

from equivariant_ssl.errors import UserError
from equivariant_ssl.storage import record


class Paragraph(NamedTuple):
  """A paragraph."""
  text: str


class Points(NamedTuple):
  """Sentences, one under the other.

  folded: the words that stand in their place until a reader opens them. '' means open.
  """
  items: tuple[str, ...]
  folded: str = ''


class Missing(NamedTuple):
  """A sentence that says what is missing, and the command that makes it ('' where none does)."""
  text: str
  command: str = ''


class Hint(NamedTuple):
  """A sentence, and the command or the options that it is about. Nothing is missing."""
  text: str
  command: str


class Code(NamedTuple):
  """Text that is copied as it is."""
  text: str


class Link(NamedTuple):
  """The header of a row that links to another page."""
  text: str
  href: str


class Table(NamedTuple):
  """Rows of cells; the first cell of a row is its header.

  left: how many columns, from the left, hold words and not numbers.
  folded: whether the table is closed until a reader opens it.
  """
  caption: str
  columns: tuple[str, ...]
  rows: Sequence[Sequence[Any]]
  left: int = 1
  folded: bool = False


class KeyNumber(NamedTuple):
  """A number that is seen first: its name, its value, and the numbers to compare it with."""
  label: str
  value: str
  beside: str


class Cards(NamedTuple):
  """Cards in a row."""
  cards: tuple[KeyNumber, ...]


class Chart(NamedTuple):
  """An SVG that charts.py made, under its title. note: how to read it."""
  title: str
  svg: str
  note: str = ''

  @property
  def wide(self) -> bool:
    """Whether the chart is wider than a column, so that it scrolls."""
    return 'class="wide"' in self.svg[:200]


class Charts(NamedTuple):
  """Charts beside each other, as many as fit in a row."""
  charts: Sequence[Chart]


class Picture(NamedTuple):
  """A PNG file with lines of text under it, which are also its text alternative.

  sharp: the picture has so few pixels that they are shown as squares.
  """
  png: bytes
  lines: tuple[str, ...]
  sharp: bool

  @property
  def source(self) -> str:
    """The picture as a data URL."""
    return 'data:image/png;base64,' + base64.b64encode(self.png).decode()


class Pictures(NamedTuple):
  """Rows of pictures. about: what a row holds."""
  title: str
  about: str
  rows: Sequence[Sequence[Picture]]


class Section(NamedTuple):
  """A heading, which the table of contents links to by `anchor`, and the blocks under it."""
  title: str
  anchor: str
  blocks: Sequence[Any]


def finite(value: Any) -> Any:
  """Return `value` with None for each number that is not finite: JSON has no such number."""
  if isinstance(value, dict):
    return {str(k): finite(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [finite(v) for v in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _kind(block: Any) -> str:
  """Return the name of a block's class, by which page.html chooses how to render it."""
  return type(block).__name__


def _breakable(cell: Any) -> Markup:
  """Return a cell whose words may break after a dot, a dash or an equals sign.

  An example is 'equivariance.action_hidden'.
  """
  return Markup(re.sub(r'([._=])(?=\w)', r'\1<wbr>', str(escape(cell))))


def _environment() -> jinja2.Environment:
  """Return jinja2's settings for page.html."""
  loader = jinja2.PackageLoader('equivariant_ssl.report', '.')
  environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True,
                                   lstrip_blocks=True, undefined=jinja2.StrictUndefined)
  environment.filters['kind'] = _kind
  environment.filters['breakable'] = _breakable
  return environment


def render(title: str, about: str, sections: Sequence[Section], data: Any) -> str:
  """Return a page as HTML.

  about: the line under the title. data: stands as JSON in the element whose id is 'data'.
  """
  # The JSON has no '<', so that no text in it can end the element or open a comment.
  embedded = json.dumps(finite(data), allow_nan=False).replace('<', '\\u003c')

  def svg(chart: Chart) -> Markup:
    return Markup(chart.svg)  # charts.py escapes the names and words that it gets

  template = _environment().get_template('page.html')
  return template.render(title=title, about=about, sections=sections, svg=svg,
                         data=Markup(embedded))


def check_target(path: pathlib.Path, name: str = 'page.html') -> None:
  """Raise UserError where `path`, a file to write, is a folder.

  name: the file name that the error suggests.
  """
  if path.is_dir():
    raise UserError(f'{str(path)!r} is a folder, not a file to write.',
                    f'Name a file in it, for example {path / name}')


def save(path: pathlib.Path, text: str) -> pathlib.Path:
  """Write a page to `path` and return the path.

  A process that is killed meanwhile leaves the old page or the new one, never a part of one.
  """
  check_target(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # The name of a file can hold what UTF-8 cannot.
  record.write_atomically(path, text.encode('utf-8', 'replace').decode())
  return path
