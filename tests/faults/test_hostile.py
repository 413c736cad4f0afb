"""What is made to deceive: names of code, of files elsewhere and of HTML. It is refused with a line, or it is only text."""
import io
import json
import os
import pathlib
import struct
import sys
import tarfile

import numpy as np
import pytest
import reports
from PIL import Image

from equivariant_ssl import cli, report
from equivariant_ssl.errors import UserError
from equivariant_ssl.export import torchvision, weight_files

DICT = 'tensorflow_datasets.core.features.features_dict.FeaturesDict'


@pytest.fixture
def trap(tmp_path, monkeypatch):
  """() -> what has been executed or written where nothing should be: a module that anything would do to import."""
  mark, before = tmp_path / 'executed', set(os.listdir('/tmp'))
  (tmp_path / 'lib').mkdir()
  for name in ('evil', 'x'):
    (tmp_path / 'lib' / f'{name}.py').write_text(f'import os\nos.mkdir({str(mark)!r})\n')
  (tmp_path / 'place').mkdir()
  monkeypatch.chdir(tmp_path / 'place')
  monkeypatch.setattr(sys, 'path', [*sys.path, str(tmp_path / 'lib')])
  monkeypatch.setattr(cli, '_cache', lambda: None)
  yield lambda: [p for p in (mark, tmp_path / 'evil.txt', pathlib.Path('/tmp/evil.txt')) if p.exists()]
  assert 'evil.txt' not in set(os.listdir('/tmp')) - before


def refused(one, name, trap, argv, capsys, codes=(2, 7)):
  """Whether a command refuses: with one of `codes`, in a few lines, and no more."""
  code = cli.main(list(map(str, argv)))
  err = capsys.readouterr().err
  clean = code in codes and 'Traceback' not in err and 'does not know this error' not in err
  one.add('wrong' if trap() else 'survived' if clean else 'lost', f'{name}: {code} {trap()} {err[-300:]}')


FEATURES = {
    'a module': {'pythonClassName': 'evil.X'}, 'legacy': {'type': 'evil.X', 'content': '{}'},
    'nested': {'pythonClassName': DICT, 'featuresDict': {'features': {'image': {'pythonClassName': 'evil.Image'}}}},
    'in text': {'pythonClassName': DICT, 'json': {'json': json.dumps({'pythonClassName': 'evil.X'})}},
    'of snakes': {'python_class_name': 'evil.X'}, 'os': {'pythonClassName': 'os.system'}, 'nothing': {}, 'a list': [],
    'almost': {'pythonClassName': 'tensorflow_datasets.core.featuresevil.X'}, 'a dot': {'pythonClassName': '.evil'},
    'twice': '{"pythonClassName": "evil.X", "pythonClassName": "' + DICT + '"}', 'deep': '[' * 100_000, 'no JSON': '\0\1'}


def test_features(row, trap, tmp_path, capsys):
  one = row('hostile features.json', len(FEATURES))
  for name, content in FEATURES.items():
    place = tmp_path / name / 'x' / '1.0.0'
    place.mkdir(parents=True)
    (place / 'features.json').write_text(content if isinstance(content, str) else json.dumps(content))
    (place / 'dataset_info.json').write_text(json.dumps({
        'name': 'x', 'version': '1.0.0', 'moduleName': 'evil', 'fileFormat': 'array_record',
        'splits': [{'name': 'train', 'shardLengths': ['1'], 'numBytes': '1', 'filepathTemplate': '{DATASET}'}]}))
    refused(one, name, trap, ['train', '--config', 'smoke', '--workdir', tmp_path / 'run', '--config.data.name=tfds',
                              f'--config.data.dataset={place}', '--config.steps=1'], capsys)


def member(name, kind=tarfile.REGTYPE, data=b'', link=''):
  found = tarfile.TarInfo(name)
  found.type, found.size, found.linkname = kind, len(data), link
  return found, data


def picture():
  out = io.BytesIO()
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)).save(out, 'JPEG')
  return out.getvalue()


