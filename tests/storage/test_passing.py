"""A disk that fails for a moment says nothing about the files on it: every reader ends with code 10."""
import builtins
import errno
import io
import os
import pathlib

import numpy as np
import pytest

from equivariant_ssl import errors
from equivariant_ssl.data import tfds_folders
from equivariant_ssl.evaluate import result_files
from equivariant_ssl.export import export_folder
from equivariant_ssl.report import embeddings
from equivariant_ssl.storage import disk, record
from equivariant_ssl.study import study_plan

READERS = {
    'a plan': lambda folder: study_plan.read(folder),
    'a result of a study': lambda folder: study_plan.read_part(folder),
    'a data set': lambda folder: tfds_folders.open_directory(folder),
    'an embedding file': lambda folder: embeddings.read(folder / 'e.npz'),
    'an export': lambda folder: export_folder.read_facts(folder),
    'a result': lambda folder: result_files.stored_result(folder / 'found.json', {}, (), print),
    'a workdir': lambda folder: record._folder(folder / 'new'),
}


@pytest.mark.parametrize('reader', READERS)
def test_an_error_that_may_pass_condemns_no_file(reader, tmp_path, monkeypatch):
  for name in ('study.json', 'found.json', 'features.json', 'config.json'):
    (tmp_path / name).write_text('{}')
  np.savez(tmp_path / 'e.npz', features=np.zeros((1, 2)))

  def fail(*_, **__):
    raise OSError(errno.EIO, os.strerror(errno.EIO))
  monkeypatch.setattr(disk.time, 'sleep', lambda _: None)
  for module, name in ((io, 'open'), (builtins, 'open'), (pathlib.Path, 'mkdir')):
    monkeypatch.setattr(module, name, fail)
  with pytest.raises((OSError, errors.UserError)) as caught:
    READERS[reader](tmp_path)
  monkeypatch.undo()
  assert errors.describe(caught.value)[1] == errors.INPUT_OUTPUT
