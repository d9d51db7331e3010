"""How far is a model that knows something from what it was, in codes? KL on text, of the demo's
model, against the bounds that docs/compress.md tells of.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Nats a token, by scheme and method.
BOUNDS = {
  ('int8', 'rtn'): 1e-4,
  ('fp8', ''): 1e-3,  # as it is where nobody says a method
  ('fp8', 'gptq'): 1e-3,
  ('int4:group=32', 'gptq'): 0.02,
}
# A process of its own: tests have eight devices, and programs that are not optimised.
CODE = """
import sys
from tests.compression.test_bounds_of_the_demo import everything
everything(sys.argv[1])
"""


def everything(directory: str) -> None:
  import train
  from configs import demo

  run = pathlib.Path(directory) / 'run'
  if not run.exists():
    train.run(demo.get_config(), run)
  smaller(run, directory)


def smaller(run, directory) -> None:
  """The run in codes of all kinds, each judged."""
  import convert

  for scheme, method in BOUNDS:
    to = f'{directory}/{scheme.partition(":")[0]}-{method}'
    convert.main(
      ['quantise', f'--workdir={run}', f'--to={to}', f'--scheme={scheme}', f'--method={method}']
    )
    convert.main(['judge', str(run), to, '--limit=16'])


@pytest.mark.slow
@pytest.mark.long
def test_kl_is_within_its_bounds(tmp_path):
  environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  command = [sys.executable, '-c', CODE, str(tmp_path)]
  subprocess.run(command, cwd=ROOT, env=environment | {'JAX_PLATFORMS': 'cpu'}, check=True)
  for (scheme, method), bound in BOUNDS.items():
    path = tmp_path / f'{scheme.partition(":")[0]}-{method}' / 'judged.json'
    assert json.loads(path.read_text())['figures']['KL, nats a token']['value'] <= bound, scheme
