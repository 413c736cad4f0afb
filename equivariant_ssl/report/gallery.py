"""`eqssl show-augs` writes a page with the views of a config, each with what was done to it."""
import os
import pathlib
from typing import Any

import jax
import numpy as np
from PIL import Image as Pillow

from equivariant_ssl.config import config_to_json
from equivariant_ssl.data.decode import BadImage, decode, read_file
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate import frozen
from equivariant_ssl.parallel import sharding
from equivariant_ssl.report import page, pictures
from equivariant_ssl.report.pictures import Tile
from equivariant_ssl.training import runs
from equivariant_ssl.training.factories import op_settings
from equivariant_ssl.training.recipe import Recipe, make_recipe
from equivariant_ssl.training.run_config import acting_role
from equivariant_ssl.training.step import Batch

SHARP = 64  # a picture with at most so many pixels a side is shown as squares
MEANING = {
    'off': 'is not used',
    'invariant': 'is in the views of the invariance',
    'sensitive': 'is in the views of the equivariance alone, which is conditioned on it',
    'both': 'is in the views of the invariance, and the equivariance is conditioned on it'}


def read_image(path: str, side: int) -> tuple[np.ndarray, np.ndarray]:
  """Read an image file as a uint8 canvas [side side 3] and its true float32 (height, width).

  Raises BadImage where the file cannot be read.
  """
  real = os.path.realpath(path)  # the user named the file, so a link may lead anywhere
  canvas, size = decode(read_file(real, os.path.dirname(real)), side)
  return canvas, np.array(size, np.float32)


def _picture(tile: Tile, most: int) -> page.Picture:
  """Return a tile as a PNG whose longer side has at most `most` pixels (0: any number)."""
  pixels = tile.pixels
  longest = max(pixels.shape[:2])
  if most and longest > most:
    width, height = (max(round(n * most / longest), 1) for n in (pixels.shape[1], pixels.shape[0]))
    pixels = np.asarray(Pillow.fromarray(pixels).resize((width, height), Pillow.Resampling.BOX))
  return page.Picture(pictures.png(pixels), tile.lines, longest <= SHARP)


def picture_block(title: str, about: str, rows: list[list[Tile]], most: int = 0) -> page.Pictures:
  """Return rows of tiles as a block of a page.

  most: the pixels that a picture's longer side has at most (0: any number).
  """
  return page.Pictures(title, about, [[_picture(tile, most) for tile in row] for row in rows])


def _file_batch(config: Any, image: str, count: int) -> tuple[Recipe, Batch]:
  """Return the recipe of a config, which needs no data, and a batch that has one image many times.

  Each of the `count` rows of the batch has draws of its own. config: a resolved config.
  """
  side = config.data.get('size', 0) or config.size
  try:
    canvas, size = read_image(image, side)
  except BadImage as e:
    raise UserError(f'{image}: {e}.',
                    'Name a JPEG, PNG, WebP, GIF or BMP file: --image FILE') from e
  # An online probe's classes show in no view.
  recipe = make_recipe(config, config.batch, side, classes=1)
  images: Any = np.stack([canvas] * count)
  sizes: Any = np.stack([size] * count)
  return recipe, Batch(images, sizes)


def _setting(value: object) -> str:
  """Return a setting of an op as text."""
  if isinstance(value, tuple):
    return f'({", ".join(map(_setting, value))})'
  return f'{value:.4g}' if isinstance(value, float) else str(value)


def _roles(config: Any, recipe: Recipe) -> list[page.Table | page.Points]:
  """Return the blocks that list each op in the order of application.

  They say its role, what the role means, its settings, and what each objective is conditioned on.
  config: a resolved config.
  """
  rows, settings = [], []
  for name in config.augment.order:
    section, second = config.augment[name], config.augment.second.get(name, {})
    words = [f'{k} {_setting(v)}' for k, v in sorted(op_settings(section).items())]
    words += [f'in the second view {k} {_setting(v)}' for k, v in second.items()]
    unread = '; no objective reads what it did' * (section.role != acting_role(config, name))
    rows.append((name, section.role, MEANING[acting_role(config, name)] + unread))
    settings.append(f'{name}: {", ".join(words)}.')
  conditioned = [
      f'{label} is conditioned on {", ".join(frozen.objective_augmentations(recipe, label))}.'
      for label in recipe.wirings]
  return [page.Table('In the order of application', ('augmentation', 'role', 'what it means'), rows,
                     left=3),
          page.Points((*settings, *conditioned))]


def _chain_words(name: str) -> str:
  """Return the name of a chain in words: 'crop, then flip'."""
  return ', then '.join(name.split('+')) if name else 'nothing'


def _about(recipe: Recipe, name: str) -> str:
  """Return what makes the views of the group `name`, and which objectives read them."""
  group = recipe.groups[name]
  readers = [label for label, e in recipe.equivariances.items() if name in e.uses]
  if name == 'views' and recipe.invariance.projector is not None:
    readers.insert(0, 'the invariance')
  chains = dict.fromkeys(_chain_words(chain.name) for chain in group.chains)
  text = ('The image itself, from which the other views are predicted.' if name == 'reference'
          else f'Chain: {"; or ".join(chains)}.')
  text += (f' The views have {group.size} x {group.size} pixels and are read by '
           f'{" and ".join(readers)}.')
  if group.all_of:
    text += (f' They have every choice of {group.all_of} in turn; the other draws are the same for '
             'all choices.')
  if group.share > 1:
    text += f' {group.share} neighboring images share one draw.'
  return text


def write_gallery(config: Any, image: str = '', out: pathlib.Path = pathlib.Path('augs.html'),
                  count: int = 4) -> pathlib.Path:
  """Write a page of the views that a config makes, as the first step of a run would draw them.

  config: a resolved config.
  image: a file, which is shown `count` times; '' means the first `count` test images. With a file,
  no data are read; its canvas has the side of the config's data, or else of the views.
  Returns the path of the page. Raises UserError where the image is missing or nothing is to show.
  """
  page.check_target(pathlib.Path(out))
  if count < 1:
    raise UserError(f'--count is {count}, so there is nothing to show.', 'Give 1 or more.')
  if image:
    recipe, batch = _file_batch(config, image, count)
    rows = pictures.view_tiles(recipe, jax.random.key(config.seed), batch)
  else:
    run = runs.prepare_run(config, sharding.mesh(jax.devices()[:1]))
    recipe, rows = run.recipe, pictures.gallery(run, count)
  name = os.path.basename(image) if image else config.data.name
  about = (f'Views of {name}, drawn as in the first step of a run of seed {config.seed}. What was '
           f'done to a view is written under it. Invariance: {config.invariance.name}. '
           f'Equivariance: {" and ".join(recipe.equivariances) or "none"}.')
  sections = [page.Section(f'Group {group}', f'group-{i}', [
      picture_block('A row is an image: the original, then its views', _about(recipe, group),
                    rows[group])])
      for i, group in enumerate(rows)]
  roles = page.Section('Roles and settings', 'roles', _roles(config, recipe))
  page.save(pathlib.Path(out), page.render('What the augmentations do', about, [*sections, roles],
                                           {'config': config_to_json(config)}))
  return pathlib.Path(out)
