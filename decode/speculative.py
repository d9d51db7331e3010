"""How does a step make more than one token? Something cheap drafts a few, and the model judges them
all at once.

A drafted token, of law q, is kept with probability min(1, p / q), p being the model's law; in the
place of the first that is not kept comes one drawn from max(p - q, 0). So tokens have the law p
exactly, whatever drafts them (Leviathan et al., arXiv:2211.17192, section 2.3; Chen et al.,
arXiv:2302.01318). Both laws are decode.sampling's, after the same history and in the same
constraint. A step begins with a token that is drawn, and so always makes one; what the step before
rejected is carried over to it.

Random numbers belong to positions. One that was drafted in vain is drafted again with the same
noise: nothing that was kept has seen it.

B rows · k drafted tokens · V vocabulary · S ids of a row
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decode import sampling as laws
from decode.loop import Chunk, DecodeState, Rules, advanced, at, draw, last, next_law, run, scores
from decode.sampling import Stream
from model.cache import Cache
from model.rearranged import shallow
from model.transformer import Decoder
from model.weights import of_rows
from parallel import axes as ax
from parallel.compiler import GENERATION

TRIAL = 32  # drafted tokens after which a row is judged by how many were kept


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Speculation:
  """What speculative generation carries from step to step; its buffers are donated.

  The fields are annotated Any because JAX rebuilds registered dataclasses with tracers,
  specs and placeholders.

  Attributes:
    state: as plain generation has it. memory: the drafter's.
    rejected: [B, V] f32, the law, log q, of the draft that was rejected where the next token will
      be; -inf where none was.
    drafted, accepted: [B] int32, tokens so far.
  """

  state: Any
  memory: Any
  rejected: Any
  drafted: Any
  accepted: Any

  @classmethod
  def of(cls, state: DecodeState, memory) -> 'Speculation':
    """With nothing drafted yet."""
    none = jnp.zeros_like(state.cache.lengths)
    return cls(state, memory, jnp.full_like(state.logits, -jnp.inf), none, jnp.copy(none))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafts:
  """What a drafter proposes.

  Attributes:
    ids: [k, B] int32.
    laws: [k, B, V] f32, log-probabilities by which they were drawn.
    counts: [B] int32, how many count.
  """

  ids: Any
  laws: Any
  counts: Any


# What drafters share. `propose`: what may follow `first` [B], a token that the model's cache does
# not have yet, though `state` has been advanced by it (and holds, of the cache, the lengths only);
# it returns the memory, the model's cache, as long as it was, and Drafts. `read`: the memory after
# tokens [B, T], the first counts[b] of each row, that came without it where rows had these lengths.
# `always`: whether every step judges k drafts, though no row may have any. `least`: f32, a row
# stops drafting where less than this share of its drafts is kept (see gave_up).


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lookup:
  """Drafts what followed the last n tokens where the row has had them before.

  Its memory: the row's ids [B, S].
  """

  n: int = dataclasses.field(metadata={'static': True})
  least: Any = 0.0
  always: bool = dataclasses.field(default=False, metadata={'static': True})

  def propose(self, memory, model, cache, state, first, rules, k, vocabulary):
    lengths = state.cache.lengths
    memory = written(memory, first[:, None], lengths - 1)
    ids, seen = looked_up(memory, lengths, self.n, k)
    # Drafts that are kept are where they belong then; others are overwritten by what comes instead.
    memory, ids = written(memory, ids, lengths), ids.T
    # Nothing was drawn: the law of a draft is all on it, so that it is kept with probability p, and
    # what comes instead is p without it.
    sure = jnp.where(jnp.arange(state.logits.shape[1])[None, None] == ids[..., None], 0.0, -jnp.inf)
    return memory, cache, Drafts(ids, sure, jnp.where(seen, k, 0))

  def read(self, memory, tokens, lengths, counts):
    return written(memory, tokens, lengths)  # what is behind the counts is overwritten later


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftModel:
  """Drafts with another model.

  Its memory: a cache, and the last token that was drafted [B], which the cache does not hold.
  """

  model: Any
  least: Any = 0.0
  always = True

  def propose(self, memory, model, cache, state, first, rules, k, vocabulary):
    counts = jnp.where(state.done, 0, 1)
    drafting, tokens, counts = self.behind(memory, first[:, None], state.cache.lengths - 1, counts)
    drafting, drafts = guessed(self.model, drafting, tokens, counts, state, rules, k, vocabulary)
    return (drafting, drafts.ids[-1]), cache, drafts

  def read(self, memory, tokens, lengths, counts):
    drafting, tokens, counts = self.behind(memory, tokens, lengths, counts)
    return (self.model(tokens, cache=drafting, counts=counts).cache, memory[1])

  def behind(self, memory, tokens, lengths, counts):
    """Its cache without what was rejected; tokens and counts with, in front, the one that it has
    not read where all drafts were kept.
    """
    drafting, tail = memory
    # It reads its drafts but the last: where all of them were kept, the text has one token more
    # than its cache, else its cache has rejected ones behind the text.
    read = jnp.minimum(drafting.lengths, lengths)
    lacks = (read < lengths)[:, None]
    tokens = jnp.where(
      lacks,
      jnp.concatenate([tail[:, None], tokens], 1),
      jnp.concatenate([tokens, tokens[:, -1:]], 1),  # one shape for both: the last does not count
    )
    return taken_back(drafting, read), tokens, jnp.where(counts > 0, counts + lacks[:, 0], 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EarlyExit:
  """Drafts with the model's own first layers, whose part of the model's cache is theirs, too.

  It needs no memory.
  """

  layers: int = dataclasses.field(metadata={'static': True})
  least: Any = 0.0
  always = True

  def propose(self, memory, model, cache, state, first, rules, k, vocabulary):
    # A place of the cache is of all layers that have one set of parameters.
    P = self.layers // model.config.shared_layers
    part = dataclasses.replace(cache, held=cache.held[:P], memory=cache.memory and cache.memory[:P])
    counts = jnp.where(state.done, 0, 1)
    part, drafts = guessed(
      shallow(model, self.layers), part, first[:, None], counts, state, rules, k, vocabulary
    )
    # The lengths stay as they were: the model, when it judges, writes these slots again.
    return memory, dataclasses.replace(cache, held=(*part.held, *cache.held[P:])), drafts

  def read(self, memory, tokens, lengths, counts):
    return memory


def guessed(
  model: Decoder, cache: Cache, tokens, counts, state, rules: Rules, k: int, vocabulary: int
) -> tuple[Cache, Drafts]:
  """k tokens of a model that has to read these first [B, T].

  All of them but the last are in its cache then. state: before the first of them; of its cache it
  has the lengths only.
  """

  def feed(cache, tokens, counts):
    x, cache, _ = model(tokens, cache=cache, counts=counts)
    return cache, scores(model, last(x, jnp.maximum(counts, 1)), vocabulary)

  def guess(state):
    log_law = next_law(state, rules)
    # A draft that fails drafts nothing, and harms nobody.
    state = dataclasses.replace(state, done=state.done | laws.bad(log_law))
    # By noise of its own: with the token's, a draft that was rejected would have told what comes
    # instead.
    ids, real = draw(log_law, rules.sampling, state.cache.lengths, Stream.DRAFT), ~state.done
    return advanced(state, longer(state.cache, real), ids, real, rules), (ids, log_law, real)

  def more(carry, _):
    state, cache = carry
    state, guesses = guess(state)
    cache, logits = feed(cache, guesses[0][:, None], (~state.done).astype(jnp.int32))
    return (dataclasses.replace(state, logits=logits), cache), guesses

  cache, logits = feed(cache, tokens, counts)
  (state, cache), guesses = jax.lax.scan(
    more, (dataclasses.replace(state, logits=logits), cache), length=k - 1
  )
  ids, log_laws, real = jax.tree.map(
    lambda before, last: jnp.concatenate([before, last[None]]), guesses, guess(state)[1]
  )
  return cache, Drafts(ids, log_laws, real.sum(0, dtype=jnp.int32))


@functools.partial(
  jax.jit,
  static_argnames=('steps', 'k', 'pad', 'vocabulary', 'alternatives'),
  donate_argnums=2,
  compiler_options=GENERATION,
)
def speculate_chunk(
  model: Decoder,
  drafter: Any,
  carried: Speculation,
  rules: Rules,
  count: Int[Array, ''] | None = None,
  *,
  steps: int,
  k: int,
  pad: int,
  vocabulary: int = 0,
  alternatives: int = 0,
) -> tuple[Speculation, Chunk]:
  """As loop.decode_chunk: `steps` steps, or `count` of them, each of which makes 1 to k + 1 tokens
  of a row.

  The chunk has k + 1 places for each step, so that what is real is no prefix. No cache needs more
  room than for each row's stop_at.
  """
  model = of_rows(model, carried.state.adapters)

  def step(carried):
    cache = carried.state.cache
    n = cache.lengths
    state, first, broken = begun(carried, rules, alternatives)
    memory, cache, drafts = drafter.propose(
      carried.memory, model, cache, state, first.ids, rules, k, vocabulary
    )
    # Nothing behind a row's stop_at is judged: the cache has no room for it.
    drafting = ~state.done & ~gave_up(carried.drafted, carried.accepted, drafter.least)
    counts = jnp.where(drafting, jnp.clip(state.stop_at - n - 1, 0, drafts.counts), 0)

    def judge(most, cache):
      """With the first `most` drafts of each row: the cache with all that the model has read, and
      what `judged` finds.
      """
      asked = Drafts(drafts.ids[:most], drafts.laws[:most], counts)
      cache, after = _logits(model, cache, first, asked, vocabulary)
      logits = jnp.where(first.real[:, None], after[0], state.logits)
      known = dataclasses.replace(state, logits=logits)
      behind, rejected, more = judged(known, asked, after[1:], rules, alternatives)
      # Of one shape, however many are judged.
      beyond = [(0, k - most)]
      more = jax.tree.map(lambda x: jnp.pad(x, beyond + [(0, 0)] * (x.ndim - 1)), more)
      return cache, behind, rejected, more

    if drafter.always:
      cache, state, rejected, more = judge(k, cache)
    else:
      before = cache, state, carried.rejected
      cache, state, rejected, more = _where_any(counts, k, judge, before)

    kept = more.real.sum(0, dtype=jnp.int32)
    state = dataclasses.replace(state, cache=taken_back(cache, n + first.real + kept))
    tokens = jax.tree.map(_side_by_side, first, more)
    carried = Speculation(
      state=state,
      memory=memory,
      rejected=rejected,
      drafted=carried.drafted + counts,
      accepted=carried.accepted + kept,
    )
    return carried, (tokens, broken, counts, kept)

  # Rows may have ended sooner than their caller knows.
  count = jnp.where(carried.state.done.all(), 0, steps if count is None else count)
  carried, (tokens, *sums) = run(step, carried, steps, count)
  tokens = jax.tree.map(
    lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]), tokens
  )
  ids = jnp.where(tokens.real, tokens.ids, pad)
  broken, drafted, kept = (x.sum(1) for x in sums)
  return carried, dataclasses.replace(
    tokens, ids=ids, broken=broken > 0, drafted=drafted, accepted=kept
  )


def _logits(model, cache, first, drafts, vocabulary):
  """The model's cache with the first token and the drafts, and logits [1 + k, B, V] after each."""
  tokens = jnp.concatenate([first.ids[:, None], drafts.ids.T], 1)
  counts = jnp.where(first.real, 1 + drafts.counts, 0)
  x, cache, _ = model(tokens, cache=cache, counts=counts)
  return cache, jnp.moveaxis(scores(model, x, vocabulary), 1, 0)


