"""Is what is learned of two answers, and of several that a policy wrote, what TRL learns of them?
Its trainers' own losses, of padded rows, beside ours of packed ones.
"""

import collections
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from data import shards
from data.conversations import Example
from data.preferences import Choice, ChoiceBatch, ChoiceRows
from data.rewarded import RewardedRows
from model import checkpoint, heads
from objectives.answers import NONE
from objectives.kto import KTO
from objectives.objective import or_one
from objectives.policy import GRPO
from objectives.preference import Preference
from objectives.reward import Reward
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


class Minimised(NamedTuple):
  """What ours makes of a batch; gradients: of all models, by name."""

  loss: Any
  metrics: dict
  sums: dict
  gradients: dict


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """Two models, as ours and as theirs; and what makes a trainer of TRL for the first one."""
  import datasets
  import tokenizers
  import transformers
  import trl
  from trl.experimental import cpo

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
  sampled = {'temperature': CLIPPED['temperature'], 'max_completion_length': NEW}
  sampled |= {'epsilon': CLIPPED['clip'], 'epsilon_high': CLIPPED['clip_high']}

  def trainer_of(kind):
    """Of one record, or two, which are not what is compared."""
    pair = {'prompt': 'a', 'chosen': 'a', 'rejected': 'a'}
    judged = [{'prompt': 'a', 'completion': 'a', 'label': label} for label in (True, False)]
    row = datasets.Dataset.from_list(judged if kind == 'kto' else [pair])
    given = {'train_dataset': row, 'processing_class': tokenizer}
    policy, reference = theirs['policy'], theirs['reference']
    if kind == 'dpo':
      settings = trl.DPOConfig(**run, disable_dropout=False)
      return trl.DPOTrainer(policy, reference, settings, **given)
    if kind == 'kto':
      # The other way round: of these the divergence is above 0, where it is cut off.
      return trl.KTOTrainer(reference, policy, trl.KTOConfig(**run), **given)
    if kind == 'cpo':
      settings = cpo.CPOConfig(**run, loss_type='simpo', gradient_checkpointing=False)
      return cpo.CPOTrainer(policy, settings, **given)
    if kind == 'reward':
      classifier = transformers.LlamaForSequenceClassification.from_pretrained(
        directory / 'policy', num_labels=1, attn_implementation='eager'
      )
      return trl.RewardTrainer(classifier, trl.RewardConfig(**run), **given)

    def score(**of):
      return [0.0]

    if kind == 'rloo':
      # Its divergence is taken off rewards: its loss has none.
      return trl.RLOOTrainer(policy, score, trl.RLOOConfig(**run, **sampled, beta=0.0), **given)
    # Its default multiplies the divergence with the ratio, as DeepSeek-V3.2 does; GRPO does not.
    settings = sampled | {'beta': CLIPPED['beta'], 'use_bias_correction_kl': False}
    return trl.GRPOTrainer(policy, score, trl.GRPOConfig(**run, **settings), **given)

  return Models(*found, theirs, trainer_of)


def drawn(*counts):
  """Ids of so many tokens, for each count."""
  draw = np.random.default_rng(sum(counts))
  return [draw.integers(3, 60, count).tolist() for count in counts]


def half(prompt, answer) -> Example:
  ids = np.array(prompt + answer, np.int32)
  return Example(ids, np.arange(len(ids)) >= len(prompt))


def packed(directory, choices, form=ChoiceRows(T)) -> ChoiceBatch:
  """The rows that a run would read of two answers each, as one batch."""
  with shards.ShardWriter(directory, 'train-0', 64, scored=True, notes=2) as writer:
    for choice in choices:
      writer.add(choice.ids, choice.scored, choice.notes)
  (entry,) = writer.shards
  plan = form.write_plan(directory, directory, entry)
  shard = shards.PackedShard(directory, directory, entry['name'], entry['dtype'], True)
  source = form.source('pairs', 1.0, (shard,), np.array([plan['rows']]))
  batch = ChoiceBatch.empty(len(source), T)
  for row in range(len(source)):
    source.fill(row, batch, row)
  assert len(batch.tokens) < len(choices), 'no row has several pairs'
  return batch


