"""A report as one HTML file: sections of blocks, rendered by page.html, and its data as JSON inside."""
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


class Text(NamedTuple):
  """A paragraph."""
  text: str


class Points(NamedTuple):
  """Sentences, one under the other. folded: what to say in their place until they are asked for."""
  items: tuple[str, ...]
  folded: str = ''


class Missing(NamedTuple):
  """What is not there, in a sentence, and what to type for it ('': nothing helps)."""
  text: str
  command: str = ''


class Code(NamedTuple):
  """Text to copy as it is."""
  text: str


class Link(NamedTuple):
  """A row's header that leads to another page."""
  text: str
  href: str


class Table(NamedTuple):
  """Rows of cells, the first cell of each its header. left: how many columns hold words, not numbers. folded: closed
  until asked for."""
  caption: str
  columns: tuple[str, ...]
  rows: Sequence[Sequence[Any]]
  left: int = 1
  folded: bool = False


class Card(NamedTuple):
  """A number to see first: what it is, the number, what stands beside it."""
  label: str
  value: str
  beside: str


class Cards(NamedTuple):
  """Cards in a row."""
  cards: tuple[Card, ...]


class Chart(NamedTuple):
  """An SVG of charts.py under its title; note: how to read it."""
  title: str
  svg: str
  note: str = ''

  @property
  def wide(self) -> bool:
    return 'class="wide"' in self.svg[:200]


class Charts(NamedTuple):
  """Charts beside each other, as many as fit."""
  charts: Sequence[Chart]


class Picture(NamedTuple):
  """A PNG with the lines under it, which are its text alternative too. sharp: few pixels, shown as squares."""
  png: bytes
  lines: tuple[str, ...]
  sharp: bool

  @property
  def source(self) -> str:
    return 'data:image/png;base64,' + base64.b64encode(self.png).decode()


class Pictures(NamedTuple):
  """Rows of Pictures; about: what a row holds."""
  title: str
  about: str
  rows: Sequence[Sequence[Picture]]


class Section(NamedTuple):
  """A heading that the contents link to by `anchor`, and blocks."""
  title: str
  anchor: str
  blocks: Sequence[Any]


def finite(value: Any) -> Any:
  """`value` as JSON can hold it: a number that is not finite is null."""
  if isinstance(value, dict):
    return {str(k): finite(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [finite(v) for v in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _environment() -> jinja2.Environment:
  made = jinja2.Environment(loader=jinja2.PackageLoader(__package__, '.'), autoescape=True, trim_blocks=True,
                            lstrip_blocks=True, undefined=jinja2.StrictUndefined)
  made.filters['kind'] = lambda block: type(block).__name__
  # 'equivariance.action_hidden' may break after a dot or a dash.
  made.filters['breakable'] = lambda cell: Markup(re.sub(r'([._=])(?=\w)', r'\1<wbr>', str(escape(cell))))
  return made


def render(title: str, about: str, sections: Sequence[Section], data: Any) -> str:
  """The page: its title, a line under it, the sections, and `data` as JSON in the element with id 'data'."""
  # No '<' in it, so that no text can end the element or open a comment.
  embedded = json.dumps(finite(data), allow_nan=False).replace('<', '\\u003c')
  svg = lambda chart: Markup(chart.svg)  # charts.py escapes what it is given
  return _environment().get_template('page.html').render(title=title, about=about, sections=sections, svg=svg,
                                                         data=Markup(embedded))


def check(path: pathlib.Path, name: str = 'page.html') -> None:
  """UserError where the file to write is a folder, with the `name` of a file to write in it."""
  if path.is_dir():
    raise UserError(f'{str(path)!r} is a folder, not a file to write.', f'Give a file in it, e.g. {path / name}')


def save(path: pathlib.Path, text: str) -> pathlib.Path:
  """Write a page whole: a kill leaves the old one or the new one."""
  check(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  record.write_whole(path, text.encode('utf-8', 'replace').decode())  # a file's name can hold what UTF-8 cannot
  return path