def _side_by_side(first, more):
  """[B, 1 + k, ...] of [B, ...] and [k, B, ...]."""
  return jnp.concatenate([first[:, None], jnp.moveaxis(more, 0, 1)], 1)


def _where_any(counts, k, judge, before):
  """What `judge` finds of k drafts, or of none where no row has any: what drafts nothing costs
  nothing.

  before: cache, state and rejected law, as `judge` returns them, in front of the tokens.
  """
  kinds = jax.eval_shape(functools.partial(judge, k), before[0])[-1]
  none = jax.tree.map(lambda x: ax.place(jnp.zeros(x.shape, x.dtype), None, 'batch'), kinds)
  findings, some = (*before, none), counts.any().astype(jnp.int32)
  # Loops of one turn or none: XLA copies the cache for a branch, and none for a loop.
  for most, turns in ((k, some), (0, 1 - some)):
    findings = jax.lax.fori_loop(
      0, turns, lambda _, findings, most=most: judge(most, findings[0]), findings
    )
  return findings


def begun(carried: Speculation, rules: Rules, alternatives: int):
  """The token that a step makes for certain: the state advanced by it, of its cache the length
  only; the token; rows that are broken.
  """
  state = carried.state
  log_law = next_law(state, rules)
  broken = ~state.done & laws.bad(log_law)
  real = ~state.done & ~broken
  # Where the step before rejected a draft, this is what comes instead of it, by the law that is
  # left of p. It is noted with p itself: that is the law of the token, drafts or none.
  ids = draw(residual(log_law, carried.rejected), rules.sampling, state.cache.lengths)
  first = token(state, log_law, ids, real, alternatives)
  state = dataclasses.replace(state, done=state.done | broken)
  return advanced(state, longer(state.cache, real), ids, real, rules), first, broken


