"""Does an encoder-decoder learn from the targets that it writes itself? Of rows, losses, runs that
were stopped, devices, adapters, and a teacher.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tokenizers import ByteTokenizer
from objectives.policy import GRPO
from objectives.ppo import PPO
from objectives.rollout_rows import packed, unpacked
from objectives.rollout_seq2seq import GKDSeq2Seq, GRPOSeq2Seq
from tests.training import test_rollouts
from tests.training.conftest import assert_same, run_here
from tests.training.test_denoise import T5
from tests.training.test_rollouts import Started, assert_same_runs, metrics_of, place as place

NEW, S = 6, 12
PREFIX = 'do: '
FAMILY = GRPOSeq2Seq(
  prefix=PREFIX, max_new_tokens=NEW, beta=0.1, temperature=0.8, group=4, minibatches=2, epochs=2
)


def config(place, objective=FAMILY, **parts):
  return test_rollouts.config(place, objective, **{'model': T5} | parts)


def by_hand(made, model, batch) -> float:
  """GRPO's loss with its reference, in float64, of the logits of all positions."""
  of = made.objective
  given = ('tokens', 'positions', 'segments', 'source', 'source_segments')
  hidden = model(**{name: jnp.asarray(getattr(batch, name)) for name in given}).hidden
  law = jax.nn.log_softmax(model.logits(hidden) / of.temperature)
  logprob = np.take_along_axis(np.asarray(law, np.float64), batch.targets[..., None], -1)[..., 0]
  ratio = np.exp(logprob - batch.behaviour)
  each = -np.minimum(
    ratio * batch.advantages, np.clip(ratio, 1 - of.clip, 1 + of.clip) * batch.advantages
  )
  apart = batch.reference - logprob
  each += of.beta * (np.exp(apart) - apart - 1)
  answers = [each[row, mask > 0].mean() for row, mask in enumerate(batch.weights)]
  return float(np.mean(answers))


@pytest.mark.slow
def test_rows_are_what_was_written_and_their_loss_is_by_hand(place, tmp_path):
  """What the encoder reads begins with the prefix and ends as sources do; sampler and trainer agree
  on what the decoder wrote; and a policy that has moved has the loss of the formula.
  """
  with Started(config(place), tmp_path) as run:
    run.rollouts.take(run.state)
    batch, tokenizer = run.rollouts._batch, ByteTokenizer()
    assert batch.source.shape == (16, S) and batch.tokens.shape == (16, NEW)
    first = batch.cut(range(8))
    said = run.stage.said(run.state.models, first, ('policy',))['policy']
    np.testing.assert_allclose(said, np.where(first.weights > 0, first.behaviour, 0), atol=1e-5)
    prompts = {prompt.ids: prompt for prompt in run.stage.prompts.train}
    sources = []
    for row in range(16):
      n, source = (int((of[row] > 0).sum()) for of in (batch.segments, batch.source_segments))
      sources.append(tuple(batch.source[row, :source].tolist()))
      assert prompts[sources[-1]].text == PREFIX + prompts[sources[-1]].row['prompt']
      assert sources[-1] == (*tokenizer.encode(prompts[sources[-1]].text), tokenizer.eos)
      assert batch.tokens[row, :n].tolist() == [tokenizer.pad, *batch.targets[row, : n - 1]]
      assert batch.weights[row].sum() == n == batch.lengths[row].sum()
    assert all(len(set(sources[i : i + 4])) == 1 for i in range(0, 16, 4)) and len(set(sources)) > 1
    assert_same(vars(unpacked(packed(batch))), vars(batch))

    assert np.ptp(first.advantages) > 0
    moved = jax.tree.map(
      lambda x: x * jnp.asarray(1.1, x.dtype) if x.ndim > 1 else x, run.state.models['policy']
    )
    models = run.state.models | {'policy': moved}
    losses = run.config.objective.loss(models, jax.tree.map(jnp.asarray, first))
    total = sum(value / weight for value, weight in losses.values())
    np.testing.assert_allclose(total, by_hand(run.config, moved, first), rtol=2e-4)


