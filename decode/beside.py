"""How do adapters of all kinds come onto one model that generates, and what is each to a row?

Soft tokens become virtual ids of one table (model.soft.together), low-rank updates a bank behind
each matrix (model.banks). A row that asks for one is as if there were no others.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from decode.front import Front
from decode.generating import generating_model
from model import banks, soft
from model.adaptation import AdapterConfig
from model.adapters import Adapter
from model.transformer import Decoder

Adapters = Mapping[str, tuple[Adapter, AdapterConfig]]


def with_adapters(
  model: Decoder, adapters: Adapters, plain: Front, weights: str = ''
) -> tuple[Decoder, dict[str, Front]]:
  """The model as generation holds it, with these adapters by name, and what stands before the rows
  of each. On the mesh in context.

  model: as it is stored. plain: of the model by itself. weights: see generating_model.

  Raises ValueError for an adapter with numbers that are none, and for soft tokens on a model that
  has some already; as model.soft.check, and as model.banks.banked.
  """
  for name, (adapter, _) in adapters.items():
    if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(adapter)):
      raise ValueError(
        f'adapter {name!r} has numbers that are not finite, which would reach rows of other '
        'adapters; take an earlier checkpoint of its run'
      )
  stored = model.config
  model, fronts = _with_soft(model, adapters, plain)
  model = jax.jit(generating_model, static_argnames='weights')(model, weights=weights)

  low_rank = {name: pair for name, pair in adapters.items() if not pair[1].soft}
  for index, name in enumerate(low_rank, 1):
    fronts[name] = dataclasses.replace(plain, adapter=name, index=index)
  if low_rank:
    model = banks.with_adapters(model, stored, low_rank)
  return model, {name: fronts[name] for name in adapters}


def _with_soft(model, adapters: Adapters, plain: Front) -> tuple[Decoder, dict[str, Front]]:
  """The model with the soft tokens of all that are such, and the fronts of these."""
  chosen = {name: pair for name, pair in adapters.items() if pair[1].soft}
  if not chosen:
    return model, {}
  if plain.soft:
    raise ValueError(
      f'adapter {next(iter(chosen))!r} has soft tokens, and the model has {len(plain.soft)} of its '
      'own, which stand before every text: load the model that these were put on'
    )
  for _, config in chosen.values():
    soft.check(model.config, config)
  model, ranges = soft.together(model, [adapter for adapter, _ in chosen.values()])
  fronts = {
    name: dataclasses.replace(plain, adapter=name, soft=tuple(ids))
    for name, ids in zip(chosen, ranges, strict=True)
  }
  return model, fronts
