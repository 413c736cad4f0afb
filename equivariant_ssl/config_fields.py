"""The fields of a config: its top-level defaults, its sections, and the factories they name."""
import re
from typing import Any

from equivariant_ssl import augment, data, equivariance, invariance, nets, registry
from equivariant_ssl.dotted import is_dotted
from equivariant_ssl.errors import UserError
from equivariant_ssl.parallel import sharding
from equivariant_ssl.registry import unknown_name
from equivariant_ssl.training import optim

TOP = {
    'seed': 0,              # the seed of initialization, order and augmentation
    'size': 32,             # the side of a view, in pixels
    'batch': 256,           # the number of images of the global batch
    'fit_batch': False,     # make the batch smaller where there are fewer training images
    'accumulate': 1,        # parts of the batch that the encoder computes one after the other, in
                            # the memory of one part: see step.encode
    'sharding': 'replicate',  # how the state lies on the devices: a copy on each, or 'fsdp', a
                              # shard on each
    'epochs': 100.,
    'steps': 0,             # > 0: this many steps, whatever `epochs` says
    'dtype': 'float32',     # or 'bfloat16': the dtype in which the networks compute; losses and
                            # statistics stay in float32
    'mean': (),             # of each channel of the inputs, for pixels in [0, 1]; (): the mean of
                            # the data set. An imported network has its own
    'std': (),              # the standard deviation, likewise
    'validation': 0.,       # a share of each class that is kept out of training; evaluations read
                            # out on it, not on the test split
    'batchnorm': 'joint',   # statistics over all views of one size; 'view': a pass for each view
    'batchnorm_groups': 1,  # 1: statistics over the images of the whole batch; G: over each of G
                            # equal groups of them, as on G GPUs whose BatchNorm is not synchronized
    'log_every': 0,         # steps between two rows of metrics; 0: 10, or where these take less
                            # than a second 20, 40, 80 ..., as the first row says
    'checkpoint_every': 0,  # steps between two checkpoints; 0: ten checkpoints in the run
    'keep': 2,              # checkpoints that are kept
    'tensorboard': False,   # write TensorBoard files too
    'probe': False,         # train a linear classifier on the features, without gradients to the
                            # encoder, and log its accuracy
    'knn_every': 0.,        # epochs between two measurements of the kNN accuracy on the test
                            # images (or the held-out ones); 0: never
    'on_collapse': 'warn',  # or 'stop': what to do when the spread of the embeddings falls under
                            # .3 of the sphere's
}
# The fields that may differ on resuming. run_config.free_fields adds the place of the data.
FREE = ('log_every', 'checkpoint_every', 'keep', 'tensorboard', 'knn_every', 'on_collapse',
        'sharding')
CHOICES = {'dtype': ('float32', 'bfloat16'), 'batchnorm': ('joint', 'view'),
           'on_collapse': ('warn', 'stop'), 'sharding': sharding.RULES}
# The place of an augmentation that is added to the order of a config: colors after shapes, and the
# turn, of which E-SSL has four copies, last. Another one comes at the end.
USUAL_ORDER = ('crop', 'affine', 'flip', 'vflip', 'jitter', 'gray', 'blur', 'blur_levels',
               'solarize', 'posterize', 'invert', 'erase', 'jigsaw', 'turn', 'rotate')
COSINES = ('step', 'epoch')  # how often the learning rate changes
# The sections that name a factory, and the package that has the factory.
SECTIONS = {'data': data, 'encoder': nets, 'invariance': invariance, 'equivariance': equivariance,
            'optimizer': optim}
HEADS = ('projector', 'predictor')  # sections of the invariances that have them
# The argument of a package's factories that the recipe fills in, and that a config does not have.
RECIPE_ARGUMENTS = {augment: 'size', nets: 'dtype', optim: 'schedule'}
# The fields that a section has beside the arguments of its factory.
MORE_FIELDS = {augment: {'role': 'invariant'}, equivariance: {'augmentations': ()},
               optim: {'lr': 1., 'warmup_epochs': 10., 'end': 0., 'cosine': 'step'}}
# The sections that a config file may leave out, and an override may begin.
OPTIONAL_SECTION = re.compile(
    rf'config\.({"|".join(SECTIONS)}|invariance\.({"|".join(HEADS)})|augment\.second(\.\w+)?)')
# The sections that an override may replace by a dict.
DICT_SECTION = re.compile(rf'{OPTIONAL_SECTION.pattern}|config\.augment(\.\w+)?')


def is_factory(package: Any, name: Any) -> bool:
  """Return whether a config can name a factory `name` of a package.

  A dotted path is the name of a module elsewhere, which is looked at when its fields are read.
  """
  return is_dotted(name) and package is not optim or name in factory_names(package)


def factory_names(package: Any) -> list[str]:
  """Return the names of the factories of a package that a config can name."""
  return list(optim.OPTIMIZERS) if package is optim else registry.names(package)


def section_schema(package: Any, name: str) -> dict[str, Any]:
  """Return the fields of a section that names factory `name` of a package, with their defaults."""
  factory = optim.OPTIMIZERS[name] if package is optim else registry.factory(package, name)
  arguments = {k: v for k, v in registry.arguments(factory).items()
               if k != RECIPE_ARGUMENTS.get(package)}
  return {'name': name, **arguments, **MORE_FIELDS.get(package, {})}


# Names of other programs for fields of the config.
OTHER_NAMES = {'batch_size': 'batch', 'learning_rate': 'optimizer.lr', 'base_lr': 'optimizer.lr',
               'wd': 'optimizer.weight_decay', 'arch': 'encoder.name', 'model': 'encoder.name',
               'backbone': 'encoder.name', 'image_size': 'size', 'img_size': 'size',
               'dataset': 'data.name', 'method': 'invariance.name',
               'temp': 'invariance.temperature',
               'max_epochs': 'epochs', 'num_epochs': 'epochs', 'max_steps': 'steps'}


def find_field(word: str) -> str:
  """Return the path of the field that a word may mean, such as 'optimizer.lr' for 'lr'; or ''."""
  word = word.lower().replace('-', '_')
  if word in TOP or word in OTHER_NAMES:
    return OTHER_NAMES.get(word, word)
  if word in SECTIONS:
    return f'{word}.name'
  for section in ('optimizer', 'data', 'encoder', 'invariance', 'equivariance'):
    package = SECTIONS[section]
    if any(word in section_schema(package, name) for name in factory_names(package)):
      return f'{section}.{word}'
  section, _, field = word.partition('.')
  return word if field and section in (*SECTIONS, 'augment') else ''


def unknown_factory(path: str, package: Any, name: Any) -> UserError:
  """Return the error for a section at `path` that is, or names, no factory, such as 'resnet50'."""
  known = factory_names(package)
  match = re.fullmatch(r'([a-z]+?)[_-]?(\d+|t|s|b|tiny|small|base)', str(name).lower())
  if match and match[1] in known:
    field = 'depth' if match[2].isdecimal() else 'variant'
    value = {'t': 'tiny', 's': 'small', 'b': 'base'}.get(match[2], match[2])
    if field in section_schema(package, match[1]):
      return UserError(f'{path} has no {name!r}.', f'Did you mean --{path}.name={match[1]} '
                       f'--{path}.{field}={value}? It has: {", ".join(known)}.')
  return unknown_name(path, name, known)
