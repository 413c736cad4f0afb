"""The suite runs on 8 host devices, with warnings as errors and no silent promotion of dtype or rank."""
import os
import pathlib

# Compile cost dominates the suite: LLVM's optimization is off (speed is measured in benchmarks/, not here).
# Eight devices on two busy cores may wait long for each other: by default XLA ends the process after 40 s.
os.environ['XLA_FLAGS'] = (os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=0'
                           ' --xla_cpu_collective_call_terminate_timeout_seconds=600')

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_compilation_cache_dir', os.environ.get(
    'EQSSL_TEST_CACHE', str(pathlib.Path(__file__).parent.parent / '.cache' / 'xla-tests')))
jax.config.update('jax_persistent_cache_min_compile_time_secs', .3)


@pytest.fixture
def key():
  return jax.random.key(0)