def tars():
  """{name: (members, or the bytes)} of archives of nothing that may be read."""
  evil = b'evil'
  found = {'out of it': [member('../../evil.txt', data=evil)], 'absolute': [member('/tmp/evil.txt', data=evil)],
           'a link': [member('a.JPEG', tarfile.SYMTYPE, link='/etc/passwd')],
           'a link, then through it': [member('d', tarfile.SYMTYPE, link='/tmp'), member('d/evil.txt', data=evil)],
           'a hard link': [member('a.JPEG', tarfile.LNKTYPE, link='/etc/passwd')],
           'a pipe': [member('a.JPEG', tarfile.FIFOTYPE)], 'a device': [member('a.JPEG', tarfile.CHRTYPE)],
           'no image': [member('n01440764/a.JPEG', data=b'<script>')], 'nothing': [], 'no tar': b'x' * 999, 'empty': b''}
  whole = io.BytesIO()
  with tarfile.open(fileobj=whole, mode='w') as tar:
    for info, data in [member('n01440764/a.JPEG', data=picture() * 9)]:
      tar.addfile(info, io.BytesIO(data))
  lying = bytearray(whole.getvalue()[:1024])
  lying[124:136] = b'77777777777\0'  # 8 GiB
  lying[148:156] = b'        '
  lying[148:156] = b'%06o\0 ' % sum(lying[:512])
  return found | {'cut': whole.getvalue()[:1500], 'a size of 8 GiB': bytes(lying)}


def test_tars(row, trap, tmp_path, capsys):
  found = tars()
  one = row('hostile tar archives', len(found))
  for name, content in found.items():
    src = tmp_path / name
    src.mkdir()
    with open(src / 'ILSVRC2012_img_train.tar', 'wb') as file:
      if isinstance(content, bytes):
        file.write(content)
      else:
        with tarfile.open(fileobj=file, mode='w') as tar:
          for info, data in content:
            tar.addfile(info, io.BytesIO(data))
    root = tmp_path / f'root {name}'
    refused(one, name, trap, ['data', 'prepare', 'imagenet', '--src', src, '--root', root], capsys)
    left = [p for p in root.rglob('*')] if root.exists() else []
    assert not left, f'{name} left {left}'


def tensors(header, data=b'', size=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack('<Q', len(text) if size is None else size) + text + data


def weights():
  """{name: bytes} of safetensors files that are none, or of no network."""
  one = lambda **kw: {'conv1.weight': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8], **kw}}
  return {'huge header': tensors(b'{}', size=1 << 60), 'header beyond': tensors(b'{}', size=99),
          'no JSON': tensors(b'\0' * 9), 'a list': tensors([]), 'deep': tensors(b'[' * 99_999),
          'negative': tensors(one(data_offsets=[-8, 0]), bytes(8)),
          'beyond': tensors(one(data_offsets=[0, 1 << 40]), bytes(8)), 'of no bytes': tensors(one()),
          'too large a shape': tensors(one(shape=[1 << 62, 1 << 62]), bytes(8)),
          'another shape': tensors(one(shape=[3]), bytes(8)),
          'overlap': tensors(one() | {'b': {'dtype': 'F32', 'shape': [2], 'data_offsets': [4, 12]}}, bytes(12)),
          'hole': tensors(one(data_offsets=[8, 16]), bytes(16)), 'more after it': tensors(one(), bytes(99)),
          'a type': tensors(one(dtype='evil.X'), bytes(8)), 'a name of a file': tensors(
              {'../../evil.txt': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}}, bytes(8)),
          'empty': b'', 'a pickle': b'\x80\4cevil\nX\n.', 'twice': tensors(
              b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
              bytes(8))}