def judged(state, drafts: Drafts, after, rules: Rules, alternatives: int):
  """Which drafts are kept: the state after them, the law of what was rejected, and tokens [k, B] of
  a Chunk.

  state: with the model's logits before the first draft. after: [k, B, V], its logits after each.
  """

  # One by one, as plain generation goes: p depends on penalties and the constraint, and these on
  # every draft before that was kept.
  def judge(carry, draft):
    state, rejected, open = carry  # open: rows of which every draft so far was kept
    ids, log_q, after, index = draft
    log_p = next_law(state, rules)
    # What ends a row, or breaks it, ends its drafts: the next step meets it, and says so.
    asked = open & (index < drafts.counts) & ~state.done & ~laws.bad(log_p)
    # Of the draft's position, and independent of the noise by which it was drawn.
    noise = laws.noise(rules.sampling.seed, state.cache.lengths, Stream.ACCEPT)
    kept = asked & accepted(log_p, log_q, ids, noise)
    # The first one that is not kept leaves its law: the token in its place is drawn by what p has
    # over q. A row whose drafts were all kept, or had none, draws its next token by p alone.
    rejected = jnp.where((asked & ~kept)[:, None], log_q, rejected)
    judgement = token(state, log_p, ids, kept, alternatives)

    state = advanced(state, longer(state.cache, kept), ids, kept, rules)
    logits = jnp.where(kept[:, None], after, state.logits)
    return (dataclasses.replace(state, logits=logits), rejected, kept), judgement

  start = state, jnp.full_like(state.logits, -jnp.inf), ~state.done
  index = jnp.arange(drafts.ids.shape[0], dtype=jnp.int32)
  drafted = drafts.ids, drafts.laws, after, index
  (state, rejected, _), tokens = jax.lax.scan(judge, start, drafted)
  return state, rejected, tokens


