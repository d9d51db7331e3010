"""How likely does a model find each of several words, behind a text, in it, or in answer to it? The
text is read once for all of them.

B rows of a batch · T length · S of a source · W words · M tokens of a word · D width
"""

import functools
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from decode.loaded import LoadedModel
from decode.loop import last
from model.cache import APPEND, init_cache, repeated
from model.logprobs import logprobs
from model.vocabulary import TOKENS, Law
from parallel import axes as ax

ROWS = 64  # that go on side by side, of all words together, at most


def choice_scores(
  model: LoadedModel, texts: Sequence[Sequence[int]], words: Sequence[Sequence[int]], mask: int = -1
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
  config = model.model.config
  if not config.causal and (mask < 0 or max(map(len, words)) > 1):
    raise ValueError('an encoder finds words of one id each in the place of a mask; name its id')
  longest = max(map(len, words))
  alone = not config.causal or longest == 1
  size = max(1, ROWS // (4 if alone else len(words)))
  size = -(-min(size, len(texts)) // model.parts) * model.parts

  # Texts of about the same length side by side: less padding.
  order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
  scores = np.zeros((len(texts), len(words)), np.float32)
  for first in range(0, len(order), size):
    here = order[first : first + size]
    rows = [texts[i] for i in here]
    rows += [rows[-1]] * (size - len(rows))  # that fill the batch up
    scores[here] = _of_batch(model, rows, words, mask)[: len(here)]
  return scores


def _of_batch(model: LoadedModel, rows, words, mask: int) -> np.ndarray:
  """[B, W]"""
  B, W = len(rows), len(words)
  targets, counts = _filled(words)
  config = model.model.config
  front = model.plain
  tokens, lengths = model.padded([front.whole(ids) for ids in rows])
  with jax.set_mesh(model.mesh):
    if not config.causal:
      places = np.array([list(ids).index(mask) for ids in rows], np.int32) + len(front.soft)
      inside = np.tile(targets[:, 0], (B, 1))
      arrays = map(model.put, (tokens, lengths, places, inside))
      return np.asarray(_inside(model.model, *arrays, vocabulary=model.vocabulary))
    source = None
    if config.encoder_layers:
      real = np.arange(tokens.shape[1])[None] < lengths[:, None]
      source = model.put(tokens), model.put(real.astype(np.int32))
      tokens, lengths = model.padded([[model.tokenizer.pad]] * B)
    capacity = min(front.positions or sys.maxsize, tokens.shape[1] + targets.shape[1])
    if int(lengths.max()) + targets.shape[1] - 1 > capacity:
      raise ValueError(
        f'a text of {int(lengths.max()) - len(front.begins)} tokens and a word of '
        f'{targets.shape[1]} pass {front.limit}; shorten the text'
      )
    arrays = (tokens, lengths, np.tile(targets, (B, 1)), np.tile(counts, B))
    arrays = map(model.put, arrays)
    sums = _behind(
      model.model, *arrays, source, words=W, capacity=capacity, vocabulary=model.vocabulary
    )
    return np.asarray(sums).reshape(B, W)


def _filled(words) -> tuple[np.ndarray, np.ndarray]:
  """Words as one array [W, M], filled up with their own first id, and how many ids each has."""
  counts = np.array([len(word) for word in words], np.int32)
  filled = np.array([[*word, *[word[0]] * (counts.max() - len(word))] for word in words], np.int32)
  return filled, counts


@functools.partial(jax.jit, static_argnames=('words', 'capacity', 'vocabulary'))
def _behind(model, tokens, lengths, targets, counts, source, *, words, capacity, vocabulary):
  """[B W] log-probabilities of words [B W, M], the first counts [B W] ids of each, behind tokens
  [B, T].
  """
  M = targets.shape[1]
  cache = init_cache(model.config, tokens.shape[0], capacity, '', max(M, APPEND))
  if source is not None:
    cache = model.read(cache, *source)
  x, cache, _ = model(tokens, cache=cache, counts=lengths, fresh=True)

  # The last token of the text foretells the first ones of all words; each foretells its next one.
  def spread(x):
    return jnp.repeat(x, words, 0)

  hidden = ax.local(spread, (('batch', None),), ('batch', None))(
    ax.place(last(x, lengths), 'batch', None)
  )[:, None]
  if M > 1:
    begun = repeated(cache, words)
    more = model(targets[:, :-1], cache=begun, counts=counts - 1).hidden
    hidden = jnp.concatenate([hidden, ax.place(more, 'batch', None, None)], 1)
  weights = (jnp.arange(M)[None] < counts[:, None]).astype(jnp.float32)
  return _logprobs(model, hidden, targets, weights, vocabulary).sum(1)


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
  return _logprobs(model, hidden, targets, jnp.ones(targets.shape, jnp.float32), vocabulary)


def _logprobs(model, hidden, targets, weights, vocabulary):
  """Of a few tokens a row, which the mesh does not split."""
  with ax.whole_rows(True):
    targets, weights = (ax.place(a, *TOKENS) for a in (targets, weights))
    x = ax.place(hidden, *TOKENS, 'width')
    law = Law(*model.scored(x), softcap=model.config.logit_softcap, vocabulary=vocabulary)
    return ax.place(logprobs(law, targets, weights), 'batch', None)
