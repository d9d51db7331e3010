"""Is what is learned of two answers, and of several that a policy wrote, what TRL learns of them?
Its trainers' own losses, of padded rows, beside ours of packed ones.
"""

import collections

import jax
import numpy as np
import pytest

from data import shards
from data.conversations import Example
from data.preferences import Choice, ChoiceBatch, ChoiceRows
from model import checkpoint
from objectives.objective import or_one
from objectives.policy import GRPO
from objectives.preference import Preference
from objectives.rollout_rows import RolloutBatch
from tests.goldens import ours

pytestmark = pytest.mark.oracle
torch = pytest.importorskip('torch', reason='torch is not installed')
pytest.importorskip('transformers', reason='transformers is not installed')
pytest.importorskip('trl', reason='trl is not installed')

T = 32
# Tokens of prompts, of chosen and of rejected answers.
PAIRS = [(3, 2, 5), (9, 5, 1), (1, 4, 6), (5, 1, 1), (2, 11, 7), (7, 3, 2), (4, 4, 9)]
# Tokens of prompts and of answers, the longest of them NEW.
WRITTEN, NEW = [(3, 2), (6, 8), (1, 5), (4, 1), (2, 8), (5, 3)], 8
PREFERENCES = {
  'sigmoid': {},
  'ipo': {},
  'hinge': {'beta': 0.02},  # so that some pairs are still apart, and others not
  'robust': {'label_smoothing': 0.2},
  'apo_zero': {},
  'sigmoid_norm': {},
  'sigmoid, sft': {'sft': 0.3},
}
POLICIES = {
  'grpo': ('grpo', 'token'),
  'dr_grpo': ('dr_grpo', 'token'),
  'dapo': ('dapo', 'token'),
  'gspo': ('grpo', 'sequence'),
}
CLIPPED = {'beta': 0.3, 'temperature': 0.7, 'clip': 0.2, 'clip_high': 0.3, 'max_new_tokens': NEW}
Models = collections.namedtuple('Models', 'policy reference theirs trainer_of')


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """Two models, as ours and as theirs; and what makes a trainer of TRL for the first one."""
  import datasets
  import tokenizers
  import transformers
  from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

  from tests.goldens import make

  directory = tmp_path_factory.mktemp('models')
  theirs = {'policy': make.build('llama', directory / 'policy')}
  draw = torch.Generator().manual_seed(0)
  moved = make.load('llama', directory / 'policy')
  with torch.no_grad():
    for p in moved.parameters():
      p.add_(0.05 * torch.randn(p.shape, generator=draw))
  moved.save_pretrained(directory / 'reference')
  theirs['reference'] = make.load('llama', directory / 'reference')
  found = [checkpoint.load(directory / name, mesh=ours.MESH)[1] for name in theirs]

  words = tokenizers.models.WordLevel({'<pad>': 0, '</s>': 1, 'a': 2}, unk_token='a')
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(words), pad_token='<pad>', eos_token='</s>'
  )
  run = {'output_dir': str(directory / 'trl'), 'use_cpu': True, 'bf16': False, 'report_to': []}

  def trainer_of(kind):
    """Of one record, which is not what is compared."""
    row = datasets.Dataset.from_list([{'prompt': 'a', 'chosen': 'a', 'rejected': 'a'}])
    given = {'train_dataset': row, 'processing_class': tokenizer}
    policy, reference = theirs['policy'], theirs['reference']
    if kind == 'dpo':
      return DPOTrainer(policy, reference, DPOConfig(**run, disable_dropout=False), **given)
    settings = {'beta': CLIPPED['beta'], 'temperature': CLIPPED['temperature']}
    settings |= {'epsilon': CLIPPED['clip'], 'epsilon_high': CLIPPED['clip_high']}
    # Its default multiplies the divergence with the ratio, as DeepSeek-V3.2 does; GRPO does not.
    settings |= {'max_completion_length': NEW, 'use_bias_correction_kl': False}
    return GRPOTrainer(policy, lambda **of: [0.0], GRPOConfig(**run, **settings), **given)

  return Models(*found, theirs, trainer_of)


def drawn(*counts):
  """Ids of so many tokens, for each count."""
  draw = np.random.default_rng(sum(counts))
  return [draw.integers(3, 60, count).tolist() for count in counts]


