"""The library: what `import equivariant_ssl as es` offers. The command line is built on it.

A mistake raises `UserError`: one line with the cause, one with the fix. The fix may name a field as
the command line does; `--config.batch=64` is `overrides={'batch': 64}` here.

The examples below begin with this, in a folder where `runs/mine` is a run of the config 'smoke':

>>> import jax
>>> import numpy as np
>>> import equivariant_ssl as es
"""
import functools
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console

from equivariant_ssl import augment, registry
from equivariant_ssl.augment import laws
from equivariant_ssl.config import config_to_json, resolve_config
from equivariant_ssl.data import arrays
from equivariant_ssl.data.source import Source, Split
from equivariant_ssl.dotted import EVERY, allow_imports
from equivariant_ssl.encoder import Classifier, Encoder, load_encoder
from equivariant_ssl.errors import OTHER_DATA, UserError
from equivariant_ssl.parallel import processes
from equivariant_ssl.run_arguments import as_text, config_of_data, to_config
from equivariant_ssl.storage import record
from equivariant_ssl.training.recipe import Recipe, make_recipe
from equivariant_ssl.training.step import Batch
from equivariant_ssl.types import Op, Views

__all__ = ['Classifier', 'Encoder', 'LawError', 'Source', 'Split', 'UserError', 'check_laws',
           'evaluate', 'load', 'pretrain', 'study', 'views']

Path = str | pathlib.Path


def load(run: Path, *, step: int | None = None, allow: Sequence[str] = ()) -> Encoder:
  """The encoder of a run, or of a folder that `eqssl export` wrote.

  run:   the folder.
  step:  of the checkpoint; None for the newest valid one.
  allow: packages whose modules may be imported because the run's config names them by a dotted
         path. A module that the program has imported needs no permission; nothing else that the
         folder says is ever imported.

  The result is callable on images [N H W 3], uint8 or floats in [0, 1], of any size H x W, and
  returns features [N D] float32; see `Encoder`. Raises UserError where there is no run, no valid
  checkpoint, or a module that is not allowed.

  >>> encoder = es.load('runs/mine')
  >>> encoder(np.zeros((3, 40, 30, 3), 'uint8')).shape == (3, encoder.dim)
  True
  """
  with allow_imports(*allow):
    return load_encoder(pathlib.Path(run), step)


def pretrain(config: Any, data: Any = None, workdir: Path = '', *,
             overrides: Mapping[str, Any] | None = None, start_from: Path | None = None,
             accept_data: bool = False, quiet: bool = False, command: str = '') -> pathlib.Path:
  """Train a run in the folder `workdir`, or go on with it, and return the folder.

  config:      the name of a config, the path of a config file, or a ConfigDict.
  data:        the images. An array [N H W 3] of uint8, or of floats in [0, 1]; (images, labels),
               whose labels are numbers from 0, or names; {'train': these, 'test': these}; a list of
               images of several sizes, or a sequence of examples with a length (grain's and TFDS's
               data sources), each an image, (image, label), or a dict with 'image' and 'label'; a
               `Source`. These are written into `workdir`, so that every command finds them. Or the
               path of a folder of images, of a prepared TFDS data set, or of a .npz file, or the
               name of a data set. None: as the config says.
  overrides:   {'field': value} of the config, such as {'epochs': 10, 'augment.order': ('crop',)}.
               Where a field names a module, the dotted path of one's own works: 'my_pkg.sepia'.
  start_from:  the folder of a run from whose newest checkpoint a longer training starts.
  accept_data: go on although the data are not those that the run was trained on.
  quiet:       print nothing.
  command:     what the run's command.txt says; by default the program's own command line.

  Ctrl-C and SIGTERM save, and raise UserError with code 75; the same call goes on. UserError has
  the codes of `training.loop.train` otherwise.

  >>> images = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), 'uint8')
  >>> labels = np.arange(32) % 2
  >>> es.pretrain('smoke', (images, labels), 'runs/mine', overrides={'steps': 2}, quiet=True).name
  'mine'
  """
  if not workdir:
    raise UserError('pretrain needs a folder for the run.', "e.g. workdir='runs/mine'")
  from equivariant_ssl.training import loop, runs, stop
  processes.initialize()  # before anything else touches jax
  workdir = pathlib.Path(workdir).absolute()
  record.check_workdir(workdir)
  resolved, file = config_of_data(config, overrides or {}, data, workdir)
  try:
    with (processes.explain_lost_process(),
          stop.explain_interrupt(lambda: runs.interrupted_line(workdir))):
      loop.train(resolved, workdir, command or shlex.join(sys.argv), quiet=quiet,
                 accept_data=accept_data, start_from=start_from)
  except UserError as error:
    if error.code == OTHER_DATA and file is not None:  # these arrays are not the run's
      file.unlink(missing_ok=True)
    raise
  return workdir


