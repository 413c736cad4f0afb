"""The demo's question in miniature, asked by a study: which role should a digit's turn have?"""
import pathlib
from typing import Any

from equivariant_ssl.demo.arms import Budget
from equivariant_ssl.study.study_plan import Settings
from equivariant_ssl.study.study_session import study

EPOCHS = 10.  # of the demo's 40: what a study's short runs can tell


def settings(budget: Budget) -> Settings:
  """Return the settings of the study: every role of the turn, beside crops alone."""
  steps = {'steps': str(budget.steps)} if budget.steps else {}
  return Settings(
      'digits_simclr_equimod', augs=('rotate',), seeds=tuple(budget.seed_numbers),
      overrides={'augment.rotate.role': 'off', **steps}, budget=0. if budget.steps else EPOCHS,
      protocols=('regression',))


def run_demo(out: pathlib.Path, budget: Budget = Budget(1), command: str = 'eqssl demo --study'
             ) -> dict[str, Any]:
  """Do the study in the folder `out` and return the content of its results.json.

  Its last line names the report. A study that is already in the folder goes on.
  """
  return study(out, settings(budget), command)