def packed(directory) -> ChoiceBatch:
  """The rows that a run would read of the pairs, as one batch."""

  def half(prompt, answer):
    ids = np.array(prompt + answer, np.int32)
    return Example(ids, np.arange(len(ids)) >= len(prompt))

  with shards.ShardWriter(directory, 'train-0', 64, scored=True, notes=2) as writer:
    for counts in PAIRS:
      prompt, chosen, rejected = drawn(*counts)
      example = Choice.of(half(prompt, chosen), half(prompt, rejected))
      writer.add(example.ids, example.scored, example.notes)
  (entry,) = writer.shards
  form = ChoiceRows(T)
  plan = form.write_plan(directory, directory, entry)
  shard = shards.PackedShard(directory, directory, entry['name'], entry['dtype'], True)
  source = form.source('pairs', 1.0, (shard,), np.array([plan['rows']]))
  batch = ChoiceBatch.empty(len(source), T)
  for row in range(len(source)):
    source.fill(row, batch, row)
  return batch


def minimised(objective, both, batch):
  """(loss, metrics, gradient by the rows of the embedding) of ours."""

  def value(policy, batch):
    models = both | {'policy': policy}
    terms, sums = objective.sums(models, batch)
    weights = {name: or_one(weight) for name, weight in objective.weights(batch).items()}
    loss = sum(terms[name] / weights[name] for name in terms)
    return loss, (objective.metrics(terms, weights, sums), sums)

  with jax.set_mesh(ours.MESH):
    placed = jax.tree.map(ours.put, batch)
    of_policy = jax.jit(jax.value_and_grad(value, has_aux=True))
    (loss, said), gradient = of_policy(both['policy'], placed)
  return np.asarray(loss), *jax.device_get(said), np.asarray(gradient.embedding.tokens[...])


def theirs_of(trainer, inputs):
  """(loss, gradient by the rows of the embedding) of TRL's; what it says of it is in its
  `_metrics`.
  """
  model = trainer.model.eval()
  model.zero_grad()
  loss = trainer.compute_loss(model, inputs)
  loss.backward()
  return loss.item(), model.get_input_embeddings().weight.grad.numpy()


def compare(found, loss, gradient):
  np.testing.assert_allclose(found[0], loss, rtol=1e-5)
  scale = np.abs(gradient).max()
  assert scale > 1e-3
  np.testing.assert_allclose(found[-1][: len(gradient)], gradient, rtol=0, atol=3e-5 * scale)


def test_preferences(models, tmp_path):
  """Losses, rewards, log-probabilities and gradients of pairs of uneven lengths."""
  from trl.trainer.dpo_trainer import DataCollatorForPreference

  names = ('prompt_ids', 'chosen_ids', 'rejected_ids')
  rows = [dict(zip(names, drawn(*counts), strict=True)) for counts in PAIRS]
  inputs = DataCollatorForPreference(pad_token_id=0)(rows)
  batch = packed(tmp_path)
  assert len(batch.tokens) < len(PAIRS), 'no row has several pairs'
  assert batch.weights.sum() == sum(chosen + rejected for _, chosen, rejected in PAIRS)
  trainer, losses = models.trainer_of('dpo'), set()
  for name, fields in PREFERENCES.items():
    variant = name.split(',')[0]
    objective = Preference(**{'variant': variant, 'beta': 0.3} | fields)
    trainer.loss_types, trainer.loss_weights = [variant], [1.0]
    if objective.sft:
      trainer.loss_types, trainer.loss_weights = [variant, 'sft'], [1.0, objective.sft]
    trainer.beta, trainer.label_smoothing = objective.beta, objective.label_smoothing
    trainer._metrics['eval'].clear()
    loss, gradient = theirs_of(trainer, inputs)
    both = {'policy': models.policy, 'reference': models.reference}
    found = minimised(objective, both, batch)
    compare(found, loss, gradient)
    losses.add(round(loss, 4))

    _, metrics, sums, _ = found
    said = {name: value[-1] for name, value in trainer._metrics['eval'].items()}
    for side in ('chosen', 'rejected'):
      mean = sums[f'policy_{side}'] / len(PAIRS)
      np.testing.assert_allclose(mean, said[f'logps/{side}'], rtol=1e-5)
      if variant not in ('ipo', 'sigmoid_norm'):  # TRL's rewards are of answers whatever the loss
        np.testing.assert_allclose(metrics[f'rewards_{side}'], said[f'rewards/{side}'], 1e-5, 2e-6)
    if variant not in ('ipo', 'sigmoid_norm'):
      assert metrics['reward_accuracy'] == np.float32(said['rewards/accuracies']) not in (0, 1)
  assert len(losses) == len(PREFERENCES), 'the pairs do not tell the losses apart'


