"""What do all tests share? Eight virtual CPU devices, strict shapes,
exact products, checked annotations.
"""

import gc
import importlib.metadata
import os

# A trace is a million small objects, most of which stay: to look through them for circles as often
# as Python does is a seventh of the suite, and to write each operation's stack into its program
# a twelfth. (Commands that tests start have the latter from the environment, too.)
gc.set_threshold(200_000, 50, 50)
os.environ.setdefault('JAX_TRACEBACK_IN_LOCATIONS_LIMIT', '0')

os.environ['JAX_PLATFORMS'] = 'cpu'
# A collective blocks a thread of XLA's pool for every device; with as many threads as devices,
# programs that follow one another can wait for each other's threads until XLA aborts the process.
os.environ.setdefault('NPROC', '32')
# Most of a test's time is the compiler's: without LLVM's optimizations the suite takes a third
# less, and with XLA's older way to emit fusions, which jaxlib 0.11 no longer has, programs take
# another fifth less. A tenth of what is left goes into cutting each of them into 32 modules, which
# many cores would compile at once, and a twentieth into passes of LLVM that level 0 leaves on.
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + (
  ' --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
  ' --xla_llvm_disable_expensive_passes=true'
)
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  os.environ['XLA_FLAGS'] += (
    ' --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
  )

import hypothesis
import jax
import jaxtyping

# Before the packages are imported: their jaxtyping annotations are checked at run time.
jaxtyping.install_import_hook(
  [
    'model',
    'kernels',
    'objectives',
    'decode',
    'evaluation',
    'training.precision',
    'training.adam8bit',
    'training.gradients',
  ],
  'beartype.beartype',
)

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_default_matmul_precision', 'highest')

# The machine may be busy: an example that takes long is no failure.
hypothesis.settings.register_profile('tandem', deadline=None)
hypothesis.settings.load_profile('tandem')

import pathlib

import pytest

from parallel.mesh import MeshConfig, make_mesh
from tests.thinned import rest_long

ORACLES = pathlib.Path(__file__).parent / 'oracle'
SHARED_DATA = pathlib.Path(__file__).parents[2] / 'shared' / 'data'


def pytest_ignore_collect(collection_path, config):
  """To import torch and transformers takes ten seconds: not for tests that are left out."""
  return True if collection_path == ORACLES and 'not oracle' in config.option.markexpr else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
  """Tests of real models run where they are asked for, `-m real`: whatever else is, they need
  packages of a hundred MB. All others are marked before -m chooses among them.
  """
  rest_long(items)
  if 'real' not in config.getoption('markexpr'):
    real = [item for item in items if item.get_closest_marker('real')]
    config.hook.pytest_deselected(items=real)
    items[:] = [item for item in items if item not in real]


@pytest.fixture(scope='module', autouse=True)
def few_programs():
  """Programs are forgotten before they are so many that the process dies: Linux grants it 65,530
  memory maps, and a program takes several.
  """
  yield
  maps = pathlib.Path('/proc/self/maps')
  if maps.exists() and maps.read_bytes().count(b'\n') > 30_000:
    jax.clear_caches()


@pytest.fixture
def one_device():
  """A mesh of one device, in context."""
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    yield mesh


@pytest.fixture(scope='session')
def shared_data():
  """Real text beside the checkout; tests that use it are skipped where it is not there."""
  if not SHARED_DATA.is_dir():
    pytest.skip(f'{SHARED_DATA} is not there')
  return SHARED_DATA


@pytest.fixture(scope='session')
def topology():
  """Devices to compile for by a topology's name;
  the test is skipped, and says so, where there is no compiler for them.
  """
  from analysis import aot

  def devices_of(name):
    try:
      return aot.topology(name)
    except ImportError as error:
      pytest.skip(f'{name} cannot be compiled for: {error}')

  return devices_of
