"""Reports in a real headless Chromium: phone and desktop, light and dark, keyboard and print; no network."""
import os
import pathlib
import shutil

import jax
import pytest
import reports

from equivariant_ssl.config import load_config
from equivariant_ssl.evaluate import evaluation, frozen, panel_protocols, protocols
from equivariant_ssl.parallel import sharding
from equivariant_ssl.report import report
from equivariant_ssl.training import loop

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(CHROMIUM is None, reason='no Chromium is installed (apt install chromium)')]
WIDTHS, SCHEMES = (380, 1400), ('light', 'dark')
PAGES = ('run', 'trained', 'comparison', 'study', 'bare')
FITS = '''() => [...document.querySelectorAll('main *')].filter(e => {
  if (e.closest('.scroll') || e.closest('svg')) return false;
  const box = e.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 1 || box.left < -1);
}).map(e => e.outerHTML.slice(0, 200))'''
CUT = '''() => [...document.querySelectorAll('svg text')].filter(e => {
  const box = e.getBoundingClientRect(), chart = e.ownerSVGElement.getBoundingClientRect();
  return box.width && (box.right > chart.right + 2 || box.left < chart.left - 2 || box.bottom > chart.bottom + 2);
}).map(e => e.textContent)'''
SEEN = '''() => {
  const e = document.activeElement, style = getComputedStyle(e), box = e.getBoundingClientRect();
  return {name: e.tagName, href: e.getAttribute('href'), outline: parseFloat(style.outlineWidth),
          solid: style.outlineStyle !== 'none', inside: box.left >= 0 && box.top >= 0 && box.right <= innerWidth};
}'''


@pytest.fixture(scope='module')
def pages(tmp_path_factory) -> dict[str, pathlib.Path]:
  """A page of each kind; 'trained' is of a run that was trained and evaluated, on a checkpoint of its own."""
  root = tmp_path_factory.mktemp('pages')
  with pytest.MonkeyPatch.context() as patch:
    for name, value in (('PANEL', ('crop', 'rotate')), ('OUTSIDE', {})):
      patch.setattr(frozen, name, value)
    patch.setattr(protocols, 'BANK', 16)
    for name, value in (('PANEL_TRAIN', 64), ('PANEL_TEST', 48), ('SHARED', 2)):
      patch.setattr(panel_protocols, name, value)
    # A batch that 8 devices do not divide: one device, whose programs compile sooner.
    config = load_config('smoke', {'steps': '4', 'batch': '15', 'knn_every': '.05', 'probe': 'True'})
    loop.train(config, root / 'trained', 'eqssl train --config smoke', mesh=sharding.mesh(jax.devices()[:1]), quiet=True)
    evaluation.evaluate(root / 'trained', ['knn', 'gains', 'profile', 'health'])
    found = {'trained': report([root / 'trained'])}
    reports.fake_panels(patch, 224)
    found['run'] = report([reports.run(root / 'run')])
  seeds = [reports.run(root / f'{name}{seed}', seed, reports.results(.4 + seed / 50), equivariance=name)
           for name in ('none', 'equimod', 'essl') for seed in range(2)]
  found['comparison'] = report(seeds, root / 'comparison.html')
  found['study'] = report([reports.study(root / 'study')])
  found['bare'] = report([reports.run(root / 'bare', result_files={}, rows=0)], images=False)
  return found


@pytest.fixture(scope='module')
def browser():
  playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
  with playwright.sync_playwright() as p:
    opened = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'] if os.geteuid() == 0 else [])
    yield opened
    opened.close()


@pytest.fixture
def visit(browser, pages):
  """Open a page; what the browser complains of, or asks of anything but the file, fails the test."""
  wrong, opened = [], []

  def go(name: str, width: int = 1400, scheme: str = 'light'):
    page = browser.new_page(viewport={'width': width, 'height': 800}, color_scheme=scheme)
    opened.append(page)
    page.on('console', lambda message: wrong.append(message.text))
    page.on('pageerror', lambda error: wrong.append(str(error)))
    page.on('dialog', lambda dialog: wrong.append(dialog.message) or dialog.dismiss())  # a hostile name that came alive
    page.on('request', lambda r: None if r.url.startswith(('data:', pages[name].as_uri())) else wrong.append(r.url))
    page.goto(pages[name].as_uri())
    return page
  yield go
  for page in opened:
    page.close()
  assert not wrong


