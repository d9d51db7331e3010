"""Which token comes next? The one law of what is drawn: by plain, speculative and constrained
generation, and where it is only scored.

The order is fixed: penalties and bias, then the mask of what is allowed, temperature, top-k, top-p,
min-p, each on what the one before left. Every option is traced and per row. Thresholds are found by
bisection, not by sorting the vocabulary.

B rows · V vocabulary · W ids with a bias
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

import names
from decode.options import LAW, TABLE, Options, PerRow
from parallel import axes as ax

SMALLEST_BIAS = 8  # ids that a bias has room for, if it has for any
# The scope of what no call without top-k and top-p runs, and no plan counts.
FILTER = 'only_where_a_row_filters'


class Stream(enum.IntEnum):
  """What a random number is for: a token, a draft of it, whether that is kept.

  A row, seed and position has independent ones for each.
  """

  TOKEN = 0
  DRAFT = 1
  ACCEPT = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bias:
  """What is added to the logits of a few ids. Annotated Any as Sampling is.

  Attributes:
    ids: [B, W] int32, different ones; -1 is none.
    values: [B, W] f32; -inf forbids a token.
  """

  ids: Any
  values: Any

  def added(self, logits: Float[Array, 'B V']) -> Float[Array, 'B V']:
    """Logits with it; where no row of a device has one, at no cost."""
    if not self.ids.shape[1]:
      return logits

    def add():
      B, V = logits.shape
      ids = jnp.where(self.ids < 0, V, self.ids)  # behind the last one: nowhere
      rows = jnp.arange(B, dtype=jnp.int32)[:, None]
      return logits.at[rows, ids].add(self.values, mode='drop')

    return jax.lax.cond((self.ids >= 0).any(), add, lambda: logits)

  def padded(self, width: int) -> 'Bias':
    """With room for so many ids, as numpy arrays. Raises ValueError where that is too little."""
    beyond = width - self.ids.shape[1]
    if beyond < 0 and (self.ids[:, width:] >= 0).any():
      most = int((self.ids >= 0).sum(1).max())
      raise ValueError(f'logit_bias has {most} ids; at most {width} are possible here: give fewer')
    pad = [(0, 0), (0, max(beyond, 0))]
    return Bias(
      np.pad(self.ids[:, :width], pad, constant_values=-1), np.pad(self.values[:, :width], pad)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
  """Options of each row; arrays, so that another value compiles nothing anew.

  The fields are annotated Any because JAX rebuilds registered dataclasses with tracers,
  specs and placeholders.

  Attributes:
    temperature .. frequency_penalty, seed: [B], of the type and in the range that decode.options
      states, which says what each of them does.
    bias: see Bias; without one it has room for no ids.
  """

  temperature: Any
  top_k: Any
  top_p: Any
  min_p: Any
  repetition_penalty: Any
  presence_penalty: Any
  frequency_penalty: Any
  bias: Any
  seed: Any

  def penalises(self) -> Any:
    """Whether each row, [B] bool, asks for a penalty, for which `law` needs its history."""
    return (
      (self.repetition_penalty != 1) | (self.presence_penalty != 0) | (self.frequency_penalty != 0)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
  """What penalties look at. Annotated Any as Sampling is.

  Attributes:
    generated: [B, V] int32, how often each token was generated.
    prompt: [B, V] bool, tokens that the prompt has.
  """

  generated: Any
  prompt: Any

  @classmethod
  def of(cls, tokens: Int[Array, 'B T'], lengths: Int[Array, 'B'], V: int) -> 'History':
    """The history behind prompts of these lengths, padded behind; nothing is generated yet."""

    def mark(tokens, lengths):
      ids = jnp.where(jnp.arange(tokens.shape[1])[None] < lengths[:, None], tokens, V)
      return jax.vmap(lambda row: jnp.zeros(V, bool).at[row].set(True, mode='drop'))(ids)

    prompt = _by_rows(mark, tokens, lengths)
    return cls(jnp.zeros_like(prompt, jnp.int32), prompt)

  def add(self, ids: Int[Array, 'B'], real: Bool[Array, 'B']) -> 'History':
    """With another generated token of each row that is real."""
    hit = (jnp.arange(self.generated.shape[1])[None] == ids[:, None]) & real[:, None]
    return History(self.generated + hit, self.prompt)


def make_sampling(rows: int, *, vocabulary: int = 0, **given: PerRow) -> Sampling:
  """Options for `rows` rows as numpy arrays; each is one value for all rows, or a sequence of one
  for each.

  given: options of the law (decode.options.LAW) by name; what is left out has its default there.
    Ids of logit_bias are below `vocabulary`, the number of logits. Of one seed, row i draws with
    seed_of(seed, i).
  Raises ValueError for a name that is none, and for a value that makes no sense.
  """
  for name in given:
    names.check('option', name, LAW)
  values = {name: given.get(name, TABLE[name].default) for name in LAW}
  logit_bias = values.pop('logit_bias')

  columns = {name: _column(TABLE[name], value, rows) for name, value in values.items()}
  if np.ndim(values['seed']) == 0:
    columns['seed'] = columns['seed'] + np.arange(rows, dtype=np.uint32)  # as seed_of
  return Sampling(bias=_bias(logit_bias, rows, vocabulary), **columns)


def sampling_of(options: Options, prompts: int, vocabulary: int) -> Sampling:
  """The sampling of all rows of a call, the samples of a prompt side by side, each with its
  `sample_seed`. Raises as make_sampling.
  """
  given = {name: getattr(options, name) for name in LAW}
  for name, value in given.items():
    if value is not None and np.ndim(value) and len(value) != prompts:
      raise ValueError(
        f'{name} has {len(value)} values for {prompts} prompts; give one for all, or one for each'
      )
  sampling = make_sampling(prompts, vocabulary=vocabulary, **given)
  if options.rows == 1:
    return sampling

  seeds = [sample_seed(int(seed), i) for seed in sampling.seed for i in range(options.rows)]
  rows = jax.tree.map(lambda x: np.repeat(x, options.rows, 0), sampling)
  return dataclasses.replace(rows, seed=np.array(seeds, np.uint32))


def seed_of(seed: int, row: int) -> int:
  """With which seed a prompt's row draws where one seed is given for all prompts: seed + row,
  and behind 2**32 - 1 comes 0.
  """
  return (seed + row) % 2**32 if row else seed  # the first is judged as it was given


def sample_seed(seed: int, sample: int) -> int:
  """With which seed sample number `sample` of a request is drawn, whose first one has the request's
  own: far from those of requests with seeds nearby, whose noise it would share otherwise.
  """
  if not sample:
    return seed
  return int(np.random.SeedSequence(seed, spawn_key=(sample,)).generate_state(1)[0])


def _column(option, value, rows):
  name, must = option.name, option.range.must
  given = np.asarray(value)
  if given.dtype.kind not in 'iuf':
    raise ValueError(f'{name}={value!r} {must}')
  _check_rows(name, given.shape, rows)

  with np.errstate(over='ignore', invalid='ignore'):
    # What is out of a float's range is judged as what it becomes.
    whole = option.type != np.float32
    values = given if whole else given.astype(np.float32)
    valid = option.range.holds(values)
    if whole:
      valid &= values % 1 == 0
  if not valid.all():
    raise ValueError(f'{name}={given[~valid].ravel()[0].item()} {must}')
  return np.array(np.broadcast_to(values, rows), option.type)


def _bias(logit_bias, rows, vocabulary):
  """A Bias with room for as many ids as a row has, rounded up to a power of two."""
  if logit_bias is None:
    logit_bias = {}
  each = [logit_bias] * rows if isinstance(logit_bias, Mapping) else list(logit_bias)
  _check_rows('logit_bias', (len(each),), rows)
  each = [given or {} for given in each]
  most = max(map(len, each), default=0)
  width = max(SMALLEST_BIAS, 1 << (most - 1).bit_length()) if most else 0
  bias = Bias(np.full((rows, width), -1, np.int32), np.zeros((rows, width), np.float32))
  for row, given in enumerate(each):
    for place, (id_, value) in enumerate(given.items()):
      if not (isinstance(id_, (int, np.integer)) and 0 <= id_ < vocabulary):
        raise ValueError(
          f'logit_bias has the id {id_!r}; ids are whole numbers in [0, vocabulary={vocabulary})'
        )
      bias.ids[row, place] = id_
      bias.values[row, place] = value
      if not bias.values[row, place] < np.inf:
        raise ValueError(
          f'logit_bias={value} of id {id_} must be finite, or -inf to forbid the token'
        )
    if given and np.isneginf(bias.values[row]).sum() == vocabulary:
      raise ValueError(
        f'logit_bias forbids all ids in [0, vocabulary={vocabulary}) of a row; leave at least one'
      )
  return bias


def _check_rows(name, shape, rows):
  if shape not in ((), (rows,)):
    raise ValueError(
      f'{name} has shape {shape} for {rows} rows; give one value for all, or one for each'
    )


def bad(logits: Float[Array, 'B V']) -> Bool[Array, 'B']:
  """Rows that no token can be drawn of, because of a NaN, of +inf, or because nothing is possible:
  of logits, or of their law.
  """
  return ~jnp.isfinite(logits.max(-1))


def penalised(
  logits: Float[Array, 'B V'], sampling: Sampling, history: History | None
) -> Float[Array, 'B V']:
  """Logits, f32, after penalties and bias.

  Without a history, rows that ask for a penalty are NaN.
  """
  logits = logits.astype(jnp.float32)
  if history is None:
    logits = jnp.where(sampling.penalises()[:, None], jnp.nan, logits)
  else:
    generated, repetition = history.generated > 0, sampling.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(history.prompt | generated, repeated, logits)
    logits -= (
      sampling.presence_penalty[:, None] * generated
      + sampling.frequency_penalty[:, None] * history.generated
    )
  return sampling.bias.added(logits)


def law(
  logits: Float[Array, 'B V'],
  sampling: Sampling,
  history: History | None = None,
  allowed: Bool[Array, 'B V'] | None = None,
) -> Float[Array, 'B V']:
  """Log-probabilities, f32, of what is drawn: -inf for tokens that are ruled out,
  one-hot where greedy, NaN for `bad` rows.

  history: what penalties look at; None if no row asks for one.
  allowed: tokens that a constraint leaves; None: all.
  """
  return _by_rows(_law, logits, sampling, history, allowed)


def _law(logits, sampling, history, allowed):
  logits = penalised(logits, sampling, history)
  if allowed is not None:
    # No mask hides that the model is broken.
    logits = jnp.where(allowed | jnp.isnan(logits), logits, -jnp.inf)
  greedy = sampling.temperature[:, None] == 0
  ids = jnp.arange(logits.shape[1])[None]
  best = jnp.where(ids == greatest(logits)[:, None], 0.0, -jnp.inf)
  # From the best downwards, so that no temperature is too small to divide by; but for those that
  # hardware takes for 0.
  below = logits.max(-1, keepdims=True) - logits
  warmth = jnp.maximum(sampling.temperature[:, None], jnp.finfo(jnp.float32).tiny)
  scaled = below / jnp.where(greedy, 1.0, warmth)
  drawn = jax.nn.log_softmax(jnp.where(_kept(below, scaled, sampling), -scaled, -jnp.inf), -1)
  return jnp.where(bad(logits)[:, None], jnp.nan, jnp.where(greedy, best, drawn))


def _kept(below, scaled, sampling):
  """Which tokens top-k, then top-p, then min-p leave; ties at a border stay in."""
  # Floats that are not negative order as their bits do.
  bits = jax.lax.bitcast_convert_type(below, jnp.int32)
  drawn = sampling.temperature > 0
  k, p = sampling.top_k, sampling.top_p
  kept = bits <= _border(bits, drawn & (k > 0), lambda: (jnp.ones_like(bits), k[:, None]))

  def mass():
    weights = jnp.where(kept, jnp.exp(-scaled), 0.0)
    return weights, p[:, None] * weights.sum(-1, keepdims=True)

  return (
    kept
    & (bits <= _border(bits, drawn & (p < 1), mass))
    & (scaled <= -jnp.log(sampling.min_p)[:, None])
  )


def _border(bits, active, measure):
  """[B, 1]: the largest bits before which (theirs not included) weights sum to less than `reach`;
  beyond all in rows not active.

  measure: () -> weights [B, V], reach [B, 1]; not asked for if no row is active,
    as for most callers.
  """

  def bisect():
    weights, reach = measure()

    def halve(i, border):
      higher = border | (1 << (30 - i))
      before = jnp.where(bits < higher, weights, 0).sum(-1, keepdims=True)
      return jnp.where(before < reach, higher, border)

    return jnp.where(active[:, None], jax.lax.fori_loop(0, 31, halve, jnp.zeros_like(none)), none)

  none = jnp.full((bits.shape[0], 1), 2**31 - 1, jnp.int32)
  with jax.named_scope(FILTER):
    return jax.lax.cond(active.any(), bisect, lambda: none)


def noise(
  seed: UInt[Array, 'B'], positions: Int[Array, 'B'], stream: int, shape: tuple[int, ...] = ()
) -> Float[Array, 'B ...']:
  """Uniform numbers in [0, 1), `shape` of them a row; they depend on the row's seed,
  its position and the `Stream` only.
  """

  def draw(seed, position):
    return jax.random.uniform(_key(seed, position, stream), shape, jnp.float32)

  return _by_rows(jax.vmap(draw), seed, positions)


def sample(
  log_law: Float[Array, 'B V'],
  seed: UInt[Array, 'B'],
  positions: Int[Array, 'B'],
  stream: int = Stream.TOKEN,
) -> Int[Array, 'B']:
  """A token of each row by its law, drawn for the absolute position that it will have (the
  Gumbel-max way); any token of `bad` rows.
  """

  def gumbel(seed, position):
    # 'high', because noise of 23 bits ends at 16: large vocabularies would tie there,
    # and rare tokens be drawn too rarely.
    V = log_law.shape[1]
    return jax.random.gumbel(_key(seed, position, stream), (V,), jnp.float32, mode='high')

  def draw(log_law, seed, positions):
    return greatest(log_law + jax.vmap(gumbel)(seed, positions))

  return _by_rows(draw, log_law, seed, positions)


def greatest(x: Float[Array, 'B V']) -> Int[Array, 'B']:
  """jnp.argmax of each row, where it can be without pairs of numbers and ids: XLA on a CPU reduces
  these, and computes what they are made of, one by one.
  """

  def of(x):
    V = x.shape[1]
    first = jnp.where(x == x.max(-1, keepdims=True), jnp.arange(V, dtype=jnp.int32), V).min(-1)
    # NaN is equal to nothing; nor need be what a compiler computes twice.
    return jax.lax.cond(
      (first == V).any(), lambda: jnp.argmax(x, -1).astype(jnp.int32), lambda: first
    )

  return _by_rows(of, x)


def _key(seed, position, stream):
  return jax.random.fold_in(
    jax.random.fold_in(jax.random.key(seed, impl='threefry2x32'), position), stream
  )


def logprobs(
  logits: Float[Array, 'B V'], ids: Int[Array, 'B'], k: int
) -> tuple[Float[Array, 'B'], Int[Array, 'B k'], Float[Array, 'B k']]:
  """Of the model itself, before any option: log-probabilities, f32, of these ids;
  the k most likely ids, and theirs.
  """

  def of(logits, ids):
    log_law = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    likeliest, which = jax.lax.top_k(log_law, k)
    return jnp.take_along_axis(log_law, ids[:, None], -1)[:, 0], which, likeliest

  return _by_rows(of, logits, ids)


def _by_rows(function, *arguments):
  """The function of arrays of rows, each device on its own: nothing is sent,
  not even to ask whether another device's rows filter.
  """
  return ax.local(function, (('batch',),) * len(arguments), ('batch',))(*arguments)
