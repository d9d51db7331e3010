"""Is what a wheel installs one package, which works from anywhere and says who has its names?"""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

import tandem

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
  """The directory that a wheel of the repository was unpacked into, as pip would."""
  directory = tmp_path_factory.mktemp('wheel')
  files = subprocess.run(
    ['git', 'ls-files', '--cached', '--others', '--exclude-standard', ':!tests', ':!docs'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.split('\n')
  for name in filter(None, files):
    if (ROOT / name).is_file():
      target = directory / 'source' / name
      target.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(ROOT / name, target)
  build = [sys.executable, 'setup.py', '-q', 'bdist_wheel', '--dist-dir', str(directory)]
  subprocess.run(build, cwd=directory / 'source', check=True, capture_output=True)
  with zipfile.ZipFile(next(directory.glob('*.whl'))) as wheel:
    wheel.extractall(directory / 'site')
  return directory / 'site'


def python(site, where, text: str):
  """Runs it in another directory, where a person keeps a `model.py` and a `files.py`."""
  for name in ('model', 'files', 'train'):
    (where / f'{name}.py').write_text("raise RuntimeError('the wrong one')\n")
  (where / 'script.py').write_text(text)
  environment = os.environ | {'PYTHONPATH': str(site), 'JAX_PLATFORMS': 'cpu'}
  return subprocess.run(
    [sys.executable, 'script.py'], cwd=where, env=environment, capture_output=True, text=True
  )


def test_only_one_name_lies_in_site_packages(installed):
  names = {path.name for path in installed.iterdir() if not path.name.endswith('.dist-info')}
  assert names == {'tandem'}
  # Each of its modules is claimed, or a person's own would be taken for it.
  inside = {path.stem for path in (installed / 'tandem').iterdir()} - {'__init__', 'scripts'}
  assert inside == set(tandem.NAMES)
  inside = ('configs/templates/sentiment.toml', 'kernels/tuning.json')
  for name in ('configs/demo.py', 'configs/models/gpt2.py', 'train.py', *inside):
    assert (installed / 'tandem' / name).exists() == (ROOT / name).exists(), name


def test_it_works_beside_modules_of_its_names(installed, tmp_path):
  done = python(
    installed,
    tmp_path,
    'import tandem\n'
    'from tandem import Generator, train\n'
    'import model.config\n'
    'print(tandem.__file__, model.config.__file__, Generator.__name__, train.__module__)\n',
  )
  assert done.returncode == 0, done.stderr
  where, config, *names = done.stdout.split()
  assert pathlib.Path(where).is_relative_to(installed)
  assert pathlib.Path(config).is_relative_to(installed) and names == ['Generator', 'train']


def test_a_module_that_has_its_name_already_is_named(installed, tmp_path):
  text = "import types, sys\nm = types.ModuleType('data')\nm.__file__ = '/there/data.py'\n"
  text += "sys.modules['data'] = m\nimport tandem\n"
  done = python(installed, tmp_path, text)
  assert "tandem needs the name 'data' for a module of its own, and /there/data.py" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('command', ['train', 'convert'])
def test_commands_are_installed(installed, tmp_path, command):
  entries = next(installed.glob('*.dist-info/entry_points.txt')).read_text()
  for name in ('train', 'generate', 'evaluate', 'plan', 'convert'):
    assert f'tandem-{name} = tandem.scripts:{name}' in entries
  text = f"import sys\nsys.argv = ['tandem-{command}', '--help']\n"
  done = python(installed, tmp_path, text + f'from tandem.scripts import {command}\n{command}()\n')
  assert '--workdir' in done.stdout + done.stderr, done.stderr
  assert done.returncode in (0, 1) and 'Traceback' not in done.stderr