def pairs(margins=(0.0,) * len(PAIRS)) -> list[Choice]:
  """Those of PAIRS, with these margins."""
  made = []
  for counts, margin in zip(PAIRS, margins, strict=True):
    prompt, chosen, rejected = drawn(*counts)
    made.append(Choice.of(half(prompt, chosen), half(prompt, rejected), margin))
  return made


def minimised(objective, models, batch) -> Minimised:
  def value(models, batch):
    terms, sums = objective.sums(models, batch)
    weights = {name: or_one(weight) for name, weight in objective.weights(batch).items()}
    loss = sum(terms[name] / weights[name] for name in terms)
    return loss, (objective.metrics(terms, weights, sums), sums)

  with jax.set_mesh(ours.MESH):
    prepared = jax.jit(objective.prepare)(models, jax.tree.map(ours.put, batch))
    of_models = jax.jit(jax.value_and_grad(value, has_aux=True))
    (loss, said), gradients = of_models(models, prepared)
  return Minimised(np.asarray(loss), *jax.device_get(said), jax.device_get(gradients))


def theirs_of(trainer, inputs, of=None):
  """(loss, gradient by the rows of the embedding) of TRL's; what it says of it is in its
  `_metrics`. of: (trainer, model, inputs) -> the loss, where that is not `compute_loss`.
  """
  model = trainer.model.eval()
  model.zero_grad()
  loss = of(trainer, model, inputs) if of else trainer.compute_loss(model, inputs)
  loss.backward()
  return loss.item(), model.get_input_embeddings().weight.grad.numpy()


def compare(found: Minimised, loss, gradient):
  np.testing.assert_allclose(found.loss, loss, rtol=1e-5)
  scale = np.abs(gradient).max()
  assert scale > 1e-3
  rows = np.asarray(found.gradients['policy'].embedding.tokens[...])
  np.testing.assert_allclose(rows[: len(gradient)], gradient, rtol=0, atol=3e-5 * scale)


def test_preferences(models, tmp_path):
  """Losses, rewards, log-probabilities and gradients of pairs of uneven lengths."""
  from trl.trainer.dpo_trainer import DataCollatorForPreference

  names = ('prompt_ids', 'chosen_ids', 'rejected_ids')
  rows = [dict(zip(names, drawn(*counts), strict=True)) for counts in PAIRS]
  inputs = DataCollatorForPreference(pad_token_id=0)(rows)
  batch = packed(tmp_path, pairs())
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

    metrics, sums = found.metrics, found.sums
    said = {name: value[-1] for name, value in trainer._metrics['eval'].items()}
    for side in ('chosen', 'rejected'):
      mean = sums[f'policy_{side}'] / len(PAIRS)
      np.testing.assert_allclose(mean, said[f'logps/{side}'], rtol=1e-5)
      if variant not in ('ipo', 'sigmoid_norm'):  # TRL's rewards are of answers whatever the loss
        np.testing.assert_allclose(metrics[f'rewards_{side}'], said[f'rewards/{side}'], 1e-5, 2e-6)
    if variant not in ('ipo', 'sigmoid_norm'):
      assert metrics['reward_accuracy'] == np.float32(said['rewards/accuracies']) not in (0, 1)
  assert len(losses) == len(PREFERENCES), 'the pairs do not tell the losses apart'


