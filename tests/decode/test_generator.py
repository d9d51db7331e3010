"""Does the Generator write the same text whichever way it is asked, and say what is wrong with what it is given?"""
import dataclasses

import jax
import numpy as np
import pytest

from data.config import DataConfig
from data.tokenizer import ByteTokenizer
from decode.generator import Generator
from model import params, transformer
from model.config import ModelConfig
from parallel.mesh import MeshConfig, make_mesh
from training import config as configs
from training import state as states
from training.checkpoint import Checkpoints
from training.config import Config
from training.optimizer import make_optimizer

MODEL = ModelConfig(vocabulary=259, width=16, layers=2, heads=2, feed_forward=24, max_length=64, init_scale=1.0)
CONFIG = Config(model=MODEL, data=DataConfig(sequence_length=64))
PROMPTS = ['def main(', '', 'naïve']


@pytest.fixture(scope='module')
def generator():
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    model = jax.jit(transformer.init, static_argnums=(0, 1))(MODEL, 0)
  return Generator(model, ByteTokenizer(), mesh)


def test_text_streams_and_ids_agree(generator):
  together = generator(PROMPTS, max_new_tokens=20, seed=3)
  assert [c.prompt for c in together] == PROMPTS
  for i, completion in enumerate(together):
    assert completion.text == generator.tokenizer.decode(completion.ids)
    assert len(completion.ids) == 20 or completion.finish == 'stop'
    assert ''.join(generator.stream(PROMPTS[i], max_new_tokens=20, seed=3 + i)) == completion.text
    assert generator(PROMPTS[i], max_new_tokens=20, seed=3 + i, chunk=7)[0] == completion


class DropsFirstSpace(ByteTokenizer):
  """As SentencePiece models that put a space before every text: decoding a whole text takes it away."""

  def decode(self, ids):
    return super().decode(ids).removeprefix(' ')


def test_a_continuation_keeps_its_first_space(generator, monkeypatch):
  spaced = Generator(generator.model, DropsFirstSpace(), generator.mesh)
  monkeypatch.setattr(spaced, 'ids', lambda prompts, **_: (chunk for chunk in [[spaced.tokenizer.encode(' world')]]))
  assert spaced('hello')[0].text == ''.join(spaced.stream('hello')) == ' world'


def test_finish_reasons(generator):
  (free,) = generator('a', max_new_tokens=24, seed=1)
  assert free.finish == 'length' and len(free.ids) == 24
  tokenizer = ByteTokenizer()
  tokenizer.eos = free.ids[5]
  stopping = Generator(generator.model, tokenizer, generator.mesh)
  for chunk in (2, 16):
    (ended,) = stopping('a', max_new_tokens=24, seed=1, chunk=chunk)
    assert ended.finish == 'stop' and ended.ids == free.ids[:free.ids.index(free.ids[5]) + 1]
  (exact,) = stopping('a', max_new_tokens=len(ended.ids), seed=1)
  assert exact.finish == 'stop', 'end-of-text as the very last token that was allowed'


def test_a_model_is_filled_to_its_last_token(generator):
  (completion,) = generator('a' * 40, max_new_tokens=23, temperature=0.0)
  assert len(completion.ids) == 23


@pytest.mark.parametrize('prompts, options, words', [
    ([], {}, 'there are no prompts; give at least one'),
    (['a'], {'max_new_tokens': 0}, 'max_new_tokens=0 must be at least 1'),
    (['a'], {'chunk': 0}, 'chunk=0 must be at least 1'),
    (['a' * 40], {'max_new_tokens': 24}, 'a prompt of 41 tokens and max_new_tokens=24 pass model.max_length=64'),
    (['a'], {'temperature': -1.0, 'max_new_tokens': 4}, 'temperature=-1.0 must be'),
    (['a'], {'top_p': 0.0, 'max_new_tokens': 4}, 'top_p=0.0 must be'),
])
def test_bad_options_raise_at_once(generator, prompts, options, words):
  with pytest.raises(ValueError, match=words):
    generator(prompts, **options)
  if prompts:
    with pytest.raises(ValueError, match=words):
      generator.stream(prompts[0], **options)


def save_run(workdir, model=MODEL):
  """A run's directory with checkpoints 3 and 5, as train.py leaves it; returns the two models."""
  config = dataclasses.replace(CONFIG, model=model)
  configs.save(config, workdir)
  ByteTokenizer().save(workdir / 'tokenizer')
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  specs = params.specs(jax.eval_shape(lambda: transformer.init(model, 0)))
  optimizer = make_optimizer(config.optimizer, config.train.steps, specs)
  checkpoints = Checkpoints(workdir, log=lambda _: None)
  with jax.set_mesh(mesh):
    state = jax.jit(lambda: states.init(config, optimizer))()
    checkpoints.save(3, state, {}, {}, validation_loss=1.0)
    checkpoints.wait()
    later = dataclasses.replace(state, model=jax.jit(transformer.init, static_argnums=(0, 1))(model, 9))
    checkpoints.save(5, later, {}, {}, validation_loss=2.0)
    checkpoints.wait()
  return state.model, later.model


def test_load(tmp_path):
  models = save_run(tmp_path)
  for which, model in (('last', models[1]), ('best', models[0]), ('3', models[0]), ('5', models[1])):
    loaded = Generator.load(tmp_path, which)
    for a, b in zip(jax.tree.leaves(loaded.model), jax.tree.leaves(model), strict=True):
      np.testing.assert_array_equal(a, b)
  assert len(loaded('def', max_new_tokens=5)[0].ids) == 5
  with pytest.raises(ValueError, match=r"checkpoint='4' is unknown.*3, 5, best, last"):
    Generator.load(tmp_path, '4')
  name = next(iter(Checkpoints(tmp_path).record(3)['files']))
  (tmp_path / 'checkpoints' / '00000003' / name).write_bytes(b'')
  with pytest.raises(ValueError, match="checkpoint 3 is damaged: .*use another, or 'last'"):
    Generator.load(tmp_path, '3')


def test_a_run_that_trained_with_a_backend_for_training_generates(tmp_path):
  save_run(tmp_path, dataclasses.replace(MODEL, attention='blocked'))
  assert len(Generator.load(tmp_path)('def', max_new_tokens=5)[0].ids) == 5


def test_wrong_directories_raise(tmp_path):
  with pytest.raises(FileNotFoundError, match=str(tmp_path)):
    Generator.load(tmp_path)
  configs.save(CONFIG, tmp_path)
  with pytest.raises(FileNotFoundError, match='holds no checkpoint; train with train.py --workdir='):
    Generator.load(tmp_path)
