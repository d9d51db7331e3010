"""Is what a run writes on its way what its parameters write, and does the run not notice?"""

import dataclasses

import jax
import pytest
from conftest import assert_same, on, run_here

from data.tokenizers import ByteTokenizer
from decode.generator import Generator
from model.params import named_leaves
from parallel.mesh import MeshConfig, make_mesh
from training.config import Config, TrainConfig
from workdir import samples
from workdir.open import open_run

ASKED = {'sample_every': 2, 'sample_prompts': ('ab', 'The '), 'sample_tokens': 5}
MESHES = (
  {'data': 2, 'fsdp': 2, 'tensor': 2},
  pytest.param({'data': 8}, marks=pytest.mark.slow),
  pytest.param({'data': 1, 'stage': 2, 'fsdp': 4}, marks=pytest.mark.slow),
  pytest.param({'data': 1, 'context': 2, 'fsdp': 4}, marks=pytest.mark.slow),
)


def parameters(workdir):
  """Of the last checkpoint, by name."""
  return named_leaves(open_run(workdir, mesh=MeshConfig(data=1)).model)


def written(workdir):
  return [(sample.step, sample.prompt, sample.text) for sample in samples.read(workdir)]


@pytest.mark.parametrize('mesh', MESHES, ids=str)
def test_samples_are_those_of_the_parameters(corpus, tmp_path, mesh):
  config = on(corpus, train=ASKED | {'steps': 3}, mesh=mesh)
  run_here(config, tmp_path / 'run')
  assert [step for step, *_ in written(tmp_path / 'run')] == [2, 2, 3, 3]
  options = {'max_new_tokens': 5, 'temperature': config.train.sample_temperature, 'seed': 0}
  generator = Generator.load(tmp_path / 'run', mesh=MeshConfig(**mesh))
  texts = [completion.text for completion in generator(['ab', 'The '], **options)]
  assert [text for step, _, text in written(tmp_path / 'run') if step == 3] == texts
  report = (tmp_path / 'run' / 'report.md').read_text()
  assert 'Step 3:' in report and f'The {texts[1]}' in report


@pytest.mark.slow
def test_the_run_does_not_notice(corpus, tmp_path):
  config = on(corpus, train=ASKED | {'steps': 3})
  run_here(config, tmp_path / 'run')
  plain = dataclasses.replace(config, train=dataclasses.replace(config.train, sample_every=0))
  run_here(plain, tmp_path / 'plain')
  assert_same(*(parameters(tmp_path / name) for name in ('run', 'plain')))


@pytest.mark.slow
def test_a_resumed_run_has_each_sample_once(corpus, tmp_path):
  def run(steps, name):
    run_here(on(corpus, train=ASKED | {'steps': steps, 'save_every': 3}), tmp_path / name)
    return written(tmp_path / name)

  whole = run(6, 'whole')
  run(3, 'parts')
  path = tmp_path / 'parts' / samples.FILE
  # As if it had been killed further on, in the midst of a line.
  path.write_text(path.read_text() + samples._line(samples.Sample(4, 'ab', 'lost')) + '{"step": 5')
  again = run(6, 'parts')
  assert [sample for sample in again if sample[0] % 2 == 0] == whole
  assert [step for step, *_ in again] == [2, 2, 3, 3, 4, 4, 6, 6]


@pytest.mark.parametrize(
  'changes, error, words',
  [
    ({'model': {'causal': False}}, NotImplementedError, 'an encoder writes no text'),
    (
      {'train': {'offload_parameters': True}, 'model': {'remat': 'full'}},
      NotImplementedError,
      'train.offload_parameters, which keeps.*write with generate.py',
    ),
    ({'model': {'max_length': 4}}, ValueError, "'The ' is 5 tokens.*model.max_length=4; shorten"),
  ],
)
def test_what_cannot_be_sampled_is_refused_at_the_start(changes, error, words, tmp_path):
  model = Config().model
  fields = dict(changes.get('model', {}))
  if remat := fields.pop('remat', ''):
    model = model.with_execution(remat=remat)
  model = dataclasses.replace(model, vocabulary=264, **fields)
  train = TrainConfig(**ASKED | changes.get('train', {}))
  data = dataclasses.replace(Config().data, sequence_length=2)
  config = Config(model=model, train=train, data=data)
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  with pytest.raises(error, match=words):
    samples.Sampler(config, ByteTokenizer(), mesh, tmp_path, 0)


def test_prompts_are_needed():
  with pytest.raises(ValueError, match='train.sample_every=3 without train.sample_prompts'):
    TrainConfig(sample_every=3, sample_prompts=())
