"""What the calls do, in order: `measure` is call 1, `experiment` calls 2 and 3. Exit codes as lease.py says."""
import os

import budget
import carried
import sizes

DATA = 35.   # seconds to prepare CIFAR-10 (24 + 11 measured on 2 busy cores), the programs compiled meanwhile
AFTER = 32.  # seconds kept after a training: to stop it, which saves, and to write its encoder
TRITON = '--xla_gpu_enable_triton_gemm=false'  # for a product that has no Triton tiling (design/accelerators.md)


def measure(lease) -> int:
  """Measure versions and device, one step against the CPU, the speed of three methods, a second start, PyTorch, and XLA
  flags."""
  size = sizes.SIZES[lease.size]
  device = lease.part('device', 'device', {}, 10, 60)
  if size.accelerator and device.get('platform') != 'gpu':
    lease.say(f'jax finds no GPU here ({device.get("platform", "no device at all: see log.txt")}): nothing was measured')
    return 4
  lease.part('step against the CPU', 'agree', {}, 30, 100)
  if not lease.result_of('step against the CPU'):
    lease.part('step against the CPU, without Triton', 'agree', {}, 30, 100, TRITON)
    if lease.result_of('step against the CPU, without Triton'):
      lease.results['flags'] = TRITON  # what fails there may fail in every part
  for config in sizes.FOUNDING:
    lease.part(f'speed {config}', 'speed', {'config': config}, 30, 100)
  lease.part('second start', 'speed', {'config': sizes.FOUNDING[-1], 'profile': False, 'share': .1}, 20, 60)
  lease.part('PyTorch', 'pytorch', {}, 40, 130)
  together(lease)
  for line in summary_lines(lease.results['parts']):
    lease.say(line)
  return 0 if 'epoch_s' in lease.known('speed ' + sizes.FOUNDING[-1]) else 4


def together(lease) -> None:
  """Time each of sizes.FLAGS for the step with EquiMod, and keep the best for the trainings; then the speed of the other
  sizes.SPEEDS. All are compiled at once, and then timed one after the other."""
  before = lease.results.get('flags', '')
  lock = {'lock': str(lease.store / 'lock')}
  for config in sizes.SPEEDS[len(sizes.FOUNDING):]:
    lease.start(f'speed {config}', 'speed', {'config': config, **lock}, 30, 130)
  for name, flag in {'none': '', **sizes.FLAGS}.items():  # the step without a flag is timed among them
    given = {'config': sizes.FOUNDING[-1], 'profile': False, **lock}
    lease.start(f'flags {name}', 'speed', given, 30, 130, f'{before} {flag}'.strip())
  for key in list(lease.running):
    lease.finish(key)
  base = lease.known('flags none')
  if 'loss' not in base or len(base.get('images_per_s', ())) < 3:
    return
  speeds = lease.known('speed ' + sizes.FOUNDING[-1]).get('images_per_s', [])
  # It is timed before them too: the noise between the two timings counts.
  base = {**base, 'images_per_s': base['images_per_s'] + speeds}
  tried = {name: lease.known(f'flags {name}') for name in sizes.FLAGS}
  best = budget.best(base, tried)
  if best and sizes.FLAGS[best] not in before:
    lease.results['flags'] = f'{before} {sizes.FLAGS[best]}'.strip()
  lease.results['best_flags'] = {'name': best, 'tried': sum(bool(f) for f in tried.values())}
  lease.write()


def summary_lines(parts: dict) -> list[str]:
  """The main numbers of call 1, one on each line, for the end of the output, which the reply carries."""
  lines = []
  for key, part in parts.items():
    found = part.get('found', {})
    if 'ms_per_step' in found:
      memory = f', {found["memory_gib"]:.2f} GiB' if 'memory_gib' in found else ''
      lines.append(f'{key}: {budget.middle(found["images_per_s"]):.0f} images/s, {found["ms_per_step"]:.2f} ms a step, '
                   f'compiled in {found["compile_s"]:.1f} s, first step after {found["start_s"]:.1f} s{memory}')
    if 'gradient_error' in found:
      lines.append(f'{key}: loss {found["loss_error"]:.1e}, gradient {found["gradient_error"]:.1e}: '
                   f'{"passed" if found["passed"] else "FAILED"}')
    lines += [f'{name}: {speed:.0f} images/s' for name, speed in found.get('median', {}).items()]
  return lines


