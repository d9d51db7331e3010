"""What does a frozen model read before every text, that nobody wrote? Soft prompts and prefixes:
made, put on, and several of them on one model.

A soft token is a virtual id, behind the rows of the table of embeddings, so that packing, segments,
positions, caches and engines know nothing of it: it is a token. What stands for it is trained. Of a
prompt (Lester et al., arXiv:2104.08691) that is the vector that the first layer reads, a row behind
the table's (model.weights.appended); of a prefix (Li and Liang, arXiv:2101.00190) the key and the
value that every layer has in its place (model.prefix.in_places), without position and norm,
while what the layers compute there is seen by nobody.

The numbers are those of PEFT: a prompt is given after a model's factor of its embeddings, keys and
values are as they lie in a cache.

P soft tokens · R layers of a place · K key/value heads · H head width · D width
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model.adaptation import AdapterConfig
from model.cache import init_cache
from model.config import ModelConfig
from model.layers import lookup
from model.weights import read
from model.weights.appended import Appended
from model.weights.plain import Plain
from parallel import axes as ax

Adapter = dict[str, dict[str, nnx.Param]]

TABLE = 'embedding.tokens'
COMMON = 5000  # the commonest tokens, from which Lester et al. draw (section 3.2)
BOUND = 0.5  # of uniform random numbers (the same)


def check(network: ModelConfig, config: AdapterConfig) -> None:
  """Raises NotImplementedError where a model of this config has no keys that could be learned."""
  if config.kind != 'prefix':
    return
  for field, value, why in (
    ('encoder_layers', network.encoder_layers, 'has two stacks, whose layers have two attentions'),
    ('latent.width', network.latent.width, 'keeps latents, and neither keys nor values'),
    (
      'shared_layers',
      network.shared_layers > 1 and network.shared_layers,
      'has layers of one set of parameters',
    ),
    ('causal', None if network.causal else False, 'keeps no keys and values of earlier tokens'),
  ):
    if value or (field == 'causal' and value is False):
      raise NotImplementedError(
        f"adapter.kind='prefix' of a model with model.{field}={value}, which {why}; use "
        "adapter.kind='prompt'"
      )


def new(model, config: AdapterConfig, key: jax.Array, ids: Sequence[int] | None = None) -> Adapter:
  """What a config's soft tokens begin as, on a model that may be abstract. On the mesh in context,
  and traced.

  ids: of the text that they begin as; None: drawn from the vocabulary. Raises as `check`.
  """
  check(model.config, config)
  P, network = config.tokens, model.config
  random = config.initial == 'random'
  if ids is None:
    most = min(COMMON, network.V)
    drawn = jax.random.choice(key, most, (P,), replace=most < P)
  else:
    drawn = jnp.asarray([ids[i % len(ids)] for i in range(P)])
  drawn = drawn.astype(jnp.int32)

  def uniform(i, shape):
    return jax.random.uniform(jax.random.fold_in(key, i), shape, minval=-BOUND, maxval=BOUND)

  if config.kind == 'prompt':
    rows = uniform(0, (P, network.D)) if random else model.embedding.scale * _rows(model, drawn)
    return {TABLE: {'soft': _parameter(rows, (), (None, 'embed'))}}

  axes = (None, ax.whole_or('kv_heads', network.K), 'head_width')
  shape = P, network.K, network.H
  if random:
    places = [
      [uniform(2 * i + n, (len(layers), *shape)) for n in (0, 1)]
      for i, (_, layers) in enumerate(network.places)
    ]
  else:
    places = _keys_values(model, drawn)
  return {
    f'stack.blocks.{i}.attention': {
      part: _parameter(x, layers_axis(model.stack.blocks[i].attention.k), axes)
      for part, x in zip(('keys', 'values'), place, strict=True)
    }
    for i, place in enumerate(places)
  }


def layers_axis(p: nnx.Param) -> tuple[str | None]:
  """The logical axis of stacked layers, where stages of a pipeline share them out."""
  x = jax.tree.leaves(p.get_value())[0]
  return ('layers',) if ax.explicit() and jax.typeof(x).sharding.spec[0] else (None,)


def _parameter(values: Array, layers: tuple[str | None, ...], axes: tuple[str | None, ...]):
  placed = ax.place(values.astype(jnp.float32), *layers, *axes)
  return nnx.Param(placed, axes=axes, kind='embedding', inputs=1, wide=False)


def _everywhere(ids: Int[Array, 'P']) -> Int[Array, 'B P']:
  """A row of them for every part of the mesh that has rows."""
  rows = jnp.broadcast_to(ids, (ax.size('batch'), len(ids)))
  return ax.place(rows, 'batch', None)


def _rows(model, ids: Int[Array, 'P']) -> Float[Array, 'P D']:
  with ax.whole_rows(True):
    rows = lookup(model.embedding.tokens, _everywhere(ids), 'float32')
  return ax.place(rows, None, None, None)[0]


def _keys_values(model, ids: Int[Array, 'P']):
  """Keys and values [R, P, K, H] of every place that the model has of these tokens."""
  P = len(ids)
  cache = init_cache(model.config, ax.size('batch'), P, 'float32', P)
  cache = model(_everywhere(ids), cache=cache, fresh=True).cache

  def of_first_row(x, axes):
    layers, _, heads, _, width = axes
    x = ax.place(x, layers, None, heads, None, width)
    return jnp.moveaxis(x[:, 0, :, :P], 2, 1)

  return [
    [of_first_row(x, held.axes().keys) for x in (held.keys, held.values)] for held in cache.held
  ]


def applied(model, adapter: Adapter):
  """The model that reads the adapter's tokens for its virtual ids: they share all arrays."""
  return together(model, [adapter])[0]


