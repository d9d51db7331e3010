"""What makes a model give more of the answers that were wanted and fewer of the others, where none
was compared with another? Kahneman-Tversky optimisation (Ethayarajh et al., arXiv:2402.01306).

B rows of a batch · P answers of a row
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from data.judged import JudgedSettings
from objectives import answers
from objectives.answers import NONE, REFERENCE, OfAnswers, Scored
from objectives.experts import EXPERTS, balance, routed, router_metrics
from objectives.laws import laid_out, parts_of
from objectives.objective import MAIN, or_one

JUDGED = 'kto'  # the term
SIDES = ('wanted', 'unwanted')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judging(OfAnswers):
  """Answers that were judged, all alike, whoever reads them; equation 7 of the paper. The
  divergence that rewards are compared with is that of a whole batch, from answers to other prompts.

  Attributes:
    wanted_weight, unwanted_weight: of the losses of both kinds of answers; where there are more of
      one kind, the other's times their number should be 1 to 4/3 of this one's.
  """

  main_passes = 1.0  # in `prepare`
  wanted_weight: float = 1.0
  unwanted_weight: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    self._check_least(wanted_weight=0, unwanted_weight=0)
    if self.reference == NONE:
      raise ValueError(
        f'objective.kind={self.kind!r} measures how far a policy is from its reference, and '
        "objective.reference='none' is none; use 'begun', or the directory of a run"
      )

  def prepare(self, models, batch):
    """Rows as the models read them, the reference's log-probabilities in them; and the divergence
    of the whole batch, for each row.
    """
    batch, parts = laid_out(models[MAIN], batch)
    if not self.stored_reference:
      reference, _ = answers.token_logprobs(models[REFERENCE], batch, parts)
      batch = dataclasses.replace(batch, reference=reference)
    scored = self._scored(models, batch)
    away = scored.total(scored.answers.ratios[..., 1]) / or_one(answers.pairs_of(batch))
    away = jax.lax.stop_gradient(jnp.maximum(away, 0))
    # A row's own, so that it is cut with the rows.
    return {'rows': batch, 'away': away + jnp.zeros_like(batch.weights.max(1))}

  def _scored(self, models, batch) -> Scored:
    # The rows are laid out, and the reference's part in them.
    policy = models[MAIN]
    return answers.score({MAIN: policy}, batch, parts_of(policy))

  def weights(self, batch):
    rows = batch['rows']
    return {JUDGED: answers.pairs_of(rows), EXPERTS: routed(self.tokens(rows))}

  def sums(self, models, batch):
    scored = self._scored(models, batch['rows'])
    wanted, rewards = self._judgements(scored, batch)
    # 1 - sigmoid(z) is sigmoid(-z), of how much better than the divergence it is, or worse.
    better = jnp.where(wanted, rewards, -rewards)
    weight = jnp.where(wanted, self.wanted_weight, self.unwanted_weight)
    each = jnp.where(scored.real, weight * jax.nn.sigmoid(-better), 0)
    terms = {JUDGED: each.sum(), EXPERTS: balance(scored.router)}
    return terms, self._said(scored, wanted, rewards, batch) | (scored.router or {})

  def _judgements(self, scored: Scored, batch) -> tuple[Array, Float[Array, 'B P']]:
    """Which answers are wanted, and beta times by how much the policy's liking for each is above
    the divergence.
    """
    rows = batch['rows']
    counts = scored.answers.lengths[..., 0]
    wanted = answers.by_pairs(rows.margins, rows)[..., 0] > 0.5 * counts
    above = scored.answers.ratios[..., 0] - batch['away'][:, None]
    return wanted, self.beta * above

  def _said(self, scored: Scored, wanted, rewards, batch) -> dict[str, Array]:
    of = scored.answers
    sums = {
      'pairs': scored.total(jnp.ones_like(rewards)),
      'right': scored.total((rewards > 0) == wanted),
      'tokens': scored.total(of.lengths[..., 0]),
      # Repeated for every answer, so that it adds up as all else does.
      'away': scored.total(batch['away'][:, None] + jnp.zeros_like(rewards)),
    }
    for side, of_side in zip(SIDES, (wanted, ~wanted), strict=True):
      for name, values in (
        ('count', jnp.ones_like(rewards)),
        ('rewards', self.beta * of.ratios[..., 0]),
        ('policy', of.policy[..., 0]),
        ('tokens', of.lengths[..., 0]),
      ):
        sums[f'{name}_{side}'] = scored.total(jnp.where(of_side, values, 0))
    return sums

  def metrics(self, terms, weights, sums):
    """`loss`; `rewards_wanted`, `rewards_unwanted`, means over answers, and their
    `reward_margin`; `logprob_wanted`, `logprob_unwanted`, of a token, in nats; `kl`, the divergence
    that they are compared with, in nats an answer; `accuracy`, the share of answers that are on
    their side of it.
    """
    said = super().metrics(terms, weights, sums)
    said.pop(EXPERTS, None)
    said.pop(JUDGED, None)
    return said | self._means(sums) | router_metrics(sums, weights[EXPERTS])

  def _means(self, sums):
    said = {}
    for side in SIDES:
      said[f'rewards_{side}'] = sums[f'rewards_{side}'] / or_one(jnp.asarray(sums[f'count_{side}']))
      tokens = or_one(jnp.asarray(sums[f'tokens_{side}']))
      said[f'logprob_{side}'] = sums[f'policy_{side}'] / tokens
    pairs = or_one(jnp.asarray(sums['pairs']))
    return said | {
      'reward_margin': said['rewards_wanted'] - said['rewards_unwanted'],
      'kl': sums['away'] / pairs,
      'accuracy': sums['right'] / pairs,
    }

  def judged(self, models, batch):
    terms, sums = self.sums(models, self.prepare(models, batch))
    means = [
      f'{name}_{side}' for name in ('count', 'rewards', 'policy', 'tokens') for side in SIDES
    ]
    names = ['pairs', 'right', 'tokens', 'away', *means]
    return {name: sums[name] for name in names} | {'loss': terms[JUDGED]}

  def verdict(self, sums, prepared):
    """`validation_loss`, against the divergence of each of its batches; and what `metrics` says, as
    validation_...
    """
    del prepared
    said = {f'validation_{name}': float(value) for name, value in self._means(sums).items()}
    return {'validation_loss': sums['loss'] / sums['pairs'], **said}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTO(Judging, JudgedSettings):
  """Packed answers of a decoder (data/judged.py)."""

  kind: str = 'kto'

  def __post_init__(self):
    super().__post_init__()
    JudgedSettings.__post_init__(self)
