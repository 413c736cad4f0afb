"""The laws of augmentations, which hold for every op of this package and for one's own.

A law is a function of a Case, an op with many draws and views of it, and returns what is wrong, in
one sentence, or ''. `broken_laws` checks all of them.
"""
import re
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from equivariant_ssl.augment import algebra
from equivariant_ssl.augment.law_cases import (
    DRAWS,
    PICTURES,
    SIZE,
    Case,
    images,
    make_case,
    repeated,
    rows,
    same,
    take,
)
from equivariant_ssl.keys import key_for
from equivariant_ssl.types import Action, Array, Image, Op

CLOSE = 1e-6  # pixels that differ by less are equal, to float32 rounding
UNITS = 'bool|fraction|pixel|turn|factor|degree|radian|index|id of|class'


def identity_is_the_plain_resize(case: Case) -> str:
  """The identity gives the image as it is, or resized to the side of the op's views."""
  side = case.views.pixels.shape[1]
  plain = jax.vmap(lambda image: algebra.resize(image, side))(images())
  difference = np.abs(case.views.pixels[8:] - plain.pixels).max()
  if not difference <= CLOSE:
    return f'apply(identity, image) differs from the image by up to {difference:.2g}.'
  if not np.array_equal(case.views.size[8:], plain.size):
    return 'apply(identity, image) has another true size than the image.'
  return ''


def identity_encodes_to_zero(case: Case) -> str:
  """encode(identity) is 0; encodings are float32 [A], finite, and differ where actions differ."""
  code = np.asarray(case.op.encode(case.identity))
  codes = np.asarray(jax.vmap(case.op.encode)(case.drawn))
  if code.ndim != 1 or codes.shape != (DRAWS, *code.shape) or codes.dtype != np.float32:
    return f'encode gives {codes.dtype} {codes.shape[1:]}, and not float32 [A].'
  if not (code == 0).all():
    return f'encode(identity) is {code.tolist()}, and not 0.'
  if not np.isfinite(codes).all():
    return 'an encoding is not finite.'
  if len(np.unique(codes, axis=0)) != len(np.unique(rows(case.drawn, DRAWS), axis=0)):
    return 'two different actions have the same encoding.'
  return ''


def relative_actions_fit(case: Case) -> str:
  """The way from an action to itself is 0; from the identity it is the action's encoding."""
  def ways(a: Action, b: Action) -> list[Array]:
    return [algebra.relative(case.op, *pair) for pair in ((a, a), (case.identity, a), (a, b))]
  few = take(case.drawn, slice(256))
  to_itself, onward, between = jax.jit(jax.vmap(ways))(few, take(few, slice(None, None, -1)))
  codes = np.asarray(jax.vmap(case.op.encode)(few))
  if not (to_itself == 0).all():
    return 'relative(a, a) is not 0.'
  if not (onward.shape == codes.shape and np.abs(onward - codes).max() <= CLOSE):
    return 'relative(identity, a) is not encode(a).'
  if not (between.shape == codes.shape and between.dtype == np.float32
          and np.isfinite(between).all()):
    return 'relative(a, b) is not float32 [A], or not finite.'
  return ''


def views_stay_images(case: Case) -> str:
  """A view is square, float32 [S S 3] in [0, 1], with its true size."""
  pixels, size = case.views
  side = pixels.shape[1]
  if pixels.shape != (16, side, side, 3) or pixels.dtype != np.float32:
    return f'a view is {pixels.dtype} {pixels.shape[1:]}, and not float32 [S S 3].'
  if not (pixels.min() >= 0 and pixels.max() <= 1):
    return f'a view has values from {pixels.min():.4g} to {pixels.max():.4g}, beyond [0, 1].'
  if size.shape != (16, 2) or size.dtype != np.float32:
    return f'the true size of a view is {size.dtype} {size.shape[1:]}, and not float32 [2].'
  return ''