@pytest.mark.parametrize('scheme', SCHEMES)
@pytest.mark.parametrize('width', WIDTHS)
@pytest.mark.parametrize('name', PAGES)
def test_it_fits_and_every_picture_is_there(visit, name, width, scheme):
  page = visit(name, width, scheme)
  assert page.evaluate('document.documentElement.scrollWidth') <= width and page.evaluate(FITS) == []
  page.evaluate('document.querySelectorAll("details").forEach(d => d.open = true)')
  assert page.evaluate('document.documentElement.scrollWidth') <= width and page.evaluate(FITS) == []
  assert page.evaluate(CUT) == []
  images = page.evaluate('[...document.images].map(i => [i.naturalWidth, i.clientWidth, i.alt])')
  assert all(natural > 0 and shown > 40 and alt for natural, shown, alt in images)
  assert len(images) > 30 if name in ('run', 'trained') else len(images) == (18 if name == 'study' else 0)
  assert page.evaluate('[...document.querySelectorAll("svg")].every(s => s.clientWidth > 200)')
  dark = page.evaluate('getComputedStyle(document.body).backgroundColor')
  assert (sum(map(int, dark[4:-1].split(','))) < 200) == (scheme == 'dark')


@pytest.mark.parametrize('width', WIDTHS)
def test_the_keyboard_reaches_everything(visit, width):
  page = visit('run', width)
  page.keyboard.press('Tab')
  skip = page.evaluate(SEEN)
  assert skip['href'] == '#main' and skip['inside'] and skip['solid'] and skip['outline'] >= 2
  links = page.evaluate('[...document.querySelectorAll("nav a")].map(a => a.getAttribute("href"))')
  for href in links:
    page.keyboard.press('Tab')
    seen = page.evaluate(SEEN)
    assert seen['href'] == href and seen['solid'] and seen['outline'] >= 2
  page.keyboard.press('Enter')
  assert page.url.endswith(links[-1])
  page = visit('run', width)
  page.keyboard.press('Tab')
  page.keyboard.press('Enter')
  assert page.evaluate('document.activeElement.id') == 'main'
  reached = set()
  for _ in range(60):
    page.keyboard.press('Tab')
    seen = page.evaluate(SEEN)
    assert seen['name'] == 'BODY' or seen['solid']
    reached.add(seen['name'])
  assert {'SUMMARY', 'DIV', 'PRE'} <= reached
  page.locator('summary').first.focus()
  page.keyboard.press('Enter')
  assert page.evaluate('document.querySelector("details").open')


def test_a_wide_table_scrolls_by_itself(visit):
  page = visit('comparison', 380)
  table = page.locator('.scroll:has(table)').first
  assert table.evaluate('e => e.scrollWidth > e.clientWidth')
  table.focus()
  page.keyboard.press('ArrowRight')
  page.wait_for_function('e => e.scrollLeft > 0', arg=table.element_handle())


@pytest.mark.parametrize('name', PAGES)
def test_it_prints(visit, name, tmp_path):
  page = visit(name, scheme='dark')
  page.emulate_media(media='print', color_scheme='dark')
  assert page.evaluate('getComputedStyle(document.documentElement).getPropertyValue("--paper")').strip() == '#fff'
  assert page.evaluate('getComputedStyle(document.querySelector("nav")).display') == 'none'
  folded = page.locator('details table').first  # printed too
  assert not folded.count() or folded.evaluate('e => e.getBoundingClientRect().height') > 40
  page.pdf(path=tmp_path / 'page.pdf', format='A4')
  assert (tmp_path / 'page.pdf').stat().st_size > 20_000


def test_the_data_can_be_read(visit):
  page = visit('run')
  data = page.evaluate('JSON.parse(document.getElementById("data").textContent)')
  assert data['results']['knn']['trained'][0]['numbers']['top1'] == .4321
  assert page.evaluate('[...document.querySelectorAll("img")].some(i => i.getAttribute("src") === "x")') is False
