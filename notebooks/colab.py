"""Which accelerator has this runtime, what makes JAX use it, and does it?

For the first cell of the notebooks, which has fetched the code by then. Nothing here imports jax:
what the notebook's own process has loaded it keeps, and an accelerator that it holds is no other
process's.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

RESTART = 'choose Runtime > Restart session, and run this cell again'
ASK = (
  'import jax, json; print(json.dumps([[d.platform, d.device_kind] for d in jax.devices()] '
  '+ [jax.__version__]))'
)


def accelerator() -> str:
  """'tpu', 'gpu' or 'cpu': what the machine has, whether or not anything can use it yet."""
  if os.environ.get('JAX_PLATFORMS') == 'cpu':  # asked for
    return 'cpu'
  if any(pathlib.Path(path).exists() for path in ('/dev/accel0', '/dev/vfio/0')):
    return 'tpu'
  return 'gpu' if _cuda() else 'cpu'


def install() -> None:
  """Installs the project with the JAX of this runtime's accelerator, all parts of one version: a
  jaxlib beside a CUDA plugin of another falls back to the CPU, with no more than a warning.
  """
  for command in commands():
    subprocess.run([sys.executable, '-m', 'pip', *command], check=True)
  if 'jax' in sys.modules:
    raise RuntimeError(f'jax was imported before it was installed anew: {RESTART}')


def commands() -> list[list[str]]:
  """Of pip, in order."""
  kind = accelerator()
  if kind == 'tpu':
    return [['install', '-q', '-e', '.[constrain,tpu]']]
  if kind == 'cpu':
    return [['install', '-q', '-e', '.[constrain]']]
  # Plugins for another CUDA than the driver's are found, and fail.
  cuda, other = ('cuda13', 'cuda12') if _cuda() >= 13 else ('cuda12', 'cuda13')
  stale = [f'jax-{other}-{part}' for part in ('plugin', 'pjrt')]
  return [
    ['uninstall', '-q', '-y', *stale],
    ['install', '-q', '--upgrade', '-e', '.[constrain]', f'jax[{cuda}]'],
  ]


def check() -> str:
  """Prints the devices that JAX finds, and returns their platform. Raises RuntimeError where the
  accelerator is not among them.
  """
  asked = subprocess.run([sys.executable, '-c', ASK], capture_output=True, text=True)
  if asked.returncode:
    raise RuntimeError(f'jax does not start here: {asked.stderr.strip()[-500:]}')
  *devices, version = json.loads(asked.stdout.splitlines()[-1])
  wanted, platform = accelerator(), devices[0][0]
  print(f'jax {version}: {len(devices)} x {devices[0][1]} ({platform})')
  if {'cuda': 'gpu'}.get(platform, platform) != wanted:
    raise RuntimeError(
      f'this runtime has a {wanted.upper()}, and jax {version} uses the {platform.upper()}: '
      f'{RESTART}; if that does not help, choose another type under Runtime > Change runtime type. '
      f'What jax says: {asked.stderr.strip()[-300:] or "nothing"}'
    )
  return wanted


def _cuda() -> int:
  """The newest CUDA that the driver runs; 0 where there is no GPU."""
  tool = shutil.which('nvidia-smi')
  if tool is None:
    return 0
  asked = subprocess.run([tool], capture_output=True, text=True)
  version = re.search(r'CUDA Version: (\d+)', asked.stdout)
  return int(version[1]) if asked.returncode == 0 and version else 0
