"""What is said before anything is trained: no step at all, a warm-up that leaves no step for the cosine."""
import pytest
import tiny

from equivariant_ssl import cli, shipped
from equivariant_ssl.config import load_config
from equivariant_ssl.study import study_session
from equivariant_ssl.training import loop
from equivariant_ssl.training.recipe import warmup_warning
from equivariant_ssl.training.runs import prepare_run

PER_EPOCH = 1000 // 16  # of the tiny config


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
  """command(*overrides) -> (exit code, stderr) of a training that stops before its first step."""
  monkeypatch.setattr(cli, '_cache', lambda: None)
  monkeypatch.setattr(loop, 'initial_state', lambda run, rule: loop.TrainState(0, {}, {}, (), (), ()))
  monkeypatch.setattr(loop, 'fit', lambda run, state, on_step: state)

  def of(*overrides):
    code = cli.main(['train', '--config', tiny.NAME, '--workdir', str(tmp_path / 'run'), *overrides])
    return code, capsys.readouterr().err
  return of


@pytest.mark.parametrize('epochs', ['.001', '1e-9'])
def test_no_step_is_an_error_and_leaves_nothing(epochs, command, tmp_path):
  code, err = command('--config.steps=0', f'--config.epochs={epochs}')
  assert code == 2 and 'no whole step to train' in err and '--config.epochs=1' in err
  assert len(err.strip().splitlines()) == 2 and not (tmp_path / 'run').exists()


@pytest.mark.parametrize(('steps', 'warmup', 'said'), [
    (PER_EPOCH, 1, 'to 1 of its peak'), (PER_EPOCH - 1, 1, 'to 0.984 of its peak'), (8, 10, 'to 0.0129 of its peak'),
    (PER_EPOCH + 1, 1, ''), (1, 0, '')])
def test_a_warm_up_as_long_as_the_run_is_said(steps, warmup, said, command):
  code, err = command(f'--config.steps={steps}', f'--config.optimizer.warmup_epochs={warmup}')
  assert code == 0
  lines = [line for line in err.splitlines() if 'warm-up' in line]
  assert len(lines) == bool(said) and (not said or said in lines[0] and f'{warmup * PER_EPOCH:,} steps' in lines[0])


def test_what_it_proposes_is_shorter():
  over = {'steps': '8', 'optimizer.warmup_epochs': '10'}
  line = warmup_warning(config := load_config(tiny.NAME, over), prepare_run(config).recipe)
  assert 'For a warm-up of a tenth of the run: --config.optimizer.warmup_epochs=' in line
  over['optimizer.warmup_epochs'] = line.split('warmup_epochs=')[1]
  assert 0 < float(over['optimizer.warmup_epochs']) < 1
  assert warmup_warning(config := load_config(tiny.NAME, over), prepare_run(config).recipe) == ''


@pytest.mark.parametrize('name', sorted(p.stem for p in shipped.folders()[0].glob('*.py')))
def test_no_shipped_config_is_all_warm_up(name):
  config = load_config(name)
  assert config.steps or config.optimizer.warmup_epochs < config.epochs


@pytest.mark.parametrize('argv', [
    ('--config.steps=3', '--proxies', '1/8'), ('--config.steps=0', '--budget', '1', '--proxies', '.5,.001'),
    ('--config.steps=0', '--budget', '.001')])
def test_a_study_with_a_run_of_no_step_does_not_start(argv, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(study_session, 'execute', lambda *args: pytest.fail('runs were started'))
  monkeypatch.setattr(study_session, 'devices', lambda: ({'backend': 'cpu'}, 1))
  assert cli.main(['study', '--config', tiny.NAME, '--augs', 'flip', '--out', str(tmp_path / 's'), *argv]) == 2
  err = capsys.readouterr().err
  assert 'no whole step to train' in err and len(err.strip().splitlines()) == 2 and not (tmp_path / 's').exists()
