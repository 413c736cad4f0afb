"""A row of metrics.jsonl: the numbers of one step, as a line of JSON."""
import json
import math
from typing import Any

LARGEST = 1e300  # no metric is so large; a larger number was not written by this program


def _is_number(value: Any) -> bool:
  """Return whether a JSON value is a number that can be a metric."""
  return (isinstance(value, int | float) and not isinstance(value, bool)
          and abs(value) < LARGEST)


def valid_row(row: Any) -> dict[str, Any] | None:
  """Return the numbers of a row of metrics, with None for those that are not finite.

  The result is None if the value is no row of a step.
  """
  if not isinstance(row, dict) or not isinstance(row.get('step'), int):
    return None
  if not _is_number(row['step']) or row['step'] < 0:
    return None
  return {k: v if _is_number(v) else None for k, v in row.items()
          if v is None or _is_number(v) or isinstance(v, float)}


def row_text(row: dict[str, Any]) -> str:
  """Return a row of metrics as a line of JSON. A number that is not finite becomes null."""
  finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
  return json.dumps(finite, allow_nan=False) + '\n'