def together(model, adapters: Sequence[Adapter]):
  """The model that has the tokens of several adapters, and the virtual ids of each, a range: rows
  of one batch begin with whichever they are asked with.

  Raises ValueError for an adapter of another kind.
  """
  sizes = [_tokens(adapter) for adapter in adapters]
  # Behind all prompts come the prefixes: their places among keys count from the first of them.
  order = sorted(range(len(adapters)), key=lambda i: TABLE not in adapters[i])
  ids, first = {}, model.config.table_rows
  for i in order:
    ids[i] = range(first, first + sizes[i])
    first += sizes[i]
  prefixes = [adapters[i] for i in order if TABLE not in adapters[i]]

  model = jax.tree.map(lambda x: x, model)  # a copy, to be written to
  table = model.embedding.tokens
  soft = Plain(_table(model, [adapters[i] for i in order]), (None, 'embed'))
  model.embedding.tokens = nnx.data(
    table.replace(Appended(read(table), soft, model.config.table_rows))
  )
  if prefixes:
    model.embedding.prefix_tokens = sum(map(_tokens, prefixes))
    for i, block in enumerate(model.stack.blocks):
      pairs = [adapter[f'stack.blocks.{i}.attention'] for adapter in prefixes]
      block.attention.prefix_keys = nnx.data(_joined([pair['keys'] for pair in pairs]))
      block.attention.prefix_values = nnx.data(_joined([pair['values'] for pair in pairs]))
  return model, [ids[i] for i in range(len(adapters))]


def _tokens(adapter: Adapter) -> int:
  parts = next(iter(adapter.values()))
  name = next((name for name in ('soft', 'keys') if name in parts), '')
  if not name:
    raise ValueError(
      f'an adapter of {", ".join(adapter)} stands before no text; put it on with '
      'model.adapters.applied'
    )
  return parts[name].get_value().shape[-2 if name == 'soft' else -3]


def _table(model, adapters: Sequence[Adapter]) -> Float[Array, 'P D']:
  """Rows for all of them; of a prefix nobody sees them."""

  def rows(adapter):
    if TABLE in adapter:
      return adapter[TABLE]['soft'].get_value() / model.embedding.scale
    shape = _tokens(adapter), model.config.D
    return ax.place(jnp.zeros(shape, out_sharding=ax.out(None, 'embed')), None, 'embed')

  return jnp.concatenate([rows(adapter) for adapter in adapters])


def _joined(parameters: Sequence[nnx.Param]) -> nnx.Param:
  first, *others = parameters
  if not others:
    return first
  return first.replace(jnp.concatenate([p.get_value() for p in parameters], -3))
