"""How likely does a model find texts behind texts? What several of them follow is read once for all
of them.

Pairs are laid into few shapes, so that a stream of any length compiles a bounded number of programs
and takes a bounded memory: contexts of about the same length side by side, rounded up to a bucket.

B contexts that are read together · J continuations behind them · T length · M tokens of a
continuation · S of a source · W words · D width
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from decode.loaded import LoadedModel, bucket
from decode.loop import last
from model.cache import APPEND, init_cache, rows_of
from model.logprobs import logprobs, logprobs_and_greedy
from model.moves import taken
from model.vocabulary import TOKENS, Law
from parallel import axes as ax, mesh

ROWS = 64  # continuations that are read side by side, at most
HELD = 2**15  # tokens that these hold at a time, at most, but for a row that is longer
CACHED = 2**12  # the same on a CPU, in whose cache a layer's activations then stay
LONG = 256  # tokens of a row from which on a batch is rather cut in two than filled up
SHARED = 16  # tokens of a context from which on it pays to read it apart from what follows it

Ids = Sequence[int]


class PairScore(NamedTuple):
  """Of a continuation behind its context.

  Attributes:
    logprob: of all of its tokens, summed, in nats. tokens: how many these are.
    greedy: whether a model that takes the likeliest token each time writes it; not where the
      model's scores are not finite.
  """

  logprob: float
  tokens: int
  greedy: bool


class _Group(NamedTuple):
  """A context, and what follows it: (index of the pair, its continuation)."""

  context: tuple[int, ...]
  behind: list[tuple[int, tuple[int, ...]]]

  @property
  def longest(self) -> int:
    return max(len(ids) for _, ids in self.behind)


def score_pairs(
  model: LoadedModel, contexts: Sequence[Ids], continuations: Sequence[Ids]
) -> list[PairScore]:
  """Scores of pairs of ids, in their order; a context that several have is read once.

  contexts: what the model reads, with all that begins a text (bos); of an encoder-decoder what its
    encoder reads, whose decoder writes the continuation from its beginning on.
  continuations: as many, each behind its context.

  Which pairs are beside which, and in which order, changes rounding only. Raises ValueError for an
  empty one, for a pair that passes the model's positions (see `room`; cut the context), and for an
  encoder.
  """
  if not model.model.config.causal:
    raise ValueError('an encoder writes nothing behind a text; ask it for words in a mask')
  groups = _grouped(model, contexts, continuations)
  scores: list[PairScore | None] = [None] * len(contexts)
  apart = model.model.config.encoder_layers > 0
  whole = [g for g in groups if not apart and (len(g.behind) == 1 or len(g.context) < SHARED)]
  shared = [g for g in groups if apart or not (len(g.behind) == 1 or len(g.context) < SHARED)]
  for pairs, sums in (*_whole(model, whole), *_shared(model, shared)):
    for row, (index, ids) in pairs.items():
      scores[index] = PairScore(float(sums[0][row]), len(ids), bool(sums[1][row]))
  return scores


def room(model: LoadedModel, continuation: int) -> int:
  """Tokens that a context can have in front of a continuation of so many, the last of which the
  model need not read; sys.maxsize where there is no end of them.
  """
  if model.model.config.encoder_layers or model.context == sys.maxsize:
    return model.context
  return model.context + 1 - continuation


def _grouped(model: LoadedModel, contexts, continuations) -> list[_Group]:
  """Pairs by context, in an order that depends on nothing but these; none has more than ROWS
  continuations.
  """
  if len(contexts) != len(continuations):
    raise ValueError(
      f'{len(contexts)} contexts and {len(continuations)} continuations are no pairs; give as many'
    )
  by_context: dict[tuple[int, ...], list] = {}
  for i, pair in enumerate(zip(contexts, continuations)):
    if not all(map(len, pair)):
      raise ValueError(
        f'pair {i} has {"a context" if len(pair[1]) else "a continuation"} of no ids'
      )
    context, ids = (tuple(map(int, each)) for each in pair)
    if len(context) > room(model, len(ids)):
      raise ValueError(
        f'pair {i}: {len(context)} tokens and {len(ids)} behind them pass {model.plain.limit}; cut '
        f'the context to {room(model, len(ids))}'
      )
    by_context.setdefault(context, []).append((i, ids))
  groups = [
    _Group(context, behind[first : first + ROWS])
    for context, behind in by_context.items()
    for first in range(0, len(behind), ROWS)
  ]
  # Beside which they are filled up least: contexts of a bucket, by the longest of what follows.
  return sorted(groups, key=lambda g: (length_of(len(g.context), 0), g.longest, g.context))


def side_by_side(length: int, parts: int) -> int:
  """How many rows of so many tokens are read together: a power of two for each part."""
  held = CACHED * parts if mesh.platform() == 'cpu' else HELD
  fit = max(1, min(ROWS, held // length) // parts)
  return (1 << fit.bit_length() - 1) * parts


def length_of(tokens: int, limit: int, halves: int = 128) -> int:
  """A bucket for texts: powers of two, and what is half way between them beyond `halves`; no more
  than the limit, if that is not 0.
  """
  least = bucket(tokens)
  half = least // 4 * 3
  return min(half if tokens <= half and half > halves else least, limit or sys.maxsize)


def _few(tokens: int) -> int:
  """A bucket for continuations. Finer ones would fill up less, and compile for longer than that."""
  return 1 if tokens == 1 else -(-tokens // 8) * 8 if tokens <= 32 else bucket(tokens)


# One continuation, or next to no context: a row of its own, by the pass that training makes.


def _whole(model: LoadedModel, groups: list[_Group]) -> Iterator[tuple[dict, tuple]]:
  """({row: pair}, what its program says of all rows) of pairs that share nothing."""
  soft, limit = model.plain.soft, model.plain.positions
  flat = [
    (len(soft) + len(g.context) + len(ids) - 1, i, ids, g) for g in groups for i, ids in g.behind
  ]
  flat.sort(key=lambda pair: (pair[0], len(pair[2]), pair[1]))
  while flat:
    size = side_by_side(length_of(flat[0][0], limit), model.parts)
    # Sorted, the last of a batch is the longest: longer ones make the batch smaller.
    while size > model.parts and size > side_by_side(
      length_of(flat[min(size, len(flat)) - 1][0], limit), model.parts
    ):
      size //= 2
    if len(flat) < size and flat[-1][0] > LONG:
      size = model.parts << max(1, len(flat) // model.parts).bit_length() - 1
    here, flat = flat[:size], flat[size:]
    B = min(size, bucket(-(-len(here) // model.parts), 1) * model.parts)
    T = length_of(here[-1][0], limit)
    M = min(T, bucket(max(len(ids) for _, _, ids, _ in here), 8))
    tokens = np.full((B, T), model.tokenizer.pad, np.int32)
    targets, counts = np.zeros((B, M), np.int32), np.zeros(B, np.int32)
    begins = np.zeros(B, np.int32)
    for row, (length, _, ids, group) in enumerate(here):
      tokens[row, :length] = [*soft, *group.context, *ids[:-1]]
      targets[row, : len(ids)], counts[row] = ids, len(ids)
      begins[row] = len(soft) + len(group.context) - 1
    with jax.set_mesh(model.mesh):
      arrays = map(model.put, (tokens, begins, targets, counts))
      sums = _alone(model.model, *arrays, vocabulary=model.vocabulary)
      yield {row: (i, ids) for row, (_, i, ids, _) in enumerate(here)}, jax.device_get(sums)


@functools.partial(jax.jit, static_argnames='vocabulary')
def _alone(model, tokens, begins, targets, counts, *, vocabulary):
  """([B] log-probabilities, [B] whether greedy) of targets [B, M], the first counts [B] of each,
  the first of which the token at begins [B] of tokens [B, T] foretells.
  """
  with ax.whole_rows(tokens.shape[1] % ax.size('length') > 0):
    x = ax.place(model(ax.place(tokens, *TOKENS)).hidden, 'batch', None, None)

  def take(x, begins):
    at = begins[:, None] + jnp.arange(targets.shape[1])[None]
    return jnp.take_along_axis(x, at[..., None], 1, mode='clip')

  rows = ('batch', None, None)
  hidden = ax.local(take, (rows, ('batch',)), rows)(x, begins)
  return _judged(model, hidden, targets, counts, vocabulary)


# Several continuations of one context: the cache that was filled by it is copied for each.


def _shared(model: LoadedModel, groups: list[_Group]) -> Iterator[tuple[dict, tuple]]:
  """As _whole, of groups whose contexts are read once."""
  queue, encoder = list(groups), model.model.config.encoder_layers > 0
  front, parts = model.plain, model.parts
  while queue:
    here, rows = _together(queue, model)
    queue = queue[len(here) :]
    by_part = [[g for g, part in here if part == p] for p in range(parts)]
    B = bucket(max(map(len, by_part)), 1)
    M = _few(max(g.longest for g, _ in here))
    T = length_of(max(len(front.whole(g.context)) for g, _ in here), front.positions)
    filled = _laid(model, by_part, (B, rows // parts), T, M)
    pairs, tokens, lengths, at, targets, counts = filled
    source = None
    with jax.set_mesh(model.mesh):
      if encoder:
        source = model.put(tokens), model.put(lengths)
        tokens, lengths = model.padded([[model.tokenizer.pad]] * len(tokens))
      capacity = tokens.shape[1] + M
      capacity = min(capacity, front.positions or capacity)
      arrays = map(model.put, (tokens, lengths, at, targets, counts))
      sums = _behind(model.model, *arrays, source, capacity=capacity, vocabulary=model.vocabulary)
      yield pairs, jax.device_get(sums)


def _together(groups: list[_Group], model: LoadedModel) -> tuple[list[tuple[_Group, int]], int]:
  """The first of these groups that go into one call, each with its part of the mesh, and how many
  rows of continuations the call has.
  """
  parts, here, longest = model.parts, [], 0
  used = [0] * parts  # rows of each part
  for group in groups:
    longest = max(longest, len(group.context) + group.longest)
    most = max(side_by_side(longest, parts) // parts, bucket(len(group.behind), 1))
    part = used.index(min(used))
    if here and max(used[part] + len(group.behind), *used) > most:
      break
    here.append((group, part))
    used[part] += len(group.behind)
  return here, bucket(max(used), 1) * parts


def _laid(model: LoadedModel, by_part, sizes: tuple[int, int], T: int, M: int):
  """Groups as arrays: {row: pair}, tokens [B, T], lengths [B], of which context (of its part) each
  continuation is [J], targets [J, M], counts [J].
  """
  (contexts, behind), parts = sizes, len(by_part)
  tokens = np.full((contexts * parts, T), model.tokenizer.pad, np.int32)
  lengths = np.ones(contexts * parts, np.int32)
  at, counts = np.zeros(behind * parts, np.int32), np.zeros(behind * parts, np.int32)
  targets, pairs = np.zeros((behind * parts, M), np.int32), {}
  for part, groups in enumerate(by_part):
    row = part * behind
    for number, group in enumerate(groups):
      whole = model.plain.whole(group.context)
      place = part * contexts + number
      tokens[place, : len(whole)], lengths[place] = whole, len(whole)
      for index, ids in group.behind:
        at[row], counts[row] = number, len(ids)
        targets[row, : len(ids)] = ids
        pairs[row] = index, ids
        row += 1
  return pairs, tokens, lengths, at, targets, counts


@functools.partial(jax.jit, static_argnames=('capacity', 'vocabulary'))
def _behind(model, tokens, lengths, rows, targets, counts, source, *, capacity, vocabulary):
  """([J] log-probabilities, [J] whether greedy) of targets [J, M], the first counts [J] ids of
  each, behind rows [J] (see model.cache.Slots) of tokens [B, T], the first lengths [B] of each.
  """
  M = targets.shape[1]
  cache = init_cache(model.config, tokens.shape[0], capacity, '', max(M, APPEND))
  if source is not None:
    cache = model.read(cache, *source)
  x, cache, _ = model(tokens, cache=cache, counts=lengths, fresh=True)

  # The last token of a context foretells the first ones of all that follow it; each of these
  # foretells its next one.
  hidden = rows_of(ax.place(last(x, lengths), 'batch', None), rows)[:, None]
  if M > 1:
    begun = taken(cache, rows)
    more = model(targets[:, :-1], cache=begun, counts=jnp.maximum(counts - 1, 0)).hidden
    hidden = jnp.concatenate([hidden, ax.place(more, 'batch', None, None)], 1)
  return _judged(model, hidden, targets, counts, vocabulary)


def _judged(model, hidden, targets, counts, vocabulary):
  """Of a few tokens a row, which the mesh does not split: sums of the first counts [J]."""
  weights = (jnp.arange(targets.shape[1])[None] < counts[:, None]).astype(jnp.float32)
  with ax.whole_rows(True):
    law, targets, weights = _law(model, hidden, targets, weights, vocabulary)
    logs, greedy = logprobs_and_greedy(law, targets, weights)
  logs, greedy = (ax.place(each, 'batch', None) for each in (logs, greedy))
  return logs.sum(1), greedy.all(1)


def _law(model, hidden, targets, weights, vocabulary):
  targets, weights = (ax.place(a, *TOKENS) for a in (targets, weights))
  x = ax.place(hidden, *TOKENS, 'width')
  law = Law(*model.scored(x), softcap=model.config.logit_softcap, vocabulary=vocabulary)
  return law, targets, weights


# The same words for all texts.


def choice_scores(
  model: LoadedModel, texts: Sequence[Ids], words: Sequence[Ids], mask: int = -1
) -> np.ndarray:
  """Log-probabilities of words, [texts, words] f32, summed over their tokens.

  texts: ids of each. A decoder goes on from them; an encoder-decoder reads them, and answers with
    the words; in those of an encoder the id `mask` is where the word, which is one id, stands.

  Which texts are beside which, and in which order the words are, changes rounding only. Raises
  ValueError where the context does not hold a text and a word, and for a model that cannot be asked
  so.
  """
  if not texts or not words or not all(words):
    raise ValueError('a choice is of at least one word, each of at least one id, behind a text')
  if model.model.config.causal:
    pairs = [(text, word) for text in texts for word in words]
    scored = score_pairs(model, *zip(*pairs))
    sums = np.array([each.logprob for each in scored], np.float32)
    return sums.reshape(len(texts), len(words))
  if mask < 0 or max(map(len, words)) > 1:
    raise ValueError('an encoder finds words of one id each in the place of a mask; name its id')
  inside = np.array([word[0] for word in words], np.int32)
  return masked_scores(model, texts, np.tile(inside, (len(texts), 1)), mask)


def masked_scores(
  model: LoadedModel, texts: Sequence[Ids], inside: np.ndarray, mask: int
) -> np.ndarray:
  """Log-probabilities, f32, by an encoder, of the ids [texts, W] in the place of the mask that each
  text has; texts of about the same length are read together.
  """
  size = -(-min(ROWS // 4, len(texts)) // model.parts) * model.parts
  order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
  scores = np.zeros(inside.shape, np.float32)
  for first in range(0, len(order), size):
    here = order[first : first + size]
    here += here[-1:] * (size - len(here))  # that fill the batch up
    scores[here] = _in_masks(model, [texts[i] for i in here], inside[here], mask)
  return scores


def _in_masks(model: LoadedModel, rows, inside: np.ndarray, mask: int) -> np.ndarray:
  """[B, W] of rows with the ids [B, W]."""
  front = model.plain
  tokens, lengths = model.padded([front.whole(ids) for ids in rows])
  places = np.array([list(ids).index(mask) for ids in rows], np.int32) + len(front.soft)
  with jax.set_mesh(model.mesh):
    arrays = map(model.put, (tokens, lengths, places, inside))
    return np.asarray(_inside(model.model, *arrays, vocabulary=model.vocabulary))


@functools.partial(jax.jit, static_argnames='vocabulary')
def _inside(model, tokens, lengths, places, targets, *, vocabulary):
  """[B, W] log-probabilities of the ids [B, W] in the places [B] of tokens [B, T]."""
  real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
  with ax.whole_rows(tokens.shape[1] % ax.size('length') > 0):
    tokens = ax.place(tokens, *TOKENS)
    segments = ax.place(real.astype(jnp.int32), *TOKENS)
    x = ax.place(model(tokens, segments=segments).hidden, 'batch', None, None)
  shape = (*targets.shape, x.shape[-1])
  hidden = jnp.broadcast_to(last(x, places + 1)[:, None], shape)
  with ax.whole_rows(True):
    weights = jnp.ones(targets.shape, jnp.float32)
    law, targets, weights = _law(model, hidden, targets, weights, vocabulary)
    return ax.place(logprobs(law, targets, weights), 'batch', None)
