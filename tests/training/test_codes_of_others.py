"""Is a checkpoint of others in codes, once it is imported, a run like others in codes?"""

import dataclasses
import shutil

import numpy as np
import pytest

import convert
from decode.generator import Generator
from model.adaptation import AdapterConfig
from model.params import named_leaves
from tests import quantised_files as files
from tests.goldens import ours
from tests.training.conftest import on, run_here
from workdir.open import open_run

TEXTS = ['some words', 'other ones']


@pytest.fixture(scope='module')
def runs(two_steps, tmp_path_factory):
  """A checkpoint by GPTQ of a run that was trained: hf/, codes/; and what import makes of it:
  numbers/, kept/.
  """
  directory = tmp_path_factory.mktemp('others')
  shutil.copytree(two_steps, directory / 'run')
  convert.main(['export', '--workdir', f'{directory}/run', '--to', f'{directory}/hf'])
  files.in_codes(directory / 'hf', directory / 'codes', files.gptq(4, 16, symmetric=False))
  source = ['import', '--vocabulary_multiple=1', '--from', f'{directory}/codes', '--workdir']
  convert.main([*source, f'{directory}/kept'])
  convert.main([*source, f'{directory}/numbers', '--dequantise'])
  return directory


def scores(run):
  return Generator.load(run).score(TEXTS)


def alike(a, b, atol=1e-5):
  for one, other in zip(a, b, strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.long
def test_it_is_asked_judged_adapted_merged_and_exported(corpus, runs, tmp_path, capsys):
  config = open_run(runs / 'kept').config
  assert config.model.execution.stored == ('*=int4:group=16:asymmetric',)
  assert not open_run(runs / 'numbers').config.model.execution.stored
  alike(scores(runs / 'kept'), scores(runs / 'numbers'))

  (tmp_path / 'text').write_text('some words of a text\n' * 40)
  convert.main(['judge', f'{runs}/numbers', f'{runs}/kept', f'--text={tmp_path}/text', '--limit=4'])
  assert 'same likeliest token        1.000' in capsys.readouterr().out

  config = dataclasses.replace(
    on(corpus, train={'steps': 3, 'save_every': 2}),
    model=config.model,
    adapter=AdapterConfig(kind='lora', rank=2, alpha=64.0),
    init=str(runs / 'kept'),
  )
  before = {n: np.asarray(x) for n, x in named_leaves(open_run(runs / 'kept').model).items()}
  run_here(config, tmp_path / 'lora')
  after = named_leaves(open_run(runs / 'kept').model)
  assert all((np.asarray(after[name]) == x).all() for name, x in before.items())
  convert.main(
    ['merge', '--workdir', f'{tmp_path}/lora', '--to', f'{tmp_path}/merged', '--dequantise']
  )
  alike(scores(tmp_path / 'lora'), scores(tmp_path / 'merged'), 1e-3)

  convert.main(['export', '--workdir', f'{runs}/kept', '--to', f'{tmp_path}/out'])
  expected, found = ours.tensors(runs / 'hf'), ours.tensors(tmp_path / 'out')
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(found[name], x, err_msg=name)
