"""How do our kernels become a backend? Made differentiable, run by each device on its own rows and
heads, with operands they can multiply.

B batch · T query length · S key length · N query heads · K key/value heads · H head width
"""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp

from kernels.blocks import Blocks
from kernels.scoring import Scoring
from parallel import axes as ax, mesh
from parallel.remat import named

# Backend -> the module with `forward` and `backward`, imported when it is used, and the platform
# where it is not interpreted.
KERNELS = {'pallas_tpu': ('kernels.flash_tpu', 'tpu'), 'pallas_gpu': ('kernels.flash_gpu', 'gpu')}
# Precisions that Mosaic has on TPUs, and whether they are of f32 operands only: of bfloat16 it has
# one pass, of float16 nothing at all.
PRECISIONS = {None: False, 'default': False, 'bfloat16': False, 'highest': True, 'float32': True}


def attention(backend: str, q, k, v, scoring: Scoring, *, blocks: Blocks):
  """kernels.reference.attention; on a platform that is not the kernels' own they are interpreted,
  which is slow.
  """
  if isinstance(scoring.scale, jax.core.Tracer):
    raise NotImplementedError(
      f'backend {backend} is compiled for one scale, not {scoring.scale}: multiply q by it, '
      'or use blocked or xla'
    )
  mask, sinks = scoring.mask, scoring.sinks
  arrays = {
    field.name: getattr(mask, field.name)
    for field in dataclasses.fields(mask)
    if hasattr(getattr(mask, field.name), 'shape')
  }
  # What is not split over devices: all but the arrays, which each device gets its own part of.
  spec = dataclasses.replace(mask, **dict.fromkeys(arrays))

  def local(q, k, v, arrays, sinks):
    own = dataclasses.replace(scoring, mask=dataclasses.replace(spec, **arrays), sinks=sinks)
    return flash((backend, interpreted(backend), blocks), *_operands(backend, q, k, v), own)

  def heads_of(name):
    return ('batch', 'length', name, 'head_width')

  # Positions may be those of every row.
  of_array = {
    name: ('batch' if len(x) == len(q) else None, 'length')[: x.ndim] for name, x in arrays.items()
  }
  k_heads = ax.whole_or('kv_heads', k.shape[2])
  inputs = (
    heads_of('heads'),
    heads_of(k_heads),
    heads_of(k_heads),
    of_array,
    None if sinks is None else ('heads',),
  )
  out, lse = ax.local(local, inputs, (heads_of('heads'), ('batch', 'length', 'heads')))(
    q, k, v, arrays, sinks
  )
  return out.astype(v.dtype), lse


def part(backend: str, q, k, v, scoring: Scoring, *, blocks: Blocks = Blocks()):
  """kernels.reference.attention on one device, not to be differentiated."""
  out, lse = _module(backend).forward(
    *_operands(backend, q, k, v), scoring, interpret=interpreted(backend), blocks=blocks
  )
  return out.astype(v.dtype), lse


def part_backward(
  backend: str, q, k, v, scoring: Scoring, lse, delta, d_out, *, blocks: Blocks = Blocks()
):
  """kernels.reference.backward."""
  q, k, v, d_out = _operands(backend, q, k, v, d_out)
  run = functools.partial(_module(backend).backward, interpret=interpreted(backend), blocks=blocks)
  return *run(q, k, v, scoring, lse, delta, d_out), None


def interpreted(backend: str) -> bool:
  return mesh.platform() != KERNELS[backend][1]


def _module(backend):
  return importlib.import_module(KERNELS[backend][0])


def _operands(backend, *arrays):
  """Arrays in a type that the backend multiplies in the precision that is asked for."""
  if backend == 'pallas_gpu':
    return arrays
  precision = jax.config.jax_default_matmul_precision
  if precision not in PRECISIONS:
    raise NotImplementedError(
      f'backend {backend} has no products of jax_default_matmul_precision={precision!r}; '
      f"use one of {list(PRECISIONS)}, or model.execution.attention='xla'"
    )
  if PRECISIONS[precision] or arrays[0].dtype == jnp.float16:  # f32 holds both narrow types exactly
    return tuple(x.astype(jnp.float32) for x in arrays)
  return arrays


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def flash(static, q, k, v, scoring):
  """The mixed values and the log-sum-exp, both differentiable. static: (backend, interpret,
  blocks).

  `scoring` is differentiated by its sinks; its numbers are part of the tree's structure, so that
  they are static here, too.
  """
  backend, interpret, blocks = static
  return _module(backend).forward(q, k, v, scoring, interpret=interpret, blocks=blocks)


def _forward(static, q, k, v, scoring):
  out, lse = (named(x, 'attention') for x in flash(static, q, k, v, scoring))
  return (out, lse), (q, k, v, scoring, out, lse)


def _backward(static, kept, gradients):
  backend, interpret, blocks = static
  (q, k, v, scoring, out, lse), (d_out, d_lse) = kept, gradients
  # The log-sum-exp's own gradient enters where that of the weights' sum is taken off; of a query
  # that sees nothing it is -inf whatever the scores are.
  delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - jnp.where(
    lse == -jnp.inf, 0, d_lse
  )
  run = functools.partial(_module(backend).backward, interpret=interpret, dtype=None, blocks=blocks)
  # The log-sum-exp has the sinks in it already: no kernel needs them again.
  sinks, scoring = scoring.sinks, dataclasses.replace(scoring, sinks=None)
  d_q, d_k, d_v = _once(backend, run)(q, k, v, scoring, lse, delta, d_out)
  if sinks is None:
    return d_q, d_k, d_v, None
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # of queries that see nothing, not even a sink
  d_sinks = (
    -(jnp.exp(sinks.astype(jnp.float32)[None, None] - lse) * delta).sum((0, 1)).astype(sinks.dtype)
  )
  return d_q, d_k, d_v, dataclasses.replace(scoring, mask=None, sinks=d_sinks)


flash.defvjp(_forward, _backward)


def _once(backend, run):
  """`run`, with an error for who differentiates it again."""

  def refuse(*_):
    raise NotImplementedError(
      f'attention backend {backend!r} is differentiated once; second derivatives are of '
      'reference, blocked or xla'
    )

  once = jax.custom_vjp(run)
  once.defvjp(refuse, refuse)
  return once
