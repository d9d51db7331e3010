"""Does the notebook run, from its first cell to its last, as it would in Colab?"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import jax  # noqa: F401 - that it is there is what a test is about
import pytest

from notebooks import colab

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / 'notebooks' / 'generate.ipynb'
EXERCISE = NOTEBOOK.with_name('flan_t5_exercise.ipynb')  # tests/evaluation/test_exercise.py runs it


def cells(notebook=NOTEBOOK):
  return json.loads(notebook.read_text())['cells']


@pytest.mark.parametrize('notebook', [NOTEBOOK, EXERCISE], ids=lambda path: path.stem)
def test_it_is_kept_without_outputs(notebook):
  kept = cells(notebook)
  assert all(not cell.get('outputs') and cell.get('execution_count') is None for cell in kept)


def test_notebooks_fetch_the_code_in_the_same_way():
  other = ''.join(next(cell for cell in cells(EXERCISE) if cell['cell_type'] == 'code')['source'])
  lines = [line for line in other.splitlines() if 'metrics' not in line]
  assert lines == first_cell().splitlines()


def first_cell():
  return ''.join(next(cell for cell in cells() if cell['cell_type'] == 'code')['source'])


@pytest.fixture
def in_colab(tmp_path, monkeypatch):
  """(what the form says, files to upload) -> runs the first cell as in Colab; commands that ran."""
  ran, uploaded = [], []
  package, files = types.ModuleType('google.colab'), types.ModuleType('google.colab.files')
  files.upload = lambda: dict.fromkeys(uploaded, b'')
  package.files = files
  monkeypatch.setitem(sys.modules, 'google', types.ModuleType('google'))
  monkeypatch.setitem(sys.modules, 'google.colab', package)
  monkeypatch.setattr(sys, 'path', [*sys.path])
  monkeypatch.setattr(colab, 'commands', lambda: [['install', 'all']])
  monkeypatch.setattr(colab, 'check', lambda: ran.append('checked'))
  monkeypatch.delitem(sys.modules, 'jax')
  monkeypatch.chdir(tmp_path)

  def run(command, check):
    ran.append(command[1:])
    if command[0] == 'git':
      (tmp_path / command[-1]).mkdir()
      (tmp_path / command[-1] / 'generate.py').touch()

  monkeypatch.setattr(subprocess, 'run', run)

  def start(said='', upload=()):
    uploaded[:] = upload
    source = first_cell()
    assert source.count("SOURCE = ''") == 1
    exec(source.replace("SOURCE = ''", f'SOURCE = {said!r}'), {})
    assert sys.path[0] == os.getcwd()
    return ran

  return start


INSTALLED = [['-m', 'pip', 'install', 'all'], 'checked']


def test_colab_clones_what_the_form_says(in_colab, tmp_path):
  for _ in range(2):  # to run the cell again clones nothing into the clone
    ran = in_colab('somewhere.git')
    assert pathlib.Path.cwd() == tmp_path / 'tandem'
  assert ran == [['clone', '--depth=1', 'somewhere.git', 'tandem'], *INSTALLED * 2]


@pytest.mark.parametrize('how', ['folder', 'archive', 'upload'])
def test_colab_takes_a_folder_or_an_archive(in_colab, tmp_path, how):
  code = tmp_path / 'from' / 'tandem-1.0'
  code.mkdir(parents=True)
  (code / 'generate.py').touch()
  shutil.make_archive(str(tmp_path / 'code'), 'zip', tmp_path / 'from')
  if how == 'folder':
    assert in_colab(str(code)) == INSTALLED and pathlib.Path.cwd() == code
    return
  ran = in_colab('', ['code.zip']) if how == 'upload' else in_colab('code.zip')
  assert ran == INSTALLED and pathlib.Path.cwd() == tmp_path / 'tandem' / 'tandem-1.0'


def test_colab_says_where_the_code_is_to_come_from(in_colab):
  with pytest.raises(ValueError, match='there is no code yet: write into SOURCE'):
    in_colab()


def runtime(monkeypatch, tpu=False, cuda=0, jax_says=('cpu', 'cpu')):
  """As if the machine had these, and jax found that."""
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  monkeypatch.setattr(colab.pathlib.Path, 'exists', lambda _: tpu)
  monkeypatch.setattr(colab, '_cuda', lambda: cuda)
  said = f'a warning\n{json.dumps([list(jax_says), "0.10.2"])}\n'
  answer = types.SimpleNamespace(returncode=0, stdout=said, stderr='no plugin for this jaxlib')
  monkeypatch.setattr(subprocess, 'run', lambda *_, **__: answer)


@pytest.mark.parametrize(
  'has, kind, installed',
  [
    ({}, 'cpu', [['install', '-q', '-e', '.[constrain]']]),
    ({'tpu': True}, 'tpu', [['install', '-q', '-e', '.[constrain,tpu]']]),
    (
      {'cuda': 12},
      'gpu',
      [
        ['uninstall', '-q', '-y', 'jax-cuda13-plugin', 'jax-cuda13-pjrt'],
        ['install', '-q', '--upgrade', '-e', '.[constrain]', 'jax[cuda12]'],
      ],
    ),
    (
      {'cuda': 13},
      'gpu',
      [
        ['uninstall', '-q', '-y', 'jax-cuda12-plugin', 'jax-cuda12-pjrt'],
        ['install', '-q', '--upgrade', '-e', '.[constrain]', 'jax[cuda13]'],
      ],
    ),
  ],
)
def test_what_is_installed_is_of_the_accelerator(has, kind, installed, monkeypatch):
  runtime(monkeypatch, **has)
  assert (colab.accelerator(), colab.commands()) == (kind, installed)


def test_an_accelerator_that_is_not_used_stops_the_notebook(monkeypatch, capsys):
  for has, says in (
    ({}, ('cpu', 'cpu')),
    ({'cuda': 12}, ('gpu', 'Tesla T4')),
    ({'tpu': True}, ('tpu', 'TPU v5 lite')),
  ):
    runtime(monkeypatch, **has, jax_says=says)
    assert colab.check() == says[0]
    assert f'jax 0.10.2: 1 x {says[1]} ({says[0]})' in capsys.readouterr().out
  for has, name in (({'cuda': 12}, 'GPU'), ({'tpu': True}, 'TPU')):
    runtime(monkeypatch, **has)
    with pytest.raises(
      RuntimeError, match=f'has a {name}, and jax 0.10.2 uses the CPU: choose Run'
    ):
      colab.check()


def test_a_jax_that_was_there_before_is_not_gone_on_with(monkeypatch):
  runtime(monkeypatch)
  with pytest.raises(RuntimeError, match='jax was imported before.*Restart session'):
    colab.install()


@pytest.mark.slow
@pytest.mark.long
def test_it_runs_headless(tmp_path):
  import nbclient
  import nbformat

  notebook = nbformat.read(NOTEBOOK, as_version=4)
  (chosen,) = (cell for cell in notebook.cells if 'parameters' in cell.metadata.get('tags', []))
  chosen.source = f'WORKDIR, STEPS = {str(tmp_path / "run")!r}, 30'
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  nbclient.NotebookClient(
    notebook, timeout=900, resources={'metadata': {'path': str(ROOT / 'notebooks')}}
  ).execute(env=environment)
  printed = [
    ''.join(output.get('text', '') for output in cell.outputs if output.output_type == 'stream')
    for cell in notebook.cells
    if cell.cell_type == 'code'
  ]
  assert any('drafted tokens kept' in text for text in printed) and any(
    'taken back' in text for text in printed
  )
  assert any(
    output.output_type == 'display_data' and 'image/png' in output.data
    for cell in notebook.cells
    if cell.cell_type == 'code'
    for output in cell.outputs
  ), 'the plot'
