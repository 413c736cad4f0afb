"""The demo's report page: its figure and sentences, every read-out, and how it trained."""
import base64
import pathlib
import shlex
from typing import Any

import numpy as np

from equivariant_ssl.config import config_to_json
from equivariant_ssl.demo.arms import (
  FIRST_SEED,
  READOUTS,
  VALIDATION,
  ArmSpec,
  Budget,
  TrainedArm,
  arm_config,
  show_mean,
)
from equivariant_ssl.evaluate.statistics import interval, interval_text
from equivariant_ssl.report import charts, page, panels
from equivariant_ssl.report.page import Chart, Charts, Paragraph, Points, Section, Table
from equivariant_ssl.report.svg import escape

CHOSEN = (
    f'Settings are chosen on {VALIDATION:.0%} of the training digits of each class, with seeds '
    f'from {FIRST_SEED["validation"]} on (eqssl demo --readout validation; docs/results.md says '
    'what was tried). The test digits and the seeds that are read out on them choose nothing; an '
    'older version chose the width of the network on test digits.')
CONTROLS = {'true': 'the true turns', 'shuffled': 'turns of other images', 'zeroed': 'no turn'}


def _picture(path: pathlib.Path, words: str) -> Chart:
  """Return a PNG file as a chart as wide as the page. words: its text alternative."""
  source = 'data:image/png;base64,' + base64.b64encode(path.read_bytes()).decode()
  return Chart('Turns of digits, at a glance',
               f'<img class="wide" alt="{escape(words)}" src="{source}" '
               'style="width:clamp(40rem,calc(100vw - 6rem),68rem)">')


def _result(out: pathlib.Path, arms: dict[str, TrainedArm], content: dict[str, Any]) -> Section:
  rows = [(name, *(interval_text(interval(arm.readouts[key]), digits=1, sign=False)
                   for key in READOUTS)) for name, arm in arms.items()]
  table = Table('Mean over seeds [95 % interval]; chance: turn 25 %, class 10 %, both 2.5 %',
                ('arm', *READOUTS.values()), rows)
  return Section('What the features keep', 'result', [
      Points(tuple(content['conclusion'])),
      Charts([_picture(out / 'figure.png', content['conclusion'][0])]), table])


def _predictor(arms: dict[str, TrainedArm]) -> Section:
  """Return the section on what EquiMod's predictor makes of a turn."""
  rows, gain_rows = [], []
  for name, arm in arms.items():
    if arm.gains and arm.retrieved:
      rows.append((name, *(show_mean([getattr(r, field) for r in arm.retrieved])
                           for field in ('turn', 'digit', 'both', 'turn_without'))))
      gains = [gain['all'] for gain in arm.gains]
      gain_rows.append((name, *(show_mean([100 * getattr(gain, control).absolute.mean
                                           for gain in gains]) for control in CONTROLS),
                        show_mean([100 * gain.over_shuffled.mean for gain in gains])))
  return Section('What the predictor knows', 'predictor', [
      Paragraph('EquiMod predicts where each turn of a held-out digit takes its embedding. The '
                'nearest view of another held-out digit, in any of its four turns, then has:'),
      Table('%, mean ± std over seeds', ('arm', 'the right turn', 'the right class', 'both',
                                         'the right turn, conditioned on no turn'), rows),
      Paragraph('EquiMod\'s absolute gain: how much nearer, in cosine, the prediction is to the '
                'turned digit\'s embedding than the embedding of the digit as it is. Doing nothing '
                'is 0.'),
      Table('Gain x 100, mean ± std over seeds',
            ('arm', *CONTROLS.values(), 'true - other images\''), gain_rows)])


def _training(arms: dict[str, TrainedArm], specs: dict[str, ArmSpec], budget: Budget) -> Section:
  """Return the section with what the arms are, their losses, and their configs."""
  series = {}
  for name, arm in arms.items():
    if arm.losses:
      losses = np.mean(arm.losses, axis=0).tolist()
      series[name] = list(range(1, len(losses) + 1)), losses
  chart = Chart('Training loss, mean over seeds', charts.line_chart('Training loss', series),
                'Arms have different terms: compare shapes, not heights.')
  configs = [panels.config_table(config_to_json(arm_config(spec, budget)), f'The config of {name}')
             for name, spec in specs.items()]
  return Section('How it trained', 'training', [
      Table('The arms', ('arm', 'what it is'),
            [(name, spec.story) for name, spec in specs.items()], 2),
      Charts([chart]), *configs])


def write(out: pathlib.Path, arms: dict[str, TrainedArm], specs: dict[str, ArmSpec],
          budget: Budget, content: dict[str, Any]) -> pathlib.Path:
  """Write report.html into `out`, where figure.png is already, and return its path.

  content: that of results.json.
  """
  environment, seeds = content['environment'], ', '.join(map(str, content['seeds']))
  chosen = Section('What was chosen where', 'chosen', [
      Paragraph(f'Read out on {content["images"]}, seeds {seeds}. {CHOSEN}')])
  steps = ('--steps', budget.steps) if budget.steps else ()
  typed = ('eqssl', 'demo', '--seeds', budget.seeds, '--readout', budget.readout, *steps)
  command = shlex.join(map(str, typed))
  again = panels.rerun_section(environment, [command], 'every number of the demo')
  sections = [_result(out, arms, content), chosen, _predictor(arms),
              _training(arms, specs, budget), again._replace(
                  blocks=[*again.blocks, panels.environment_table(environment)])]
  about = (f'Digits, read out on {content["images"]}; seeds {seeds}; {content["minutes"]:.1f} '
           'minutes. The arms differ in the role of the quarter turn alone.')
  text = page.render('Digits and their turns: what features keep', about, sections, content)
  return page.save(out / 'report.html', text)
