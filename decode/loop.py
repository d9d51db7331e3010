"""How are tokens generated? Prefill, then jitted chunks of steps over a cache that is rewritten in
place. Or, where a cache stays and rows join and leave it (decode.engine): join, read, the same
chunks, release.

B rows · J of them that a call is about · T tokens · C tokens of a chunk · V vocabulary ·
M ids that end a row · k alternatives
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from decode import constrain, sampling as laws
from decode.sampling import Bias, History, Sampling, make_sampling
from model.begun import begun
from model.cache import Cache, rows_of, with_rows
from model.moves import copied, taken
from model.transformer import Decoder
from model.weights import of_rows
from parallel import axes as ax
from parallel.compiler import GENERATION


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """What generation carries from token to token; its buffers are donated.

  The fields are annotated Any because JAX rebuilds registered dataclasses with tracers,
  specs and placeholders.

  Attributes:
    cache: of all tokens so far. logits: [B, V] f32 for each row's next token.
    done: [B] bool, rows that have ended.
    stop_at: [B] int32, length, prompt included, at which a row ends at the latest.
    history: what penalties look at.
    places: [B] int32, where each row is in the automaton of constraints; None without one.
    adapters: [B] int32, of each row, see model.weights.bank.Bank.index; None for a model without.
  """

  cache: Any
  logits: Any
  done: Any
  stop_at: Any
  history: Any
  places: Any = None
  adapters: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
  """What a call asks of its rows; arrays, so that other values compile nothing anew.

  Attributes:
    sampling: see there.
    ends: [B, M] int32, ids that end a row and belong to it; -1 is none.
    automaton: of constraints, or None.
  """

  sampling: Any
  ends: Any
  automaton: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
  """Tokens of each row. Where `real` is False, all else means nothing.

  Attributes:
    ids: [B, C] int32. real: [B, C] bool, whether it is the row's (and not after its end).
    raw: [B, C] f32, log-probability by the model.
    processed: [B, C] f32, by the law that it was drawn from (decode.sampling).
    alternatives: [B, C, k] int32, the ids that the model finds likeliest.
    alternatives_raw: [B, C, k] f32, their log-probabilities.
    broken: [B] bool, rows that have ended because the model's scores are not finite.
    drafted, accepted: [B] int32, tokens that a draft proposed, and those of them that were kept;
      None without drafts.
  """

  ids: Any
  real: Any
  raw: Any
  processed: Any
  alternatives: Any
  alternatives_raw: Any
  broken: Any
  drafted: Any = None
  accepted: Any = None


@functools.partial(jax.jit, static_argnames='vocabulary', donate_argnums=3)
def prefill(
  model: Decoder,
  tokens: Int[Array, 'B T'],
  lengths: Int[Array, 'B'],
  cache: Cache,
  stop_at: Int[Array, 'B'],
  source: tuple[Int[Array, 'B S'], Int[Array, 'B']] | None = None,
  places: Int[Array, 'B'] | None = None,
  adapters: Int[Array, 'B'] | None = None,
  *,
  vocabulary: int = 0,
) -> DecodeState:
  """Reads prompts into an empty cache.

  tokens: each row's prompt, then padding, whose ids are free: it is never seen.
  lengths: of the prompts, at least 1.
  source: of an encoder-decoder, what the encoder reads: ids, and how many of them.
  places: where rows begin in the automaton of their constraints. adapters: see DecodeState.
  vocabulary: ids from here on are never generated; 0: all may be.
  """
  model = of_rows(model, adapters)
  if source is not None:
    cache = model.read(cache, *source)
  x, cache, _ = model(tokens, cache=cache, counts=lengths, fresh=True)
  logits = scores(model, last(x, lengths), vocabulary)
  return DecodeState(
    cache=cache,
    logits=logits,
    done=lengths >= stop_at,
    stop_at=stop_at,
    history=History.of(tokens, lengths, logits.shape[1]),
    places=places,
    adapters=adapters,
  )


@functools.partial(jax.jit, static_argnames='vocabulary', donate_argnums=1)
def append(
  model: Decoder,
  state: DecodeState,
  tokens: Int[Array, 'B T'],
  counts: Int[Array, 'B'],
  *,
  vocabulary: int = 0,
) -> DecodeState:
  """Reads more of each row's prompt: the first counts[b] of its tokens; rows whose count is 0 stay
  as they are.
  """
  model = of_rows(model, state.adapters)
  x, cache, _ = model(tokens, cache=state.cache, counts=counts)
  logits = scores(model, last(x, jnp.maximum(counts, 1)), vocabulary)
  logits = jnp.where((counts > 0)[:, None], logits, state.logits)
  prompt = state.history.prompt | History.of(tokens, counts, logits.shape[1]).prompt
  return dataclasses.replace(
    state,
    cache=cache,
    logits=logits,
    history=dataclasses.replace(state.history, prompt=prompt),
    done=cache.lengths >= state.stop_at,
  )


@jax.jit
def spread(
  state: DecodeState,
  rows: Int[Array, 'B'],
  stop_at: Int[Array, 'B'],
  places: Int[Array, 'B'] | None = None,
) -> DecodeState:
  """Rows that go on from prompts that were read once each.

  state: after the prompts. rows: from which of its device's prompts each row goes on, see
  model.cache.Slots. stop_at, places: of the rows, see DecodeState.
  """
  cache = taken(state.cache, rows)
  without = dataclasses.replace(state, cache=None, places=None)
  return dataclasses.replace(
    rows_of(without, rows),
    cache=cache,
    done=cache.lengths >= stop_at,
    stop_at=stop_at,
    places=places,
  )


@functools.partial(jax.jit, donate_argnums=(0, 1))
def join(
  state: DecodeState,
  rules: Rules,
  rows: Int[Array, 'J'],
  joining: Rules,
  stop_at: Int[Array, 'J'],
  places: Int[Array, 'J'],
  adapters: Int[Array, 'J'] | None = None,
) -> tuple[DecodeState, Rules]:
  """Rows begin anew, with nothing of what was there before: empty, and not to be decoded until
  `read` has come to the end of their prompts.

  rules, joining: of all rows, and of these; without automata. rows: as model.cache.Slots numbers
  them. stop_at, places, adapters: see DecodeState.
  """
  cache = state.cache
  lengths, none = cache.lengths_of(rows), jnp.zeros_like(rows)
  cache = cache.longer(cache.held, -lengths, rows)
  history = rows_of(state.history, rows)
  state = DecodeState(
    cache=cache,
    logits=state.logits,
    done=with_rows(state.done, rows, none == 0),
    stop_at=with_rows(state.stop_at, rows, stop_at),
    history=with_rows(state.history, rows, jax.tree.map(jnp.zeros_like, history)),
    places=with_rows(state.places, rows, places),
    adapters=None if adapters is None else with_rows(state.adapters, rows, adapters),
  )
  return state, with_rows(rules, rows, joining)


@functools.partial(jax.jit, static_argnames='vocabulary', donate_argnums=1)
def read(
  model: Decoder,
  state: DecodeState,
  rows: Int[Array, 'J'],
  tokens: Int[Array, 'J T'],
  counts: Int[Array, 'J'],
  ends: Bool[Array, 'J'],
  source: tuple[Int[Array, 'J S'], Int[Array, 'J']] | None = None,
  *,
  vocabulary: int = 0,
) -> DecodeState:
  """Reads a part of the prompts of some rows straight into their slots: the first counts[j] of the
  tokens; all other rows stay as they are.

  rows: as model.cache.Slots numbers them. ends: whether a row's prompt ends with this part, so that
  the row is decoded from now on. source, vocabulary: as of prefill.
  """
  before = rows_of(dataclasses.replace(state, cache=None), rows)
  model = of_rows(model, before.adapters)
  cache = state.cache if source is None else model.read(state.cache, *source, rows)
  x, cache, _ = model(tokens, cache=cache, counts=counts, rows=rows)
  logits = scores(model, last(x, jnp.maximum(counts, 1)), vocabulary)
  logits = jnp.where((counts > 0)[:, None], logits, before.logits)
  prompt = before.history.prompt | History.of(tokens, counts, logits.shape[1]).prompt
  done = ~ends | (cache.lengths_of(rows) >= before.stop_at)
  return dataclasses.replace(
    state,
    cache=cache,
    logits=with_rows(state.logits, rows, logits),
    done=with_rows(state.done, rows, done),
    history=dataclasses.replace(
      state.history, prompt=with_rows(state.history.prompt, rows, prompt)
    ),
  )


@functools.partial(jax.jit, donate_argnums=0)
def share(state: DecodeState, sources: Int[Array, 'J'], rows: Int[Array, 'J']) -> DecodeState:
  """Rows that have joined go on from prompts which others have just read to their ends, as if they
  had read them themselves.

  sources, rows: whose prompts, and who goes on from them, as model.cache.Slots numbers them.
  """
  cache = copied(state.cache, sources, rows)
  logits, prompt = rows_of((state.logits, state.history.prompt), sources)
  done = cache.lengths_of(rows) >= rows_of(state.stop_at, rows)
  history = dataclasses.replace(state.history, prompt=with_rows(state.history.prompt, rows, prompt))
  return dataclasses.replace(
    state,
    cache=cache,
    logits=with_rows(state.logits, rows, logits),
    done=with_rows(state.done, rows, done),
    history=history,
  )


@functools.partial(jax.jit, static_argnames='windows', donate_argnums=0)
def resume(
  state: DecodeState,
  sources: Int[Array, 'J'],
  rows: Int[Array, 'J'],
  counts: Int[Array, 'J'],
  prompt: Bool[Array, 'J V'],
  *,
  windows: tuple[int, ...],
) -> DecodeState:
  """Rows that have joined have read the first tokens of their prompts already, as others have.

  sources, rows: who has read them, and who goes on from there, as model.cache.Slots numbers them.
  counts: how many. prompt: which ids are among them. windows: of every place of the cache.
  """
  history = state.history
  return dataclasses.replace(
    state,
    cache=begun(state.cache, sources, rows, counts, windows),
    history=dataclasses.replace(history, prompt=with_rows(history.prompt, rows, prompt)),
  )


@functools.partial(jax.jit, donate_argnums=(0, 1))
def release(
  state: DecodeState, rules: Rules, leaving: Bool[Array, 'B']
) -> tuple[DecodeState, Rules]:
  """Rows leave: ended and empty, so that no step pays for what they held, nor, as they ask for
  nothing any more, for their options.

  rules: without an automaton.
  """

  def reset(state, lengths, sampling, leaving):
    idle = idle_sampling(leaving.shape[0], sampling.bias.ids.shape[1])
    state = dataclasses.replace(
      state,
      done=state.done | leaving,
      stop_at=jnp.where(leaving, 0, state.stop_at),
      places=jnp.where(leaving, constrain.FREE, state.places),
    )

    def cleared(x, nothing):
      return jnp.where(leaving.reshape(-1, *(1,) * (x.ndim - 1)), nothing, x)

    return state, jnp.where(leaving, 0, lengths), jax.tree.map(cleared, sampling, idle)

  run = ax.local(reset, (('batch',),) * 4, ('batch',))
  without = dataclasses.replace(state, cache=None)
  after, lengths, sampling = run(without, state.cache.lengths, rules.sampling, leaving)
  cache = dataclasses.replace(state.cache, lengths=lengths)
  return dataclasses.replace(after, cache=cache), dataclasses.replace(rules, sampling=sampling)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def hold(
  state: DecodeState,
  kept: tuple[Bool[Array, 'B'], Int[Array, 'B']],
  leaving: Bool[Array, 'B'],
  returning: Bool[Array, 'B'],
) -> tuple[DecodeState, tuple[Bool[Array, 'B'], Int[Array, 'B']]]:
  """Rows wait, ended and empty to all others, and go on later as if nothing had been.

  kept: of rows that wait, whether they had ended, and how many tokens they hold.
  """

  def move(done, lengths, kept, leaving, returning):
    mine = done, lengths
    nothing = jnp.ones_like(done), jnp.zeros_like(lengths)
    back = [jnp.where(returning, was, is_now) for was, is_now in zip(kept, mine)]
    gone = [jnp.where(leaving, none, is_now) for none, is_now in zip(nothing, back)]
    kept = [jnp.where(leaving, is_now, was) for is_now, was in zip(mine, kept)]
    return *gone, tuple(kept)

  rows = ('batch',)
  run = ax.local(move, (rows, rows, (rows, rows), rows, rows), (rows, rows, (rows, rows)))
  done, lengths, kept = run(state.done, state.cache.lengths, kept, leaving, returning)
  cache = dataclasses.replace(state.cache, lengths=lengths)
  return dataclasses.replace(state, cache=cache, done=done), kept


def idle_sampling(rows: int, width: int) -> Sampling:
  """Of rows that no one uses, as numpy arrays: greedy, without bias, which is cheapest.

  width: ids that a bias has room for.
  """
  bias = Bias(np.full((rows, width), -1, np.int32), np.zeros((rows, width), np.float32))
  return dataclasses.replace(make_sampling(rows, temperature=0.0), bias=bias)


@functools.partial(
  jax.jit,
  static_argnames=('steps', 'pad', 'vocabulary', 'alternatives'),
  donate_argnums=1,
  compiler_options=GENERATION,
)
def decode_chunk(
  model: Decoder,
  state: DecodeState,
  rules: Rules,
  count: Int[Array, ''] | None = None,
  *,
  steps: int,
  pad: int,
  vocabulary: int = 0,
  alternatives: int = 0,
) -> tuple[DecodeState, Chunk]:
  """`steps` more tokens of each row, or only `count` of them; where none is made, behind a row's
  end, ids are `pad`.

  vocabulary: as of prefill. alternatives: k, see Chunk.
  """
  model = of_rows(model, state.adapters)

  def step(state):
    log_law = next_law(state, rules)
    broken = ~state.done & laws.bad(log_law)
    state = dataclasses.replace(state, done=state.done | broken)
    real = ~state.done
    ids = jnp.where(state.done, pad, draw(log_law, rules.sampling, state.cache.lengths))
    raw, which, likeliest = laws.logprobs(state.logits, ids, alternatives)

    # A row that has ended stays as it is.
    x, cache, _ = model(ids[:, None], cache=state.cache, counts=real.astype(jnp.int32))
    logits = jnp.where(real[:, None], scores(model, x[:, 0], vocabulary), state.logits)
    state = dataclasses.replace(advanced(state, cache, ids, real, rules), logits=logits)
    return state, Chunk(ids, real, raw, at(log_law, ids), which, likeliest, broken)

  state, chunk = run(step, state, steps, count)
  ids = jnp.where(chunk.real, chunk.ids, pad)
  return state, dataclasses.replace(chunk, ids=ids, broken=chunk.broken.any(1))


def run(step, state, steps: int, count=None):
  """`step` again and again, at most `steps` times: the last state, and what each step found, side
  by side in dimension 1.
  """

  def into(index, carry):
    state, before = carry
    state, findings = step(state)

    def put(all, x):
      return jax.lax.dynamic_update_index_in_dim(all, x[:, None], index, 1)

    return state, jax.tree.map(put, before, findings)

  kinds = jax.eval_shape(lambda state: step(state)[1], state)
  none = jax.tree.map(
    lambda x: ax.place(jnp.zeros((x.shape[0], steps, *x.shape[1:]), x.dtype), 'batch'), kinds
  )
  return jax.lax.fori_loop(0, steps if count is None else count, into, (state, none))


def next_law(state: DecodeState, rules: Rules):
  """Log-probabilities [B, V] that each row's next token is drawn by."""
  allowed = None if rules.automaton is None else _allowed(rules.automaton, state)
  return laws.law(state.logits, rules.sampling, state.history, allowed)


