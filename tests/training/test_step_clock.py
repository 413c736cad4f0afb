"""The time of steps: what devices wait for, and what is no part of a step."""
import time
import types

import pytest

from equivariant_ssl.training import step_log
from equivariant_ssl.training.step_clock import Spent, StepClock
from equivariant_ssl.training.step_log import DATA_WAIT, FIRST_STEP, SAVE


class Step:
  """What a device computes in some seconds from now on."""

  def __init__(self, seconds):
    self.end = time.perf_counter() + seconds

  def block_until_ready(self):
    time.sleep(max(self.end - time.perf_counter(), 0.))
    return self


def test_a_wait_counts_from_when_the_device_is_idle():
  with StepClock() as clock:
    with clock.span(FIRST_STEP):
      time.sleep(.1)
    clock.launch(step := Step(.2))
    with clock.span(DATA_WAIT):  # the data come .1 s after the device is done
      time.sleep(.3)
    clock.launch(step := Step(.2))
    with clock.span(DATA_WAIT):  # and here they come in time
      time.sleep(.1)
    step.block_until_ready()
    with clock.span(SAVE):
      time.sleep(.1)
    spent = clock.read()
    assert spent.steps == 2 and spent.seconds == pytest.approx(.7, abs=.1)
    assert spent.idle == pytest.approx({FIRST_STEP: .1, DATA_WAIT: .1, SAVE: .1}, abs=.06)
    assert clock.read().steps == 0
  assert not clock.thread.is_alive()


def test_a_row_says_the_speed_of_the_steps_alone():
  spent = Spent(10., 5, {FIRST_STEP: 4., SAVE: 2., DATA_WAIT: 1., 'monitor_s': 1e-6})
  assert step_log._speed(8, spent) == {FIRST_STEP: 4., SAVE: 2., 'images_per_s': 8 * 5 / 4,
                                       DATA_WAIT: .25}
  assert step_log._speed(8, Spent(3., 0, {FIRST_STEP: 3.})) == {FIRST_STEP: 3.}


@pytest.mark.parametrize('seconds,steps', [(2., 10), (.12, 10), (.09, 20), (.01, 160), (.001, 1280)])
def test_rows_are_a_second_apart_where_steps_are_short(seconds, steps):
  """The first row is at 10 steps, and the next ones at multiples of what it says."""
  spent = Spent(9 * seconds + 30., 9, {FIRST_STEP: 30.})
  assert step_log._steps_between_rows(spent) == steps
  run = types.SimpleNamespace(log_every=0)
  assert step_log.start_window(run.log_every).every == 10
  assert step_log.start_window(7)[1:3] == (7, True)