def evaluate(run: Path, protocols: str | Sequence[str] = (), *, step: int | None = None,
             seeds: Sequence[int] = (0,), untrained: bool = True, quiet: bool = False,
             data_path: Path = '', accept_data: bool = False, allow: Sequence[str] = (),
             plan: bool = False, **options: Any) -> dict[str, dict]:
  """Evaluate a checkpoint of a run under protocols, and return {protocol: result}.

  run:       the folder of the run.
  protocols: names such as 'knn' and 'linear', or groups of them; `eqssl eval --protocol list` lists
             them. (): the default ones that the run can have.
  step:      of the checkpoint; None for the newest valid one.
  seeds:     of the protocols' own draws.
  untrained: measure the network at its initialization too.
  quiet:     print no tables.
  data_path: the folder that the data are in now; '' for where they were.
  accept_data: take data that are not those that the run was trained on.
  allow:     as in `load`.
  plan:      print the time and the memory that it would take, evaluate nothing, and return {}.
  options:   epochs, batch, images, targets, root, readout, as `eqssl eval --help` explains them.

  A result is what DIR/eval/PROTOCOL.json holds: result['trained'][seed]['numbers'] and ['controls']
  are {row: value}; accuracies are shares of 1. A stored result of the same weights, data, pixels,
  protocol and options is read and not computed again. Raises UserError for an unknown protocol or
  option, for one that the run cannot have, and where the data are not the run's.

  >>> result = es.evaluate('runs/mine', 'knn', quiet=True)['knn']
  >>> 0 <= result['trained'][0]['numbers']['top1'] <= 1
  True
  """
  from equivariant_ssl.evaluate import evaluation  # it takes a second to import
  from equivariant_ssl.evaluate.subject import Options
  from equivariant_ssl.training.runs import DataRequest
  if unlisted := sorted(set(options) - set(Options._fields)):
    raise registry.unknown_name('evaluate', unlisted[0], Options._fields)
  names = [protocols] if isinstance(protocols, str) else list(protocols)
  request = DataRequest(str(data_path), accept_data)
  console = Console(quiet=True) if quiet else None
  with allow_imports(*allow):
    return evaluation.evaluate(pathlib.Path(run), names, step, tuple(seeds), Options(**options),
                               console, untrained=untrained, data_request=request, plan=plan)


def study(config: Path = '', augmentations: Sequence[str] = (), folder: Path = '', *,
          data: Any = None, overrides: Mapping[str, Any] | None = None, workers: int = 0,
          launcher: str = 'local', collect: bool = False, quiet: bool = False, command: str = '',
          allow: Sequence[str] = (), **settings: Any) -> dict[str, Any]:
  """Train a config with each augmentation in each role, and return what the roles cost or add.

  config:        as in `pretrain`, but a name or a file. '': go on with the study in `folder`.
  augmentations: names, or dotted paths of one's own.
  folder:        of the study. What is done in it is not done again.
  data, overrides: as in `pretrain`.
  workers:       runs side by side, each a process; 0 for as many as fit this machine.
  launcher:      'local', or 'slurm': an array of jobs.
  collect:       start no run; make the table and the report of what is done.
  quiet:         print nothing.
  allow:         as in `load`; for going on with a study.
  settings:      those of `eqssl study --help`, as tuples where they are lists: arms, objective,
                 seeds, design, interactions, budget, equal, proxies, protocols, transfer, root,
                 readout.

  The result is what FOLDER/results.json holds; FOLDER/report.html and FOLDER/table.csv say the
  same. This process leaves the devices to those that it starts: call it before jax has used a GPU.
  Raises UserError for a setting that no study can have, and where runs failed.

  >>> es.study('smoke', ['rotate'], 'runs/study', arms=('off',), seeds=(), quiet=True)
  Traceback (most recent call last):
    ...
  equivariant_ssl.errors.UserError: --seeds none --budget 0 --proxies none: seeds must differ, ...
  """
  from equivariant_ssl.study import study_plan, study_session
  if not folder:
    raise UserError('a study needs a folder.', "e.g. folder='runs/study'")
  if unlisted := sorted(set(settings) - set(study_plan.Settings._fields)):
    raise registry.unknown_name('study', unlisted[0], study_plan.Settings._fields)
  record.check_workdir(folder, '--out')
  folder, complete = pathlib.Path(folder).absolute(), None
  if config:
    texts = {k: as_text(v) for k, v in (overrides or {}).items()}
    if data is not None:
      complete_config = config_of_data(config, texts, data, folder)[0]
      texts = {k: v for k, v in texts.items() if not k.startswith('data.')}
      texts['data'] = repr(config_to_json(complete_config)['data'])
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v
                              for k, v in settings.items()}
    complete = study_plan.Settings(os.fspath(config), tuple(augmentations), texts, **values)
  console = Console(quiet=True) if quiet else None
  with allow_imports(*allow):
    return study_session.study(folder, complete, command or shlex.join(sys.argv), launcher, workers,
                               collect, console)