def test_weights(row, trap, tmp_path):
  found = weights()
  one = row('hostile safetensors', len(found))
  for name, data in found.items():
    path = tmp_path / 'model.safetensors'
    path.write_bytes(data)
    try:
      state = weight_files.read(path)
      torchvision.backbone(state)
      one.add('wrong', f'{name}: accepted {list(state)}')
    except UserError as error:
      one.add('wrong' if trap() else 'survived' if len(str(error).splitlines()) <= 2 else 'lost', f'{name}: {error}')
    except Exception as error:
      one.add('lost', f'{name}: {type(error).__name__}: {error}')


NAMES = ('evil', '../../lib/evil', 'os', 'equivariant_ssl.cli', '__init__', 'x; import evil', '', '.', 'folder\0',
         'a' * 9999)


@pytest.mark.parametrize('field', ['data', 'encoder', 'invariance', 'equivariance', 'optimizer'])
def test_names_in_a_config(field, row, trap, tmp_path, capsys):
  one = row(f'hostile names in config.json: {field}', len(NAMES))
  run = reports.run(tmp_path / 'run')
  config = json.loads((run / 'config.json').read_text())
  for name in NAMES:
    (run / 'config.json').write_text(json.dumps({**config, field: {'name': name}}))
    (run / 'command.txt').write_text(f'eqssl train --config {tmp_path}/lib/evil.py --config.{field}.name={name!r}\n')
    refused(one, repr(name[:20]), trap, ['resume', run], capsys, (2, 5))


HTML = (reports.HOSTILE, '<script>alert(1)</script>', '" onmouseover="alert(1)', "' onload='alert(1)", 'javascript:alert(1)',
        '{{ 7 * 7 }}{% raw %}', '&lt;script&gt;', '<!--', ']]>', '\u202e<svg onload=alert(1)>',
        '</title></style><iframe src=//x>')


def harmless(page: str) -> str:
  """'' where a page has nothing that runs, asks anything of the network, or comes of a name; else what it has."""
  found = reports.Parsed(page)
  scripts = [a for name, a in found.elements if name == 'script']
  asks = lambda a: [a.get(k) for k in ('href', 'src', 'action', 'xlink:href')
                    if str(a.get(k)).strip().lower().startswith(('javascript:', 'http', '//'))]
  odd = [(name, a) for name, a in found.elements if name in ('iframe', 'object', 'embed', 'form', 'base')
         or any(k.startswith('on') for k in a) or asks(a)]
  odd += [s for s in scripts if s.get('type') != 'application/json']
  return '' if not odd and '49' not in found.text.split() else f'{odd[:2]}'


def test_names_in_a_report(row, trap, tmp_path):
  one = row('hostile names in a report', len(HTML))
  for i, text in enumerate(HTML):
    run = reports.run(tmp_path / str(i) / text.replace('/', ' '), result_files={
        'knn': reports.result('knn', {text: .5, 'top1': .4}, {text: {text: .1}, 'top1': {'chance': .1}})})
    (run / 'command.txt').write_text(f'eqssl train --config smoke --workdir {text}\n{text}\n')
    (run / 'env.json').write_text(json.dumps({**reports.ENV, 'cpu': text, text: text}))
    with (run / 'metrics.jsonl').open('a') as file:
      file.write(json.dumps({'step': 99, 'loss': 1., text: 1., 'invariance': text}) + '\n')
    config = json.loads((run / 'config.json').read_text())
    (run / 'config.json').write_text(json.dumps({**config, 'data': {
        'name': 'folder', 'path': text, 'size': 32}}))
    try:
      page = report.report([run], images=False).read_text()
      bad = harmless(page)
      one.add('wrong' if bad or trap() else 'survived', f'{text}: {bad}')
    except UserError as error:
      one.add('survived' if len(str(error).splitlines()) <= 2 else 'lost', f'{text}: {error}')
    except Exception as error:
      one.add('lost', f'{text}: {type(error).__name__}: {error}')


def test_the_test_can_see_what_runs():
  for text in ('<script>x</script>', '<img src=x onerror=alert(1)>', '<a href="javascript:x">a</a>', '<iframe></iframe>'):
    assert harmless(f'<html><body>{text}</body></html>')
  assert not harmless('<html><body><a href="#x">a</a></body></html>')