def accepted(
  log_p: Float[Array, 'B V'],
  log_q: Float[Array, 'B V'],
  ids: Int[Array, 'B'],
  noise: Float[Array, 'B'],
) -> Bool[Array, 'B']:
  """Whether a token of law q is kept as one of law p; noise: uniform in [0, 1)."""
  # With probability min(1, p / q), as noise is below 1: so a token x comes out as a kept draft with
  # q(x) min(1, p(x) / q(x)) = min(p(x), q(x)), never more often than p wants it. What is missing,
  # max(p - q, 0), is what `residual` draws by. Greedy laws are one-hot: the ratio is 1 or 0.
  return noise < jnp.exp(at(log_p, ids) - at(log_q, ids))


def residual(log_p: Float[Array, 'B V'], log_q: Float[Array, 'B V']) -> Float[Array, 'B V']:
  """The law, as logarithms, of what comes instead of a rejected token: max(p - q, 0), made a law; p
  itself where log q is -inf everywhere.
  """
  # A draft is rejected with probability 1 - sum min(p, q) = sum max(p - q, 0) = total: divided by
  # it, what is left makes up exactly what kept drafts lack of p.
  left = jnp.maximum(jnp.exp(log_p) - jnp.exp(log_q), 0)
  total = left.sum(-1, keepdims=True)
  # Where rounding leaves nothing, p and q are the same.
  rejected = (log_q.max(-1, keepdims=True) > -jnp.inf) & (total > 0)
  return jnp.where(rejected, jnp.log(left) - jnp.log(jnp.where(rejected, total, 1)), log_p)