def test_others_are_refused_by_name(place, tmp_path):
  ppo = dataclasses.replace(test_rollouts.CRITICAL, reward=('r.py',))
  for objective, model, match in (
    (FAMILY, {}, "use an encoder-decoder, or objective.kind='grpo'"),
    (GKDSeq2Seq(teacher='t'), {}, "use an encoder-decoder, or objective.kind='gkd'"),
    (GRPO(), T5, "'grpo' learns from what a decoder writes.*'grpo_seq2seq'"),
    (ppo, T5, "'ppo' learns from what a decoder writes"),
  ):
    made = config(place, GRPO(), model=model).model
    with pytest.raises(NotImplementedError, match=match):
      objective.accepts({'policy': made})
  assert isinstance(ppo, PPO)
  made = config(place)
  objective = dataclasses.replace(FAMILY, reward=(str(tmp_path),))
  with pytest.raises(NotImplementedError, match='judges an answer behind its prompt'):
    with Started(dataclasses.replace(made, objective=objective), tmp_path):
      pass


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_was_stopped_is_one_that_was_not(place, tmp_path):
  """Bit for bit, also from within a rollout; held-out prompts are answered."""
  made = config(place, train={'steps': 7, 'eval_every': 3, 'save_every': 3})
  run_here(made, tmp_path / 'whole')
  three = dataclasses.replace(made, train=dataclasses.replace(made.train, steps=3))
  run_here(three, tmp_path / 'stopped')
  run_here(made, tmp_path / 'stopped')
  assert_same_runs(made, 7, tmp_path / 'whole', tmp_path / 'stopped')
  assert any('validation_reward' in line for line in metrics_of(tmp_path / 'whole'))


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [{'data': 2, 'fsdp': 2}, {'tensor': 2}], ids=str)
def test_devices_write_the_same(place, tmp_path, mesh):
  batches = []
  for name, of in (('one', {}), ('several', mesh)):
    devices = int(np.prod([*of.values()]))
    with Started(config(place, mesh=of), tmp_path / name, devices) as run:
      run.rollouts.take(run.state)
      batches.append(run.rollouts._batch)
  alone, spread = batches
  for name in ('source', 'tokens', 'targets'):
    np.testing.assert_array_equal(getattr(alone, name), getattr(spread, name))
  for name in ('behaviour', 'reference', 'advantages'):
    np.testing.assert_allclose(getattr(alone, name), getattr(spread, name), atol=2e-5)


@pytest.mark.slow
@pytest.mark.long
def test_a_student_learns_what_a_teacher_says_of_its_own_targets(place, tmp_path):
  run_here(config(place, train={'steps': 1, 'seed': 5}), tmp_path / 'teacher')
  objective = GKDSeq2Seq(
    max_new_tokens=NEW, teacher=str(tmp_path / 'teacher'), temperature=1.5, prefix=PREFIX
  )
  made = config(place, train={'steps': 12, 'eval_every': 6})
  run_here(dataclasses.replace(made, objective=objective), tmp_path / 'student')
  lines = metrics_of(tmp_path / 'student')
  apart = [line['validation_divergence'] for line in lines if 'validation_divergence' in line]
  assert apart[-1] < 0.8 * apart[0] and {'answer_length', 'ended'} <= lines[0].keys()


@pytest.mark.slow
@pytest.mark.long
def test_an_adapter_writes_and_learns(place, tmp_path):
  """The check of sampler and trainer is of the base first, then of an adapter that has moved."""
  fields = {'kind': 'lora', 'rank': 4, 'alpha': 8.0}
  made = config(place, adapter=fields, train={'steps': 4, 'eval_every': 4})
  run_here(made, tmp_path)
  run_here(dataclasses.replace(made, train=dataclasses.replace(made.train, steps=5)), tmp_path)
  lines = metrics_of(tmp_path)
  assert lines[-1]['step'] == 5 and all(np.isfinite(line.get('loss', 0)) for line in lines)
