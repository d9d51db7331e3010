"""How fast and how exact is one peer's attention? What each process of benchmarks.attention runs: it reads a job, measures, prints results.

    python -m benchmarks.attention_peers JOB        (a JSON file that benchmarks.attention writes)

A program runs many calls of a kernel one after the other, so that what is timed is the device and not its dispatch; torch's calls are
timed by CUDA events. The first run warms up; before it, memory is filled with NaN and freed, so that what a kernel leaves unwritten
shows. What the last call returned is compared with attention in f64, one head of it.

T length · N heads · H head width
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import sys
import time

import numpy as np

REPEATS, SECONDS, RATE = 7, 0.04, 400e12  # timed runs; length of one, at about this many FLOP/s
COMPILED_AHEAD = 8  # cases whose programs are compiled side by side
DIRECTIONS = {'forward': 2, 'backward': 5}  # products of a pair of a query and a key
STICKY = (
  'CUDA_ERROR',
  'CUDA error',
  'illegal',
  'launch failure',
)  # after which a process can run nothing more on its GPU


@dataclasses.dataclass(frozen=True)
class Case:
  """Attention of a batch; as many query as key heads, `tokens` and `hidden` whatever the length and the width of a head.

  Attributes:
    mask: 'causal', 'full', 'window' (causal, the last T/16 keys) or 'packed' (causal, 8 documents in a row).
  """

  mask: str
  length: int
  width: int
  tokens: int = 16384
  hidden: int = 2048

  @property
  def name(self) -> str:
    return f'{self.mask} {self.length} x {self.width}'

  @property
  def heads(self) -> int:
    return self.hidden // self.width

  @property
  def rows(self) -> int:
    return max(1, self.tokens // self.length)

  @property
  def shape(self) -> tuple[int, int, int, int]:
    return self.rows, self.length, self.heads, self.width

  @property
  def window(self) -> int:
    return self.length // 16 if self.mask == 'window' else 0

  @property
  def document(self) -> int:
    return self.length // 8 if self.mask == 'packed' else self.length

  def flops(self, direction: str) -> float:
    """Of the pairs that the mask leaves: causal ones are half, and windows and documents are what they are."""
    from analysis.flops import mean_keys

    keys = (
      self.length if self.mask == 'full' else mean_keys(self.length, self.window, self.document)
    )
    return DIRECTIONS[direction] * 2 * self.rows * self.heads * self.length * keys * self.width

  def visible(self, q, k):
    """Whether the query at q sees the key at k."""
    if self.mask == 'full':
      return (q >= 0) & (k >= 0)
    seen = (k <= q) & (q // self.document == k // self.document)
    return seen & (q - k < self.window) if self.window else seen

  def calls(self, direction: str) -> int:
    return max(2, min(100, round(SECONDS * RATE / self.flops(direction))))


class Job:
  """What a process is asked to do: a peer's name, cases, and numbers that all processes draw alike."""

  def __init__(self, path: str):
    job = json.loads(pathlib.Path(path).read_text())
    self.peer, self.deadline, self.rehearsal = job['peer'], job['deadline'], job['rehearsal']
    self.cases = [Case(**case) for case in job['cases']]
    self.directory, self.peak_size = pathlib.Path(path).parent, job['peak_size']
    largest = max([0, *(int(np.prod(case.shape)) for case in self.cases)])
    # A generator each: what an array begins with is then the same for a process that has only some of the cases.
    self._drawn = [
      np.random.default_rng([job['seed'], i]).standard_normal(largest, np.float32) for i in range(4)
    ]

  def arrays(self, case: Case) -> list[np.ndarray]:
    """q, k, v and the gradient of what comes out, in f32; every peer rounds them to bfloat16."""
    return [x[: np.prod(case.shape)].reshape(case.shape) for x in self._drawn]

  def late(self) -> bool:
    return time.time() > self.deadline

  def errors(self, case: Case, found: dict) -> dict:
    """Of the probed head: root mean square over that of the exact values, each of out, dq, dk and dv."""
    with np.load(self.directory / f'{case.name}.npz') as exact:
      return {
        name: float(np.sqrt(np.mean((value - exact[name]) ** 2) / np.mean(exact[name] ** 2)))
        for name, value in found.items()
      }


