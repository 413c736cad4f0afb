"""The parts of the founding experiment: data, programs, training, what comes back, and read-outs.

parts.py runs each of them alone.
"""
import hashlib
import io
import json
import os
import pathlib
import sys
import tarfile

import encoders
import sizes

STORE = pathlib.Path(os.environ.get('LEASE_STORE', '/tmp/eqssl-gpu'))  # on the machine's own disk: outlasts a call
FILES = (*(f'cifar10-train{i}.webp.zip' for i in range(1, 6)), 'cifar10-test.webp.zip')
LEFT = ('projector', 'predictor')  # of the invariance: no protocol reads them, so they are not brought back


def folder(label: str, seed: int) -> pathlib.Path:
  """The run of an arm, or of the untrained network."""
  return STORE / 'runs' / f'{label}-s{seed}'


def data(size: sizes.Size, say) -> dict:
  """Unpack the six carried files, check their bytes, and prepare them as `eqssl data prepare cifar10` does."""
  sys.path.insert(0, str(STORE / 'data'))
  import unpack  # travels with the data

  from equivariant_ssl.data import cifar10, prepare
  archive, root = STORE / 'cifar10.tar', pathlib.Path(os.environ['TFDS_DATA_DIR'])
  with tarfile.open(archive, 'w') as tar:
    for name in FILES:
      part = name.removeprefix('cifar10-').removesuffix('.webp.zip')
      member = 'test_batch.bin' if part == 'test' else f'data_batch_{part.removeprefix("train")}.bin'
      content = unpack.binary(*unpack.part(part))
      if hashlib.sha256(content).hexdigest() != unpack.SHA256[member]:
        raise ValueError(f'{name}: not the bytes that were packed')
      info = tarfile.TarInfo(prepare.FOLDER + member)
      info.size = size.records * prepare.RECORD
      tar.addfile(info, io.BytesIO(content[:info.size]))
  prepare.prepare(str(archive), root, size.records, print)
  archive.unlink()
  source = cifar10.make()  # decoded once, and kept for every run
  return {'train': len(source.train.images), 'test': len(source.test.images)}


def _settings(size: sizes.Size, arm: list, epochs: int, seed: int) -> dict[str, str]:
  """The overrides of an arm's config. There are three checkpoints, because each costs time on the device."""
  _, config, changed = arm
  steps = epochs * (5 * size.records) // int(size.overrides.get('batch', 512))
  return sizes.overrides(size, config, {**changed, 'epochs': str(float(epochs)), 'seed': str(seed),
                                        'checkpoint_every': str(steps // 3 + 1)})


def programs(size: sizes.Size, say, arm: list, epochs: int, seed: int) -> dict:
  """Compile an arm's step and its initialization into the cache, while the data are prepared."""
  import parts

  from equivariant_ssl.training import runs
  runs.keep_compiled_programs()
  run = parts.described(size, arm[1], _settings(size, arm, epochs, seed), images=False)
  parts.compiled(run)
  runs.initial_state(run)
  return {'arm': arm[0], 'epochs': epochs}


def train(size: sizes.Size, say, arm: list, epochs: int, seed: int) -> dict:
  """Train an arm, from its newest checkpoint where it has one. It ends with the command line's exit code; 75 is stopped and
  saved."""
  from equivariant_ssl import cli
  from equivariant_ssl.storage import record
  place = folder(arm[0], seed)
  changes = _settings(size, arm, epochs, seed)
  code = cli.main(['train', '--config', arm[1], '--workdir', str(place), *(f'--config.{k}={v}' for k, v in changes.items())])
  rows = record.read_metrics(place)
  found = {'code': code, 'epochs': epochs, 'seed': seed, 'step': rows[-1]['step'] if rows else 0, 'metrics': rows}
  say(found)
  if code:
    sys.exit(code)
  return found


def untrained(size: sizes.Size, say, arm: list, epochs: int, seed: int) -> dict:
  """Write the network of an arm before its first step as a run of step 0, so that it is evaluated like the others."""
  from equivariant_ssl.config import config_to_json, load_config
  from equivariant_ssl.storage import checkpoint, record
  from equivariant_ssl.training import runs
  runs.keep_compiled_programs()
  place = folder('untrained', seed)
  run = runs.prepare_run(load_config(arm[1], _settings(size, arm, epochs, seed)))
  record.start_record(place, config_to_json(run.config), f'benchmarks/gpu/parts.py untrained, of {arm[0]}')
  with checkpoint.open_checkpoints(place / 'checkpoints') as saved:
    saved.save(0, runs.initial_state(run), {}, wait=True)
  return {'arm': arm[0], 'seed': seed}


def bring(size: sizes.Size, say, label: str, seed: int) -> dict:
  """Write the encoder and the equivariance heads of the newest checkpoint to the store. restore.py makes a run of them."""
  import jax
  import numpy as np

  from equivariant_ssl.config import config_to_json, read_config
  from equivariant_ssl.storage import checkpoint, fingerprint, record
  from equivariant_ssl.training import runs
  place = folder(label, seed)
  run = runs.prepare_run(read_config(place / 'config.json'))
  step, state, _ = checkpoint.load_checkpoint(place / 'checkpoints', runs.abstract_state(run))
  kept = {part: {k: v for k, v in getattr(state, part).items() if k not in LEFT} for part in ('params', 'stats')}
  leaves = {k: np.asarray(v) for k, v in fingerprint.flatten(jax.device_get(kept)).items()}
  out = STORE / 'brought'
  out.mkdir(exist_ok=True)
  files = encoders.write(leaves, out, f'{place.name}.encoder')
  return {**files, 'run': place.name, 'step': step, 'steps': run.recipe.steps, 'config': config_to_json(run.config),
          'environment': json.loads((place / 'env.json').read_text()), 'metrics': record.read_metrics(place),
          'command': (place / 'command.txt').read_text()}


def probe(size: sizes.Size, say, label: str, seed: int, protocols: list[str]) -> dict:
  """Evaluate an arm's newest checkpoint, or the untrained network, under protocols, one after the other."""
  from equivariant_ssl.evaluate import evaluation
  from equivariant_ssl.training import runs
  runs.keep_compiled_programs()
  found = {}
  for name in protocols:
    found |= evaluation.evaluate(folder(label, seed), [name], untrained=False)
    say(found)
  return found


PARTS = (data, programs, train, untrained, bring, probe)
