"""How likely is each token? Log-probabilities, entropy, divergences per token; [B, T, V] never is.

The one definition for scores of texts, preference, policy and distillation; the loss (model.loss)
is made of the same passes over the vocabulary (model.vocabulary). Results are for each token, so
that their cotangents differ: the backward pass goes through the vocabulary again with these in
hand.

All that is differentiated here has one slope. Of a sum over the vocabulary whose terms depend on
log p, let a be the slope by log p of an id at fixed p; then the slope by its logit is a - p sum(a):

    log p of the target     a = 1 at the target               so  hit - p
    entropy                 a = -p log p                      so  -p (log p + entropy)
    divergence from q       a, and b by log q: `_slopes`      whose sums are the divergence, too

B batch · T length · D width · V vocabulary · C rows of a chunk of it · S segments of a row ·
K ids of a token
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model import vocabulary as passes
from model.vocabulary import CHUNK, TOKENS, Law


def logprobs(
  law: Law,
  targets: Int[Array, 'B T'],
  weights: Float[Array, 'B T'],
  *,
  chunk: int = CHUNK,
) -> Float[Array, 'B T']:
  """log p(target) of every token, f32, differentiable in the law's hidden states and head.

  Args:
    targets: ids; any valid one where nothing is scored. An id that the law has not: -inf.
    weights: where 0, nothing is scored: the result is 0, whatever the hidden state (NaN included),
      whose gradient is 0. Elsewhere only that they are not 0 matters here; `segment_sums` and the
      losses multiply.
    chunk: logits of a device that are alive at once.
  """
  return _scored(law, targets, weights, False, chunk)[0]


def logprobs_and_greedy(
  law: Law,
  targets: Int[Array, 'B T'],
  weights: Float[Array, 'B T'],
  *,
  chunk: int = CHUNK,
) -> tuple[Float[Array, 'B T'], Bool[Array, 'B T']]:
  """`logprobs`, and whether no other id is likelier; True where weights are 0. By the same pass,
  and not differentiable.
  """

  def run(parts, arrays, place):
    weights, targets = arrays
    seen = passes.statistics(parts[0], targets, place.columns)
    known = _known(targets, law)
    logprob = jnp.where(known, seen.picked - seen.lse, -jnp.inf)
    greedy = (weights == 0) | (known & (seen.picked >= seen.top) & jnp.isfinite(seen.lse))
    return _where_scored(weights, logprob), greedy

  return passes.on_devices(run, (law,), (weights, targets), (TOKENS, TOKENS), chunk)


def entropy(law: Law, weights: Float[Array, 'B T'], *, chunk: int = CHUNK) -> Float[Array, 'B T']:
  """-sum p log p of every token, in nats; 0 where weights are; differentiable as `logprobs`."""
  return _scored(law, jnp.zeros_like(weights, jnp.int32), weights, True, chunk)[1]


def kl(p: Law, q: Law, weights: Float[Array, 'B T'], *, chunk: int = CHUNK) -> Float[Array, 'B T']:
  """KL(p || q) = sum p (log p - log q) of every token, in nats, at least 0; 0 where weights are.

  Differentiable in both laws; the reverse divergence is kl(q, p). A law behind stop_gradient (a
  reference, a teacher) costs no gradient. Raises ValueError for laws of different vocabularies.
  """
  return _divergence(p, q, weights, None, chunk)


def jsd(
  p: Law, q: Law, weights: Float[Array, 'B T'], beta: float = 0.5, *, chunk: int = CHUNK
) -> Float[Array, 'B T']:
  """Generalised Jensen-Shannon divergence (arXiv:2306.13649, equation 1), otherwise as `kl`.

  beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q. Divided by beta it becomes
  KL(p || q) as beta goes to 0, divided by 1 - beta KL(q || p) as beta goes to 1.
  Raises ValueError unless 0 < beta < 1.
  """
  if not 0 < beta < 1:
    raise ValueError(
      f'beta={beta} must be between 0 and 1; at an end the divergence is 0, and its limit, divided '
      'by the distance from the end, is kl(p, q) at 0 and kl(q, p) at 1: use these'
    )
  return _divergence(p, q, weights, float(beta), chunk)


def likeliest(
  law: Law, weights: Float[Array, 'B T'], K: int, *, chunk: int = CHUNK
) -> tuple[Int[Array, 'B T K'], Float[Array, 'B T K']]:
  """The K likeliest ids of every token, and their log-probabilities, f32, in order; any where
  weights are 0. Not differentiable. Raises ValueError for more than the law has.
  """
  V = law.vocabulary or law.head.shape[0]
  if not 0 < K <= V:
    raise ValueError(f'the likeliest {K} of {V} ids: give at least 1, and at most all of them')

  def best(scores, ids):
    scores, at = jax.lax.top_k(scores, K)
    return scores, jnp.take_along_axis(ids, at, -1)

  def run(parts, arrays, place):
    (weights,) = arrays
    part, none = parts[0], jnp.zeros_like(weights, jnp.int32)
    lse = passes.statistics(part, none, place.columns).lse

    def step(carry, chunk):
      logits = passes.tempered(part, passes.capped(part, chunk))
      ids = jnp.broadcast_to(chunk['ids'][None, None], logits.shape)
      more = zip(carry, (logits, ids))
      return best(*(jnp.concatenate(pair, -1) for pair in more)), None

    shape = (*weights.shape, K)
    nothing = (jnp.full(shape, -jnp.inf, jnp.float32), jnp.full(shape, -1, jnp.int32))
    found, _ = jax.lax.scan(step, nothing, part.chunks)
    if place.columns:
      found = best(*(jax.lax.all_gather(x, place.columns, axis=2, tiled=True) for x in found))
    scores, ids = found
    return ids, scores - lse[..., None]

  return passes.on_devices(run, (law,), (weights,), ((*TOKENS, None),) * 2, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def logprobs_of(
  law: Law, ids: Int[Array, 'B T K'], weights: Float[Array, 'B T'], chunk: int = CHUNK
) -> Float[Array, 'B T K']:
  """log p of K ids that the law has of every token, f32, otherwise as `logprobs`."""
  return _several_forward(law, ids, weights, chunk)[0]


def segment_sums(
  values: Float[Array, 'B T'],
  weights: Float[Array, 'B T'],
  segments: Int[Array, 'B T'],
  count: int,
) -> Float[Array, 'B S']:
  """Sums of values * weights over the tokens of segments 1, 2, .. `count` of each row.

  Values count for nothing where the weight is 0, NaN included. Of ones they are what means divide
  by. Differentiable in values and weights.
  """
  ids = jnp.arange(1, count + 1, dtype=segments.dtype)[None, None]
  weighted = jnp.where(weights != 0, values, 0) * weights
  # Compared and added up in one go: [B, T, S] is never stored.
  return jnp.where(segments[..., None] == ids, weighted[..., None], 0).sum(1)


# Per token, with rules of their own: gradients come with the cotangents, chunk by chunk.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _scored(law, targets, weights, with_entropy, chunk):
  """[B, T] f32: log p(target); entropy, or None. 0 where weights are."""
  return _scored_forward(law, targets, weights, with_entropy, chunk)[0]


def _scored_forward(law, targets, weights, with_entropy, chunk):
  def run(parts, arrays, place):
    weights, targets = arrays
    seen = passes.statistics(parts[0], targets, place.columns, with_entropy)
    logprob = jnp.where(_known(targets, law), seen.picked - seen.lse, -jnp.inf)
    return (*(_where_scored(weights, value) for value in (logprob, seen.entropy)), seen.lse)

  outputs = (TOKENS, TOKENS if with_entropy else None, TOKENS)
  *values, lse = passes.on_devices(run, (law,), (weights, targets), outputs, chunk)
  return tuple(values), (law, targets, weights, lse, values[1])


def _scored_backward(with_entropy, chunk, kept, cotangents):
  law, targets, weights, lse, entropies = kept

  def run(parts, arrays, place):
    _, targets, lse, entropies, d_logprob, d_entropy = arrays

    def slopes(logits, ids):
      # p of a chunk is known without the others: the first pass left the log-sum-exp of all.
      log_p, p = _probabilities(logits[0], lse, ids)
      slope = d_logprob[..., None] * (passes.hits(targets, ids) - p)
      if with_entropy:
        slope -= d_entropy[..., None] * p * (log_p + entropies[..., None])
      return (slope,)

    return passes.pulled(parts, slopes, place)

  arrays = (weights, targets, lse, entropies)
  (d_law,) = _gradients(run, (law,), arrays, cotangents, chunk)
  return d_law, None, None


_scored.defvjp(_scored_forward, _scored_backward)


def _several_forward(law, ids, weights, chunk):
  def run(parts, arrays, place):
    weights, ids = arrays
    part, none = parts[0], jnp.zeros_like(weights, jnp.int32)
    lse = passes.statistics(part, none, place.columns).lse

    def step(picked, chunk):
      logits = passes.tempered(part, passes.capped(part, chunk))
      at, hit = _places(ids, chunk['ids'])
      return picked + jnp.where(hit, jnp.take_along_axis(logits, at, -1), 0), None

    picked, _ = jax.lax.scan(step, jnp.zeros(ids.shape, jnp.float32), part.chunks)
    picked = passes.sum_over(picked, place.columns)
    return _where_scored(weights, picked - lse[..., None]), lse

  outputs = ((*TOKENS, None), TOKENS)
  value, lse = passes.on_devices(run, (law,), (weights, ids), outputs, chunk)
  return value, (law, ids, weights, lse)


def _several_backward(chunk, kept, cotangent):
  law, ids, weights, lse = kept

  def run(parts, arrays, place):
    _, ids, lse, d_value = arrays
    total = d_value.sum(-1, keepdims=True)

    def slopes(logits, chunk_ids):
      _, p = _probabilities(logits[0], lse, chunk_ids)
      at, hit = _places(ids, chunk_ids)
      add = jax.vmap(jax.vmap(lambda slope, at, d: slope.at[at].add(d)))
      return (add(-total * p, at, jnp.where(hit, d_value, 0)),)

    return passes.pulled(parts, slopes, place)

  (d_law,) = _gradients(run, (law,), (weights, ids, lse), (cotangent,), chunk)
  return d_law, None, None


logprobs_of.defvjp(_several_forward, _several_backward)


def _places(ids, chunk_ids):
  """Of [B, T, K] ids: where in a chunk of ids that follow each other they are, and which are."""
  at = jnp.clip(ids - chunk_ids[0], 0, len(chunk_ids) - 1)
  return at, chunk_ids[at] == ids


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _divergence(p, q, weights, beta, chunk):
  """[B, T] f32: sums over the vocabulary of `_slopes`; 0 where weights are."""
  return _divergence_forward(p, q, weights, beta, chunk)[0]


def _divergence_forward(p, q, weights, beta, chunk):
  _check_pair(p, q)

  def run(parts, arrays, place):
    lses = tuple(
      passes.statistics(part, jnp.zeros_like(arrays[0], jnp.int32), place.columns).lse
      for part in parts
    )

    def step(sums, chunks):
      ids = chunks[0]['ids']
      logits = (passes.tempered(part, passes.capped(part, c)) for part, c in zip(parts, chunks))
      laws = (_probabilities(z, lse, ids) for z, lse in zip(logits, lses))
      a, b = _slopes(*laws, beta)
      # Each id's share of the divergence is at least 0; a rounding error must not make it less. (Of
      # NaN and 0 a CPU may add up 0 as the larger.)
      share = jnp.where(a + b < 0, 0, a + b)
      return tuple(total + value.sum(-1) for total, value in zip(sums, (share, a, b))), None

    # The sums of the slopes by log p and log q come along, one number a token each: the backward
    # pass subtracts them from every id's slope, and must know them before its first chunk.
    zeros = jnp.zeros(arrays[0].shape, jnp.float32)
    sums, _ = jax.lax.scan(step, (zeros,) * 3, tuple(part.chunks for part in parts))
    value, *slope_sums = (passes.sum_over(total, place.columns) for total in sums)
    return _where_scored(arrays[0], value), lses, tuple(slope_sums)

  pair = (TOKENS, TOKENS)
  value, lses, slope_sums = passes.on_devices(run, (p, q), (weights,), (TOKENS, pair, pair), chunk)
  return value, (p, q, weights, lses, slope_sums)


def _divergence_backward(beta, chunk, kept, cotangent):
  p, q, *arrays = kept

  def run(parts, arrays, place):
    _, lses, slope_sums, d_value = arrays
    d_value = d_value[..., None]

    def slopes(logits, ids):
      laws = tuple(_probabilities(z, lse, ids) for z, lse in zip(logits, lses))
      by_log = _slopes(*laws, beta)
      return tuple(
        d_value * (a - p * total[..., None]) for a, (_, p), total in zip(by_log, laws, slope_sums)
      )

    return passes.pulled(parts, slopes, place)

  return *_gradients(run, (p, q), tuple(arrays), (cotangent,), chunk), None


_divergence.defvjp(_divergence_forward, _divergence_backward)


def _slopes(p_law, q_law, beta):
  """Slopes of the divergence by log p and log q of each id, [B, T, C]; together its share of it.

  beta: of `jsd`; None: KL(p || q), whose share has q - p, which adds up to 0 and makes it positive.
  """
  (log_p, p), (log_q, q) = p_law, q_law
  if beta is None:
    return p * (log_p - log_q), q - p
  log_m = jnp.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
  return beta * p * (log_p - log_m), (1 - beta) * q * (log_q - log_m)


def _probabilities(logits, lse, ids):
  """(log p, p) of a chunk; of an id that there is not p is 0, and its logarithm finite."""
  exists = ids[None, None] >= 0
  log_p = jnp.where(exists, logits - lse[..., None], 0)
  return log_p, jnp.where(exists, jnp.exp(log_p), 0)


def _gradients(run, laws, arrays, cotangents, chunk):
  """Gradients by the laws, as laws; `run` gets `arrays`, weights first, and the cotangents."""
  cotangents = jax.tree.map(functools.partial(_where_scored, arrays[0]), cotangents)
  narrow = any(law.hidden.dtype == jnp.float16 for law in laws)
  if narrow:
    # A cotangent may be as small as 1 / tokens, or as large as f16's loss scale: f16 holds neither
    # times a probability. The largest is 1 while it counts.
    unit = functools.reduce(jnp.maximum, (jnp.abs(d).max() for d in jax.tree.leaves(cotangents)))
    unit = jnp.where(unit > 0, unit, 1)
    cotangents = jax.tree.map(lambda d: d / unit, cotangents)
  gradients = passes.on_devices(
    run, laws, (*arrays, *cotangents), tuple(map(passes.gradient_axes, laws)), chunk
  )

  def finished(d, primal):
    return (d * unit if narrow else d).astype(primal.dtype)

  return tuple(
    dataclasses.replace(
      law,
      hidden=finished(d_x, law.hidden),
      head=finished(d_head, law.head),
      temperature=jax.tree.map(jnp.zeros_like, law.temperature),
    )
    for law, (d_x, d_head) in zip(laws, gradients)
  )


def _check_pair(p, q):
  sizes = [(law.head.shape[0], law.vocabulary) for law in (p, q)]
  if sizes[0] != sizes[1]:
    (V, limit), (other_V, other_limit) = sizes
    raise ValueError(
      f'a divergence is between laws of the same ids: the heads have {V} and {other_V} rows, and '
      f'vocabulary={limit} and {other_limit}; fill the smaller head up with rows, and say in both '
      'laws of how many ids the vocabulary is'
    )


def _known(targets, law):
  """Which targets the law has a probability of."""
  V = law.vocabulary or law.head.shape[0]
  return (targets >= 0) & (targets < V)


def _where_scored(weights, value):
  if value is None:
    return None
  behind = value.ndim - weights.ndim
  return jnp.where(weights.reshape(*weights.shape, *(1,) * behind) != 0, value, 0)