def probe(case: Case) -> tuple:
  """Where the head lies that is compared: the last row, a head in the middle."""
  return case.rows - 1, slice(None), case.heads // 2


def report(**result) -> None:
  print('RESULT ' + json.dumps(result), flush=True)


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


def as_rows(attend, case: Case):
  """For peers without segments: documents as rows of their own, which works because all are as long."""
  if case.mask != 'packed':
    return attend

  def split(x):
    return x.reshape(-1, case.document, *x.shape[2:])

  return lambda *x: attend(*map(split, x)).reshape(x[0].shape)


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
  backward = (
    {}
    if case.width > 128
    else dict(compute_wgs_bwd=2, block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64)
  )
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
# In float16, because its bfloat16 goes through f16 buffers; and it does not scale, so that queries come scaled.
PRESCALED = {'mosaic': 'float16'}


def repeated(step, n: int):
  """`step` n times in one program; each call waits for the one before it, so that none is merged with another or left out."""
  import jax
  import jax.numpy as jnp

  def run(*arguments):
    def again(_, done):
      return step(*jax.lax.optimization_barrier((arguments, done))[0])

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, *arguments))
    return jax.lax.fori_loop(0, n, again, nothing)

  return run


def check_calls(compiled, n: int) -> str:
  """Raises RuntimeError where a program does not run its kernels n times each: XLA has merged calls or taken them out of the loop.

  Returns why that could not be counted, or ''.
  """
  from analysis import hlo

  try:
    times = {
      i.name: times
      for _, i, times in hlo.Module(compiled.as_text()).walk()
      if i.kernel or '"__cudnn$' in i.attributes
    }
  except (
    ValueError,
    KeyError,
    AttributeError,
    TypeError,
  ) as error:  # a program in a form that the reader of programs does not know
    return f'calls were not counted: {type(error).__name__}: {error}'
  if any(count % n or not count for count in times.values()):
    raise RuntimeError(f'kernels run {times} times, not {n}: nothing to be timed')
  return ''


