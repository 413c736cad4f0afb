"""Print what benchmarks/gpu/cifar10.sh has so far: progress, images/s, memory and accuracies, a line an arm."""
import json
import pathlib
import statistics
import sys

from equivariant_ssl import record


def line(run: pathlib.Path) -> str:
  """One arm's figures; what is not there yet is said."""
  rows = record.read_metrics(run)
  if not rows:
    return f'{run.name}: no step logged yet'
  speed = statistics.median(row['images_per_s'] for row in rows)
  memory = max((row['memory_gib'] for row in rows if 'memory_gib' in row), default=None)
  words = [f'{run.name}: step {rows[-1]["step"]}, epoch {rows[-1]["epoch"]:.1f}, loss {rows[-1]["loss"]:.4f}',
           f'{speed:.0f} images/s (median)',
           'device memory not reported (CPU)' if memory is None else f'{memory:.2f} GiB of device memory (peak)']
  results = [json.loads(path.read_text()) for path in sorted((run / 'eval').glob('*.json'))]
  for result in results:
    trained, untrained = result['trained'][0], result['untrained'][0]
    if 'top1' in trained['numbers']:
      words.append(f'{trained["name"]} {100 * trained["numbers"]["top1"]:.2f} % '
                   f'(untrained {100 * untrained["numbers"]["top1"]:.2f})')
    elif result['protocol'] == 'gains':
      gain = next(iter(trained['detail'].values()))['over_shuffled']
      words.append(f'gain over shuffled actions {gain["mean"]:.4f} [{gain["low"]:.4f}, {gain["high"]:.4f}]')
  return ', '.join(words if results else [*words, 'not evaluated yet'])


if __name__ == '__main__':
  out, *arms = sys.argv[1:]
  environments = sorted(pathlib.Path(out).glob('*/env.json'))
  if environments:
    about = json.loads(environments[0].read_text())
    print(json.dumps({k: v for k, v in about.items() if k not in ('xla_flags', 'earlier')}))
  for arm in arms:
    print(line(pathlib.Path(out, arm)))