def _allowed(automaton, state):
  """[B, V]: what constraints leave of the vocabulary, at no cost where no row has one."""

  def everything():
    shape = state.logits.shape
    return ax.place(jnp.ones(shape, bool, out_sharding=ax.out('batch', None)), 'batch', None)

  constrained = (state.places != constrain.FREE).any()
  return jax.lax.cond(constrained, lambda: constrain.allowed(automaton, state.places), everything)


def draw(log_law, sampling: Sampling, positions, stream=laws.Stream.TOKEN):
  """A token of each row by its law."""

  def greedy():
    # Most callers need no noise, which is what sampling costs.
    return laws.greatest(log_law)

  return jax.lax.cond(
    (sampling.temperature > 0).any(),
    lambda: laws.sample(log_law, sampling.seed, positions, stream),
    greedy,
  )


def advanced(state: DecodeState, cache: Cache, ids, real, rules: Rules) -> DecodeState:
  """The state after a token of each row that is real, but for its logits."""
  ended = real & (ids[:, None] == rules.ends).any(1)
  done = state.done | ended | (cache.lengths >= state.stop_at)
  history = state.history.add(ids, real)
  places = state.places
  if rules.automaton is not None:
    places = jnp.where(real, constrain.advance(rules.automaton, places, ids), places)
  return dataclasses.replace(state, cache=cache, done=done, history=history, places=places)


def at(x, ids):
  """x[b, ids[b]] of [B, V]."""
  return jnp.take_along_axis(x, ids[:, None], 1)[:, 0]


def last(x, lengths):
  """[B, D] of [B, T, D]: of each row's last token."""
  chosen = jnp.arange(x.shape[1])[None] == lengths[:, None] - 1
  return jnp.where(chosen[..., None], x, 0).sum(1)


def scores(model, x, vocabulary):
  """Logits [.., V] of hidden states, those of ids from `vocabulary` on at -inf."""
  # Sampling ranks the whole vocabulary of a row.
  logits = ax.place(model.logits(x), 'batch', *(None,) * (x.ndim - 1))
  if not vocabulary:
    return logits
  inside = jnp.arange(logits.shape[-1]) < vocabulary
  return jnp.where(jnp.expand_dims(inside, range(logits.ndim - 1)), logits, -jnp.inf)
