"""How fast and how exact is one peer's attention?
What each process of benchmarks.attention runs: it reads a job, measures, prints results.

    python -m benchmarks.attention_peers JOB        (a JSON file that benchmarks.attention writes)

A program runs many calls of a kernel one after the other, so that what is timed is the device and
not its dispatch; torch's calls are timed by CUDA events. The first run warms up; before it, memory
is filled with NaN and freed, so that what a kernel leaves unwritten shows. What the last call
returned is compared with attention in f64, one head of it.

T length · N heads · H head width
"""

import concurrent.futures
import functools
import os
import sys

import numpy as np

from benchmarks.attention_cases import Case, Job, as_rows, attempt, both, probe, report, seconds_of

COMPILED_AHEAD = 8  # cases whose programs are compiled side by side


# Each peer that jax runs: attention of (q, k, v) [B, T, N, H], or a reason, by case.


def tandem(case: Case, backend: str):
  """One of our backends, with the mask that the case means."""
  import jax.numpy as jnp

  from kernels import attention as kernels
  from kernels.mask import Mask
  from kernels.scoring import Scoring

  if backend not in kernels.HONOURS:
    return f'kernels.attention has no backend {backend!r}'
  segments = jnp.broadcast_to(
    jnp.arange(case.length, dtype=jnp.int32) // case.document, (case.rows, case.length)
  )
  packed = {'query_segments': segments, 'key_segments': segments} if case.mask == 'packed' else {}
  mask = Mask(causal=case.mask != 'full', window=case.window, **packed)
  return lambda q, k, v: kernels.attention(q, k, v, Scoring(mask), backend=backend)[0]


def cudnn(case: Case):
  import jax

  window = (case.window - 1, 0) if case.window else None
  return as_rows(
    functools.partial(
      jax.nn.dot_product_attention,
      is_causal=case.mask != 'full',
      local_window_size=window,
      implementation='cudnn',
    ),
    case,
  )


def mosaic(case: Case):
  """jax's own Mosaic GPU kernel."""
  from jax.experimental.pallas.ops.gpu import attention_mgpu as kernel

  if case.window:
    return 'it has no window'
  keys = {64: 256, 128: 128, 256: 64}[case.width]  # the most that fit into shared memory
  backward = dict(compute_wgs_bwd=2, block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64)
  if case.width > 128:
    backward = {}
  config = kernel.TuningConfig(
    block_q=64, block_kv=keys, max_concurrent_steps=2, causal=case.mask != 'full', **backward
  )
  return as_rows(functools.partial(kernel.attention, config=config), case)


JAX_PEERS = {
  'pallas_gpu': functools.partial(tandem, backend='pallas_gpu'),
  'blocked': functools.partial(tandem, backend='blocked'),
  'cudnn': cudnn,
  'mosaic': mosaic,
}
# In float16, because its bfloat16 goes through f16 buffers;
# and it does not scale, so that queries come scaled.
PRESCALED = {'mosaic': 'float16'}


def repeated(step, n: int):
  """`step` n times in one program; each call waits for the one before it,
  so that none is merged with another or left out.
  """
  import jax
  import jax.numpy as jnp

  def run(*arguments):
    def again(_, done):
      return step(*jax.lax.optimization_barrier((arguments, done))[0])

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, *arguments))
    return jax.lax.fori_loop(0, n, again, nothing)

  return run


def check_calls(compiled, n: int) -> str:
  """Raises RuntimeError where a program does not run its kernels n times each:
  XLA has merged calls or taken them out of the loop.

  Returns why that could not be counted, or ''.
  """
  from analysis import hlo

  try:
    times = {
      i.name: times
      for _, i, times in hlo.Module(compiled.as_text()).walk()
      if i.kernel or '"__cudnn$' in i.attributes
    }
  # A program in a form that the reader of programs does not know.
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    return f'calls were not counted: {type(error).__name__}: {error}'
  if any(count % n or not count for count in times.values()):
    raise RuntimeError(f'kernels run {times} times, not {n}: nothing to be timed')
  return ''


def programs(attend, case: Case, dtype: str, sharding=None) -> dict:
  """Lowered: the forward pass many times; once, with what the backward pass keeps;
  and the backward pass many times.

  sharding: of a device that isn't here, to compile for; default: for this process's.
  """
  import jax

  shape, form = jax.ShapeDtypeStruct(case.shape, dtype, sharding=sharding), []

  def keeping(*x):
    out, pull = jax.vjp(attend, *x)
    kept, tree = jax.tree.flatten(pull)
    form.append(tree)
    return out, kept

  lowered = {'forward': jax.jit(repeated(attend, case.calls('forward'))).lower(shape, shape, shape)}
  try:
    lowered['keeping'] = jax.jit(keeping).lower(shape, shape, shape)
    kept = [
      jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
      for x in lowered['keeping'].out_info[1]
    ]

    def backward(kept, d_out):
      return jax.tree.unflatten(form[0], kept)(d_out)

    lowered['backward'] = jax.jit(repeated(backward, case.calls('backward'))).lower(kept, shape)
  # Of a kernel that has no backward pass for this case.
  except (NotImplementedError, ValueError) as error:
    lowered['backward'] = str(error)
  return lowered


