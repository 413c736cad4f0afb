"""No artifact of how an op is done tells what it did: an untrained network reads nothing off noise.

The network, the noise and the questions are those of benchmarks/shortcuts.py, which also prints the figures.
"""
import importlib.util
import pathlib

import pytest

TRAIN, TEST = 2500, 2000
KINDS = ('white', '1/f')

_spec = importlib.util.spec_from_file_location(
    'shortcuts', pathlib.Path(__file__).parents[2] / 'benchmarks' / 'shortcuts.py')
shortcuts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shortcuts)


def answers(case, kinds):
  return shortcuts.answer_questions(case, {kind: shortcuts.noise(kind, TRAIN + TEST) for kind in kinds}, TRAIN)


def check(name, kinds):
  for (kind, question), answer in answers(shortcuts.cases()[name], kinds).items():
    assert answer.chance < .6, f'{name}: {question!r} asks nothing'
    assert answer.right <= answer.chance + shortcuts.BAR, \
        f'{name}: an untrained network reads {question!r} off {kind} noise: {answer.right:.1%}, chance {answer.chance:.1%}'


FAST = ('crop, flip, vflip', 'crop, rotate', 'jigsaw 2 x 2', 'turn')  # the rest under `make test-all`


@pytest.mark.parametrize('name', [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in shortcuts.cases()])
def test_nothing_is_read_off_noise(name):
  check(name, ('1/f',) if 'jigsaw' in name else KINDS)


@pytest.mark.slow  # tiles of white noise have no borders that could fit
@pytest.mark.parametrize('name', [name for name in shortcuts.cases() if 'jigsaw' in name])
def test_no_order_is_read_off_white_noise(name):
  check(name, ('white',))


@pytest.mark.parametrize('name', shortcuts.naive())
def test_a_planted_artifact_is_found(name):
  found = answers(shortcuts.naive()[name], ('1/f',))
  assert all(answer.right > answer.chance + shortcuts.BAR for answer in found.values()), found