def test_preferences_that_are_not_of_its_dpo(models, tmp_path):
  """SimPO; ORPO's odds with the cross-entropy of chosen answers (TRL's own ORPOTrainer has that of
  prompts in it, the paper has not); and conservative DPO, which in TRL is CPO's, of what it finds
  beside a reference.
  """
  from trl.experimental.orpo import ORPOTrainer
  from trl.experimental.utils import DPODataCollatorWithPadding

  features = []
  for choice in pairs():
    features.append({})
    for side, example in zip(('chosen', 'rejected'), choice.halves, strict=True):
      ids = example.ids.tolist()
      labels = np.where(example.scored, example.ids, -100).tolist()
      said = {'input_ids': ids, 'attention_mask': [1] * len(ids), 'labels': labels}
      features[-1] |= {f'{side}_{name}': value for name, value in said.items()}
  inputs = DPODataCollatorWithPadding(pad_token_id=0)(features)
  trainer, batch = models.trainer_of('cpo'), packed(tmp_path, pairs())

  def orpo(trainer, model, inputs):
    chosen, rejected, _, _, cross_entropy = trainer.concatenated_forward(model, inputs)
    odds, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    return cross_entropy - odds.mean()

  def conservative(trainer, model, inputs):
    trainer.loss_type = 'sigmoid'
    chosen, rejected, *_ = trainer.concatenated_forward(model, inputs)
    with torch.no_grad():
      chosen_before, rejected_before, *_ = trainer.concatenated_forward(
        models.theirs['reference'], inputs
      )
    losses, *_ = trainer.cpo_loss(chosen - chosen_before, rejected - rejected_before)
    return losses.mean()

  both = {'policy': models.policy, 'reference': models.reference}
  for objective, of in (
    (Preference(variant='simpo', reference=NONE, beta=2.0, gamma=0.7, sft=0.3), None),
    (Preference(variant='orpo', reference=NONE, beta=0.4, sft=1.0), orpo),
    (Preference(beta=0.3, label_smoothing=0.2), conservative),
  ):
    trainer.beta, trainer.simpo_gamma = objective.beta, objective.gamma
    trainer.cpo_alpha, trainer.label_smoothing = objective.sft, objective.label_smoothing
    loss, gradient = theirs_of(trainer, inputs, of)
    found = minimised(objective, {name: both[name] for name in objective.models(None)}, batch)
    compare(found, loss, gradient)
    if not of:
      said = {name: value[-1] for name, value in trainer._stored_metrics['train'].items()}
      for side in ('chosen', 'rejected'):
        reward = found.metrics[f'rewards_{side}']
        np.testing.assert_allclose(reward, said[f'rewards/{side}'], rtol=1e-5)


def test_judged_answers(models, tmp_path):
  """Losses, rewards and divergence of answers of which some were wanted."""
  from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

  rows, choices = [], []
  answered = [drawn(*counts)[:2] for counts in PAIRS]
  for row, (prompt, answer) in enumerate(answered):
    other, wanted = answered[row - 1][1], row % 3 > 0
    names = ('prompt_ids', 'completion_ids', 'KL_completion_ids', 'label')
    rows.append(dict(zip(names, (prompt, answer, other, wanted), strict=True)))
    choices.append(Choice.of(half(prompt, answer), half(prompt, other), float(wanted)))
  inputs = DataCollatorForUnpairedPreference(pad_token_id=0)(rows)
  batch, trainer = packed(tmp_path, choices), models.trainer_of('kto')
  objective = KTO(beta=0.3, wanted_weight=1.5, unwanted_weight=0.8)
  trainer.beta, trainer.desirable_weight, trainer.undesirable_weight = 0.3, 1.5, 0.8
  loss, gradient = theirs_of(trainer, inputs)
  found = minimised(objective, {'policy': models.reference, 'reference': models.policy}, batch)
  compare(found, loss, gradient)
  said = {name: value[-1] for name, value in trainer._metrics['eval'].items()}
  assert said['kl'] > 0.1, 'the divergence is not told from none'
  for ours_, name in (
    ('kl', 'kl'),
    ('rewards_wanted', 'rewards/chosen'),
    ('rewards_unwanted', 'rewards/rejected'),
    ('reward_margin', 'rewards/margins'),
  ):
    np.testing.assert_allclose(found.metrics[ours_], said[name], 1e-5, 2e-6, err_msg=ours_)


