"""Is what a run writes on its way what its parameters write, and does the run not notice?"""

import dataclasses

import jax
import pytest

from data.tokenizers import ByteTokenizer
from decode.generator import Generator
from model import transformer
from model.execution import ExecutionConfig
from model.params import named_leaves
from parallel.mesh import MeshConfig, make_mesh
from tests.training.conftest import assert_same, on, run_here, tiny
from training.config import Config, TrainConfig
from workdir import samples
from workdir.open import open_run

ASKED = {'sample_every': 2, 'sample_prompts': ('ab', 'The ')}
MESHES = (
  {'data': 2, 'fsdp': 2, 'tensor': 2},
  {'data': 8},
  {'data': 1, 'stage': 2, 'fsdp': 4},
  {'data': 1, 'context': 2, 'fsdp': 4},
)


def parameters(workdir):
  """Of the last checkpoint, by name."""
  return named_leaves(open_run(workdir, mesh=MeshConfig(data=1)).model)


def written(workdir):
  return [(sample.step, sample.prompt, sample.text) for sample in samples.read(workdir)]


@pytest.mark.slow
def test_a_sampler_writes_what_the_generator_would(tmp_path):
  """Of a model in hand, with the config that it trains with; the file has it, too."""
  config = tiny(train=ASKED, model={'execution': ExecutionConfig(remat='full')})
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  tokenizer = ByteTokenizer()
  with jax.set_mesh(mesh):
    model = transformer.init(config.model, 0)
    sampler = samples.Sampler(config, tokenizer, mesh, tmp_path, 0)
    shown = sampler(4, {'policy': model})
  completions = Generator(model, tokenizer, mesh)(['ab', 'The '], **samples.OPTIONS)
  texts = [completion.text for completion in completions]
  assert written(tmp_path) == [(4, 'ab', texts[0]), (4, 'The ', texts[1])]
  assert shown == '\n\n'.join(map(samples.fenced, (f'ab{texts[0]}', f'The {texts[1]}')))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('mesh', MESHES, ids=str)
def test_samples_are_those_of_the_parameters(corpus, tmp_path, mesh):
  config = on(corpus, train=ASKED | {'steps': 3}, mesh=mesh)
  run_here(config, tmp_path / 'run')
  assert [step for step, *_ in written(tmp_path / 'run')] == [2, 2, 3, 3]
  generator = Generator.load(tmp_path / 'run', mesh=MeshConfig(**mesh))
  texts = [completion.text for completion in generator(['ab', 'The '], **samples.OPTIONS)]
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
