"""The parts of the founding experiment: data, programs, training, what comes back, read-outs. Run by parts.py,
each alone."""
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
# What a network is evaluated by; the rest (projector, optimiser) is not brought back.
BROUGHT = ('encoder', 'heads_equimod')


def folder(arm: str, seed: int) -> pathlib.Path:
  """The run of an arm, or of the untrained network."""
  return STORE / 'runs' / f'{arm}-s{seed}'


def data(size: sizes.Size, say) -> dict:
  """Unpack the six carried files and prepare them as `eqssl data prepare cifar10` does; their bytes are checked."""
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


def _settings(epochs: int, seed: int) -> dict[str, str]:
  return {'epochs': str(float(epochs)), 'seed': str(seed)}


def programs(size: sizes.Size, say, arm: str, epochs: int, seed: int) -> dict:
  """Compile an arm's step and its initialisation into the cache, while the data are prepared."""
  import parts

  from equivariant_ssl import runs
  runs.keep_programs()
  run = parts.described(size, arm, _settings(epochs, seed), images=False)
  parts.compiled(run)
  runs.initial(run)
  return {'arm': arm, 'epochs': epochs}


def train(size: sizes.Size, say, arm: str, epochs: int, seed: int) -> dict:
  """Train an arm, from its newest checkpoint where it has one. Ends with the command line's code: 75 stopped and saved."""
  from equivariant_ssl import cli, record
  place = folder(arm, seed)
  changes = sizes.overrides(size, arm, _settings(epochs, seed))
  code = cli.main(['train', '--config', arm, '--workdir', str(place), *(f'--config.{k}={v}' for k, v in changes.items())])
  rows = record.read_metrics(place)
  say({'code': code, 'epochs': epochs, 'seed': seed, 'step': rows[-1]['step'] if rows else 0, 'metrics': rows})
  if code:
    sys.exit(code)
  return {'code': code, 'epochs': epochs, 'seed': seed, 'step': rows[-1]['step'], 'metrics': rows}


def untrained(size: sizes.Size, say, arm: str, epochs: int, seed: int) -> dict:
  """The network of an arm before its first step as a run of step 0, to be evaluated like the others."""
  from equivariant_ssl import checkpoint, record, runs
  from equivariant_ssl import config as configs
  runs.keep_programs()
  place = folder('untrained', seed)
  run = runs.prepare(configs.load(arm, sizes.overrides(size, arm, _settings(epochs, seed))))
  record.start(place, configs.as_json(run.config), f'benchmarks/gpu/parts.py untrained, of {arm}')
  with checkpoint.open(place / 'checkpoints') as saved:
    saved.save(0, runs.initial(run), {}, wait=True)
  return {'arm': arm, 'seed': seed}


def bring(size: sizes.Size, say, arm: str, seed: int) -> dict:
  """Write the newest checkpoint's encoder, and EquiMod's head, to the store: what restore.py makes a run of."""
  import jax
  import numpy as np

  from equivariant_ssl import checkpoint, fingerprint, record, runs
  from equivariant_ssl import config as configs
  place = folder(arm, seed)
  run = runs.prepare(configs.read(place / 'config.json'))
  step, state, _ = checkpoint.load(place / 'checkpoints', runs.abstract(run))
  kept = {part: {k: v for k, v in getattr(state, part).items() if k in BROUGHT} for part in ('params', 'stats')}
  leaves = {k: np.asarray(v) for k, v in fingerprint.flat(jax.device_get(kept)).items()}
  out = STORE / 'brought'
  out.mkdir(exist_ok=True)
  files = encoders.write(leaves, out, f'{arm}-s{seed}.encoder')
  return {**files, 'run': place.name, 'step': step, 'steps': run.recipe.steps, 'config': configs.as_json(run.config),
          'environment': json.loads((place / 'env.json').read_text()), 'metrics': record.read_metrics(place),
          'command': (place / 'command.txt').read_text()}


def probe(size: sizes.Size, say, arm: str, seed: int, protocols: list[str]) -> dict:
  """The results of protocols of an arm's newest checkpoint, or of the untrained network's, one after the other."""
  from equivariant_ssl import runs
  from equivariant_ssl.evaluate import run as evaluation
  runs.keep_programs()
  found = {}
  for name in protocols:
    found |= evaluation.evaluate(folder(arm, seed), [name], untrained=False)
    say(found)
  return found


PARTS = (data, programs, train, untrained, bring, probe)