def test_rewards(models, tmp_path):
  """Losses and gradients of a model and its head, with margins and the pull towards 0."""
  from trl.trainer.reward_trainer import DataCollatorForPreference

  trainer = models.trainer_of('reward')
  weight = trainer.model.score.weight
  with torch.no_grad():
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) / 4)
  margins = [0.25 * number for number in range(len(PAIRS))]
  choices = pairs(margins)
  rows = [
    {'chosen_ids': chosen.ids.tolist(), 'rejected_ids': rejected.ids.tolist(), 'margin': margin}
    for margin, (chosen, rejected) in zip(margins, (choice.halves for choice in choices))
  ]
  batch = packed(tmp_path, choices, RewardedRows(T, unread=0))
  with jax.set_mesh(ours.MESH):
    head = heads.new(models.policy.config, 0, labels=1)
    head['weight'] = head['weight'].replace(ours.put(weight.detach().numpy().T))
  for centring in (0.0, 0.1):
    trainer.args.center_rewards_coefficient = centring or None
    inputs = DataCollatorForPreference(pad_token_id=0)(rows)
    loss, gradient = theirs_of(trainer, inputs)
    objective = Reward(centring=centring)
    found = minimised(objective, {'policy': models.policy, 'head': head}, batch)
    compare(found, loss, gradient)
    of_head = weight.grad.numpy().T
    atol = 3e-5 * np.abs(of_head).max()
    np.testing.assert_allclose(found.gradients['head']['weight'][...], of_head, rtol=0, atol=atol)
    said = trainer._metrics['eval']
    assert found.metrics['accuracy'] == np.float32(said['accuracy'][-1]) not in (0, 1)
    np.testing.assert_allclose(found.metrics['reward_margin'], said['margin'][-1], rtol=1e-4)


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


def write_near(trainer, batch: RolloutBatch, inputs: dict, spread: float) -> None:
  """Says that a policy wrote them, and a reference reads them, that differ by so much from what is
  trained: were they far from it, all of them were clipped.
  """
  draw = np.random.default_rng(2)
  ids = torch.cat([inputs['prompt_ids'], inputs['completion_ids']], 1)
  mask = torch.cat([inputs['prompt_mask'], inputs['completion_mask']], 1)
  with torch.no_grad():
    now, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, NEW)
  for name, ours_ in (('old_per_token_logps', 'behaviour'), ('ref_per_token_logps', 'reference')):
    logs = now.numpy() + spread * draw.normal(size=now.shape).astype(np.float32)
    inputs[name] = torch.tensor(logs)
    for row, (n, new) in enumerate(WRITTEN):
      getattr(batch, ours_)[row, n - 1 : n + new - 1] = logs[row, :new]


def test_policies(models):
  """Losses, divergences and gradients of answers of uneven lengths, of which some have moved beyond
  the clip on either side.
  """
  batch, inputs = rollout()
  trainer = models.trainer_of('grpo')
  write_near(trainer, batch, inputs, 0.5)
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
      np.testing.assert_allclose(found.metrics['clip_fraction'], clipped, rtol=1e-6)
      assert 0.1 < clipped < 0.9 and trainer._metrics['eval']['clip_ratio/low_mean'][-1] > 0
  assert len(losses) == len(POLICIES), 'the answers do not tell the losses apart'


def test_a_baseline_of_the_others(models):
  """RLOO: ratios of whole answers, some of them beyond the clip."""
  batch, inputs = rollout()
  trainer = models.trainer_of('rloo')
  write_near(trainer, batch, inputs, 0.3)
  inputs['old_logps'] = (inputs['old_per_token_logps'] * inputs['completion_mask']).sum(1)
  loss, gradient = theirs_of(trainer, inputs)
  objective = GRPO(variant='rloo', reward=('none.py',), group=2, **CLIPPED | {'beta': 0.0})
  compare(minimised(objective, {'policy': models.policy}, batch), loss, gradient)
  assert 0 < trainer._metrics['eval']['clip_ratio/region_mean'][-1] < 1