def views(config: Any, images: Any, *, overrides: Mapping[str, Any] | None = None, seed: int = 0
          ) -> dict[str, Views]:
  """The views that a config makes of images, and their actions: {view group: Views}.

  config, overrides: as in `pretrain`.
  images: [B H W 3], uint8 or floats in [0, 1]; or a list of images of several sizes. Those that
          are not square are squashed to a canvas, with their true sizes beside them.
  seed:   of the draws, which are those of the first step of a run of this seed.

  `Views.images` are float32 [B V S S 3] in [0, 1]; `Views.actions` are {op: action [B V ...]}.
  Raises UserError for a config or images that cannot be read.

  >>> both = es.views('smoke', np.zeros((4, 16, 16, 3), 'uint8'))
  >>> both['views'].images.shape, both['views'].actions['rotate'].turns.shape
  ((4, 2, 16, 16, 3), (4, 2))
  """
  from equivariant_ssl.report.pictures import first_views
  resolved: Any = to_config(config, overrides)
  split = arrays.to_split(images, resolved.data.get('size', 0) or resolved.size)
  recipe = _recipe_of_views(json.dumps(config_to_json(resolved)), split.images.shape[1])
  return first_views(recipe, jax.random.key(seed), Batch(split.images, split.sizes))


@functools.lru_cache(8)
def _recipe_of_views(config: str, canvas: int) -> Recipe:
  """The recipe of a config's JSON, without data; the same object each time, so traced once."""
  resolved: Any = resolve_config(ConfigDict(json.loads(config)))
  return make_recipe(resolved, resolved.batch, canvas, classes=1)


class LawError(AssertionError):
  """An augmentation breaks laws: the message has a line for each.

  >>> issubclass(es.LawError, AssertionError)  # so pytest shows it as a failed test
  True
  """


def check_laws(op: str | Op, **settings: Any) -> None:
  """Check the laws of augmentations on an op. Raises LawError with a line for each that it breaks.

  op:       the dotted path of a module ('my_pkg.sepia'), the name of an op of this package, or an
            Op.
  settings: arguments of the module's factory.

  The laws (`augment/laws.py`): the identity changes no pixel and encodes to 0; encodings are finite
  and differ where actions differ; views stay images in [0, 1]; gradients are finite; a draw depends
  on its key alone; a batch is a loop, and several devices change no bit; the docstring of the
  action gives each field's unit; a chance is right, and is encoded; the choices of a discrete op
  are its classes. It takes seconds, most of them to compile.

  >>> es.check_laws('rotate')
  >>> from equivariant_ssl import augment, registry
  >>> flip = registry.make(augment, 'flip')
  >>> es.check_laws(flip._replace(encode=lambda action: flip.encode(action) + 1))
  Traceback (most recent call last):
    ...
  equivariant_ssl.api.LawError: flip breaks 2 laws...
  """
  checked: Any = op
  if isinstance(op, str):
    with allow_imports(EVERY):
      checked = registry.make(augment, op, **settings)
  lines = laws.broken_laws(checked)
  if lines:
    count = 'a law' if len(lines) == 1 else f'{len(lines)} laws'
    raise LawError('\n  '.join([f'{checked.name} breaks {count}:', *lines]))
