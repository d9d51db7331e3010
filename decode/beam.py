"""Which texts are likeliest as wholes? Beam search: the best beginnings of each prompt are
continued side by side, in jitted steps.

The semantics are those of transformers (`generate(num_beams=..)`), to which tests hold it. Of all
continuations of a prompt's beams, the W likeliest are looked at: those that end join the prompt's
finished texts, of which the W best are kept, by their log-probability over
length ** length_penalty. The W likeliest that do not end go on. At its last token a prompt's text
ends wherever it is.

A score is the sum of log-probabilities by the model, after penalties, bias and constraint: they
change the log-probabilities, which are not normalised again. A text's length is that of its new
tokens, the one that ended it included.

B prompts · W beams of each · B x W rows, those of a prompt side by side · N room for new tokens
V vocabulary · k alternatives
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from decode import constrain, loop, sampling as laws
from decode.loop import Chunk, DecodeState, Rules
from model import cache as caches
from model.transformer import Decoder
from parallel import axes as ax
from parallel.compiler import GENERATION

EARLY = {False: 0, True: 1, 'never': 2}  # early_stopping, as numbers: see BeamState.early
# What they may be where nothing is drawn.
NOT_DRAWN = {
  'temperature': (0, 1),
  'top_k': (0,),
  'top_p': (1,),
  'min_p': (0,),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
  """W texts of each prompt, the best first. The fields are annotated Any because JAX rebuilds
  registered dataclasses.

  Attributes:
    scores: [B, W] f32; -inf: there is no such text.
    texts: Chunk of [B, W, N] tokens, `processed` being what scores sum up.
  """

  scores: Any
  texts: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamState:
  """What a search carries from token to token; its buffers are donated. Annotated Any as Beams is.

  Attributes:
    rows: DecodeState of the running beams; all of a prompt are done together.
    begun: [B] int32, lengths of the prompts.
    running: scores are sums.
    finished: scores are sums over length ** length_penalty.
    length_penalty: [B] f32; above 0 longer texts gain.
    early: [B] int32, EARLY of early_stopping. Once W texts are finished, True ends the prompt,
      False ends it when the best running beam scores less than the worst of them as it is,
      'never' when that is so at any length it could still have.
    broken: [B] bool, prompts that have ended because the scores of a beam are not numbers.
  """

  rows: Any
  begun: Any
  running: Any
  finished: Any
  length_penalty: Any
  early: Any
  broken: Any


@functools.partial(jax.jit, static_argnames=('beams', 'room', 'alternatives'))
def begin(
  state: DecodeState,
  length_penalty: Float[Array, 'B'],
  early: Int[Array, 'B'],
  *,
  beams: int,
  room: int,
  alternatives: int = 0,
) -> BeamState:
  """A search from prompts that were read once each (loop.prefill).

  room: N. alternatives: k, see Chunk.
  """

  def rows(state):
    return jax.tree.map(lambda x: jnp.repeat(x, beams, 0), state)

  def empty(lengths):
    def zeros(dtype, *more):
      return jnp.zeros((lengths.shape[0], beams, room, *more), dtype)

    texts = Chunk(
      zeros(jnp.int32),
      zeros(bool),
      zeros(jnp.float32),
      zeros(jnp.float32),
      zeros(jnp.int32, alternatives),
      zeros(jnp.float32, alternatives),
      None,
    )
    none = jnp.full((lengths.shape[0], beams), -jnp.inf, jnp.float32)
    # one beam: alike, they would stay so
    return (
      Beams(none.at[:, 0].set(0), texts),
      Beams(none, texts),
      jnp.zeros_like(lengths, bool),
    )

  lengths = state.cache.lengths
  running, finished, broken = _by_prompts(empty, lengths)
  spread = dataclasses.replace(
    _by_prompts(rows, dataclasses.replace(state, cache=None)),
    cache=caches.repeated(state.cache, beams),
  )
  return BeamState(spread, lengths, running, finished, length_penalty, early, broken)


@functools.partial(
  jax.jit, static_argnames='vocabulary', donate_argnums=1, compiler_options=GENERATION
)
def search(
  model: Decoder, state: BeamState, rules: Rules, count: Int[Array, ''], *, vocabulary: int = 0
) -> tuple[BeamState, Bool[Array, 'B']]:
  """`count` more tokens of each prompt's beams, and whether the prompt goes on.

  rules: of all rows; nothing is drawn. vocabulary: as of loop.prefill.
  """

  def step(_, state):
    rows, lengths = state.rows, state.rows.cache.lengths
    allowed = None if rules.automaton is None else constrain.allowed(rules.automaton, rows.places)
    without = dataclasses.replace(state, rows=dataclasses.replace(rows, cache=None))
    state, sources, ids, real = _by_prompts(
      _chosen, without, lengths, rules.sampling, rules.ends, allowed
    )
    moved = dataclasses.replace(
      state.rows, cache=caches.reordered(rows.cache, sources, state.begun)
    )
    x, cache, _ = model(ids[:, None], cache=moved.cache, counts=real.astype(jnp.int32))
    new = loop.advanced(moved, cache, ids, real, rules)
    new = dataclasses.replace(new, logits=loop.scores(model, x[:, 0], vocabulary), done=~real)
    return dataclasses.replace(state, rows=new)

  state = jax.lax.fori_loop(0, count, step, state)
  return state, _by_prompts(
    lambda done, begun: ~done.reshape(begun.shape[0], -1)[:, 0], state.rows.done, state.begun
  )


@jax.jit
def best(state: BeamState) -> tuple[Float[Array, 'B W'], Chunk]:
  """Scores of each prompt's finished texts, the best first, and these,
  as a Chunk of B x W rows of N tokens.

  Of a prompt that is still going on, running beams count as if they ended here.
  """

  def found(state, lengths):
    B, W = state.running.scores.shape
    made = jnp.maximum(lengths[::W] - state.begun, 1)[:, None]
    as_it_is = jnp.where(
      state.rows.done[::W, None],
      -jnp.inf,
      _penalised(state.running.scores, made, state.length_penalty[:, None]),
    )
    beams = jax.vmap(_merged)(state.finished, dataclasses.replace(state.running, scores=as_it_is))
    texts = dataclasses.replace(beams.texts, broken=jnp.broadcast_to(state.broken[:, None], (B, W)))
    return beams.scores, jax.tree.map(lambda x: x.reshape(B * W, *x.shape[2:]), texts)

  return _by_prompts(
    found,
    dataclasses.replace(state, rows=dataclasses.replace(state.rows, cache=None)),
    state.rows.cache.lengths,
  )


def check(options) -> None:
  """Raises ValueError for options (decode.generator.Options) of a search that make no sense,
  alone or together.
  """
  beams, length_penalty, early = options.beams, options.length_penalty, options.early_stopping
  if (
    isinstance(length_penalty, bool)
    or not isinstance(length_penalty, (int, float))
    or not math.isfinite(length_penalty)
  ):
    raise ValueError(
      f'length_penalty={length_penalty!r} must be a finite number; 1.0 ranks texts by the mean of '
      'their log-probabilities'
    )
  if not isinstance(early, (bool, str)) or early not in EARLY:
    raise ValueError(f"early_stopping={early!r} must be False, True or 'never'")
  if beams == 1:
    if length_penalty != 1 or early is not False:
      raise ValueError(
        f'length_penalty={length_penalty} and early_stopping={early!r} are of a search, but '
        'beams=1; ask for 2 or more'
      )
    return
  for name, idle in NOT_DRAWN.items():
    if any(value not in idle for value in np.ravel(getattr(options, name)).tolist()):
      raise ValueError(
        f'{name}={getattr(options, name)!r} with beams={beams}: a search draws nothing; leave '
        f'{name} at {idle[-1]}, or draw with num_samples and without beams'
      )
  for name in ('draft', 'lookup', 'early_exit'):
    if getattr(options, name):
      raise ValueError(
        f'{name} with beams={beams}: a draft guesses one text, a search follows several; leave one '
        'of the two out'
      )
  if options.num_samples > beams:
    raise ValueError(
      f'num_samples={options.num_samples} with beams={beams}: it finds as many texts as it has '
      'beams; ask for fewer'
    )
  if any(isinstance(stop, str) for stop in options.stop):
    raise ValueError(
      f'stop={options.stop!r} with beams={beams}: it ranks by ids, before a text could be cut off; '
      'give ids to stop at, or a constraint that the text keeps to'
    )


def texts(
  generator, watch, rows, state: DecodeState, rules: Rules, options, room: int
) -> Iterator[list[str]]:
  """Searches behind prompts that a decode.generator.Generator has read, and fills its rows,
  options.num_samples of each prompt.

  Rows for which no text is left, where a constraint or logit_bias leaves fewer, are taken out of
  the list. Nothing is said before the end. rules: of all beams. room: see begin. Returns a Report.
  Raises ValueError where no text is possible, FloatingPointError for scores that are not numbers.
  """
  W, n, prompts = options.beams, options.num_samples, state.logits.shape[0]

  def each(value):
    return generator.put(np.full(prompts, value))

  with jax.set_mesh(generator.mesh):
    state = begin(
      state,
      each(np.float32(options.length_penalty)),
      each(np.int32(EARLY[options.early_stopping])),
      beams=W,
      room=room,
      alternatives=max(options.logprobs, 0),
    )

  def advance(state, count):
    with jax.set_mesh(generator.mesh):
      state, goes_on = search(
        generator.model, state, rules, jnp.int32(count), vocabulary=generator.vocabulary
      )
      # The best so far at once: an interrupt may come when the state is given away to the next
      # chunk.
      return (
        state,
        (goes_on, best(state)),
      )

  watch.began(state.rows.cache, int(np.asarray(state.begun)[: len(rows) // n].sum()) * W)
  left, finish, nothing = options.max_new_tokens, 'length', [''] * len(rows)

  def made():
    return [options.max_new_tokens - left] * (len(rows) // n * W)

  count = 1
  state, ahead = watch.first(advance(state, count))
  try:
    while True:
      (goes_on, _), left = ahead, left - count
      count = min(left, options.chunk)
      if count:
        state, ahead = advance(state, count)
      any_ = np.asarray(goes_on).any()
      watch.came(made())
      if not count or not any_:
        break
      yield nothing
  except KeyboardInterrupt:
    finish = 'interrupted'
  scores, found = jax.tree.map(np.asarray, ahead[1])
  for index, row in enumerate(rows):
    prompt, place = divmod(index, n)
    row.add(prompt * W + place, found)
    row.end(finish)
    row.score = float(scores[prompt, place])
    if np.isneginf(scores[prompt, 0]):
      raise ValueError(
        f'a constraint and logit_bias leave no text behind prompt {prompt}; leave one of them out'
      )
  watch.came(made())
  rows[:] = [row for row in rows if not np.isneginf(row.score)]
  yield nothing
  return watch.report(options.seed, rows)


def _by_prompts(function, *arguments):
  """The function of arrays whose first dimension is prompts, or their rows,
  each device on its own: beams never leave theirs.
  """
  return ax.local(function, (('batch',),) * len(arguments), ('batch',))(*arguments)


def _chosen(state, lengths, sampling, ends, allowed):
  """The state, but for cache and logits, after a choice;
  from which of its beams [B, W] a prompt goes on; each row's id; if it goes on.
  """
  rows, (B, W) = state.rows, state.running.scores.shape
  raw = jax.nn.log_softmax(rows.logits, -1)
  law = laws.penalised(raw, sampling, rows.history)
  if allowed is not None:
    # No mask hides that the model is broken.
    law = jnp.where(allowed | jnp.isnan(law), law, -jnp.inf)

  def beams(x):
    return x.reshape(B, W, *x.shape[1:])

  made, most = lengths[::W] - state.begun, rows.stop_at[::W] - state.begun
  new = jax.vmap(_choice)(
    state.running,
    state.finished,
    beams(law),
    beams(raw),
    ends[::W],
    made,
    most,
    state.length_penalty,
    state.early,
  )
  running, finished, sources, ids, goes_on, broken = new
  was = ~rows.done[::W]
  goes_on, broken = was & goes_on & ~broken, was & broken
  kept = was & ~broken

  def freeze(new, old):
    return jnp.where(kept.reshape(B, *(1,) * (new.ndim - 1)), new, old)

  running, finished = jax.tree.map(freeze, (running, finished), (state.running, state.finished))
  sources = jnp.where(goes_on[:, None], sources, jnp.arange(W, dtype=jnp.int32)[None])
  own = (jnp.arange(B, dtype=jnp.int32)[:, None] * W + sources).reshape(-1)
  history, places = jax.tree.map(lambda x: x[own], (rows.history, rows.places))
  rows = dataclasses.replace(rows, history=history, places=places)
  state = dataclasses.replace(
    state, rows=rows, running=running, finished=finished, broken=state.broken | broken
  )
  return state, sources, ids.reshape(-1), jnp.repeat(goes_on, W)


def _choice(running, finished, law, raw, ends, made, most, length_penalty, early):
  """Of one prompt: running and finished beams with a token more,
  from which and with which id they go on, whether they do; if broken.
  """
  W, V = law.shape
  alive = ~jnp.isneginf(running.scores)[:, None]
  sums = jnp.where(alive, running.scores[:, None] + law, -jnp.inf)
  # So many that W of them do not end, whatever the ends are.
  sums, which = jax.lax.top_k(sums.reshape(-1), min(W * (1 + ends.shape[0]), W * V))
  sources, ids = which // V, which % V
  over = (ids[:, None] == ends[None]).any(1) | (made + 1 == most)
  likeliest, alternatives = jax.lax.top_k(raw, running.texts.alternatives.shape[2])

  def longer(chosen):
    source, id_ = sources[chosen], ids[chosen]
    new = Chunk(
      id_,
      jnp.ones_like(id_, bool),
      raw[source, id_],
      law[source, id_],
      alternatives[source],
      likeliest[source],
      None,
    )
    return jax.tree.map(lambda old, x: old[source].at[:, made].set(x), running.texts, new)

  first = jnp.arange(W)
  ended = Beams(
    _penalised(jnp.where(over[:W], sums[:W], -jnp.inf), made + 1, length_penalty), longer(first)
  )
  finished = _merged(finished, ended)
  scores, on = jax.lax.top_k(jnp.where(over, -jnp.inf, sums), W)
  full, worst = ~jnp.isneginf(finished.scores[-1]), finished.scores[-1]  # -inf if it is not full
  length = jnp.where((early == EARLY['never']) & (length_penalty > 0), most, made + 1)
  goes_on = (_penalised(scores[0], length, length_penalty) > worst) & ~(
    full & (early == EARLY[True])
  )
  broken = (alive & ~(law.max(-1, keepdims=True) < jnp.inf)).any()
  return Beams(scores, longer(on)), finished, sources[on], ids[on], goes_on, broken


def _merged(one, other):
  """The W best of two lots of beams of one prompt."""
  scores, which = jax.lax.top_k(jnp.concatenate([one.scores, other.scores]), one.scores.shape[0])
  return Beams(
    scores, jax.tree.map(lambda a, b: jnp.concatenate([a, b])[which], one.texts, other.texts)
  )


def _penalised(scores, length, length_penalty):
  return scores / length.astype(jnp.float32) ** length_penalty