def gave_up(drafted, accepted, least):
  """Rows whose drafts, after a trial, are kept so seldom that they cost more than they save.

  A draft that costs `least` of what a step of the model costs pays when it is kept at least that
  often. This depends on nothing that is measured or that other rows do, so that a seed's text does
  not.
  """
  return (drafted >= TRIAL) & (accepted < least * drafted)


def token(state, log_law, ids, real, alternatives: int) -> Chunk:
  """A token of each row as Chunk has it, without a dimension of tokens."""
  raw, which, likeliest = laws.logprobs(state.logits, ids, alternatives)
  return Chunk(ids, real, raw, at(log_law, ids), which, likeliest, None)


def longer(cache: Cache, real) -> Cache:
  """The lengths of a cache, and nothing else of it, with another token of each row that is real."""
  return Cache((), cache.lengths + real, capacity=cache.capacity)


def taken_back(cache: Cache, lengths: Int[Array, 'B']) -> Cache:
  """The cache without the tokens behind these lengths: their slots count as unused, and are written
  again.
  """
  return dataclasses.replace(cache, lengths=lengths)


def written(
  memory: Int[Array, 'B S'], tokens: Int[Array, 'B T'], start: Int[Array, 'B']
) -> Int[Array, 'B S']:
  """A row's tokens put from `start` on; what passes its end is dropped."""

  def put(memory, tokens, start):
    rows = jnp.arange(memory.shape[0])[:, None]
    where = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return memory.at[rows, where].set(tokens, mode='drop', unique_indices=True)

  return ax.local(put, (('batch', None), ('batch', None), ('batch',)), ('batch', None))(
    memory, tokens, start
  )


def looked_up(
  memory: Int[Array, 'B S'], lengths: Int[Array, 'B'], n: int, k: int
) -> tuple[Int[Array, 'B k'], Bool[Array, 'B']]:
  """What followed the last n of a row's tokens where they were before, the latest time, and whether
  they were.

  What follows up to the row's end may be less than k tokens: then the row goes round there, and it
  follows again.
  """

  def row(ids, length):
    starts = jnp.arange(ids.shape[0], dtype=jnp.int32)
    recent = ids.at[length - n + jnp.arange(n)].get(mode='clip')
    same = (starts + n < length) & (length > n)
    for i in range(n):
      same &= jnp.roll(ids, -i) == recent[i]
    begin = jnp.where(same, starts, -1).max() + n
    follows = begin + jnp.arange(k) % jnp.maximum(length - begin, 1)
    return ids.at[follows].get(mode='clip'), same.any()

  return ax.local(jax.vmap(row), (('batch', None), ('batch',)), (('batch', None), ('batch',)))(
    memory, lengths
  )


@functools.partial(jax.jit, donate_argnums=1)
def resumed(
  drafter: Any, carried: Speculation, ids: Int[Array, 'B T'], real: Bool[Array, 'B T']
) -> Speculation:
  """Where the drafter has read tokens, the first real ones of these, that were made without it.

  Of greedy rows: nothing is rejected.
  """
  counts = real.sum(1, dtype=jnp.int32)
  memory = drafter.read(carried.memory, ids, carried.state.cache.lengths - counts, counts)
  return dataclasses.replace(
    carried, memory=memory, rejected=jnp.full_like(carried.rejected, -jnp.inf)
  )