def programs(attend, case: Case, dtype: str, sharding=None) -> dict:
  """Lowered: the forward pass many times; once, with what the backward pass keeps; and the backward pass many times.

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
  except (
    NotImplementedError,
    ValueError,
  ) as error:  # of a kernel that has no backward pass for this case
    lowered['backward'] = str(error)
  return lowered


def poison(nbytes: int) -> None:
  import jax
  import jax.numpy as jnp

  jax.block_until_ready([jnp.full(nbytes // 4, jnp.nan, jnp.float32) for _ in range(4)])


def seconds_of(run, sync, repeats: int = REPEATS) -> float:
  """The median of several runs, after those that warmed up."""
  found = []
  for _ in range(repeats):
    began = time.perf_counter()
    sync(run())
    found.append(time.perf_counter() - began)
  return statistics.median(found)


def run_jax(job: Job) -> None:
  """All cases of a peer that jax runs: compiled side by side, a few at a time, then timed one by one."""
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


def attempt(case: Case, function, *arguments):
  """The function's result; a failure is reported as the case's, and ends the process where the GPU is lost with it."""
  try:
    return function(*arguments)
  except Exception as error:  # compilers and kernels raise whatever they like, and the other cases are still wanted
    report(case=case.name, error=in_a_line(error))


def in_a_line(error: Exception) -> str:
  """What it says first; raises it again where the GPU is lost with it."""
  if any(word in str(error) for word in STICKY):
    raise error
  return f'{type(error).__name__}: {error}'.strip().splitlines()[0][:300]


def both(job: Job, case: Case, forward, backward, unchecked=()) -> None:
  """Reports seconds and errors of a case. forward, backward: () -> (seconds of a call, what it returned by name); one fails alone.

  unchecked: what they note while they run.
  """
  seconds, found = forward()
  result = {'forward': seconds, 'no_backward': ''}
  try:
    result['backward'], gradients = backward()
    found |= gradients
  except Exception as error:
    result['no_backward'] = in_a_line(error)
  report(
    case=case.name,
    errors=job.errors(case, found),
    unchecked=' '.join(filter(None, unchecked)),
    **result,
  )


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
    found = {
      name: np.asarray(x[probe(case)], np.float64)
      for name, x in zip(names, outputs if len(names) > 1 else [outputs])
    }
    del outputs
    if 'dq' in found:
      found['dq'] = found['dq'] * scale
    return seconds_of(lambda: run(*arguments), jax.block_until_ready) / case.calls(direction), found

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

  def one(case):
    head = [rounded(x[probe(case)]) for x in job.arrays(case)]
    np.savez(job.directory / f'{case.name}.npz', **jax.jit(functools.partial(exact, case))(*head))
    report(case=case.name)

  for case in job.cases:
    if not job.late():
      attempt(case, one, case)


def run_peak(job: Job) -> None:
  """Of large products in bfloat16: what percentages are taken of. And what the device is."""
  import jax
  import jax.numpy as jnp

  device, size, n = jax.devices()[0], job.peak_size, 20
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


def run_torch(job: Job) -> None:
  """torch's scaled_dot_product_attention by its flash or cuDNN kernel, or its compiled flex_attention."""
  import torch
  from torch.nn import attention as kinds
  from torch.nn.functional import scaled_dot_product_attention

  device = 'cpu' if job.rehearsal else 'cuda'
  kernel = {
    'torch flash': kinds.SDPBackend.FLASH_ATTENTION,
    'torch cudnn': kinds.SDPBackend.CUDNN_ATTENTION,
  }.get(job.peer)

  def attention_of(case):
    if kernel is not None:
      if case.window:
        return 'it has no window'

      def swapped(*x):
        return (y.transpose(1, 2) for y in x)

      return as_rows(
        lambda *x: scaled_dot_product_attention(
          *swapped(*x), is_causal=case.mask != 'full'
        ).transpose(1, 2),
        case,
      )
    from torch.nn.attention import flex_attention as flex

    blocks = flex.create_block_mask(
      lambda b, h, q, k: case.visible(q, k), None, None, case.length, case.length, device=device
    )
    run = torch.compile(flex.flex_attention, dynamic=False)
    return lambda *x: run(*(y.transpose(1, 2) for y in x), block_mask=blocks).transpose(1, 2)

  def measure(case):
    attend = attention_of(case)
    if isinstance(attend, str):
      return report(case=case.name, error=attend)
    *inputs, d_out = (
      torch.from_numpy(x).to(device, torch.float32 if job.rehearsal else torch.bfloat16)
      for x in job.arrays(case)
    )
    for x in inputs:
      x.requires_grad_(True)

    def timed(direction, names, run):
      torch.full((4 * d_out.numel(),), float('nan'), device=device)
      found = {
        name: x.detach()[probe(case)].double().cpu().numpy() for name, x in zip(names, run())
      }
      return _events(run, case.calls(direction), torch, device), found

    def backward():
      out = attend(*inputs)
      return timed(
        'backward',
        ['dq', 'dk', 'dv'],
        lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True),
      )

    both(job, case, lambda: timed('forward', ['out'], lambda: [attend(*inputs)]), backward)

  for case in job.cases:
    if not job.late():
      with kinds.sdpa_kernel(kernel) if kernel is not None else torch.enable_grad():
        attempt(case, measure, case)


def _events(run, n: int, torch, device: str) -> float:
  """Seconds of a call: the median of several rows of n, between two events on the GPU."""

  def all_of_them():
    for _ in range(n):
      run()

  if device == 'cpu':
    return seconds_of(all_of_them, lambda _: None) / n
  found = []
  for _ in range(REPEATS):
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    all_of_them()
    ended.record()
    torch.cuda.synchronize()
    found.append(began.elapsed_time(ended) / 1e3 / n)
  return statistics.median(found)


def main():
  job = Job(sys.argv[1])
  if job.peer in JAX_PEERS:
    run_jax(job)
  else:
    {'oracle': run_oracle, 'peak': run_peak}.get(job.peer, run_torch)(job)


if __name__ == '__main__':
  main()
