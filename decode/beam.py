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
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from decode import constrain, loop, sampling as laws
from decode.loop import Chunk, DecodeState, Rules
from decode.options import Options
from decode.report import CallTimer, GenerationReport
from decode.request import INTERRUPTED, Row, raise_where_all_failed
from model import moves
from model.transformer import Decoder
from model.weights import of_rows
from parallel import axes as ax
from parallel.compiler import GENERATION

EARLY = {False: 0, True: 1, 'never': 2}  # early_stopping, as numbers: see BeamState.early


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
      ids=zeros(jnp.int32),
      real=zeros(bool),
      raw=zeros(jnp.float32),
      processed=zeros(jnp.float32),
      alternatives=zeros(jnp.int32, alternatives),
      alternatives_raw=zeros(jnp.float32, alternatives),
      broken=None,
    )
    none = jnp.full((lengths.shape[0], beams), -jnp.inf, jnp.float32)
    # One beam runs: alike, they would stay so.
    one = none.at[:, 0].set(0)
    return Beams(one, texts), Beams(none, texts), jnp.zeros_like(lengths, bool)

  lengths = state.cache.lengths
  running, finished, broken = _by_prompts(empty, lengths)
  spread = dataclasses.replace(
    _by_prompts(rows, dataclasses.replace(state, cache=None)),
    cache=moves.repeated(state.cache, beams),
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

  model = of_rows(model, state.rows.adapters)

  def step(_, state):
    rows, lengths = state.rows, state.rows.cache.lengths
    allowed = None if rules.automaton is None else constrain.allowed(rules.automaton, rows.places)
    without = dataclasses.replace(state, rows=dataclasses.replace(rows, cache=None))
    state, sources, ids, real = _by_prompts(
      _chosen, without, lengths, rules.sampling, rules.ends, allowed
    )
    cache = moves.reordered(rows.cache, sources, state.begun)
    rows = dataclasses.replace(state.rows, cache=cache)

    x, cache, _ = model(ids[:, None], cache=cache, counts=real.astype(jnp.int32))
    rows = loop.advanced(rows, cache, ids, real, rules)
    logits = loop.scores(model, x[:, 0], vocabulary)
    return dataclasses.replace(state, rows=dataclasses.replace(rows, logits=logits, done=~real))

  def goes_on(done, begun):
    return ~done.reshape(begun.shape[0], -1)[:, 0]

  state = jax.lax.fori_loop(0, count, step, state)
  return state, _by_prompts(goes_on, state.rows.done, state.begun)


@jax.jit
def best(state: BeamState) -> tuple[Float[Array, 'B W'], Chunk]:
  """Scores of each prompt's finished texts, the best first, and these, as a Chunk of B x W rows of
  N tokens.

  Of a prompt that is still going on, running beams count as if they ended here.
  """

  def rank(state, lengths):
    B, W = state.running.scores.shape
    made = jnp.maximum(lengths[::W] - state.begun, 1)[:, None]
    as_it_is = _penalised(state.running.scores, made, state.length_penalty[:, None])
    as_it_is = jnp.where(state.rows.done[::W, None], -jnp.inf, as_it_is)
    beams = jax.vmap(_merged)(state.finished, dataclasses.replace(state.running, scores=as_it_is))
    texts = dataclasses.replace(beams.texts, broken=jnp.broadcast_to(state.broken[:, None], (B, W)))
    return beams.scores, jax.tree.map(lambda x: x.reshape(B * W, *x.shape[2:]), texts)

  without = dataclasses.replace(state, rows=dataclasses.replace(state.rows, cache=None))
  return _by_prompts(rank, without, state.rows.cache.lengths)


def texts(
  generator: Any,
  timer: CallTimer,
  rows: list[Row],
  state: DecodeState,
  rules: Rules,
  options: Options,
  room: int,
) -> Generator[list[str], None, GenerationReport]:
  """Searches behind prompts that a decode.loaded.LoadedModel has read, and fills its rows,
  options.num_samples of each prompt.

  Rows for which no text is left, where a constraint or logit_bias leaves fewer, are taken out of
  the list; where none is possible (ValueError), or scores are not numbers (FloatingPointError), the
  first row of the prompt fails, and it is raised if all do. Nothing is said before the end.
  rules: of all beams. room: see begin.
  """
  W, prompts = options.beams, state.logits.shape[0]

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
      return state, (goes_on, best(state))

  used = len(rows) // options.num_samples  # prompts; the others fill the mesh up
  read = int(np.asarray(state.begun)[:used].sum())
  timer.began(state.rows.cache, read, read * W)
  left = most = max(row.most for row in rows)
  nothing = [''] * len(rows)

  def lengths():
    return [most - left] * (used * W)

  count = 1
  state, ahead = timer.first(advance(state, count))
  try:
    while True:
      (goes_on, _), left = ahead, left - count
      count = min(left, options.chunk)
      if count:
        state, ahead = advance(state, count)
      some_go_on = np.asarray(goes_on).any()
      timer.came(lengths())
      if not count or not some_go_on:
        break
      yield nothing
  except KeyboardInterrupt:
    pass  # with what there is

  scores, chunk = jax.tree.map(np.asarray, ahead[1])
  _fill(rows, options, scores, chunk)
  timer.came(lengths())
  rows[:] = [row for row in rows if row.error or not np.isneginf(row.score)]
  raise_where_all_failed(rows)
  yield nothing
  return timer.report(options.seed, rows)


def _fill(rows: list[Row], options: Options, scores, chunk: Chunk) -> None:
  """Gives each row its text of the best of its prompt. The first row of a prompt without any
  fails.
  """
  for index, row in enumerate(rows):
    prompt, place = divmod(index, options.num_samples)
    row.add(prompt * options.beams + place, chunk)
    row.end(INTERRUPTED)  # if it has not ended by now
    row.score = float(scores[prompt, place])
    if np.isneginf(scores[prompt, 0]) and not place and row.error is None:
      row.fail(
        ValueError(
          f'a constraint and logit_bias leave no text behind prompt {prompt}; leave one of them out'
        )
      )


def _by_prompts(function, *arguments):
  """The function of arrays whose first dimension is prompts, or their rows, each device on its own:
  beams never leave theirs.
  """
  return ax.local(function, (('batch',),) * len(arguments), ('batch',))(*arguments)


def _chosen(state, lengths, sampling, ends, allowed):
  """The state, but for cache and logits, after a choice; from which of its beams [B, W] a prompt
  goes on; each row's id; if it goes on.
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
  running, finished, sources, ids, goes_on, broken = jax.vmap(_choice)(
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

  # A prompt that had ended, or breaks now, keeps what it had.
  went_on = ~rows.done[::W]
  goes_on, broken = went_on & goes_on & ~broken, went_on & broken
  kept = went_on & ~broken

  def freeze(after, before):
    return jnp.where(kept.reshape(B, *(1,) * (after.ndim - 1)), after, before)

  running, finished = jax.tree.map(freeze, (running, finished), (state.running, state.finished))
  sources = jnp.where(goes_on[:, None], sources, jnp.arange(W, dtype=jnp.int32)[None])
  moved = (jnp.arange(B, dtype=jnp.int32)[:, None] * W + sources).reshape(-1)
  history, places = jax.tree.map(lambda x: x[moved], (rows.history, rows.places))
  rows = dataclasses.replace(rows, history=history, places=places)
  state = dataclasses.replace(
    state, rows=rows, running=running, finished=finished, broken=state.broken | broken
  )
  return state, sources, ids.reshape(-1), jnp.repeat(goes_on, W)


def _choice(running, finished, law, raw, ends, made, most, length_penalty, early):
  """Of one prompt: running and finished beams with a token more, from which and with which id they
  go on, whether they do; if broken.
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
    token = Chunk(
      ids=id_,
      real=jnp.ones_like(id_, bool),
      raw=raw[source, id_],
      processed=law[source, id_],
      alternatives=alternatives[source],
      alternatives_raw=likeliest[source],
      broken=None,
    )
    return jax.tree.map(lambda old, x: old[source].at[:, made].set(x), running.texts, token)

  # Only of the W likeliest may one end, as transformers has it.
  ended = _penalised(jnp.where(over[:W], sums[:W], -jnp.inf), made + 1, length_penalty)
  finished = _merged(finished, Beams(ended, longer(jnp.arange(W))))
  scores, on = jax.lax.top_k(jnp.where(over, -jnp.inf, sums), W)

  full, worst = ~jnp.isneginf(finished.scores[-1]), finished.scores[-1]  # -inf if it is not full
  # A sum only falls, but above 0 the penalty lifts it with every token: 'never' judges the best
  # running beam by the length at which it could score best.
  length = jnp.where((early == EARLY['never']) & (length_penalty > 0), most, made + 1)
  hopes = _penalised(scores[0], length, length_penalty) > worst
  goes_on = hopes & ~(full & (early == EARLY[True]))
  broken = (alive & ~(law.max(-1, keepdims=True) < jnp.inf)).any()
  return Beams(scores, longer(on)), finished, sources[on], ids[on], goes_on, broken


def _merged(one, other):
  """The W best of two lots of beams of one prompt."""
  scores, which = jax.lax.top_k(jnp.concatenate([one.scores, other.scores]), one.scores.shape[0])
  texts = jax.tree.map(lambda a, b: jnp.concatenate([a, b])[which], one.texts, other.texts)
  return Beams(scores, texts)


def _penalised(scores, length, length_penalty):
  return scores / length.astype(jnp.float32) ** length_penalty
