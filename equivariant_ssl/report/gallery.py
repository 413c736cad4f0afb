"""`eqssl show-augs`: what the views of a config look like, each with what was done to it, as one page."""
import os
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image as Pillow

from equivariant_ssl import config as configs
from equivariant_ssl.data.decode import BadImage, decode, read_file
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate import frozen
from equivariant_ssl.parallel import sharding
from equivariant_ssl.report import page, pictures
from equivariant_ssl.report.pictures import Tile
from equivariant_ssl.training import recipe as recipes
from equivariant_ssl.training import runs
from equivariant_ssl.training.recipe import Recipe
from equivariant_ssl.training.step import Batch

SHARP = 64  # of fewer pixels, a picture is shown as squares
MEANING = {
    'off': 'not used', 'invariant': 'seen by the invariance',
    'sensitive': 'told to the equivariance, in its own views', 'both': 'seen by the invariance, told to the equivariance'}


def opened(path: str, side: int) -> tuple[np.ndarray, np.ndarray]:
  """An image file as (uint8 canvas [side side 3], float32 true (height, width)). Raises BadImage."""
  real = os.path.realpath(path)  # named by the user: a link may lead anywhere
  canvas, size = decode(read_file(real, os.path.dirname(real)), side)
  return canvas, np.array(size, np.float32)


def _picture(tile: Tile, most: int) -> page.Picture:
  pixels = tile.pixels
  longest = max(pixels.shape[:2])
  if most and longest > most:
    size = [max(round(n * most / longest), 1) for n in (pixels.shape[1], pixels.shape[0])]
    pixels = np.asarray(Pillow.fromarray(pixels).resize(size, Pillow.Resampling.BOX))
  return page.Picture(pictures.png(pixels), tile.lines, longest <= SHARP)


def block(title: str, about: str, rows: list[list[Tile]], most: int = 0) -> page.Pictures:
  """Rows of tiles as a block of a page, each at most `most` pixels on its longer side (0: as it is)."""
  return page.Pictures(title, about, [[_picture(tile, most) for tile in row] for row in rows])


def _of_file(config: ConfigDict, image: str, count: int) -> tuple[Recipe, Batch]:
  """The recipe of a config without its data, and `count` times one image: a row of the batch is a draw of its own."""
  side = config.data.get('size', 0) or config.size
  try:
    canvas, size = opened(image, side)
  except BadImage as e:
    raise UserError(f'{image}: {e}.', 'Give a JPEG, PNG, WebP, GIF or BMP file: --image FILE') from e
  recipe = recipes.make(config, config.batch, side, classes=1)  # of an online probe, which no view shows
  return recipe, Batch(np.stack([canvas] * count), np.stack([size] * count))


def _setting(value: object) -> str:
  if isinstance(value, tuple):
    return f'({", ".join(map(_setting, value))})'
  return f'{value:.4g}' if isinstance(value, float) else str(value)


def _roles(config: ConfigDict, recipe: Recipe) -> list[page.Table | page.Points]:
  """Each op in the order of application: its role and what that means; its settings; what each objective is told."""
  rows, settings = [], []
  for name in config.augment.order:
    section, second = config.augment[name], config.augment.second.get(name, {})
    shown = [f'{k} {_setting(v)}' for k, v in sorted(section.items()) if k != 'role']
    shown += [f'in the second view {k} {_setting(v)}' for k, v in second.items()]
    rows.append((name, section.role, MEANING[section.role]))
    settings.append(f'{name}: {", ".join(shown)}.')
  told = [f'{label} is told of {", ".join(frozen.told(recipe, label))}.' for label in recipe.wirings]
  return [page.Table('In the order of application', ('augmentation', 'role', 'which is'), rows, left=3),
          page.Points((*settings, *told))]


def _about(recipe: Recipe, name: str) -> str:
  """What the views of group `name` are made of, and what reads them."""
  group = recipe.groups[name]
  readers = [*(['the invariance'] if name == 'views' and recipe.invariance.projector is not None else []),
             *(label for label, e in recipe.equivariances.items() if name in e.uses)]
  chain = lambda op: ', then '.join(op.name.split('+')) if op.name else 'nothing'
  text = 'The image itself, from which the others are predicted' if name == 'reference' else 'Chain: ' + '; or '.join(
      dict.fromkeys(map(chain, group.chains)))
  text += f'. Views of {group.size} x {group.size} pixels, read by {" and ".join(readers)}.'
  if group.all_of:
    text += f' Every choice of {group.all_of} in turn; what else is drawn is the same for all of them.'
  if group.share > 1:
    text += f' {group.share} neighbouring images share one draw.'
  return text


def show(config: ConfigDict, image: str = '', out: pathlib.Path = pathlib.Path('augs.html'), count: int = 4
         ) -> pathlib.Path:
  """Write a page of the views that a resolved config makes of `count` of its test images, or of the file `image`
  `count` times, as the first step of a run would draw them; its path.

  With a file, no data are read; its canvas has the side of the config's data, where that says one, else of the views.
  Raises UserError where there is no such image, or no row to show.
  """
  page.check(pathlib.Path(out))
  if count < 1:
    raise UserError(f'--count {count}: nothing to show.', 'Give 1 or more.')
  if image:
    recipe, batch = _of_file(config, image, count)
    found = pictures.rows(recipe, jax.random.key(config.seed), batch)
  else:
    run = runs.prepare(config, sharding.mesh(jax.devices()[:1]))
    recipe, found = run.recipe, pictures.gallery(run, count)
  of = os.path.basename(image) if image else config.data.name
  objectives = ' and '.join(recipe.equivariances) or 'none'
  about = (f'Views of {of}, drawn as in the first step of a run of seed {config.seed}, and under each what was done. '
           f'Invariance: {config.invariance.name}. Equivariance: {objectives}.')
  sections = [page.Section(f'Group {name}', f'group-{i}',
                           [block('A row an image: the original, then its views', _about(recipe, name), found[name])])
              for i, name in enumerate(found)]
  roles = page.Section('Roles and settings', 'roles', _roles(config, recipe))
  page.save(pathlib.Path(out), page.render('What the augmentations do', about, [*sections, roles],
                                           {'config': configs.as_json(config)}))
  return pathlib.Path(out)