def imagenet(lease) -> int:
  """Measure the step of ImageNet's config at 224 pixels, the share of one device of eight, with and without
  recomputation."""
  os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION'] = '.9'  # 58.8 GiB by the compiler; nothing runs beside it
  config = 'imagenet_simclr_equimod'
  for name, more in sizes.IMAGENET.items():
    lease.part(f'speed {config} {name}', 'speed', {'config': config, 'more': more}, 40, 200)
  for line in summary_lines({k: p for k, p in lease.results['parts'].items() if 'imagenet' in k}):
    lease.say(line)
  return 0


def resume(lease) -> int:
  """Measure whether steps are bitwise the same twice, and after their state was on the host; also with deterministic
  kernels."""
  for name, flag in (('', None), (', deterministic kernels', '--xla_gpu_deterministic_ops=true')):
    found = lease.part(f'bitwise{name}', 'bitwise', {'config': sizes.FOUNDING[-1]}, 30, 100, flag)
    lease.say(f'bitwise{name}: {found}')
  return 0


# -- the founding experiment

def plan(lease, seed: int) -> dict | None:
  """{epochs, enough} for a seed: as decided before, else what fits now. None where not even one epoch fits, or where the
  speed of the arms is not known and could not be measured."""
  plans = lease.plans()
  if str(seed) in plans:
    return plans[str(seed)]
  quick = {'profile': False, 'share': .3}
  for arm in lease.arms:
    if 'epoch_s' not in lease.known(f'speed {arm.label}'):
      lease.part(f'speed {arm.label}', 'speed', {'config': arm.config, 'more': arm.changed, **quick}, 30, 100)
  speeds = [lease.known(f'speed {arm.label}') for arm in lease.arms]
  if not all('epoch_s' in s for s in speeds):
    lease.say('the speed of the arms is not known (their parts failed): no training')
    return None
  start = lease.result_of('second start').get('start_s') or max(s['start_s'] for s in speeds)
  needs = budget.Needs(tuple(s['epoch_s'] for s in speeds), start)
  left = lease.left() - (0. if lease.result_of('data') else DATA)
  epochs = lease.epochs or budget.epochs(needs, left, next((p['epochs'] for p in plans.values()), sizes.MOST))
  if not epochs:
    lease.say(f'{lease.left():.0f} s are left: not one epoch of every arm fits')
    return None
  plans[str(seed)] = {'epochs': epochs, 'enough': epochs >= sizes.LEAST, 'epoch_s': needs.epoch, 'start_s': start,
                      'fixed_s': budget.fixed(needs, left), 'left_s': left}
  lease.say(f'seed {seed}: {epochs} epochs of each arm {"as asked" if lease.epochs else "fit"} '
            f'({sum(needs.epoch):.2f} s for one of each)'
            + ('' if epochs >= sizes.LEAST else f': FEWER than the {sizes.LEAST} that the experiment should have'))
  lease.write()
  return plans[str(seed)]


def ready(lease, seed: int, epochs: int) -> bool:
  """Prepare the data while the programs of the arms are compiled, and return whether there are data."""
  for arm in lease.arms:
    lease.start(f'programs {arm.label} s{seed}', 'programs', {'arm': arm, 'epochs': epochs, 'seed': seed}, 20, 150)
  lease.part('data', 'data', {}, 20, 150)
  for arm in lease.arms:
    lease.finish(f'programs {arm.label} s{seed}')
  return bool(lease.result_of('data'))


def unfinished(lease, seed: int) -> bool:
  """Whether an arm of a seed is not trained, or its encoder is not written."""
  return not all(lease.result_of(f'{what} {arm.label} s{seed}') for what in ('train', 'bring') for arm in lease.arms)


