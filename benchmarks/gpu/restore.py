"""Make run directories of the encoders that a lease brought back, so that `eqssl eval` reads them here, without a GPU.

Command: python benchmarks/gpu/restore.py FOLDER [FOLDER ...] --out runs/gpu    (the calls' $OUT, as they came back)
Then:    eqssl eval runs/gpu/cifar10_simclr_equimod-s0 --protocol cached,few_labels,equivariance,health
CIFAR-10 must be prepared here (eqssl data prepare cifar10). Matrices have the rounding of float16. The invariance's
projector and the optimizer were not brought back. They are as at the start of the run: no protocol of `eqssl eval` reads
them.
"""
import argparse
import json
import os
import pathlib
import sys
import tempfile

import encoders
import jax
import numpy as np
from ml_collections import ConfigDict

from equivariant_ssl.config import config_to_json, resolve_config
from equivariant_ssl.errors import BAD_DATA, UserError, describe
from equivariant_ssl.parallel import sharding
from equivariant_ssl.storage import checkpoint, fingerprint, record
from equivariant_ssl.training import runs


def brought(folders: list[pathlib.Path]) -> dict[str, dict]:
  """{run: what `bring` says of it, its files as paths} from the results of every folder. The later step of a run goes
  before."""
  found = {}
  for folder in folders:
    results = record.read_json_object(folder / 'results.json', 'Give the folder that $OUT came back as.')
    for key, part in results.get('parts', {}).items():
      about = part.get('found', {})
      if key.startswith('bring ') and 'sha256' in about and about['step'] > found.get(about['run'], {}).get('step', -1):
        files = [next((f / name for f in folders if (f / name).is_file()), None) for name in about['files']]
        if None in files:
          raise UserError(f'{about["run"]}: {about["files"][files.index(None)]} is in none of the folders.',
                          'Give the folders of all calls, the one that trained it too.', BAD_DATA)
        found[about['run']] = {**about, 'files': files}
  return found


def restore(about: dict, out: pathlib.Path) -> pathlib.Path:
  """Make the run directory of a network in `out`, all of it or nothing. Raises UserError."""
  workdir = out / about['run']
  if workdir.exists():
    raise UserError(f'{workdir} is there already.', 'Use another --out, or move it away.')
  there: dict = about['config']  # whose data lay in a folder of the machine that is gone
  here = {k: v for k, v in there['data'].items() if k != 'root'}
  config = resolve_config(ConfigDict({**there, 'data': here}))
  run = runs.prepare_run(config, sharding.mesh(jax.devices()[:1]))
  try:
    leaves = encoders.read(about['files'], about['sha256'])
  except ValueError as error:
    raise UserError(f'{error}.', 'Copy the files again from where the call put them.', BAD_DATA) from None
  state = runs.initial_state(run)
  flat = fingerprint.flatten(state)
  wrong = [k for k, v in leaves.items() if k not in flat or flat[k].shape != v.shape]
  wrong += [k for k in flat if k.startswith(('params/encoder/', 'stats/encoder/')) and k not in leaves]
  if wrong:
    raise UserError(f'{about["run"]}: {len(wrong)} tensors do not fit its config, {wrong[0]} for one.', '', BAD_DATA)
  filled = {**flat, **leaves, 'step': np.int32(about['step'])}
  state = jax.tree.unflatten(jax.tree.structure(state), [filled[k] for k in flat])
  out.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=out, prefix='.restore-') as scratch:
    new = pathlib.Path(scratch, about['run'])
    record.start_record(new, config_to_json(config), about['command'])
    environment = json.loads((new / 'env.json').read_text()) | {'earlier': [about['environment']]}
    record.write_atomically(new / 'env.json', json.dumps(environment, indent=1) + '\n')
    (new / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in about['metrics']))
    with checkpoint.open_checkpoints(new / 'checkpoints', config.keep) as saved:
      saved.save(about['step'], state, {'restored': 'float16 matrices, no projector, no optimizer'}, wait=True)
    os.replace(new, workdir)
  return workdir


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('folders', nargs='+', type=pathlib.Path)
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/gpu'))
  args = parser.parse_args(argv)
  try:
    found = brought(args.folders)
    if not found:
      raise UserError('no encoder came back: the results have none.', 'log.txt of call 2 says how it ended.', BAD_DATA)
    for about in found.values():
      workdir = restore(about, args.out)
      whole = '' if about['step'] == about['steps'] else f' (cut: {about["steps"]} were planned)'
      print(f'{workdir}: step {about["step"]}{whole}. Next: eqssl eval {workdir} --protocol cached,few_labels,profile')
  except (OSError, UserError) as error:
    text, code = describe(error)
    print(f'restore.py: {text}', file=sys.stderr)
    return code
  return 0


if __name__ == '__main__':
  sys.exit(main())
