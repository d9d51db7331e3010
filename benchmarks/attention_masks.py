"""Is our attention for GPUs attention on this one, whatever the mask? Values and gradients in
bfloat16 beside float64.

    python -m benchmarks.attention_masks [--budget 120] [--json FILE]
    python -m benchmarks.attention_masks --rehearse

The first needs a Hopper GPU; --rehearse takes XLA's blocks at toy sizes on this CPU for our kernel.

Of each case: the root mean square of the error over that of the exact values, computed by NumPy in
f64 of the same inputs, rounded to bfloat16. It is as large as that of attention in plain products
of bfloat16 (kernels/reference.py, its twin), by up to PARITY, or the case fails, and with it the
command. The log-sum-exp, which is not rounded, is nearer than LSE. Memory is full of NaN before
each case. What the budget in seconds leaves no time for is named.

B batch · T query length · S key length · N query heads · K key/value heads · H head width
"""

import concurrent.futures
import dataclasses
import functools
import os
import sys
import time

import numpy as np

import commands
from benchmarks.gpu_environment import LATE, begun

PARITY = 1.1  # times the error of the twin
LSE = 1e-3
OUTPUTS = ('out', 'dq', 'dk', 'dv')
BATCH, LENGTH, TOY = 2, 1000, 48


@dataclasses.dataclass(frozen=True)
class MaskCase:
  """Attention of two rows, whose queries do not fill a tile.

  Attributes:
    parts: what it has beside a causal mask, or 'full' in place of that: 'window', 'packed',
      'prefix', 'positions', 'zigzag', 'softcap', 'sinks', 'deterministic' (gradients).
    heads, kv_heads, width: as ModelConfig has them. value_width: 0 for `width`.
  """

  parts: tuple[str, ...] = ()
  heads: int = 8
  kv_heads: int = 2
  width: int = 128
  value_width: int = 0

  @property
  def name(self) -> str:
    widths = f'{self.width}' + (f'/{self.value_width}' if self.value_width else '')
    return (
      f'{", ".join(self.parts) or "causal"} x {widths}, {self.heads} heads, {self.kv_heads} of keys'
    )

  def scoring(self, T: int):
    """What is computed of T queries and T keys."""
    import jax.numpy as jnp

    from kernels.mask import Mask
    from kernels.scoring import Scoring

    draw, parts = np.random.default_rng(T), {'causal': 'full' not in self.parts}
    if 'window' in self.parts:
      parts['window'] = T // 5
    if 'zigzag' in self.parts:
      parts['zigzag'] = 4
    if 'prefix' in self.parts:
      parts['prefix'] = jnp.asarray([T // 2, 3], jnp.int32)
    if 'packed' in self.parts:
      documents = np.sort(draw.integers(0, 5, (BATCH, T)), 1).astype(np.int32)
      queries = documents.copy()
      queries[0, :3] = 9  # see nothing
      parts |= {'query_segments': jnp.asarray(queries), 'key_segments': jnp.asarray(documents)}
    if 'positions' in self.parts:
      index = draw.integers(0, T, (2, BATCH, T)).astype(np.int32)
      parts |= {'query_positions': jnp.asarray(index[0]), 'key_positions': jnp.asarray(index[1])}
    sinks = None
    if 'sinks' in self.parts:
      sinks = jnp.asarray(draw.normal(size=self.heads), jnp.float32)
    softcap = 2.0 if 'softcap' in self.parts else 0.0
    return Scoring(Mask(**parts), softcap=softcap, sinks=sinks, scale=self.width**-0.5)

  def arrays(self, T: int) -> list[np.ndarray]:
    """q, k, v and the gradient of what comes out, as bfloat16 has them."""
    import ml_dtypes

    N, K, H, Hv = self.heads, self.kv_heads, self.width, self.value_width or self.width
    draw = np.random.default_rng([T, N, K, H])
    shapes = (N, H), (K, H), (K, Hv), (N, Hv)
    return [draw.normal(size=(BATCH, T, *of)).astype(ml_dtypes.bfloat16) for of in shapes]


CASES = (
  MaskCase(),
  MaskCase(('packed',)),
  MaskCase(width=64, kv_heads=8),
  MaskCase(width=256, heads=4),
  MaskCase(('full',)),
  MaskCase(('window',), kv_heads=8),
  MaskCase(('packed', 'window'), kv_heads=1),
  MaskCase(('packed', 'deterministic')),
  MaskCase(('softcap', 'sinks')),
  MaskCase(('softcap', 'window'), width=256, heads=4),
  MaskCase(('prefix',), width=64),
  MaskCase(('prefix', 'packed', 'window')),
  MaskCase(('positions', 'sinks')),
  MaskCase(('full', 'window', 'packed'), width=64),
  MaskCase(('zigzag',)),
  MaskCase(width=192, value_width=128, kv_heads=8),
)
TOYS = MaskCase(('packed',)), MaskCase(('softcap', 'sinks')), MaskCase(('zigzag',))


def exact(q, k, v, d_out, scoring) -> dict[str, np.ndarray]:
  """Attention, its log-sum-exp and gradients by the book, in f64."""
  q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
  (T, N), (S, K) = q.shape[1:3], k.shape[1:3]
  k, v = (np.repeat(x, N // K, 2) for x in (k, v))
  allowed = np.asarray(scoring.mask.allowed(T, S))[:, None]
  scores, cap = np.einsum('BTNH,BSNH->BNTS', q, k) * scoring.scale, scoring.softcap
  capped = cap * np.tanh(scores / cap) if cap else scores
  seen = np.where(allowed, capped, -np.inf)
  if scoring.sinks is not None:  # a key like any other, without a value
    sink = np.asarray(scoring.sinks, np.float64)[None, :, None, None]
    seen = np.concatenate([seen, np.broadcast_to(sink, (*seen.shape[:3], 1))], -1)
  top = seen.max(-1, keepdims=True)
  weights = np.exp(seen - np.where(np.isfinite(top), top, 0))
  total = weights.sum(-1, keepdims=True)
  with np.errstate(divide='ignore'):
    lse = (top + np.log(total))[..., 0]
  weights = (weights / np.where(total > 0, total, 1))[..., :S]

  d_weights = np.einsum('BTNH,BSNH->BNTS', d_out, v)
  d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True))
  d_scores *= (1 - (capped / cap) ** 2 if cap else 1) * scoring.scale

  def of_keys(x):
    return x.reshape(*x.shape[:2], K, N // K, -1).sum(3)

  return {
    'out': np.einsum('BNTS,BSNH->BTNH', weights, v),
    'dq': np.einsum('BNTS,BSNH->BTNH', d_scores, k),
    'dk': of_keys(np.einsum('BNTS,BTNH->BSNH', d_scores, q)),
    'dv': of_keys(np.einsum('BNTS,BTNH->BSNH', weights, d_out)),
    'lse': np.moveaxis(lse, 1, 2),
  }


def ours(q, k, v, d_out, *, scoring, backend: str, deterministic: bool):
  """What a backend of ours gives of the same."""
  import jax
  import jax.numpy as jnp

  from kernels.attention import attention
  from kernels.blocks import Blocks

  settings = {'blocks': Blocks(deterministic=True)} if deterministic else {}
  (out, lse), pull = jax.vjp(
    lambda *x: attention(*x, scoring, backend=backend, **settings), q, k, v
  )
  gradients = pull((d_out, jnp.zeros_like(lse)))
  return dict(zip(OUTPUTS, (out, *gradients)), lse=lse)


def twin(q, k, v, d_out, *, scoring):
  """Attention with products of bfloat16, summed in f32, which rounds what our kernels round."""
  import jax.numpy as jnp

  from kernels import reference

  out, lse = reference.attention(q, k, v, scoring)
  delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)
  gradients = reference.backward(q, k, v, scoring, lse, delta, d_out)[:3]
  return dict(zip(OUTPUTS, (out, *(x.astype(q.dtype) for x in gradients))))


def compared(found: dict, beside: dict, right: dict) -> dict:
  """Errors of what was found, times those of the twin, and whether all is near enough."""

  def error(x, name):
    difference = np.asarray(x[name], np.float64) - right[name]
    return float(np.sqrt(np.mean(difference**2) / np.mean(right[name] ** 2)))

  errors = {name: error(found, name) for name in OUTPUTS}
  ratios = {name: errors[name] / error(beside, name) for name in OUTPUTS}
  lse, finite = np.asarray(found['lse'], np.float64), np.isfinite(right['lse'])
  same = (lse[~finite] == right['lse'][~finite]).all()
  off = float(np.abs(lse[finite] - right['lse'][finite]).max()) if same else float('inf')
  # What is NaN is not near.
  near = all(ratio <= PARITY for ratio in ratios.values()) and off <= LSE
  return {'errors': errors, 'ratios': ratios, 'lse': off, 'near': near}


class Programs:
  """Ours and the twin of every case, compiled side by side."""

  def __init__(self, cases, length: int, backend: str):
    self.length = length
    self._backend = backend
    self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    self._compiling = {case: self._lowered(case) for case in cases}

  def _lowered(self, case):
    """(arrays, scoring, programs that are being compiled), or why there are none."""
    import jax

    T = self.length // 8 * 8 if 'zigzag' in case.parts else self.length
    arrays, scoring = case.arrays(T), case.scoring(T)
    settings = dict(backend=self._backend, deterministic='deterministic' in case.parts)
    functions = (
      functools.partial(ours, scoring=scoring, **settings),
      functools.partial(twin, scoring=scoring),
    )
    try:
      lowered = [jax.jit(function).lower(*arrays) for function in functions]
    except (NotImplementedError, ValueError) as error:  # of what the backend does not compute
      return str(error)
    return arrays, scoring, [self._pool.submit(program.compile) for program in lowered]

  def measure(self, case) -> dict:
    """What `compared` says of a case, or {'error': why it says nothing}."""
    import jax

    from benchmarks.attention_cases import in_a_line
    from benchmarks.attention_peers import poison

    if isinstance(self._compiling[case], str):
      return {'error': self._compiling[case]}
    arrays, scoring, programs = self._compiling.pop(case)
    try:
      found, beside = (program.result() for program in programs)
      poison(arrays[0].nbytes)
      return compared(*jax.device_get((found(*arrays), beside(*arrays))), exact(*arrays, scoring))
    except Exception as error:  # a compiler's or a kernel's; the other cases are still wanted
      return {'error': in_a_line(error)}

  def close(self) -> None:
    self._pool.shutdown(wait=False, cancel_futures=True)


def show(results: dict[str, dict]) -> None:
  rows = []
  for name, result in results.items():
    if 'error' in result:
      continue
    each = [f'{1e3 * result["errors"][x]:.2f}' for x in OUTPUTS]
    worst = f'{max(result["ratios"].values(), key=lambda x: (x != x, x)):.2f}x'
    said = 'yes' if result['near'] else 'NO: PARITY FAILS'
    rows.append([name, *each, worst, f'{result["lse"]:.1e}', said])
  headers = ['', *(f'{x} 1e-3' for x in OUTPUTS), 'beside bf16', 'log-sum-exp', 'attention?']
  commands.table('Errors of bfloat16 beside f64', headers, rows)
  for name, result in results.items():
    if 'error' in result:
      print(f'not compared: {name}: {result["error"]}')


def main() -> int:
  if not (given := begun(__doc__, 120)):
    return 1
  options, device, ends = given
  backend, length = ('blocked', TOY) if options.rehearse else ('pallas_gpu', LENGTH)
  cases = TOYS if options.rehearse else CASES
  programs, results = Programs(cases, length, backend), {}
  found = {'rehearsal': options.rehearse, 'device': device.device_kind, 'backend': backend}
  found |= {'length': length, 'cases': results}
  for case in cases:
    results[case.name] = dict(LATE) if time.time() > ends else programs.measure(case)
    commands.write_json(options.json, 'attention_masks', found, partial=True)
  programs.close()
  show(results)
  failed = [name for name, result in results.items() if not result.get('near', True)]
  if failed:
    print(f'\nPARITY FAILS: {"; ".join(failed)}')
  commands.write_json(options.json, 'attention_masks', found | {'parity fails': failed})
  return 1 if failed else 0


if __name__ == '__main__':
  sys.exit(main())
