"""How is a vocabulary gone through, chunk by chunk and shared by devices? In two passes.

The first finds each token's log-sum-exp, the second computes a chunk's logits again, and gradients
from them (the idea of Cut Cross-Entropy, arXiv:2411.09009): the gradient of a chunk's rows of the
head is whole at once, so that nothing as large as the head is carried from chunk to chunk. A
vocabulary that fits in one chunk is gone through once. Devices share the vocabulary (its columns
over `tensor` and `stage`, its shards gathered), and agree on a few numbers a token.

B batch · T length · D width · V vocabulary (of this device, inside) · C rows of a chunk of it
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from parallel import axes as ax, zero

CHUNK = 2**25  # logits of a device that are alive at once
TOKENS = ('batch', 'length')  # logical axes of what there is one of per token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Law:
  """What a model says may come next, everywhere: softmax(softcap(hidden head^T) / temperature).

  `Law(*model.scored(x), softcap=config.logit_softcap, vocabulary=config.vocabulary_limit)` is that
  of final hidden states x of a model of this config.
  The array fields are annotated Any because JAX rebuilds registered dataclasses with placeholders.

  Attributes:
    hidden: [B, T, D], differentiable.
    head: [V, D], differentiable; split as it is stored, a D that `embed` does not split is whole.
    temperature: [B] f32 above 0, of each row, not differentiable: with what a rollout divided its
      logits. None: 1.
    softcap: cap * tanh(logit / cap), before the temperature; 0 for none.
    vocabulary: ids from here on have no probability, where the head has more rows than there are
      tokens; 0: all of its rows have.
  """

  hidden: Any
  head: Any
  temperature: Any = None
  softcap: float = dataclasses.field(default=0.0, metadata={'static': True})
  vocabulary: int = dataclasses.field(default=0, metadata={'static': True})


class Place(NamedTuple):
  """Mesh axes that tokens are split over (rows), and that the vocabulary is (columns)."""

  rows: tuple[str, ...]
  columns: tuple[str, ...]


class Part(NamedTuple):
  """What a device has of a law.

  Attributes:
    x: [B, T, D], 0 where weights are.
    chunks: of the head, 'head' [n, C, D] and 'ids' [n, C], -1 for rows that have no probability.
    temperature: [B, 1, 1] or None. softcap: see Law.
    shards: mesh axes over which the head's D is stored in shards.
    rows: how many of the head's rows are this device's.
  """

  x: Array
  chunks: dict[str, Array]
  temperature: Array | None
  softcap: float
  shards: tuple[str, ...]
  rows: int


class Statistics(NamedTuple):
  """Of each token, [B, T] f32: log-sum-exp of the logits, the target's logit, the largest logit;
  and, if asked for, the entropy."""

  lse: Array
  picked: Array
  top: Array
  entropy: Array | None


def on_devices(function: Callable, laws: tuple[Law, ...], arrays, outputs, chunk: int):
  """`function` of each device's rows and columns of the vocabulary; without a mesh, of everything.

  Args:
    function: (parts of the laws, arrays, Place) -> what `outputs` says.
    arrays: a tuple of [B, T], the first of which are weights; pytrees of such, too.
    outputs: logical axes of the results.
    chunk: logits of a device that are alive at once, of all laws together.
  """
  place = Place(ax.mesh_axes(*TOKENS), ax.mesh_axes('vocab'))
  layouts = tuple(map(_logical_axes, laws))
  shards = [ax.mesh_axes(axes.head[1]) if axes.head[1] else () for axes in layouts]

  def run(laws, arrays):
    parts = tuple(
      _part(law, arrays[0], stored, place.columns, chunk // len(laws))
      for law, stored in zip(laws, shards)
    )
    return function(parts, arrays, place)

  inputs = (layouts, jax.tree.map(lambda _: TOKENS, arrays))
  return ax.local(run, inputs, outputs)(laws, arrays)


def gradient_axes(law: Law) -> tuple:
  """Logical axes of what `pulled` finds for a law."""
  axes = _logical_axes(law)
  return axes.hidden, axes.head


def _logical_axes(law):
  return dataclasses.replace(
    law,
    hidden=('batch', 'length', 'width'),
    head=('vocab', ax.whole_or('embed', law.head.shape[1])),
    temperature=None if law.temperature is None else ('batch',),
  )


def _part(law, weights, shards, columns, chunk):
  scored = weights != 0
  # A product with a gradient of 0 would not stop a NaN.
  x = jnp.where(scored[..., None], law.hidden, 0)
  head = zero.all_gather(law.head, shards, 1) if shards else law.head
  temperature = law.temperature
  if temperature is not None:
    temperature = jnp.where(scored.any(1), temperature.astype(jnp.float32), 1)[:, None, None]
  chunks = _chunks(head, x, chunk, columns, law.vocabulary)
  return Part(x, chunks, temperature, law.softcap, shards, head.shape[0])


def _chunks(head, x, chunk, columns, vocabulary):
  """The head in chunks; the last one is filled up."""
  V, rows = head.shape[0], max(1, chunk // (x.shape[0] * x.shape[1]))
  n = -(-V // rows)
  # A few chunks more rather than a copy of the head, filled up.
  n = next((more for more in range(n, min(2 * n, V) + 1) if V % more == 0), n)
  pad = -V % n
  ids = jnp.arange(V + pad, dtype=jnp.int32)
  ids = jnp.where(ids < V, ids + (jax.lax.axis_index(columns) * V if columns else 0), -1)
  if vocabulary:
    ids = jnp.where(ids < vocabulary, ids, -1)
  return {
    'head': jnp.pad(head, ((0, pad), (0, 0))).reshape(n, -1, head.shape[1]),
    'ids': ids.reshape(n, -1),
  }


def capped(part: Part, chunk) -> Array:
  """Logits of a chunk of the vocabulary, f32 [B, T, C], -inf of ids that there are not."""
  logits = jnp.einsum('BTD,CD->BTC', part.x, chunk['head'], preferred_element_type=jnp.float32)
  if part.softcap:
    logits = part.softcap * jnp.tanh(logits / part.softcap)
  return jnp.where(chunk['ids'][None, None] >= 0, logits, -jnp.inf)


def tempered(part: Part, logits: Array) -> Array:
  """Those over the temperature, of which softmax is the law."""
  return logits if part.temperature is None else logits / part.temperature


def uncapped(part: Part, logits: Array, d_logits: Array) -> Array:
  """Slopes by the products with the head, of slopes by what `tempered` makes of `capped` logits."""
  if part.temperature is not None:
    d_logits = d_logits / part.temperature
  if part.softcap:
    cap_ratio = jnp.where(jnp.isfinite(logits), logits, 0) / part.softcap
    d_logits = d_logits * (1 - jnp.square(cap_ratio))
  return d_logits


def hits(targets: Array, ids: Array) -> Array:
  """Which of a chunk are the targets, bool [B, T, C].

  Comparing with ids picks the target without a gather, which a vocabulary-sharded row could not
  answer alone.
  """
  return (targets[..., None] == ids[None, None]) & (ids[None, None] >= 0)


def statistics(
  part: Part, targets: Array, columns: tuple[str, ...], entropy: bool = False
) -> Statistics:
  """The first pass."""

  def step(carry, chunk):
    # The sums so far are relative to the largest logit so far (online softmax,
    # arXiv:1805.02867): where a chunk has a larger one, they shrink.
    top, total, picked, surplus = carry
    logits = tempered(part, capped(part, chunk))
    higher = jnp.maximum(top, logits.max(-1))
    shrink, powers = jnp.exp(top - higher), jnp.exp(logits - higher[..., None])
    if entropy:
      # Sum of power * log(power), kept relative to the largest logit as the powers are.
      exists = chunk['ids'][None, None] >= 0
      logarithms = jnp.where(exists, logits - higher[..., None], 0)
      surplus = shrink * (surplus + total * (top - higher)) + (powers * logarithms).sum(-1)
    total = total * shrink + powers.sum(-1)
    return (
      higher,
      total,
      picked + jnp.where(hits(targets, chunk['ids']), logits, 0).sum(-1),
      surplus,
    ), None

  zeros = jnp.zeros(targets.shape, jnp.float32)
  # Finite, for there may be chunks, even devices, that have none of the ids.
  lowest = jnp.full_like(zeros, jnp.finfo(jnp.float32).min)
  carry = (lowest, zeros, zeros, zeros if entropy else None)
  (local_top, total, picked, surplus), _ = jax.lax.scan(step, carry, part.chunks)
  # The same between devices, each of which has its own largest logit.
  top = jax.lax.pmax(local_top, columns) if columns else local_top
  shrink = jnp.exp(local_top - top)
  if entropy:
    surplus = sum_over(shrink * (surplus + total * (local_top - top)), columns)
  total = sum_over(total * shrink, columns)
  return Statistics(
    top + jnp.log(total),
    sum_over(picked, columns),
    top,
    jnp.log(total) - surplus / total if entropy else None,
  )


def pulled(parts: tuple[Part, ...], slopes: Callable, place: Place):
  """The second pass: for each part the gradients (by hidden states, by the device's head).

  slopes: (logits of a chunk [B, T, C] of every part, the chunk's ids) -> slopes by these logits.
  The first is of the dtype of x; the second is f32 where that is f32 or f16, which could not hold a
  sum before it is scaled.
  """

  def step(d_xs, chunks):
    logits = [capped(part, chunk) for part, chunk in zip(parts, chunks)]
    laws = tuple(tempered(part, z) for part, z in zip(parts, logits))
    by_law = slopes(laws, chunks[0]['ids'])
    d_xs, d_heads = zip(*map(_pulled_chunk(place), parts, chunks, logits, by_law, d_xs))
    return d_xs, d_heads

  zeros = tuple(jnp.zeros(part.x.shape, jnp.float32) for part in parts)
  d_xs, d_heads = jax.lax.scan(step, zeros, tuple(part.chunks for part in parts))
  return tuple(
    (
      sum_over(d_x.astype(part.x.dtype), place.columns),
      d_head.reshape(-1, d_head.shape[-1])[: part.rows],
    )
    for part, d_x, d_head in zip(parts, d_xs, d_heads)
  )


def _pulled_chunk(place):
  """(part, chunk, logits before the temperature, slopes by those after it, d_x) -> d_x, d_head."""

  def run(part, chunk, logits, d_logits, d_x):
    x, shards = part.x, part.shards
    d_logits = uncapped(part, logits, d_logits).astype(x.dtype)
    d_x += jnp.einsum('BTC,CD->BTD', d_logits, chunk['head'], preferred_element_type=jnp.float32)
    # Of matrices, all tokens in one dimension: over two, XLA on a CPU transposes a copy first.
    rows, slopes = (tokens.reshape(-1, tokens.shape[-1]) for tokens in (x, d_logits))
    d_head = jnp.einsum('ND,NC->DC', rows, slopes, preferred_element_type=jnp.float32)
    if x.dtype == jnp.bfloat16:  # as every other gradient crosses devices
      d_head = d_head.astype(x.dtype)
    d_head = zero.reduce_scatter(d_head, shards, 0) if shards else d_head
    copies = tuple(axis for axis in place.rows if axis not in shards)
    return d_x, sum_over(d_head, copies).T

  return run


def sum_over(value: Array, axes: tuple[str, ...]) -> Array:
  """The sum over all devices along these mesh axes."""
  return jax.lax.psum(value, axes) if axes else value