def rollout() -> tuple[RolloutBatch, dict]:
  """Answers as ours and as TRL has them: it pads prompts on their left."""
  batch, longest = RolloutBatch.empty(len(WRITTEN), T), max(prompt for prompt, _ in WRITTEN)
  shape = (len(WRITTEN), NEW)
  inputs = {name: np.zeros(shape, np.int64) for name in ('completion_ids', 'completion_mask')}
  for name in ('prompt_ids', 'prompt_mask'):
    inputs[name] = np.zeros((len(WRITTEN), longest), np.int64)
  for name in ('old_per_token_logps', 'ref_per_token_logps'):
    inputs[name] = np.zeros(shape, np.float32)
  # More good than bad: a loss that is a small difference of large numbers would be rounding.
  inputs['advantages'] = np.float32([1.2, -0.9, 0.8, 1.5, 1.6, -0.4])
  for row, (n, new) in enumerate(WRITTEN):
    prompt, answer = drawn(n, new)
    ids, here = np.array(prompt + answer), slice(n - 1, n + new - 1)
    batch.tokens[row, : n + new - 1], batch.targets[row, : n + new - 1] = ids[:-1], ids[1:]
    batch.positions[row, : n + new - 1] = np.arange(n + new - 1)
    batch.segments[row, : n + new - 1] = batch.weights[row, here] = 1
    batch.advantages[row, here] = inputs['advantages'][row]
    inputs['prompt_ids'][row, longest - n :] = prompt
    inputs['prompt_mask'][row, longest - n :] = 1
    inputs['completion_ids'][row, :new] = answer
    inputs['completion_mask'][row, :new] = 1
  return batch, {name: torch.tensor(x) for name, x in inputs.items()}


def test_policies(models):
  """Losses, divergences and gradients of answers of uneven lengths, of which some have moved beyond
  the clip on either side.
  """
  batch, inputs = rollout()
  trainer, draw = models.trainer_of('grpo'), np.random.default_rng(2)
  ids = torch.cat([inputs['prompt_ids'], inputs['completion_ids']], 1)
  mask = torch.cat([inputs['prompt_mask'], inputs['completion_mask']], 1)
  with torch.no_grad():
    now, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, NEW)
  for name, ours_ in (('old_per_token_logps', 'behaviour'), ('ref_per_token_logps', 'reference')):
    # Near what the policy says, or all of it were clipped.
    logs = now.numpy() + 0.5 * draw.normal(size=now.shape).astype(np.float32)
    inputs[name] = torch.tensor(logs)
    for row, (n, new) in enumerate(WRITTEN):
      getattr(batch, ours_)[row, n - 1 : n + new - 1] = logs[row, :new]
  inputs['num_items_in_batch'] = inputs['completion_mask'].sum()
  losses = set()
  for variant, (loss_type, level) in POLICIES.items():
    objective = GRPO(variant=variant, reward=('none.py',), group=2, **CLIPPED)
    trainer.loss_type, trainer.importance_sampling_level = loss_type, level
    trainer._metrics['eval'].clear()
    loss, gradient = theirs_of(trainer, inputs)
    found = minimised(objective, {'policy': models.policy}, batch)
    compare(found, loss, gradient)
    losses.add(round(loss, 4))
    if level == 'token':
      clipped = trainer._metrics['eval']['clip_ratio/region_mean'][-1]
      np.testing.assert_allclose(found[1]['clip_fraction'], clipped, rtol=1e-6)
      assert 0.1 < clipped < 0.9 and trainer._metrics['eval']['clip_ratio/low_mean'][-1] > 0
  assert len(losses) == len(POLICIES), 'the answers do not tell the losses apart'