def drawn_actions_change_the_image(case: Case) -> str:
  """An action that is not the identity changes noise, and a smooth picture."""
  change = np.abs(case.views.pixels[:2] - case.views.pixels[8:10]).reshape(2, -1).max(axis=1)
  return '' if (change > 1e-3).all() else (
      'an action that is not the identity leaves an image as it was.')


def gradients_are_finite(case: Case) -> str:
  """The gradient of a view by the image's pixels is finite everywhere, and not 0 in general."""
  if not np.isfinite(case.gradients).all():
    return 'the gradient of a view by its image is not finite.'
  largest = np.abs(case.gradients).reshape(16, -1).max(axis=1)
  return '' if (largest > 0)[[0, 1, 8, 9]].all() else 'the gradient of a view by its image is 0.'


def draws_depend_on_the_key_alone(case: Case) -> str:
  """The same key gives the same draw, whatever is drawn beside it; other keys give others."""
  again, shifted = case.sample(np.arange(DRAWS)), case.sample(np.arange(DRAWS) + 64)
  if not same(case.drawn, again) or not same(take(case.drawn, slice(64, None)),
                                             take(shifted, slice(-64))):
    return 'the same key gives two different draws.'
  return '' if not same(take(case.drawn, slice(64)), take(shifted, slice(64))) else (
      'all keys give the same draw.')


def vmap_is_a_loop(case: Case) -> str:
  """Views of a batch are those of its images one by one."""
  apply = jax.jit(case.op.apply)
  for i, draw in enumerate(np.argsort(case.idle, kind='stable')[:3]):
    view = apply(take(case.drawn, draw), Image(PICTURES[i], SIZE))
    if not np.abs(view.pixels - case.views.pixels[i]).max() <= CLOSE:
      return 'the views of a batch are not those of its images one by one.'
  return ''


def fields_state_their_units(case: Case) -> str:
  """The docstring of the action says of each field what it is, with its unit."""
  kind = type(case.identity)
  if not hasattr(kind, '_fields'):
    return f'the action is a {kind.__name__}, and not a NamedTuple.'
  for field in kind._fields:
    line = re.search(rf'\b{field}\b[\w, ]*:[^:]*', kind.__doc__ or '')
    if not (line and re.search(UNITS, line[0])):
      return (f"{kind.__name__}'s docstring does not say '{field}: ...' with its unit, one of "
              f'{UNITS.replace("|", ", ")}.')
  return ''


def chances_are_right(case: Case) -> str:
  """sometimes(0) does nothing, sometimes(1) is the op, and .3 does something in 3 of 10 draws."""
  chances = (0., .3, 1.)
  ops = [algebra.sometimes(p, case.op) for p in chances]

  def sample(i: Array) -> list[Action]:
    return [op.sample(key_for(jax.random.key(1), str(p), i), SIZE)
            for p, op in zip(chances, ops, strict=True)]
  identity = rows(repeated(case.identity, 1), 1)
  for p, drawn in zip(chances, jax.jit(jax.vmap(sample))(np.arange(DRAWS)), strict=True):
    did = (rows(drawn, DRAWS) != identity).any(axis=1)
    expected = p * (1 - case.idle.mean())
    if abs(did.mean() - expected) > 5 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-9:
      return (f'sometimes({p:g}) does something in {did.mean():.3f} of the draws, not in '
              f'{expected:.3f}.')
  return ''


def doing_nothing_is_encoded(case: Case) -> str:
  """Where doing nothing is drawn with a chance, the bool `applied` leads the encoding.

  A discrete op needs none, for doing nothing is one of its classes.
  """
  fields = getattr(type(case.identity), '_fields', ())
  if case.idle.mean() <= .1 or case.op.choices and 'applied' not in fields:
    return ''
  if 'applied' not in fields or case.drawn.applied.dtype != bool:
    return ('doing nothing is drawn with a chance, and the action has no bool `applied`; '
            'augment.sometimes draws such a chance.')
  codes = np.asarray(jax.vmap(case.op.encode)(case.drawn))
  applied = np.asarray(case.drawn.applied)
  return '' if np.array_equal(codes[:, 0], applied) and np.array_equal(applied, ~case.idle) else (
      '`applied` does not lead the encoding, or does not say whether something was done.')


