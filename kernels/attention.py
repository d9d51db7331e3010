"""Which backend computes attention? One function, one table of what each backend honours; nothing
is dropped silently.

`reference`: the jnp oracle, everything, [T, S] scores in memory.
`blocked`: the oracle on blocks of queries, keys that no query of a block can see skipped and scores
recomputed in the backward pass, so that memory and work follow the mask; on a CPU a row and a key
head at a time (kernels/near.py).
`xla`: jax.nn.dot_product_attention; on a GPU it is cuDNN's kernel for a mask of `causal` and
`window` in bfloat16 or float16 (kernels.cudnn has the whole rule), and else dense scores as XLA
compiles them.
`pallas_tpu`, `pallas_gpu`: our own flash attention for TPUs (kernels.flash_tpu) and Hopper GPUs
(kernels.flash_gpu, of 16-bit operands), everything but relative positions and dropout.
`auto`: on a TPU `pallas_tpu`, but for rows of few queries, as in decoding, then `xla`; on a GPU
`xla` where that is cuDNN's kernel, then on a Hopper GPU `pallas_gpu`, as for the segments of packed
rows, then `xla` (docs/measured.md has the figures); else, and on a CPU, `blocked`, then
`reference`: the first that honours the spec. What it is is printed once. On a Hopper GPU its
gradients are not the same bits every time (kernels.blocks.Blocks has what is), nor are cuDNN's.

Where a mesh splits T, kernels.context calls these backends on each device's part; those of PARTS
it can put together, on a TPU `pallas_tpu` first. Rows that branch (Mask.branches) are two calls
(kernels/branches.py).

B batch · T query length · S key length · N query heads · K key/value heads · H head width
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import names
from kernels import blocks as block_sizes, flash, reference
from kernels.blocks import Blocks
from kernels.scoring import Scoring
from parallel import axes as ax, mesh
from parallel.remat import named

# Operands of more than 16 bits, and of more than 32, heads of more than 256.
ANY = {'float32', 'float64', 'wide_heads'}
HONOURS = {
  'reference': ANY
  | {
    'causal',
    'window',
    'prefix',
    'segments',
    'positions',
    'zigzag',
    'branches',
    'softcap',
    'sinks',
    'relative',
    'value_width',
    'dropout',
  },
  'blocked': ANY
  | {
    'causal',
    'window',
    'segments',
    'positions',
    'softcap',
    'sinks',
    'relative',
    'value_width',
    'dropout',
  },
  'pallas_tpu': ANY - {'float64'}
  | {
    'causal',
    'window',
    'prefix',
    'segments',
    'positions',
    'zigzag',
    'softcap',
    'sinks',
    'value_width',
  },
  'pallas_gpu': {
    'causal',
    'window',
    'prefix',
    'segments',
    'positions',
    'zigzag',
    'softcap',
    'sinks',
    'value_width',
  },
  'xla': ANY | {'causal', 'window', 'segments', 'positions', 'prefix'},
}
ORDER = {
  'cpu': ('blocked', 'reference'),
  'gpu': ('pallas_gpu', 'xla', 'blocked', 'reference'),
  'tpu': ('pallas_tpu', 'xla', 'blocked', 'reference'),
}
ORDER_IN_PARTS = {
  'cpu': ('blocked', 'reference'),
  'gpu': ('pallas_gpu', 'blocked', 'reference'),
  'tpu': ('pallas_tpu', 'blocked', 'reference'),
}
WIDE = 256
FEW = 128  # queries of a row, below which our kernels compute mostly what fills their blocks up
# Queries a block; smaller ones skip more of the causal triangle, larger ones feed the matrix units
# better.
BLOCK = 128


def attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K Hv'],
  scoring: Scoring,
  *,
  backend: str = 'auto',
  blocks: Blocks = Blocks(),
  context: str = 'ring',
) -> tuple[Float[Array, 'B T N Hv'], Float[Array, 'B T N']]:
  """Attention and the log-sum-exp of its scores.

  Args:
    scoring: who sees whom, and what becomes of a product of a query and a key. v may be wider or
      narrower than q and k ('value_width').
    backend: 'auto' or one of HONOURS. blocks: what its kernels work on at a time, of a backend that
      lets them be chosen.
    context: what devices that share a row do (kernels.context), where there are any.
  Returns: the mixed values, in v's dtype, and the log-sum-exp, at least f32.
  Raises: ValueError for shapes or blocks that do not fit or an unknown backend; NotImplementedError
    for a spec or blocks that the backend does not honour, naming those that do.
  """
  _check(q, k, v, scoring)
  H = q.shape[3]
  scoring = scoring.scaled(H)
  block_sizes.check(blocks, backend, max(H, v.shape[3]))
  if ax.size('length') > 1:
    if scoring.dropout is not None:
      raise NotImplementedError(
        f'attention on a mesh that splits rows in {ax.size("length")} does not honour dropout; '
        'use other axes, or no dropout of weights'
      )
    local = names.imported('kernels.context.Local')(
      *(
        functools.partial(function, backend=backend, blocks=blocks)
        for function in (attention, part, part_backward)
      )
    )
    return names.imported('kernels.context.attention')(q, k, v, scoring, local, strategy=context)
  if scoring.mask.branches > 1:
    attend = functools.partial(attention, backend=backend, blocks=blocks)
    return names.imported('kernels.branches.attention')(q, k, v, scoring, attend)

  asked = _asked(q, v, scoring)
  if backend == 'auto':
    backend = _said(choose(asked, without=_left_out(q, k, v, scoring.mask, asked)))
  else:
    check(backend, asked)
  if backend in flash.KERNELS:  # what these keep for the backward pass has its name already
    return flash.attention(backend, q, k, v, scoring, blocks=blocks)
  run = {'reference': reference.attention, 'blocked': blocked, 'xla': xla}[backend]
  if backend == 'blocked' and _near('wanted')(q, k, scoring, BLOCK):
    out, lse = _near('attention')(q, k, v, scoring, blocked)
  else:
    out, lse = run(q, k, v, scoring)
  return named(out, 'attention'), lse


def _check(q, k, v, scoring):
  """Raises ValueError where operands do not go together: a kernel would read past one of them, or
  leave some of it out.
  """
  for name, x, axes in (('q', q, 'B, T, N, H'), ('k', k, 'B, S, K, H'), ('v', v, 'B, S, K, Hv')):
    if x.ndim != 4 or not x.size:
      raise ValueError(f'{name}{list(x.shape)} must be [{axes}], and not empty')
  (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
  if k.shape != (B, S, K, H) or v.shape[:3] != (B, S, K):
    raise ValueError(
      f'q{list(q.shape)}, k{list(k.shape)} and v{list(v.shape)} must be '
      '[B, T, N, H], [B, S, K, H] and [B, S, K, Hv]'
    )
  if not q.dtype == k.dtype == v.dtype:
    raise ValueError(f'q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; cast them to one type')
  if N % K:
    raise ValueError(f'{N} query heads are not a multiple of {K} key/value heads')
  if K > 1 and ax.whole_or('kv_heads', K) is None:
    raise ValueError(
      f'{K} key heads do not split over mesh.tensor={ax.size("kv_heads")}; repeat them first'
    )
  scoring.check(B, T, S, N)


def part(q, k, v, scoring: Scoring, *, backend: str, blocks: Blocks = Blocks()):
  """Attention of this device's arrays to some of the keys, by a backend of PARTS; not to be
  differentiated.

  `scoring` has no sinks: they join once, where the parts are put together.
  """
  backend = _part(q, v, scoring, backend)
  return PARTS[backend][0](q, k, v, scoring, **_chosen(backend, blocks))


def part_backward(
  q, k, v, scoring: Scoring, lse, delta, d_out, *, backend: str, blocks: Blocks = Blocks()
):
  """What reference.backward gives, by the same backend as part()."""
  backend = _part(q, v, scoring, backend)
  return PARTS[backend][1](q, k, v, scoring, lse, delta, d_out, **_chosen(backend, blocks))


def _chosen(backend, blocks):
  return {'blocks': blocks} if backend in flash.KERNELS else {}


def _part(q, v, scoring, backend):
  asked = _asked(q, v, scoring)
  if backend == 'auto':
    return _said(choose(asked, in_parts=True, without=_too_new()))
  return check_part(check(backend, asked))


def _asked(q, v, scoring):
  """What a backend has to honour for these operands, in the words of HONOURS."""
  H, Hv = q.shape[3], v.shape[3]
  named = {
    'value_width': H != Hv,
    'wide_heads': max(H, Hv) > WIDE,
    'float32': q.dtype.itemsize > 2,
    'float64': q.dtype.itemsize > 4,
  }
  return scoring.fields() | {name for name, is_set in named.items() if is_set}


def check_part(backend: str) -> str:
  """`backend`, of which attention can be put together part by part; raises NotImplementedError
  otherwise.
  """
  if backend not in PARTS:
    raise NotImplementedError(
      f'attention backend {backend!r} gives no log-sum-exp at no extra cost, which a ring puts the '
      f"parts together by; these do: {list(PARTS)}; or use model.execution.context='gather' or "
      "'ulysses'"
    )
  return backend


def check(backend: str, spec: set[str]) -> str:
  """`backend` if it honours every part of `spec`; raises as attention() says otherwise."""
  names.check('attention backend', backend, ('auto', *HONOURS))
  missing = spec - HONOURS[backend]
  if missing:
    able = [name for name, honoured in HONOURS.items() if spec <= honoured]
    raise NotImplementedError(
      f'attention backend {backend!r} does not honour {sorted(missing)}; these do: {able}'
    )
  return backend


def choose(
  spec: set[str], platform: str = '', in_parts: bool = False, without: frozenset[str] = frozenset()
) -> str:
  """What `auto` means for this spec on a platform; default: the one compiled for (see
  parallel.mesh.platform).

  in_parts: of those that attention can be put together from part by part. without: backends that
  are not for these arrays.
  """
  order = (ORDER_IN_PARTS if in_parts else ORDER)[platform or mesh.platform()]
  return next(name for name in order if spec <= HONOURS[name] and name not in without)


def too_few(queries: int) -> frozenset[str]:
  """Our kernels, for rows of fewer queries than they are for; of others none."""
  return frozenset(flash.KERNELS if queries < FEW else ())


def _left_out(q, k, v, mask, spec) -> frozenset[str]:
  """Kernels of ours that `auto` passes over: all of them for few queries, Hopper's where cuDNN
  computes the same or on other GPUs.
  """
  if few := too_few(q.shape[1]):
    return few
  able = spec <= HONOURS['xla'] and mesh.platform() == 'gpu'
  if able and not _cudnn('refusal')(q, k, v, mask):
    return frozenset({'pallas_gpu'})
  return _too_new()


def _too_new() -> frozenset[str]:
  """Kernels that the GPU at hand cannot run."""
  hopper = mesh.platform() != 'gpu' or _cudnn('capability')()[0] == 9
  return frozenset(() if hopper else {'pallas_gpu'})


def _near(name: str):
  """Of kernels.near, which is for CPUs."""
  return names.imported(f'kernels.near.{name}')


def _cudnn(name: str):
  """Of kernels.cudnn, which only GPUs have."""
  return names.imported(f'kernels.cudnn.{name}')


@functools.cache
def _said(chosen: str) -> str:
  """What `auto` means here, printed once."""
  said = f"attention: 'auto' is {chosen!r} on a {mesh.platform()}"
  if chosen == 'pallas_gpu':
    said += (
      "; gradients of queries are added up in no certain order: for the same bits every time, set "
      'model.execution.attention=pallas_gpu and model.execution.attention_blocks.deterministic=True'
    )
  if jax.process_index() == 0:
    print(said, file=sys.stderr)
  return chosen


def blocked(q, k, v, scoring: Scoring):
  """Same contract as reference.attention, without prefix: a loop over query blocks, each with the
  keys it can see.
  """

  # Scores are as large as everything else of a block together: cheaper to compute again than to
  # keep. Only arrays are arguments, since a scale may be traced: the checkpoint closes over it.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def run(q, k, v, mask, sinks, relative, dropout):
    part = dataclasses.replace(scoring, mask=mask, sinks=sinks, relative=relative, dropout=dropout)
    return reference.attention(q, k, v, part)

  def block(queries, keys, mask):
    dropout = scoring.dropout and scoring.dropout.block(queries, keys)
    q_part, k_part, v_part = q[:, queries], k[:, keys], v[:, keys]
    return run(q_part, k_part, v_part, mask, scoring.sinks, scoring.relative, dropout)

  blocks = (block(*part) for part in _blocks(scoring, q.shape[1], k.shape[1]))
  outs, lses = zip(*blocks)
  return jnp.concatenate(outs, 1), jnp.concatenate(lses, 1)


def blocked_backward(q, k, v, scoring: Scoring, lse, delta, d_out):
  """Same contract as reference.backward, block by block."""
  wide = jnp.promote_types(q.dtype, jnp.float32)
  d_qs, d_k, d_v = [], jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
  d_relative = jax.tree.map(jnp.zeros_like, scoring.relative)
  for queries, keys, mask in _blocks(scoring, q.shape[1], k.shape[1]):
    d_q, of_keys, of_values, of_table = reference.backward(
      q[:, queries],
      k[:, keys],
      v[:, keys],
      dataclasses.replace(scoring, mask=mask),
      *(x[:, queries] for x in (lse, delta, d_out)),
    )
    d_qs.append(d_q)
    d_k = d_k.at[:, keys].add(of_keys)
    d_v = d_v.at[:, keys].add(of_values)
    d_relative = jax.tree.map(jnp.add, d_relative, of_table)
  return jnp.concatenate(d_qs, 1), d_k, d_v, d_relative


def _blocks(scoring, T, S):
  """(queries, keys, mask) of each block; of rows in order, keys that no query of the block can see
  are left out.
  """
  mask = scoring.mask
  in_order = mask.query_positions is None
  if T != S and in_order and (mask.positioned or scoring.relative is not None):
    raise ValueError(
      f'backend blocked aligns queries and keys by index, {T} queries and {S} keys do not align; '
      'use reference'
    )
  for start in range(0, T, BLOCK):
    stop = min(start + BLOCK, T)
    first, last = 0, S
    if mask.window and in_order:
      first, last = max(0, start - mask.window + 1), min(S, stop + mask.window - 1)
    queries, keys = slice(start, stop), slice(first, stop if mask.causal and in_order else last)
    yield queries, keys, mask.block(queries, keys)


def xla(q, k, v, scoring: Scoring):
  """jax.nn.dot_product_attention: cuDNN's where it honours the spec, else its own causal and window
  flags, else a dense mask.
  """
  mask, scale = scoring.mask, scoring.scale
  T, S = q.shape[1], k.shape[1]
  window = (mask.window - 1, 0 if mask.causal else mask.window - 1) if mask.window else None
  dense = None
  if (mask.positioned and T != S) or not mask.fields() <= {'causal', 'window'}:
    dense = mask.allowed(T, S)[:, None]

  if not _cudnn('refusal')(q, k, v, mask):
    out = _cudnn('attention')(q, k, v, scoring)
  elif dense is None:
    out = jax.nn.dot_product_attention(
      q, k, v, scale=scale, is_causal=mask.causal, local_window_size=window
    )
  else:
    out = jax.nn.dot_product_attention(q, k, v, mask=dense, scale=scale)
    # A query that sees no key was given the mean of all values.
    out = jnp.where(dense.any(-1).swapaxes(1, 2)[..., None], out, 0)
  # Its own residual is rounded to the inputs' type and has no gradient. Under jit a log-sum-exp
  # that nobody reads costs nothing.
  _, lse = reference.attention(q, k, v, scoring)
  return out, lse


# Backends that give the log-sum-exp at no extra cost, and gradients of parts by it: (forward,
# backward).
PARTS = {
  'reference': (reference.attention, reference.backward),
  'blocked': (blocked, blocked_backward),
  **{
    name: tuple(functools.partial(f, name) for f in (flash.part, flash.part_backward))
    for name in flash.KERNELS
  },
}
