"""The folder of an export: a file of weights, and a config.json that says what they are."""
import hashlib
import pathlib
from types import ModuleType

from equivariant_ssl.errors import UserError
from equivariant_ssl.export import timm, torchvision
from equivariant_ssl.storage import disk
from equivariant_ssl.training.runs import Run

WEIGHTS, FACTS = 'model.safetensors', 'config.json'
SECTION = 'equivariant_ssl'  # the part of config.json for what timm has no field for
# {the encoder's name in a config: the module that names and builds its weights}
FAMILIES: dict[str, ModuleType] = {'resnet': torchvision, 'vit': timm}
Architecture = torchvision.Architecture | timm.Architecture


def read_facts(folder: pathlib.Path) -> dict:
  """Return the content of the config.json in `folder`, or {} where it cannot be read.

  It has the SECTION 'equivariant_ssl' where `export` wrote it.
  """
  return disk.read_json_or_empty(folder / FACTS)


def digest(content: bytes) -> str:
  """Return the SHA-256 of a file's bytes."""
  return hashlib.sha256(content).hexdigest()


def check_folder(out: pathlib.Path) -> None:
  """Raise UserError where an export to `out` would replace a file that is no export."""
  if out.exists() and not out.is_dir():
    raise UserError(f'{out} is a file.', 'Name a folder: --out FOLDER')
  section = read_facts(out).get(SECTION)
  for name in (FACTS, WEIGHTS):
    path = out / name
    if path.exists() and (section is None or name == WEIGHTS
                          and digest(path.read_bytes()) != section.get('sha256')):
      raise UserError(f'{path} exists and was not exported by eqssl.',
                      'Use another --out, or move the file away.')


def inputs_in_words(run: Run) -> str:
  """Return the mean and the standard deviation of a run's inputs: 'mean (0.5), std (0.25)'."""
  network = run.recipe.network
  return ', '.join(f'{k} ({", ".join(f"{v:.4g}" for v in getattr(network, k))})'
                   for k in ('mean', 'std'))