def experiment(lease) -> int:
  """Train the arms of the first seed that is not done, and then what else fits for the seeds that are."""
  if carried.missing(lease.store):
    return 3  # lease.py says of what, and which call brings it; half of CIFAR-10 is not the experiment
  seed, code = next(s for s in range(lease.seed, 1000) if unfinished(lease, s)), 0
  for done in range(lease.seed, seed):
    evaluate(lease, done, wait=False)
  decided = plan(lease, seed) if worth(lease, seed) else None
  if decided and ready(lease, seed, decided['epochs']):
    code = train(lease, seed, decided['epochs'])
  for s in range(lease.seed, seed + 1):
    evaluate(lease, s, wait=True)
  lease.deliver()
  for line in learned(lease):
    lease.say(line)
  return code


def worth(lease, seed: int) -> bool:
  """Whether a seed after the first would have the epochs of the first."""
  plans = lease.plans()
  if lease.epochs or not plans or str(seed) in plans:
    return True
  first = next(iter(plans.values()))
  fit = budget.epochs(budget.Needs(tuple(first['epoch_s']), first['start_s']), lease.left(), sizes.MOST)
  if fit < first['epochs']:
    lease.say(f'{lease.left():.0f} s are left: seed {seed} would have {fit} epochs, not {first["epochs"]} as the first: '
              'not begun')
  return fit >= first['epochs']


def train(lease, seed: int, epochs: int) -> int:
  """Train the arms. Bring each arm's encoder back as soon as it is there, and evaluate it beside the next training."""
  code = 0
  lease.part(f'untrained s{seed}', 'untrained', {'arm': lease.arms[0], 'epochs': epochs, 'seed': seed}, 20, 60)
  for arm in lease.arms:
    key, given = f'train {arm.label} s{seed}', {'arm': arm, 'epochs': epochs, 'seed': seed}
    if lease.start(key, 'train', given, 40, lease.left() - AFTER):
      evaluate(lease, seed, wait=False)
      if lease.finish(key) == 'failed' and lease.results.get('flags') and not lease.saved(arm.label, seed):
        lease.say(f'{arm.label}: once more without {lease.results["flags"]}')
        lease.part(key, 'train', given, 40, lease.left() - AFTER, '')
    whole = bool(lease.result_of(key))
    if whole or lease.saved(arm.label, seed):
      lease.part(f'bring {arm.label} s{seed}', 'bring', {'label': arm.label, 'seed': seed}, 4, 40)
      lease.deliver()
      if not whole:  # an encoder on its way: brought again when it is there
        lease.results['parts'][f'bring {arm.label} s{seed}']['state'] = 'of a cut training'
        lease.write()
    code = code if lease.result_of(f'bring {arm.label} s{seed}') else 4
  return code


def evaluate(lease, seed: int, wait: bool) -> None:
  """Evaluate the networks of a seed that are there by kNN and `cached`: begin beside a training, or (`wait`) begin and take
  the results. EquiMod's own linear protocol runs beside them where there is time for it."""
  trained = [arm.label for arm in lease.arms if lease.result_of(f'train {arm.label} s{seed}')]
  first = ['untrained'] if lease.result_of(f'untrained s{seed}') else []
  parts = [('probe', who, ['knn', 'cached'], 15) for who in first + trained]
  parts += [('linear', label, ['equimod'], 60) for label in trained] if wait else []
  keys = [f'{what} {who} s{seed}' for what, who, *_ in parts]
  for key, (_, who, protocols, least) in zip(keys, parts, strict=True):
    if key not in lease.running and not lease.result_of(key):
      lease.start(key, 'probe', {'label': who, 'seed': seed, 'protocols': protocols}, least, 400)
  for key in keys if wait else ():
    lease.finish(key)


def learned(lease) -> list[str]:
  """The accuracies, one line for each network."""
  lines = []
  for key, part in lease.results['parts'].items():
    for name, result in part.get('found', {}).items():
      if isinstance(result, dict) and 'trained' in result:
        top1 = result['trained'][0]['numbers'].get('top1')
        lines.append(f'{key}: {name} top-1 {100 * top1:.2f} % at step {result["checkpoint"]}')
  return lines
