"""Does the notebook run, from its first cell to its last, as it would in Colab?"""

import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / 'notebooks' / 'generate.ipynb'


def cells():
  return json.loads(NOTEBOOK.read_text())['cells']


def test_it_is_kept_without_outputs():
  assert all(not cell.get('outputs') and cell.get('execution_count') is None for cell in cells())


@pytest.mark.parametrize('address', ['', 'somewhere.git'])
def test_colab_clones_what_the_form_says_and_asks_for_it_where_it_is_empty(
  address, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [*sys.path])
  monkeypatch.setitem(sys.modules, 'google.colab', types.ModuleType('google.colab'))
  ran = []

  def run(command, check):
    ran.append(command[1:])
    if command[0] == 'git':
      (tmp_path / command[-1]).mkdir()
      (tmp_path / command[-1] / 'generate.py').touch()

  monkeypatch.setattr(subprocess, 'run', run)
  source = ''.join(next(cell for cell in cells() if cell['cell_type'] == 'code')['source'])
  assert source.count("REPOSITORY = ''") == 1
  source = source.replace("REPOSITORY = ''", f'REPOSITORY = {address!r}')
  if not address:
    with pytest.raises(ValueError, match='REPOSITORY is empty: write into it'):
      exec(source, {})
    assert not ran
    return
  for _ in range(2):  # to run the cell again clones nothing into the clone
    exec(source, {})
    assert pathlib.Path.cwd() == tmp_path / 'tandem' and sys.path[0] == str(tmp_path / 'tandem')
  assert ran == [
    ['clone', '--depth=1', address, 'tandem'],
    *[['-m', 'pip', 'install', '-q', '-e', '.[constrain]']] * 2,
  ]


@pytest.mark.slow
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
