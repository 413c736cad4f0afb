"""Print what benchmarks/gpu/cifar10.sh has so far: progress, images/s, memory and accuracies, a line an arm."""
import json
import pathlib
import sys


def line(run: pathlib.Path) -> str:
  """One arm's figures; what is not there yet is said."""
  if not (run / 'metrics.jsonl').exists():
    return f'{run.name}: not started'
  rows = [json.loads(row) for row in (run / 'metrics.jsonl').read_text().splitlines()]
  speeds = sorted(row['images_per_s'] for row in rows)
  words = [f'{run.name}: step {rows[-1]["step"]}, epoch {rows[-1]["epoch"]:.1f}, loss {rows[-1]["loss"]:.4f}',
           f'{speeds[len(speeds) // 2]:.0f} images/s (median)']
  if rows[-1].get('memory_gib') is not None:
    words.append(f'{rows[-1]["memory_gib"]:.2f} GiB')
  for path in sorted((run / 'eval').glob('*.json')):
    result = json.loads(path.read_text())
    if 'trained' in result:
      words.append(f'{result["protocol"]} {100 * result["trained"]["top1"]:.2f} % '
                   f'(untrained {100 * result["untrained"]["top1"]:.2f})')
    else:
      gain = result['actions']['all']['trained']['over_shuffled']
      words.append(f'gain over shuffled actions {gain["mean"]:.4f} [{gain["low"]:.4f}, {gain["high"]:.4f}]')
  return ', '.join(words)


if __name__ == '__main__':
  out, *arms = sys.argv[1:]
  for arm in arms:
    print(line(pathlib.Path(out, arm)))
  environments = sorted(pathlib.Path(out).glob('*/env.json'))
  if environments:
    about = json.loads(environments[0].read_text())
    print(json.dumps({k: about[k] for k in about if k not in ('xla_flags',)}))
