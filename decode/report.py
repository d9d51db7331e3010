"""How fast was a call? Time to the first token and for each of the others,
and how near that is to what the memory allows.

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

# Bytes that are read to find the bandwidth, and how often in one program:
# a GPU reads them in less time than a call takes.
PROBE, TIMES = {'cpu': 2**28}, {'cpu': 1}
PROBE_ELSEWHERE, TIMES_ELSEWHERE = 2**30, 16
_COMPILING = '/jax/core/compile/backend_compile_duration'
_compiled = [0.0]
jax.monitoring.register_event_duration_secs_listener(
  lambda event, seconds, **_: _compiled.__setitem__(
    0, _compiled[0] + seconds * (event == _COMPILING)
  )
)


@dataclasses.dataclass(frozen=True)
class Report:
  """Of one call.

  Attributes:
    rows: of a search, all beams. prompt_tokens, new_tokens: of all rows together. steps:
      tokens of the longest row.
    first_token: seconds from the call to the first token, compilation included. compile_seconds:
      of that and all else.
    seconds: from the call to its end. ms_per_token: from the first chunk on, which is one step, of
      each further token of the longest row; NaN where there is none. tokens_per_second: of all
      rows, in the same time; NaN likewise.
    cache_bytes: of the cache. read_bytes: of weights and cached tokens that an average step reads.
    seed: as it was asked for. drafted, accepted: tokens that a draft proposed, and that were kept.
      fell_back: whether the call went on without drafts, because they cost more than they saved
      (decode.drafting).
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

  def __str__(self) -> str:
    drafts = f', {self.accepted} of {self.drafted} drafted tokens kept' if self.drafted else ''
    drafts += ', and none were drafted any more as that was faster' if self.fell_back else ''
    share = (
      ''
      if self.drafted
      else f', {self.share_of_bandwidth():.0%} of what the measured bandwidth allows'
    )
    then = f'then {self.ms_per_token:.2f} ms a step, {self.tokens_per_second:.1f} tokens/s{share}'
    too_few = 'and too few steps behind it to time'
    return (
      f'{self.rows} rows, {self.prompt_tokens} prompt tokens, {self.new_tokens} new ones{drafts}\n'
      f'first token {self.first_token * 1e3:.1f} ms, '
      f'{too_few if math.isnan(self.ms_per_token) else then}\ncache {self.cache_bytes / 1e6:.1f} '
      f'MB, compilation {self.compile_seconds:.1f} s, seed {self.seed}'
    )

  def share_of_bandwidth(self) -> float:
    """The least time that a step can take by the memory's measured bandwidth, over what it took;
    1 is the bound.

    NaN with drafts, and where no step was timed.
    """
    return (
      float('nan') if self.drafted else self.read_bytes / bandwidth() / (self.ms_per_token / 1e3)
    )


@functools.cache
def bandwidth() -> float:
  """Bytes per second that a device of this process reads, measured; of several devices,
  all of them together.
  """
  devices = jax.local_devices()
  kind = devices[0].platform
  nbytes, times = PROBE.get(kind, PROBE_ELSEWHERE), TIMES.get(kind, TIMES_ELSEWHERE)
  x = jax.device_put(jnp.ones((nbytes // 4,), jnp.float32), devices[0])
  total = jax.jit(
    lambda x: jax.lax.fori_loop(
      0,
      times,
      lambda _, before: jnp.sum(jax.lax.optimization_barrier((x, before))[0]),
      jnp.float32(0),
    )
  )
  total(x).block_until_ready()
  best = float('inf')
  for _ in range(8):
    began = time.perf_counter()
    total(x).block_until_ready()
    best = min(best, time.perf_counter() - began)
  return times * nbytes / best


def weight_bytes(model: transformer.Decoder) -> float:
  """Bytes of the weights that a step reads: not the table that tokens are looked up in,
  and of experts those that one token goes to.
  """
  leaves = params.named_leaves(model)
  moe, total = model.config.moe, 0.0
  for name, x in leaves.items():
    looked_up = name.startswith('embedding.') and not (
      name == 'embedding.tokens' and model.head.tokens is None
    )
    if looked_up or name.startswith('encoder.'):
      continue
    routed = moe.experts and '.feed_forward.' in name and moe.experts in x.shape[1:2]
    total += x.nbytes * (moe.per_token / moe.experts if routed else 1)
  return total


class Watch:
  """Takes the times of a call."""

  def __init__(self, model: transformer.Decoder):
    self._weights, self._compiled, self._start = (
      weight_bytes(model),
      _compiled[0],
      time.perf_counter(),
    )

  def began(self, cache: Cache, prompt_tokens: int) -> None:
    """The prompts are on their way into this cache."""
    self._cache = sum(x.nbytes for x in jax.tree.leaves(cache.held))
    self._per_token = self._cache / cache.capacity / cache.lengths.shape[0]
    self._prompts = prompt_tokens

  def first(self, chunk: Any) -> Any:
    """The first chunk, when it is there: the next one may be over before anyone reads this one,
    and is dispatched behind this.
    """
    jax.block_until_ready(chunk)
    self._first, self._before = time.perf_counter() - self._start, None
    return chunk

  def came(self, lengths: Sequence[int]) -> None:
    """So many tokens of each row are here."""
    self._last, self._lengths = time.perf_counter() - self._start, list(lengths)
    self._before = self._before or self._lengths

  def report(self, seed: object, rows, fell_back: bool = False) -> Report:
    new, steps = sum(self._lengths), max(self._lengths)
    timed, took = steps - max(self._before), self._last - self._first
    held = self._prompts + new / 2  # on average over the steps
    nan = float('nan')
    return Report(
      len(self._lengths),
      self._prompts,
      new,
      steps,
      self._first,
      _compiled[0] - self._compiled,
      self._last,
      took / timed * 1e3 if timed else nan,
      (new - sum(self._before)) / took if timed else nan,
      self._cache,
      self._weights + held * self._per_token,
      seed,
      sum(row.drafted for row in rows),
      sum(row.accepted for row in rows),
      fell_back,
    )
