"""The documentation site: Sphinx reads docs/*.md with MyST, and the notebooks with their outputs.

`make docs` builds it in build/docs. Nothing is executed and nothing is fetched.
"""
import pathlib
import re
import shutil
import sys

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import equivariant_ssl  # noqa: E402

project = 'equivariant_ssl'
author = 'the equivariant_ssl developers'
copyright = '2026, ' + author
version = release = equivariant_ssl.__version__

extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.mathjax',
              'sphinx_copybutton', 'sphinx-mathjax-offline']
exclude_patterns = ['conf.py', 'tutorials/README.md']
source_suffix = {'.md': 'myst-nb', '.ipynb': 'myst-nb'}
myst_enable_extensions = ['dollarmath', 'deflist', 'colon_fence']
myst_heading_anchors = 3
nb_execution_mode = 'off'  # the notebooks carry their outputs
autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
suppress_warnings = ['misc.highlighting_failure']  # a shell command within a notebook's cell
default_role = 'code'  # our docstrings write code between single backticks
smartquotes = False    # '' and -- are code
add_module_names = False

html_theme = 'sphinx_book_theme'
html_title = 'equivariant_ssl'
html_static_path = ['_static']
html_css_files = ['site.css']
html_theme_options = {'show_toc_level': 2, 'navigation_with_keys': False,
                      'use_download_button': False, 'use_fullscreen_button': False}
html_copy_source = False


def copy_notebooks() -> None:
  """Copies the notebooks into the tree that Sphinx reads; git ignores the copies."""
  tutorials = HERE / 'tutorials'
  tutorials.mkdir(exist_ok=True)
  for notebook in (ROOT / 'notebooks').glob('*.ipynb'):
    shutil.copyfile(notebook, tutorials / notebook.name)


copy_notebooks()


def write_commands() -> None:
  """Writes commands.md: the help of each command, as `eqssl COMMAND --help` prints it."""
  import argparse
  import os

  from equivariant_ssl import cli
  os.environ['COLUMNS'] = '100'
  parser = cli.build_parser('The command line: `eqssl COMMAND`.', cli.COMMANDS)
  commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
  parts = ['# The commands', 'What `eqssl COMMAND --help` prints.',
           f'```text\n{parser.format_help()}```']
  names = {action.dest for action in commands._choices_actions}  # without old spellings
  for name in sorted(names):
    command = commands.choices[name]
    parts.append(f'## eqssl {name}\n\n```text\n{command.format_help()}```')
  (HERE / 'commands.md').write_text('\n\n'.join(parts) + '\n', encoding='utf-8')


write_commands()

FIELD = re.compile(r'(\w[\w.]*(?:, [\w.]+)*(?: \[[^\]]*\])*):\s+(\S.*)')


def field_lists(app, what, name, obj, options, lines: list[str]) -> None:
  """Turns the tables `name:  what it is` of our docstrings into lists, and formulas into blocks.

  A line that is indented further goes on with the name above it.
  """
  result, block = [], []

  def flush() -> None:
    if block and all(line.startswith('  ') for line in block):  # a formula, or a program
      result.extend(['::', '', *block])
    elif result and block and FIELD.match(block[0]):  # the first block is the summary
      for line in block:
        entry = FIELD.match(line)
        if entry:
          result.append(f'* ``{entry[1].strip()}``: {entry[2]}')
        else:
          result.append(f'  {line.strip()}')
    else:
      result.extend(block)
    result.append('')
    block.clear()

  for line in lines:
    if line.strip():
      block.append(line)
    else:
      flush()
  flush()
  lines[:] = result


def skip_fields(app, what, name, obj, skip, options) -> bool | None:
  """Leaves out the entries of a NamedTuple's fields, which its docstring explains."""
  return True if (getattr(obj, '__doc__', None) or '').startswith('Alias for field') else None


def setup(app) -> None:
  app.connect('autodoc-skip-member', skip_fields)
  app.connect('autodoc-process-docstring', field_lists)
