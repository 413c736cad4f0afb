"""`eqssl import` of hostile and damaged files: one error, code 2, and nothing left behind."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load, save
from test_export import random_state

from equivariant_ssl import cli
from equivariant_ssl.export import weight_files


@pytest.fixture
def imported(monkeypatch, tmp_path, capsys):
  """A function file -> what stderr says of its import, which must be refused and leave nothing."""
  monkeypatch.setattr(cli, '_cache', lambda: None)

  def of(file):
    before = sorted(tmp_path.rglob('*'))
    code = cli.main(['import', str(file), '--workdir', str(tmp_path / 'run'), '--config', 'smoke'])
    err = capsys.readouterr().err
    assert code == 2 and 'Traceback' not in err and len(err.strip().splitlines()) <= 2, err
    assert sorted(tmp_path.rglob('*')) == before
    return err

  return of


@pytest.fixture(scope='module')
def content():
  """A sealed file of a small ResNet."""
  return weight_files.sealed(save(random_state(10), {'format': 'pt'}))


def test_a_seal_keeps_what_torch_and_timm_read(content, tmp_path):
  (tmp_path / 'x.safetensors').write_bytes(content)
  with safe_open(tmp_path / 'x.safetensors', 'np') as file:
    assert file.metadata()['format'] == 'pt' and len(file.metadata()['sha256']) == 64
  assert content == weight_files.sealed(save(random_state(10), {'format': 'pt'})), (
    'other bytes each time'
  )
  assert int.from_bytes(content[:8], 'little') % 8 == 0
  for k, v in load(content).items():
    np.testing.assert_array_equal(v, random_state(10)[k])


def test_no_flip_of_a_sealed_file_is_accepted(content, imported, tmp_path):
  """No flipped bit is accepted, without a config.json beside the file.

  Half of the flips are in the header, some of them in the fingerprint itself.
  """
  end = 8 + int.from_bytes(content[:8], 'little')
  seal = content.index(b'sha256')
  places = [
    *np.linspace(0, end - 1, 20).astype(int),
    *range(seal - 3, seal + 12),
    seal + 50,
    end - 1,
    *np.linspace(end, len(content) - 1, 30).astype(int),
  ]
  for i, place in enumerate(places):
    for change in (1 << i % 8, 0x20):
      flipped = bytearray(content)
      flipped[place] ^= change
      (tmp_path / 'x.safetensors').write_bytes(flipped)
      assert 'is damaged' in imported(tmp_path / 'x.safetensors'), (place, change)
  for other in (content + b'\0', content[:-1], content[:end] + content[end + 4 :]):
    (tmp_path / 'x.safetensors').write_bytes(other)
    assert 'is damaged' in imported(tmp_path / 'x.safetensors')


WRONG = {
  'int': ({'conv1.weight': np.int8}, 'not of floating point: conv1.weight'),
  'int64': ({'layer1.0.bn1.weight': np.int64}, 'not of floating point: layer1.0.bn1.weight'),
  'bool': ({'bn1.bias': bool}, 'not of floating point: bn1.bias'),
  'negative': ({'bn1.running_var': -1e-3}, 'negative, a variance: bn1.running_var'),
  'inf': ({'bn1.weight': np.inf}, 'not finite: bn1.weight'),
  'nan': ({'layer2.0.conv1.weight': np.nan}, 'not finite: layer2.0.conv1.weight'),
  '1e308': ({'bn1.weight': np.float64(1e308)}, 'not finite: bn1.weight'),
  '1e30': ({'bn1.weight': -1e30}, 'beyond 1e+18: bn1.weight'),
  'two': ({'bn1.weight': np.nan, 'bn1.bias': np.nan}, '2 of its tensors are not finite: bn1.'),
}


@pytest.mark.parametrize('what', WRONG)
def test_what_no_network_holds_is_refused(what, imported, tmp_path):
  """Tensors that are left out may be of any kind: counters are integers."""
  changes, words = WRONG[what]
  state = random_state(10)
  for name, change in changes.items():
    if isinstance(change, type):
      state[name] = (state[name] > 0).astype(change)
    else:
      state[name] = np.full(
        state[name].shape, change, np.float64 if isinstance(change, np.float64) else np.float32
      )
  (tmp_path / 'x.safetensors').write_bytes(save(state))
  assert words in imported(tmp_path / 'x.safetensors')


VIT = {
  'blocks.0.attn.qkv.weight': (576, 192),
  'cls_token': (1, 1, 192),
  'pos_embed': (1, 5, 192),
  'patch_embed.proj.weight': (192, 3, 4, 4),
}


@pytest.mark.parametrize(
  'change',
  [
    {'pos_embed': (1, 0, 192)},
    {'pos_embed': (1, 5)},
    {'cls_token': (1, 1, 0)},
    {'cls_token': ()},
    {'patch_embed.proj.weight': (192, 3, 0, 0)},
    {'patch_embed.proj.weight': (192, 3, 4, 7)},
    {},
  ],
)
def test_a_vit_of_wrong_shapes_is_refused(change, imported, tmp_path):
  (tmp_path / 'x.safetensors').write_bytes(
    save({k: np.zeros(s, np.float32) for k, s in {**VIT, **change}.items()})
  )
  imported(tmp_path / 'x.safetensors')


@pytest.mark.parametrize(
  'change', [{'conv1.weight': (0, 3, 3, 3)}, {'conv1.weight': (4, 1, 3, 3)}, {'bn1.bias': (4, 1)}]
)
def test_a_resnet_of_wrong_shapes_is_refused(change, imported, tmp_path):
  state = {**random_state(10), **{k: np.zeros(s, np.float32) for k, s in change.items()}}
  (tmp_path / 'x.safetensors').write_bytes(save(state))
  imported(tmp_path / 'x.safetensors')


def headed(text: bytes, size: int | None = None) -> bytes:
  return (len(text) if size is None else size).to_bytes(8, 'little') + text


ODD = {
  'no object': headed(b'[]'),
  'a number': headed(b'1'),
  'no JSON': headed(b'{"a"'),
  'empty': b'',
  'short': b'1234',
  'no letters': headed(b'\xff\xfe'),
  'endless': headed(b'{}', 2**63),
  'deep': headed(b'[' * 100_000),
  'no dict inside': headed(b'{"a":3}'),
  'another kind': headed(b'{"a":{"dtype":"F8_E5M2","shape":[1],"data_offsets":[0,1]}}') + b'0',
  'no such kind': headed(b'{"a":{"dtype":"X","shape":[1],"data_offsets":[0,1]}}') + b'0',
  'metadata': headed(b'{"__metadata__":[1]}'),
  'numbers in it': headed(b'{"__metadata__":{"sha256":1}}'),
  'overlap': headed(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}') + bytes(4),
  'huge': headed(b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'),
}


@pytest.mark.parametrize('what', ODD)
def test_an_odd_header_is_a_line(what, imported, tmp_path):
  (tmp_path / 'x.safetensors').write_bytes(ODD[what])
  assert 'is damaged or no safetensors file' in imported(tmp_path / 'x.safetensors')


def test_limits_are_stated(imported, tmp_path):
  file = tmp_path / 'x.safetensors'
  file.write_bytes(headed(b'{}' + b' ' * weight_files.HEADER))
  assert f'at most {weight_files.HEADER:,} are read' in imported(file)
  empty = {'dtype': 'F32', 'shape': [0], 'data_offsets': [0, 0]}
  file.write_bytes(
    headed(json.dumps({f'{i}': empty for i in range(weight_files.TENSORS + 1)}).encode())
  )
  assert f'20,001 tensors; at most {weight_files.TENSORS:,} are read' in imported(file)
  for name in ('x.safetensors', 'x.pth'):
    with open(tmp_path / name, 'wb') as large:
      large.truncate(weight_files.BYTES + 1)  # a file of holes
    assert f'at most {weight_files.BYTES:,} are read' in imported(tmp_path / name)
    (tmp_path / name).unlink()


# -- torch, or the lack of it


@pytest.mark.parametrize('version', ['', '2.5.1', '2.9.1+cu130'])
def test_a_pth_needs_a_torch_that_is_safe(version, imported, tmp_path, monkeypatch):
  """The file is refused with the command that converts it, in which its name is quoted."""
  fake = None
  if version:
    fake = type(sys)('torch')
    fake.__version__ = version
  monkeypatch.setitem(sys.modules, 'torch', fake)
  (tmp_path / "it's mine.pth").write_bytes(b'x')
  err = imported(tmp_path / "it's mine.pth")
  assert (
    'pip install "torch>=2.10"' in err
    and 'python -c ' in err
    and (version or 'not installed') in err
  )
  assert weight_files.shlex.split(err.split('that torch is: ')[1])[-2:] == [
    str(tmp_path / "it's mine.pth"),
    str(tmp_path / "it's mine.safetensors"),
  ]


def test_the_command_converts(tmp_path):
  torch = pytest.importorskip('torch')
  state = {k: torch.from_numpy(np.array(v)) for k, v in random_state(10).items()}
  torch.save({'epoch': 3, 'state_dict': state}, tmp_path / 'a b.pth')
  argv = weight_files.shlex.split(weight_files._conversion(tmp_path / 'a b.pth'))
  subprocess.run([sys.executable, *argv[1:]], check=True)
  tensors = weight_files.read(tmp_path / 'a b.safetensors')
  assert tensors.keys() == state.keys() and all(
    (tensors[k] == v.numpy()).all() for k, v in state.items()
  )


def test_odd_files_of_torch(imported, tmp_path):
  """Files have more than a state dict, a view larger than the file, or tensors of other kinds."""
  torch = pytest.importorskip('torch')
  small = {k: torch.from_numpy(np.array(v)) for k, v in random_state(10).items()}
  for content, words in (
    ({'conv1.weight': torch.zeros(1).expand(2**20, 2**12)}, 'tensors of 17,179,869,184 bytes'),
    (small | {'bn1.bias': torch.zeros(4, dtype=torch.int8)}, 'not of floating point: bn1.bias'),
    (
      small | {'bn1.bias': torch.zeros(4, dtype=torch.complex64)},
      'not of floating point: bn1.bias',
    ),
    (small | {'bn1.bias': torch.zeros(4).to_sparse()}, 'more than a state dict'),
    (small | {'bn1.bias': torch.full((4,), 1e308, dtype=torch.float64)}, 'not finite: bn1.bias'),
    ([1, 2], 'none of its 0 tensors'),
  ):
    torch.save(content, tmp_path / 'x.pth')
    assert words in imported(tmp_path / 'x.pth'), words
