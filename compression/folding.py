"""Where can a scale for each input of a matrix go, so that the model stays what it is? Its numbers
times s, and what gives it those inputs divided by s: the norm before it, or the matrix before it.

    norm -> projections of attention; gate, up, router and experts
    v -> o       each value is mixed with others of its head alone
    up -> down   where the activation is linear in up, or a power of it

A norm behind the residual sum feeds that, too, and keys and values of an encoder's output are of
all layers: there is no place, and these matrices stay.

I inputs · E experts
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from compression import calibration
from compression.calibration import InputStatistics

# act(x / t)^.. t is s to this power, of activations without a gate.
HOMOGENEOUS = {'relu': 1.0, 'relu2': 0.5}


class Fold(NamedTuple):
  """A place for scales.

  Attributes:
    sinks: paths in the layer of matrices whose inputs are scaled. of: the one, or several, whose
      statistics say what they see.
    norm: path of the norm that takes it back; '': none. source: of the matrix that does, by its
      outputs. power: of s, in the source.
    heads: (K, G), where each of K heads of the source feeds G heads of the sink; None: one each.
  """

  sinks: tuple[str, ...]
  of: tuple[str, ...]
  norm: str = ''
  source: str = ''
  power: float = 1.0
  heads: tuple[int, int] | None = None

  @property
  def place(self) -> str:
    return self.norm or self.source


def folds(layer, config) -> list[Fold]:
  """All places of a layer."""
  made, attention = [], layer.attention
  before = layer.placement != 'post'
  inputs = ('q', 'k', 'v')
  if config.latent.width:
    inputs = ('q_down' if attention.q_down is not None else 'q', 'kv_down', 'rope_key')
    if attention.q_down is not None:
      made.append(_of_norm('attention.q_down_norm', ('attention.q',)))
    made.append(_of_norm('attention.kv_norm', ('attention.k', 'attention.v')))
  if before:
    made.append(_of_norm('attention_norm', tuple(f'attention.{name}' for name in inputs)))
  made.append(_values('attention', config, bool(config.latent.width)))
  if layer.cross is not None:
    if before:
      made.append(_of_norm('cross_norm', ('cross.q',)))
    made.append(_values('cross', config, False))
  return made + _feed_forward(layer, config, before)


def _of_norm(norm: str, sinks: tuple[str, ...]) -> Fold:
  return Fold(sinks, sinks, norm)


def _values(part: str, config, latent: bool) -> Fold:
  heads = None if latent else (config.K, config.N // config.K)
  return Fold((f'{part}.o',), (f'{part}.o',), source=f'{part}.v', heads=heads)


def _feed_forward(layer, config, before: bool) -> list[Fold]:
  part = layer.feed_forward
  experts = hasattr(part, 'router')
  shared = getattr(part, 'shared', None) is not None
  first = ('gate', 'up') if part.gate is not None else ('up',)
  made = []
  if before:
    sinks = tuple(f'feed_forward.{name}' for name in first)
    if shared:
      sinks += tuple(f'feed_forward.shared.{name}' for name in first)
    of = sinks[::-1]  # the shared expert, if there is one, sees all tokens
    more = ('feed_forward.router',) if experts else ()
    made.append(Fold(sinks + more, of, 'feed_forward_norm'))
  power = 1.0 if part.gate is not None else HOMOGENEOUS.get(config.activation, 0.0)
  if power and config.activation != 'clamped_silu':
    for at in ('feed_forward', *(['feed_forward.shared'] if shared else [])):
      made.append(Fold((f'{at}.down',), (f'{at}.down',), source=f'{at}.up', power=power))
  return made


def seen(fold: Fold, statistics: Mapping[str, InputStatistics]) -> InputStatistics | None:
  """What a fold's sinks see, by paths; of experts that share their inputs, together. None where it
  is not known.
  """
  of = [statistics[name] for name in fold.of if name in statistics]
  if not of:
    return None
  found = of[0]
  if found.count.ndim and fold.norm:
    total = jax.tree.map(lambda x: x.sum(0), found)
    found = dataclasses.replace(total, largest=found.largest.max(0))
  return found


def tied(fold: Fold, x: jax.Array, how) -> jax.Array:
  """A number for each input, the same for all that one output of the source feeds. how: jnp.mean or
  jnp.max.
  """
  if fold.heads is None or fold.heads[1] == 1:
    return x
  K, G = fold.heads
  parts = x.reshape(K, G, -1)
  return jnp.broadcast_to(how(parts, 1, keepdims=True), parts.shape).reshape(x.shape)


def folded(layer, fold: Fold, s: jax.Array):
  """The layer with the inputs of a fold's sinks times s [*E, I], and their source divided by it.
  Every array has a first dimension of 1. Traced.
  """
  layer = jax.tree.map(lambda x: x, layer)  # a copy, to be written to
  s = s.astype(jnp.float32)
  for path in fold.sinks:
    _write(layer, path, lambda p, x: _inputs(p, x, s))
  if fold.norm:
    norm = _at(layer, fold.norm)
    _write(layer, f'{fold.norm}.scale', lambda p, x: (x + norm.offset) / s[None] - norm.offset)
    if norm.bias is not None:
      _write(layer, f'{fold.norm}.bias', lambda p, x: x / s[None])
    return layer
  of_outputs = s
  if fold.heads is not None:
    K, G = fold.heads
    of_outputs = s.reshape(K, G, -1)[:, 0].reshape(-1)
  of_outputs = of_outputs**fold.power
  _write(layer, fold.source, lambda p, x: _outputs(p, x, of_outputs))
  owner, _, name = fold.source.rpartition('.')
  if getattr(_at(layer, owner), f'{name}_bias', None) is not None:
    _write(layer, f'{fold.source}_bias', lambda p, x: x / of_outputs.reshape(x.shape))
  return layer


def _inputs(p, x, s):
  """A matrix [1, *E, inputs, outputs] with its inputs scaled; s without experts is of each."""
  lead, inputs = calibration.sizes_of(p)
  flat = x.reshape(1, *lead, inputs, -1)
  if s.ndim == 1:
    s = jnp.broadcast_to(s, (*lead, inputs))
  return (flat * s[None, ..., None]).reshape(x.shape)


def _outputs(p, x, s):
  lead, inputs = calibration.sizes_of(p)
  flat = x.reshape(1, *lead, inputs, -1)
  return (flat / jnp.expand_dims(s, (0, len(lead) + 1))).reshape(x.shape)


def _at(layer, path: str):
  for name in path.split('.'):
    layer = getattr(layer, name)
  return layer


def _write(layer, path: str, change):
  place, _, name = path.rpartition('.')
  owner = _at(layer, place) if place else layer
  p = getattr(owner, name)
  x = p[...]
  setattr(owner, name, p.replace(change(p, x.astype(jnp.float32)).astype(x.dtype)))
