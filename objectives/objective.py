"""What is an objective? A value: the models it takes, the batches it takes, what it minimises, and
what it says of both.

A kind of objective is a frozen dataclass below `Objective`; its fields are its settings, flags
`--config.objective.NAME`. The step (training/step.py), the planner and the pipelines call the
methods here and name no kind; objectives/kinds.py lists the kinds.

B rows of a batch · T length
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from data.config import DataConfig
from model import flops
from model.adaptation import AdapterConfig
from model.config import ModelConfig

Sums = dict[str, Array]  # what microbatches, devices and batches add up
MAIN = 'policy'


@dataclasses.dataclass(frozen=True)
class Role:
  """A model that an objective takes.

  Attributes:
    config: of its network; None for that of the run at `directory`.
    trained: False freezes all of it, whatever the run's patterns say (training/trainable.py).
    directory: of the run whose parameters it begins with; '' for a new model. (The run's own `init`
      is that of the main one.)
    begun: name of another one that it begins as, with the same `config`. Frozen it stays that, a
      reference; under an adapter it is then the base, and takes no memory of its own.
    stored: what makes of a frozen model what lies in memory, as `in_bfloat16` or
      model.weights.int8.in_bytes; None leaves it as its config says.
    adapter: of an adapter, which is no network: its settings; `config` is of the one it lies on.
    made: of what else is no network (a head), as `config` or `directory` say that the one it is on
      is: makes its parameters for that by a seed, on the mesh in context.
  """

  config: ModelConfig | None
  trained: bool = True
  directory: str = ''
  begun: str = ''
  stored: Callable[[Any], Any] | None = None
  adapter: AdapterConfig | None = None
  made: Callable[[ModelConfig, int], Any] | None = None


@runtime_checkable
class Batches(Protocol):
  """An endless source of batches for one process, whose position is kept in checkpoints."""

  def take(self, state) -> Any:
    """The next batch, numpy arrays [rows of this process, ...]. state: of training, before the step
    that the batch is for: a rollout generates with its models; text looks at nothing of it.
    """

  def state(self) -> dict:
    """The position, JSON-able."""

  def restore(self, position: dict) -> None:
    """Goes on at a position. Raises ValueError where it is one of other data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """What all kinds share, and what a kind says for itself.

  Attributes:
    kind: the tag, as in objectives/kinds.py; a default that nothing else may replace.
    main: name of the model that a run is for: the one of `config.model`, which `config.init` begins
      and generation opens.
    aside: names of models that nothing but training needs, a critic: a merged run has none.
    rows: rows of a batch that make up one record (a pair: 2, a group: its size). They follow one
      another, and stay together. record: what errors call that. joined: how many rows of a batch a
      model reads as one.
    of_records: whether it tunes on records, whose ids are to be those that the model knows.
    completed_by: name of the function (config, prepared, directory of the run, log) -> prepared
      data that adds what batches need of the run's models, on its mesh; '': none does.
    frozen_passes: forward passes of a frozen model for each step. main_passes: of the main one,
      besides those that it learns by.
    loss_unit: of `loss` and `validation_loss`, as reports have it; '' where there is none.
    neftune_alpha: of noise on embeddings (model/drawn.py), where a kind has it as a setting.
    prompted: whether `read` takes prompt=(virtual ids), soft tokens that stand before every text
      that a model reads: counted in lengths, and weighing nothing.
    target_field: name of the setting that says how long targets are, where rows have such.
  """

  kind: str = ''

  # Without annotations: facts of a kind, no settings.
  main = MAIN
  aside = ()
  rows = 1
  record = 'a record'
  joined = 1
  of_records = False
  completed_by = ''
  frozen_passes = 1.0
  main_passes = 0.0
  loss_unit = 'nats/token'
  neftune_alpha = 0.0
  prompted = False
  target_field = 'target_length'

  def __post_init__(self):
    tag = type(self).__dataclass_fields__['kind'].default
    if self.kind != tag:
      raise ValueError(
        f'objective.kind={self.kind!r} cannot have the fields of {tag!r}; give '
        f'--config.objective.kind={self.kind} alone'
      )

  def _check_least(self, **least: int) -> None:
    """Raises ValueError for settings below these, and for infinite ones."""
    for name, bound in least.items():
      value = getattr(self, name)
      if not bound <= value < math.inf:
        raise ValueError(f'objective.{name}={value} must be at least {bound}, and finite')

  # 1. Models.

  def models(self, config: ModelConfig) -> dict[str, Role]:
    """The models by name; `config` is the run's own, of the main one. By default that is all there
    is.
    """
    return {self.main: Role(config)}

  def accepts(self, models: Mapping[str, ModelConfig]) -> None:
    """Raises NotImplementedError or ValueError, saying what would do, where the objective cannot
    train these.
    """

  def begins(self, init: str, adapter: AdapterConfig) -> None:
    """Raises ValueError, saying what would do, where the objective cannot train what begins with
    the run at `init` ('': with none), or under this adapter.
    """

  def check_mesh(self, config: DataConfig, sizes: Mapping[str, int]) -> None:
    """Raises ValueError or NotImplementedError where what it makes of rows does not split over a
    mesh of these sizes.
    """

  # 2. Batches.

  def read(self, config: DataConfig, log: Callable[[str], Any]) -> Any:
    """What batches are cut from, made once: has `tokenizer`, `key` (of all that decides about
    batches), `document_length` (for FLOPs), `rows` (how many there are to train on), and
    `validation_documents()` (texts, for what compressors make of them; may be empty).
    """
    raise NotImplementedError

  def batches(self, prepared, config: DataConfig, rows: Sequence[int]) -> Batches:
    """Training batches; rows: of all rows of a batch, those that this process reads."""
    raise NotImplementedError

  def validation_batches(self, prepared, config: DataConfig, rows: Sequence[int]) -> Iterable:
    """Batches to evaluate on, the same ones each time; may have `parts()`, the same by source,
    which are then evaluated apart, too (data.loader.ValidationBatches); or `of(models)`, those that
    the models themselves make.
    """
    raise NotImplementedError

  def batch_like(self, config: DataConfig) -> Any:
    """A batch as jax.ShapeDtypeStructs [B, T] or [B, ...], without shardings."""
    raise NotImplementedError

  def tokens(self, batch) -> Array:
    """How many of a whole batch's tokens are no padding, [] int32: what a step is said to have
    worked on.
    """
    raise NotImplementedError

  def row_tokens(self, config: DataConfig) -> int | float:
    """Of a row without padding, as `tokens` counts them."""
    return config.sequence_length

  def longest_row(self, config: DataConfig) -> int:
    """Positions that a model needs."""
    return config.sequence_length

  def forward_flops(self, network: ModelConfig, config: DataConfig, document_length: Any) -> float:
    """FLOPs of a forward pass of one of its models, for each of those tokens; document_length: as
    of what was read (a number, or what else the objective reads), None where that is not known.
    """
    return flops.forward_flops_per_token(network, config.sequence_length, document_length)

  def prepare(self, models: Mapping[str, Any], batch) -> Any:
    """The batch with what depends on all of it (advantages whitened, statistics of a group), before
    microbatches are cut; not differentiated. Everything in a batch is [B, ...]: what is one number
    for all is repeated for each row.
    """
    return batch

  # 3. Loss.

  def weights(self, batch) -> dict[str, Float[Array, '']]:
    """The denominator of every term, of a whole prepared batch: its tokens, its examples, its
    pairs, a constant.

    A function of the batch alone, so that it is known before the first microbatch: terms of
    different denominators then share one backward pass, and each is divided by its own once, after
    all microbatches and devices.
    """
    raise NotImplementedError

  def sums(self, models: Mapping[str, Any], batch) -> tuple[dict[str, Float[Array, '']], Sums]:
    """Of any part of a prepared batch: the numerator of every term, which is differentiated; and
    what metrics are made of. Both add up over parts. Of a main model with experts the second has
    `load` (Output.router), which balances them.
    """
    raise NotImplementedError

  def loss(self, models: Mapping[str, Any], batch) -> dict[str, tuple[Array, Array]]:
    """{term: (sum, weight)} of a whole prepared batch; what is minimised is the sum over terms of
    sum / weight.
    """
    terms, _ = self.sums(models, batch)
    weights = self.weights(batch)
    return {name: (total, weights[name]) for name, total in terms.items()}

  # 4. What is said of it.

  def metrics(self, terms: Sums, weights: Sums, sums: Sums) -> dict[str, Array]:
    """Of a step, from what its whole batch added up to; holds `loss`."""
    means = {name: total / or_one(weights[name]) for name, total in terms.items()}
    return {'loss': sum(means.values()), **(means if len(means) > 1 else {})}

  def judged(self, models: Mapping[str, Any], batch) -> Sums:
    """Of a validation batch: what `verdict` needs, to be added up over batches."""
    raise NotImplementedError

  def verdict(self, sums: Mapping[str, float], prepared) -> dict[str, float]:
    """An evaluation from the sums of its batches; the best checkpoint has the lowest
    `validation_loss`. Where there are several sources, sums are also of each, as 'tokens/NAME'.
    """
    raise NotImplementedError


def in_bfloat16(model):
  """A frozen model in half of the memory."""
  return jax.tree.map(lambda p: p.astype(jnp.bfloat16), model)


def or_one(weight: Array) -> Array:
  """A denominator; 1 where nothing was counted, whose numerator is then 0."""
  return jnp.where(weight > 0, weight, 1)
