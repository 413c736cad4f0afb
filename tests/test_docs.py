"""The documentation: its links lead somewhere, every public name has its entry, and the site builds without a warning."""
import pathlib
import re
import subprocess
import sys

import pytest

import equivariant_ssl as es

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *(ROOT / 'docs').rglob('*.md')])
MADE = ('docs/tutorials/', 'docs/commands.md')  # made by docs/conf.py when the site is built
LINK = re.compile(r'\]\(([^)\s]+)\)')
FENCE = re.compile(r'^```.*?^```', re.MULTILINE | re.DOTALL)


def sources() -> list[pathlib.Path]:
  """The pages that people wrote."""
  return [page for page in PAGES if not page.relative_to(ROOT).as_posix().startswith(MADE)]


def anchors(page: pathlib.Path) -> set[str]:
  """The anchors of a page's headings, as GitHub and MyST make them."""
  headings = re.findall(r'^#+ (.+)$', FENCE.sub('', page.read_text(encoding='utf-8')), re.MULTILINE)
  return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def broken_links(page: pathlib.Path) -> list[str]:
  """The relative links of a page that lead nowhere."""
  broken = []
  for link in LINK.findall(FENCE.sub('', page.read_text(encoding='utf-8'))):
    if re.match(r'[a-z]+:', link):
      continue
    path, _, anchor = link.partition('#')
    target = (page.parent / path).resolve() if path else page
    if target.is_relative_to(ROOT / 'docs' / 'tutorials'):  # a copy of a notebook
      target = ROOT / 'notebooks' / target.name
    if not target.exists() or anchor and target.suffix == '.md' and anchor not in anchors(target):
      broken.append(link)
  return broken


@pytest.mark.parametrize('page', sources(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_links_of_a_page_lead_somewhere(page):
  assert broken_links(page) == []


def test_a_broken_link_is_noticed(tmp_path):
  page = tmp_path / 'page.md'
  page.write_text('# A page\n[a](no.md) [b](#a-page) [c](#none) [d](https://x.org)\n```\n[e](no.md)\n```\n')
  assert broken_links(page) == ['no.md', '#none']


def test_every_page_is_in_the_index():
  """And so in the navigation: sphinx -W says the same, but is not installed everywhere."""
  index = (ROOT / 'docs' / 'index.md').read_text(encoding='utf-8').splitlines()
  names = {page.relative_to(ROOT / 'docs').with_suffix('').as_posix() for page in sources()
           if page.is_relative_to(ROOT / 'docs')}
  assert names - {'index'} <= set(index)


def test_every_public_name_is_in_the_reference():
  text = (ROOT / 'docs' / 'api.md').read_text(encoding='utf-8')
  entries = {name.rpartition('.')[2] for name in re.findall(r'auto(?:function|class|exception):: (\S+)', text)}
  assert set(es.__all__) <= entries


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
  for module in ('sphinx', 'myst_nb', 'sphinx_book_theme', 'sphinx_copybutton'):
    pytest.importorskip(module, reason='the extra "docs" is not installed: pip install -e ".[docs]"')
  built = subprocess.run([sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-b', 'html', ROOT / 'docs', tmp_path],
                         cwd=ROOT, capture_output=True, text=True)
  assert built.returncode == 0, built.stdout + built.stderr
  for page in ('index', 'api', 'methods/invariance', 'results/demo', 'tutorials/04_library'):
    assert (tmp_path / f'{page}.html').is_file()
  text = (tmp_path / 'api.html').read_text(encoding='utf-8')
  assert all(f'equivariant_ssl.api.{name}"' in text for name in ('load', 'pretrain', 'evaluate', 'study', 'views', 'check_laws'))
