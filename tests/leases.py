"""The lease of a GPU for its tests: its folder of scripts on the path, and a load of files that are not CIFAR-10's."""
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
GPU = ROOT / 'benchmarks' / 'gpu'
sys.path.insert(0, str(GPU))

import budget  # noqa: E402, F401
import calls  # noqa: E402, F401
import carried  # noqa: E402
import encoders  # noqa: E402, F401
import experiment  # noqa: E402, F401
import lease  # noqa: E402, F401
import pack  # noqa: E402, F401
import rehearse  # noqa: E402, F401
import restore  # noqa: E402, F401
import sizes  # noqa: E402, F401


def fake_load(folder, call, **changed):
  (folder / 'whl').mkdir(parents=True)
  for name in (*carried.HALVES[call], 'unpack.py'):
    (folder / name).write_text(f'of {name}')
  listed = {f.name: carried.digest(f) for f in folder.iterdir() if f.is_file()}
  (folder / carried.LIST).write_text(json.dumps(listed | changed))
  return folder
