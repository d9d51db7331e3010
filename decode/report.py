"""How fast was a call? Time to the first token and for each of the others, and how near that is to
what the memory allows.

A step of decoding reads every weight once, whatever the rows, and what the cache holds: these bytes
over the machine's bandwidth are the least time that a token takes. The bandwidth is measured, once
a process, by a sum over an array that no cache of a processor holds.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from model import params, transformer
from model.cache import Cache

_COMPILING = '/jax/core/compile/backend_compile_duration'


@dataclasses.dataclass(frozen=True)
class Probe:
  """How the bandwidth is measured: by the sum over an array of so many bytes, so many times in one
  program.
  """

  nbytes: int
  times: int = 1


# By platform. What no cache of a CPU holds takes it far longer than a call does; a GPU reads as
# much in less time than that, hence a larger array there, read again and again by one program.
PROBES = {'cpu': Probe(2**28)}
PROBE_ELSEWHERE = Probe(2**30, times=16)


@dataclasses.dataclass(frozen=True)
class GenerationReport:
  """Of one call.

  Attributes:
    rows: of a search, all beams.
    prompt_tokens: that were read, those that samples share once (on each part of the mesh that has
      some of them). new_tokens: of all rows together.
    steps: tokens of the longest row.
    first_token: seconds from the call to the first token, compilation included.
    compile_seconds: of that and all else.
    seconds: from the call to its end.
    ms_per_token: from the first chunk on, which is one step, of each further token of the longest
      row; NaN where there is none.
    tokens_per_second: of all rows, in the same time; NaN likewise.
    cache_bytes: of the cache.
    read_bytes: of weights and cached tokens that a device reads in an average step.
    seed: as it was asked for.
    drafted, accepted: tokens that a draft proposed, and that were kept.
    fell_back: whether the call went on without drafts, because they cost more than they saved
      (decode.drafting).
    notes: of rows that a limit ended before max_new_tokens (decode.request.Completion.note).
  """

  rows: int
  prompt_tokens: int
  new_tokens: int
  steps: int
  first_token: float
  compile_seconds: float
  seconds: float
  ms_per_token: float
  tokens_per_second: float
  cache_bytes: int
  read_bytes: float
  seed: object
  drafted: int
  accepted: int
  fell_back: bool
  notes: tuple[str, ...] = ()

  def __str__(self) -> str:
    drafts = f', {self.accepted} of {self.drafted} drafted tokens kept' if self.drafted else ''
    if self.fell_back:
      drafts += ', and none were drafted any more as that was faster'
    return (
      f'{self.rows} rows, {self.prompt_tokens} prompt tokens, {self.new_tokens} new ones{drafts}\n'
      f'first token {self.first_token * 1e3:.1f} ms, {self._speed()}\n'
      f'cache {self.cache_bytes / 1e6:.1f} MB, compilation {self.compile_seconds:.1f} s, '
      f'seed {self.seed}'
    )

  def _speed(self) -> str:
    if math.isnan(self.ms_per_token):
      return 'and too few steps behind it to time'
    speed = f'then {self.ms_per_token:.2f} ms a step, {self.tokens_per_second:.1f} tokens/s'
    if self.drafted:
      return speed
    return f'{speed}, {self.share_of_bandwidth():.0%} of what the measured bandwidth allows'

  def share_of_bandwidth(self) -> float:
    """The least time that a step can take by the memory's measured bandwidth, over what it took;
    1 is the bound.

    NaN with drafts, and where no step was timed.
    """
    if self.drafted:
      return float('nan')
    return self.read_bytes / bandwidth() / (self.ms_per_token / 1e3)


@functools.cache
def bandwidth() -> float:
  """Bytes per second that a device of this process reads, measured."""
  device = jax.local_devices()[0]
  probe = PROBES.get(device.platform, PROBE_ELSEWHERE)
  x = jax.device_put(jnp.ones((probe.nbytes // 4,), jnp.float32), device)

  @jax.jit
  def total(x):
    # Behind a barrier with the sum before it, which a compiler cannot take out of the loop.
    def read(_, before):
      return jnp.sum(jax.lax.optimization_barrier((x, before))[0])

    return jax.lax.fori_loop(0, probe.times, read, jnp.float32(0))

  total(x).block_until_ready()
  best = float('inf')
  for _ in range(8):
    began = time.perf_counter()
    total(x).block_until_ready()
    best = min(best, time.perf_counter() - began)
  return probe.times * probe.nbytes / best


def device_bytes(x: jax.Array) -> int:
  """Bytes of an array that lie on one device."""
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def weight_bytes(model: transformer.Decoder, rows: int = 1) -> float:
  """Bytes of the weights that a device reads in a step of so many rows: not the table that tokens
  are looked up in, of experts those that tokens of all rows go to, if each goes where it likes, and
  parameters that layers share as often as they do.
  """
  moe, shared, total = model.config.moe, model.config.shared_layers, 0.0
  for name, x in params.named_leaves(model).items():
    is_head = name == 'embedding.tokens' and model.head.tokens is None
    looked_up = name.startswith('embedding.') and not is_head
    if looked_up or name.startswith('encoder.'):
      continue
    routed = moe.experts and '.feed_forward.' in name and moe.experts in x.shape[1:2]
    chosen = 1 - (1 - moe.per_token / moe.experts) ** rows if routed else 1
    total += device_bytes(x) * chosen * (shared if name.startswith('stack.') else 1)
  return total


class CallTimer:
  """Takes the times of a call, from when it is made."""

  def __init__(self, model: transformer.Decoder):
    self._model = model
    self._compiled = _compilation()
    self._compiled_before = self._compiled.seconds
    self._start = time.perf_counter()

  def began(self, cache: Cache, prompt_tokens: int, held: int) -> None:
    """So many tokens of prompts are on their way into this cache, whose rows then hold `held`."""
    self._cache = sum(x.nbytes for x in jax.tree.leaves(cache.held))
    here = sum(map(device_bytes, jax.tree.leaves(cache.held)))
    self._per_token = here / cache.capacity / cache.lengths.shape[0]
    self._prompts = prompt_tokens
    self._held = held

  def first(self, chunk: Any) -> Any:
    """The first chunk, when it is there: the next one may be over before anyone reads this one, and
    is dispatched behind this.
    """
    jax.block_until_ready(chunk)
    self._first, self._before = time.perf_counter() - self._start, None
    return chunk

  def came(self, lengths: Sequence[int]) -> None:
    """So many tokens of each row are here."""
    self._last, self._lengths = time.perf_counter() - self._start, list(lengths)
    self._before = self._before or self._lengths

  def report(self, seed: object, rows, fell_back: bool = False) -> GenerationReport:
    """rows: of the call (decode.request.Row); seed, fell_back: see GenerationReport."""
    tokens, steps = sum(self._lengths), max(self._lengths)
    timed, took = steps - max(self._before), self._last - self._first
    cached = self._held + tokens / 2  # on average over the steps
    nan = float('nan')
    return GenerationReport(
      rows=len(self._lengths),
      prompt_tokens=self._prompts,
      new_tokens=tokens,
      steps=steps,
      first_token=self._first,
      compile_seconds=self._compiled.seconds - self._compiled_before,
      seconds=self._last,
      ms_per_token=took / timed * 1e3 if timed else nan,
      tokens_per_second=(tokens - sum(self._before)) / took if timed else nan,
      cache_bytes=self._cache,
      read_bytes=weight_bytes(self._model, len(self._lengths)) + cached * self._per_token,
      seed=seed,
      drafted=sum(row.drafted for row in rows),
      accepted=sum(row.accepted for row in rows),
      fell_back=fell_back,
      notes=tuple(row.note for row in rows if row.note),
    )


@dataclasses.dataclass
class _Compilation:
  seconds: float = 0.0


@functools.cache
def _compilation() -> _Compilation:
  """What this process has compiled since this was first called: jax tells a listener, which is
  registered then, once, and stays.
  """
  compilation = _Compilation()

  def listen(event, seconds, **_):
    if event == _COMPILING:
      compilation.seconds += seconds

  jax.monitoring.register_event_duration_secs_listener(listen)
  return compilation
