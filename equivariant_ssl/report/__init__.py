"""Reports, one HTML file each: of a run, of a comparison of runs, and of a study."""
import pathlib
from collections.abc import Sequence

from rich.console import Console

from equivariant_ssl.errors import UserError
from equivariant_ssl.training.runs import DataRequest


def report(dirs: Sequence[str | pathlib.Path], out: str | pathlib.Path | None = None,
           by: str = 'method', images: bool = True, console: Console | None = None,
           data_request: DataRequest = DataRequest()) -> pathlib.Path:
  """Write the page of one study, of one run, or of several runs that are compared; return its path.

  dirs: folders of runs (with config.json) or folders that hold such, or one folder of a study (with
  study.json).
  out: the file. None means report.html: in the folder, or for several runs in the current folder.
  by: what the runs are grouped by: 'method', or a field of the config.
  images: whether the page has the panels that read the data and the checkpoints.
  data_request: where the data of the runs are, and whether other data are accepted.
  Raises UserError where a folder is neither a run nor a study.
  """
  from equivariant_ssl.evaluate.comparison import expand_runs
  from equivariant_ssl.report import comparison_page, page, run_page, study_page
  folders, path = expand_runs(dirs), pathlib.Path(out) if out else None
  for folder in folders:
    kinds = [name for name in ('study.json', 'config.json') if (folder / name).is_file()]
    if not kinds or len(folders) > 1 and kinds[0] == 'study.json':
      cause = ('a study, and a study is reported alone.' if kinds else
               'neither a run nor a study.')
      raise UserError(f'{str(folder)!r} is {cause}',
                      'Type: eqssl report DIR [DIR ...], with folders that eqssl train made, or '
                      'with one folder that eqssl study made.')
  if path:
    page.check_target(path)
  if not folders:
    raise UserError('There is no folder to report.', 'Type: eqssl report DIR [DIR ...]')
  if len(folders) > 1:
    return comparison_page.write(folders, path or pathlib.Path('report.html'), by, console)
  if (folders[0] / 'study.json').is_file():
    return study_page.write(folders[0], images, console, path, data_request.path)
  return run_page.write(folders[0], images, console, path, data_request)