def poison(nbytes: int) -> None:
  import jax
  import jax.numpy as jnp

  jax.block_until_ready([jnp.full(nbytes // 4, jnp.nan, jnp.float32) for _ in range(4)])


def run_jax(job: Job) -> None:
  """All cases of a peer that jax runs: compiled side by side, a few at a time,
  then timed one by one.
  """
  import jax.numpy as jnp

  dtype = PRESCALED.get(job.peer, 'float32' if job.rehearsal else 'bfloat16')
  waiting = list(job.cases)
  while waiting and not job.late():
    group, waiting = waiting[:COMPILED_AHEAD], waiting[COMPILED_AHEAD:]
    lowered = {}
    for case in group:
      attend = JAX_PEERS[job.peer](case)
      if isinstance(attend, str):
        report(case=case.name, error=attend)
        continue
      lowered[case] = attempt(case, programs, attend, case, dtype)
    with concurrent.futures.ThreadPoolExecutor(min(COMPILED_AHEAD, os.cpu_count())) as pool:
      compiling = {
        case: {name: x if isinstance(x, str) else pool.submit(x.compile) for name, x in of.items()}
        for case, of in lowered.items()
        if of is not None
      }
    for case, of in compiling.items():
      if not job.late():
        attempt(case, measure_jax, job, case, of, jnp.dtype(dtype))


def measure_jax(job: Job, case: Case, compiling: dict, dtype) -> None:
  import jax
  import ml_dtypes

  scale, unchecked = case.width**-0.5 if job.peer in PRESCALED else 1.0, []

  def compiled(name):
    return compiling[name].result()

  q, k, v, d_out = (x if job.rehearsal else x.astype(ml_dtypes.bfloat16) for x in job.arrays(case))
  *inputs, d_out = (
    jax.device_put(x.astype(dtype)) for x in (q.astype(np.float32) * np.float32(scale), k, v, d_out)
  )

  def timed(direction, names, *arguments):
    run = compiled(direction)
    unchecked.append(check_calls(run, case.calls(direction)))
    poison(d_out.nbytes)
    outputs = jax.block_until_ready(run(*arguments))
    probed = {
      name: np.asarray(x[probe(case)], np.float64)
      for name, x in zip(names, outputs if len(names) > 1 else [outputs])
    }
    del outputs
    if 'dq' in probed:
      probed['dq'] = probed['dq'] * scale
    seconds = seconds_of(lambda: run(*arguments), jax.block_until_ready)
    return seconds / case.calls(direction), probed

  def backward():
    if isinstance(compiling['backward'], str):
      raise NotImplementedError(compiling['backward'])
    return timed('backward', ['dq', 'dk', 'dv'], compiled('keeping')(*inputs)[1], d_out)

  both(job, case, lambda: timed('forward', ['out'], *inputs), backward, unchecked)


def exact(case: Case, q, k, v, d_out, block: int = 2048):
  """Attention of one head [T, H] and its gradients, in f64, some queries at a time."""
  import jax
  import jax.numpy as jnp

  T, H = q.shape
  keys, block = jnp.arange(T)[None], min(block, T)

  def some(sums, start):
    index = start + jnp.arange(block)
    q_, d_ = (jax.lax.dynamic_slice_in_dim(x, start, block) for x in (q, d_out))
    scores = jnp.where(case.visible(index[:, None], keys), q_ @ k.T * H**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    out = weights @ v
    d_scores = weights * (d_ @ v.T - jnp.sum(d_ * out, -1, keepdims=True)) * H**-0.5
    return (sums[0] + d_scores.T @ q_, sums[1] + weights.T @ d_), (out, d_scores @ k)

  (dk, dv), (out, dq) = jax.lax.scan(
    some, (jnp.zeros_like(k), jnp.zeros_like(v)), jnp.arange(0, T, block)
  )
  return {'out': out.reshape(T, H), 'dq': dq.reshape(T, H), 'dk': dk, 'dv': dv}


def run_oracle(job: Job) -> None:
  """Writes what `errors` compares with; of the inputs as bfloat16 has them."""
  import jax
  import jax.numpy as jnp

  jax.config.update('jax_enable_x64', True)

  def rounded(x):
    return jnp.asarray(x if job.rehearsal else x.astype(jnp.bfloat16), jnp.float64)

  def write(case):
    head = [rounded(x[probe(case)]) for x in job.arrays(case)]
    np.savez(job.directory / f'{case.name}.npz', **jax.jit(functools.partial(exact, case))(*head))
    report(case=case.name)

  for case in job.cases:
    if not job.late():
      attempt(case, write, case)


def run_peak(job: Job) -> None:
  """Of large products in bfloat16: what percentages are taken of. And what the device is."""
  import jax
  import jax.numpy as jnp

  device = jax.devices()[0]
  size, n = job.peak_size, 20
  if device.platform != 'gpu' and not job.rehearsal:
    return report(platform=device.platform, kind=device.device_kind, peak=0.0)
  a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
  run = jax.jit(repeated(jnp.matmul, n))
  jax.block_until_ready(run(a, b))
  seconds = seconds_of(lambda: run(a, b), jax.block_until_ready) / n
  report(
    platform=device.platform,
    kind=device.device_kind,
    peak=2 * size**3 / seconds,
    cores=os.cpu_count(),
  )


def main():
  job = Job(sys.argv[1])
  if job.peer in JAX_PEERS:
    run_jax(job)
  elif job.peer == 'oracle':
    run_oracle(job)
  elif job.peer == 'peak':
    run_peak(job)
  else:
    from benchmarks.attention_torch import Torch

    Torch(job).run()


if __name__ == '__main__':
  main()
