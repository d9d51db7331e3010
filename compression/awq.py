"""Which scales make a layer easier to round? They go into the norm, or the matrix, before
(compression.folding), and the model stays what it is until it is rounded.

AWQ (Lin et al., arXiv:2306.00978): s = mean|X|^a, a of 20 between 0 and 1, by the least error of
what comes out, |X (W - Q(s W) / s)|^2, which is a sum over E = W - Q(s W) / s of E^T (X^T X) E.
SmoothQuant (Xiao et al., arXiv:2211.10438): s = max|X|^a / max|W|^(1 - a), a = 1/2: outliers of
activations go over to the weights.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from compression import calibration
from compression.calibration import InputStatistics
from compression.folding import Fold, folded, folds, seen, tied
from model.config import ModelConfig
from model.weights import read

STEPS = 20
SMOOTHING = 0.5
TINY = 1e-5


def searched(fold: Fold, matrices, found: InputStatistics, statistics, rounds: Callable):
  """AWQ's scales of a fold. matrices: the sinks that are rounded, by name in the model. rounds:
  (name, parameter, numbers) -> the numbers of the nearest codes.
  """
  mean = found.absolute / jnp.maximum(found.count, 1)[..., None]
  mean = _each(fold, mean, jnp.mean)

  def scales(a):
    s = jnp.where(mean > 0, mean, 1) ** a
    s = s / jnp.sqrt(s.max(-1, keepdims=True) * s.min(-1, keepdims=True))
    return jnp.clip(s, 1 / 64, 64)

  def error(a):
    s, total = scales(a), 0.0
    for name, p in matrices.items():
      lead, inputs = calibration.sizes_of(p)
      x = read(p).numbers('float32')[0]
      wide = jnp.broadcast_to(s, (*lead, inputs))
      wide = wide.reshape(*lead, inputs, 1)
      scaled = (x.reshape(*lead, inputs, -1) * wide).reshape(x.shape)
      back = rounds(name, p, scaled).reshape(*lead, inputs, -1) / wide
      e = x.reshape(*lead, inputs, -1) - back
      with jax.default_matmul_precision('highest'):
        total += (e * (statistics[name].products @ e)).sum()
    return total

  tries = jnp.arange(STEPS, dtype=jnp.float32) / STEPS
  errors = jax.lax.map(error, tries)
  return scales(tries[jnp.argmin(errors)])


def smoothed(fold: Fold, matrices, found: InputStatistics, statistics, rounds):
  """SmoothQuant's."""
  largest = 0.0
  for p in matrices.values():
    lead, inputs = calibration.sizes_of(p)
    x = jnp.abs(read(p).numbers('float32')[0].reshape(*lead, inputs, -1)).max(-1)
    largest = jnp.maximum(largest, x if found.count.ndim or not lead else x.max(0))
  s = found.largest**SMOOTHING / jnp.maximum(largest, TINY) ** (1 - SMOOTHING)
  s = jnp.where((found.largest > 0) & (largest > 0), jnp.maximum(s, TINY), 1)
  return _each(fold, s, jnp.max)


def _each(fold: Fold, x, how):
  run = functools.partial(tied, fold, how=how)
  return jax.vmap(run)(x) if x.ndim > 1 else run(x)


@dataclasses.dataclass(frozen=True)
class Scaling:
  """A method that puts scales into places.

  Attributes:
    search: `searched` or `smoothed`. only_norms: whether matrices are no places.
    config: of the model.
  """

  search: Callable
  only_norms: bool
  config: ModelConfig

  @property
  def _exact(self) -> bool:
    return self.config.execution.parameter_dtype == 'float32'

  def places(self, layer) -> list[Fold]:
    """Those of a layer that are used."""
    return [
      fold
      for fold in folds(layer, self.config)
      if not (self.only_norms and not fold.norm)
      # In few bits 1 + w cannot be just s.
      and (self._exact or not (fold.norm and self.config.norm_offset))
    ]

  def without(self, layer, prefix: str, wanted: Callable[[str, Any], bool]) -> list[str]:
    """Names of matrices that are rounded and have no place."""
    placed = {f'{prefix}.{path}' for fold in self.places(layer) for path in fold.sinks}
    named = calibration.matrices(layer, prefix)
    return [name for name, p in named.items() if wanted(name, p) and name not in placed]

  def __call__(
    self, prefix: str, layer, statistics: Mapping[str, InputStatistics], rounds: Callable
  ):
    """The layer with scales in all places. rounds: see `searched`. Traced."""
    by_path = {name.removeprefix(f'{prefix}.'): s for name, s in statistics.items()}
    for fold in self.places(layer):
      named, found = calibration.matrices(layer, prefix), seen(fold, by_path)
      matrices = {name: named[name] for name in statistics if _path(prefix, name) in fold.sinks}
      if found is None:
        continue
      s = self.search(fold, matrices, found, statistics, rounds)
      # Of numbers of fewer bits, only a power of two leaves the model what it is.
      layer = folded(layer, fold, s if self._exact else 2 ** jnp.round(jnp.log2(s)))
    return layer


def _path(prefix: str, name: str) -> str:
  return name.removeprefix(f'{prefix}.')
