"""A kill, a full disk and an error of the disk at every operation that changes a file; an error at every one that reads."""
import random
import shutil

import pytest
from matrix import many

COUNT, KILL, EIO, ENOSPC = range(4)
STEPS = {'steps': 3, 'checkpoint_every': 1, 'keep': 1, 'log_every': 1}  # three saves, two clean-ups
CLEAN = (0, 2, 10)  # codes of a run that a fault ended: one line, and nothing is lost


@pytest.fixture(scope='module')
def whole(failing, tmp_path_factory):
  """What a run learns that nothing happens to, and how many operations change its files."""
  run = str(tmp_path_factory.mktemp('whole'))
  status, left, said = failing.do(do='light', workdir=run, config=STEPS, fault=[COUNT, 0, 0])
  assert status == 0, said
  return left['prints'], left['seen']


@pytest.fixture(scope='module')
def torn(failing, whole, tmp_path_factory):
  """A run that was killed in the middle of its second save, and how many operations change or read its files on resuming."""
  folder = tmp_path_factory.mktemp('torn')
  for at in range(whole[1] // 2, whole[1]):
    run = folder / str(at)
    assert failing.do(do='light', workdir=str(run), config=STEPS, fault=[KILL, at, 0])[0] == -9
    if any('tmp' in p.name for p in run.glob('checkpoints/*')) and any(p.name.isdigit() for p in run.glob('checkpoints/*')):
      break
  seen = {}
  for reads in (0, 1):
    copy = shutil.copytree(run, folder / f'copy{reads}')
    status, left, said = failing.do(do='light', workdir=str(copy), config=STEPS, fault=[COUNT, 0, reads])
    assert status == 0 and left['prints'] == whole[0], said
    seen[reads] = left['seen']
  return run, seen


def points(total, few):
  """All operations, or a few of them."""
  return range(1, total + 1) if many(1, 0) else sorted(random.Random(total).sample(range(1, total + 1), few))


def went_on(failing, row, run, want, config=STEPS):
  """Judge a run after a fault: does it go on to the end, with everything as it should be?"""
  status, left, said = failing.do(do='light', workdir=str(run), config=config)
  aside = list(run.glob('quarantine/*'))
  row.add('lost' if status or aside else 'survived' if left['prints'] == want else 'wrong',
          f'{run.name}: {status} {aside} {said[-500:]}')
  shutil.rmtree(run, ignore_errors=True)


@pytest.mark.parametrize('where', ['saves and clean-ups', 'a resume'])
def test_a_kill_at_every_operation(failing, whole, torn, where, row, tmp_path):
  run, seen = torn
  chosen = points(whole[1] if 'saves' in where else seen[0], 3)
  one = row(f'kill -9 at each operation of {where}', len(chosen))
  for at in chosen:
    place = tmp_path / str(at) if 'saves' in where else shutil.copytree(run, tmp_path / str(at))
    status, *_, said = failing.do(do='light', workdir=str(place), config=STEPS, fault=[KILL, at, 0])
    if status not in (-9, 0):
      one.add('wrong', f'{at}: {status} {said[-500:]}')
      continue
    went_on(failing, one, place, whole[0])


@pytest.mark.parametrize('fault', ['EIO', 'ENOSPC'])
@pytest.mark.parametrize('where', ['saves and clean-ups', 'a resume'])
def test_a_failing_disk_at_every_operation(failing, whole, torn, where, fault, row, tmp_path):
  """The run ends with a line, or does not mind; when the disk is well, the same process goes on to the right end."""
  run, seen = torn
  chosen = points(whole[1] if 'saves' in where else seen[0], 2)
  one = row(f'{"one EIO" if fault == "EIO" else "disk full (ENOSPC) from"} at each operation of {where}', len(chosen))
  for at in chosen:
    place = tmp_path / str(at) if 'saves' in where else shutil.copytree(run, tmp_path / str(at))
    status, left, said = failing.do(do='light', workdir=str(place), config=STEPS, again=True,
                                    fault=[EIO if fault == 'EIO' else ENOSPC, at, 0])
    aside = list(place.glob('quarantine/*'))
    if status not in CLEAN or left.get('again') or aside:
      one.add('lost', f'{at}: {status} {left.get("again")} {aside} {said[-800:]}')
    else:
      one.add('survived' if left['prints'] == whole[0] else 'wrong', f'{at}: {said[-500:]}')
    shutil.rmtree(place)


def test_one_read_error_at_every_operation_of_a_resume(failing, whole, torn, row, tmp_path):
  """It passes: the resume goes on as if nothing had been, or ends with its own code; no good checkpoint is condemned."""
  run, seen = torn
  chosen = points(seen[1], 4)
  one = row('one EIO at each reading operation of a resume', len(chosen))
  for at in chosen:
    place = shutil.copytree(run, tmp_path / str(at))
    status, left, said = failing.do(do='light', workdir=str(place), config=STEPS, again=True, fault=[EIO, at, 1])
    aside = list(place.glob('quarantine/*'))
    if status not in (0, 10) or left.get('again') or aside:
      one.add('lost', f'{at}: {status} {left.get("again")} {aside} {said[-800:]}')
    else:
      one.add('survived' if left['prints'] == whole[0] else 'wrong', f'{at}: {said[-500:]}')
    shutil.rmtree(place)