def choices_are_the_classes(case: Case) -> str:
  """The choices of a discrete op are all that is drawn, each with an encoding and class of its own.

  The first is the identity, or the identity with the treatment of all the others (`applied`): were
  class 0 the image untouched, the treatment would reveal the class.
  """
  op = case.op
  if op.choices is None:
    return ''
  K = len(jax.tree.leaves(op.choices)[0])
  leaves = zip(jax.tree.leaves(op.choices), jax.tree.leaves(case.drawn), strict=True)
  if any(a.dtype != b.dtype for a, b in leaves):
    return 'the choices have other dtypes than the draws.'
  if len(np.unique(np.asarray(jax.vmap(op.encode)(op.choices)), axis=0)) != K:
    return 'two choices have the same encoding.'
  first = take(op.choices, 0)
  if 'applied' in first._fields and first.applied:
    first = first._replace(applied=case.identity.applied)
  if not same(first, case.identity):
    return 'the first choice is not the identity.'
  classes = jax.vmap(lambda action: algebra.class_of(op.choices, action))(op.choices)
  if not np.array_equal(classes, np.arange(K)) or algebra.class_of(op.choices, case.identity) != 0:
    return 'the class of a choice is not its index.'
  counts = (rows(case.drawn, DRAWS)[:, None] == rows(op.choices, K)[None]).all(axis=-1)
  if not (counts.sum(axis=1) == 1).all():
    return 'an action is drawn that is not among the choices.'
  return '' if (counts.sum(axis=0) > 0).all() else 'a choice is never drawn.'


def devices_change_no_bit(case: Case) -> str:
  """One image on each of several devices gives the bits of all images on one device."""
  def augmented(index: Array, image: Image) -> tuple[Array, Action]:
    view, action = algebra.augment(case.op, key_for(jax.random.key(2), index), image)
    return view.pixels, action
  program, arrays = jax.jit(jax.vmap(augmented)), (np.arange(8), images())
  devices = max(n for n in (1, 2, 4, 8) if n <= len(jax.devices()))
  mesh = Mesh(np.array(jax.devices()[:devices]), ('data',), axis_types=(AxisType.Auto,))
  together = program(*jax.device_put(arrays, jax.devices()[0]))
  if devices > 1:
    apart = program(*jax.device_put(arrays, NamedSharding(mesh, PartitionSpec('data'))))
  else:  # a device that has one image of eight compiles what a batch of one does
    parts = [program(*take(arrays, slice(i, i + 1))) for i in range(8)]
    apart = jax.tree.map(lambda *a: np.concatenate(a), *parts)
  return '' if same(together, apart) else (
      'a batch of one image is not rounded as a batch of eight: see augment/pixels.py.')


LAWS: tuple[Callable[[Case], str], ...] = (
    identity_is_the_plain_resize, identity_encodes_to_zero, relative_actions_fit, views_stay_images,
    drawn_actions_change_the_image, gradients_are_finite, draws_depend_on_the_key_alone,
    vmap_is_a_loop, fields_state_their_units, chances_are_right, doing_nothing_is_encoded,
    choices_are_the_classes, devices_change_no_bit)


def broken_laws(op: Op) -> list[str]:
  """What is wrong with an op: a line for each law that it breaks, '' where there is none."""
  try:
    case = make_case(op)
  except Exception as error:  # one's own op can raise anything
    return [f'make_case: {type(error).__name__}: {str(error).splitlines()[0]}']
  lines = []
  for law in LAWS:
    try:
      fault = law(case)
    except Exception as error:
      fault = f'{type(error).__name__}: {str(error).splitlines()[0]}'
    lines += [f'{law.__name__}: {fault}'] if fault else []
  return lines
