"""A result file as a table that loses no digit at any width of the console."""
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions
from rich.table import Table

from equivariant_ssl.evaluate.protocols import PROTOCOLS
from equivariant_ssl.evaluate.statistics import (
  FEW,
  Interval,
  counted,
  images_classified,
  interval_text,
  mean_std,
  mean_value,
)

HEAD = 10  # letters in a line of a narrow column's head


class Fitting(NamedTuple):
  """The first of `tables` that is no wider than the console.

  Where none is, it is the last one, with its cells folded.
  """
  tables: tuple[Table, ...]

  def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
    endless = options.update(max_width=10_000)
    fit = (t for t in self.tables
           if console.measure(t, options=endless).maximum <= options.max_width)
    yield next(fit, self.tables[-1])


def _number(value: Any, scale: float) -> str:
  """Return a value of a result file as text: '46.10', or with its interval."""
  if isinstance(value, dict):
    return interval_text(Interval(**value), scale, sign=False)
  return f'{scale * value:.2f}'


def _over_seeds(seeds: list[dict], row: str, scale: float) -> str:
  """Return a row of a result as text: the value of one seed, or the mean ± std of several."""
  values = [seed['numbers'][row] for seed in seeds]
  if len(values) == 1:
    return _number(values[0], scale)
  mean, std = mean_std([mean_value(v) for v in values])
  assert std is not None  # there are two values or more
  return f'{scale * mean:.2f} ± {scale * std:.2f}'


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
  """Return rows under `columns`, the first column to the left.

  A cell that does not fit is folded, not cut.
  """
  out = Table(title=title)
  for i, column in enumerate(columns):
    out.add_column(column, justify='right' if i else 'left', overflow='fold')
  for row in rows:
    out.add_row(*row)
  return out


def _cells(result: dict, networks: list[str], row: str, scale: float) -> dict[str, str]:
  """Return {head: text} of a row. The intervals of controls are left to the file."""
  values = {network: _over_seeds(result[network], row, scale) for network in networks}
  images = images_classified(result)
  for network in networks if 0 < images < FEW and len(result['trained']) == 1 else ():
    if not isinstance(value := result[network][0]['numbers'][row], dict):
      values[network] += f' = {counted(value, images)}'
  for control, value in result['trained'][0]['controls'].get(row, {}).items():
    values[control] = _number(mean_value(value), 1. if control.startswith('ratio') else scale)
  return values


def table(result: dict, title: str) -> Fitting:
  """Return a result file as a table: a row for each number, a column for each control.

  On a narrow console an interval is under its mean; on a narrower one, what is beside a number is
  under it.
  """
  percent, first = PROTOCOLS[result['protocol']].percent, result['trained'][0]
  controls = dict.fromkeys(c for row in first['controls'].values() for c in row)
  networks = [network for network in ('trained', 'untrained') if network in result]
  cells = {row: _cells(result, networks, row, 100. if percent else 1.)
           for row in first['numbers']}
  heads, title = [*networks, *controls], f'{title}: {first["name"]}{", %" if percent else ""}'
  wide = [(row, *(texts.get(h, '') for h in heads)) for row, texts in cells.items()]
  under = [(row, *(cell.replace(' [', '\n[') for cell in texts)) for row, *texts in wide]
  beneath = [(f'{row}, {h}' if h == networks[0] else f'  {h}', texts[h])
             for row, texts in cells.items() for h in heads if h in texts]
  narrow_heads = ['\n'.join(textwrap.wrap(h, HEAD)) for h in heads]
  return Fitting((_table(title, ['', *heads], wide), _table(title, ['', *narrow_heads], under),
                  _table(title, ['number', 'value'], beneath)))
