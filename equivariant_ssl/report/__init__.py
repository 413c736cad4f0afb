"""Reports as one HTML file each: of a run, of a comparison, of a study."""
import pathlib
from collections.abc import Sequence

from rich.console import Console

from equivariant_ssl.errors import UserError
from equivariant_ssl.runs import Asked


def report(dirs: Sequence[str | pathlib.Path], out: str | pathlib.Path | None = None, by: str = 'method',
           images: bool = True, console: Console | None = None, asked: Asked = Asked()) -> pathlib.Path:
  """Write the page of one study (a folder with study.json), of one run, or of several runs compared; its path.

  out: the file; None: report.html in the folder, of several in the current one. by: what several are grouped by.
  images: with the panels that read data and checkpoints. asked: of the data of a run. Raises UserError where a folder is
  neither.
  """
  from equivariant_ssl.report import comparison, page, run, study
  folders, out = [pathlib.Path(d) for d in dirs], pathlib.Path(out) if out else None
  for folder in folders:
    kinds = [name for name in ('study.json', 'config.json') if (folder / name).is_file()]
    if not kinds or len(folders) > 1 and kinds[0] == 'study.json':
      what = 'a study: it is reported alone' if kinds else 'neither a run nor a study'
      raise UserError(f'{str(folder)!r} is {what}.',
                      'eqssl report DIR [DIR ...]: folders that eqssl train made, or one that eqssl study made.')
  if out:
    page.check(out)
  if not folders:
    raise UserError('no folder to report.', 'eqssl report DIR [DIR ...]')
  if len(folders) > 1:
    return comparison.write(folders, out or pathlib.Path('report.html'), by, console)
  if (folders[0] / 'study.json').is_file():
    return study.write(folders[0], images, console, out, asked.path)
  return run.write(folders[0], images, console, out, asked)
