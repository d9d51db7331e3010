"""What is the network? A decoder: embedding, one block scanned over its layers, a norm, a head.

B batch · T length · S cache length · D width · V vocabulary · L layers
"""
import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model.cache import Cache, Slots
from kernels.mask import Mask
from model.attention import Attention
from model.config import ModelConfig
from model.layers import FeedForward, Norm, rope_angles
from model.params import param, use
from parallel import axes as ax
from parallel.remat import remat


class Block(nnx.Module):
  """Pre-norm residual block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.attention_norm = Norm(config, config.D, rngs)
    self.attention = Attention(config, rngs)
    self.feed_forward_norm = Norm(config, config.D, rngs)
    self.feed_forward = FeedForward(config, rngs)

  def __call__(self, x: Float[Array, 'B T D'], angles, mask: Mask, slots: Slots | None):
    with jax.named_scope('attention'):
      mixed, slots = self.attention(self.attention_norm(x), angles, mask, slots)
      x = x + mixed
    with jax.named_scope('feed_forward'):
      x = x + self.feed_forward(self.feed_forward_norm(x))
    return x, slots


class Decoder(nnx.Module):
  """A decoder-only language model. `model(tokens, ...)` gives final hidden states, `model.logits` the scores of them."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    if not config.V:
      raise ValueError('model.vocabulary=0: set it to the size of the tokenizer before building the model')
    if config.position == 'learned' and not config.max_length:
      raise ValueError('model.max_length=0: learned positions need the length of their table')
    D, V, dtype = config.D, config.V, config.parameter_dtype
    self.config = config
    self.embedding = param(rngs, (V, D), ('vocab', 'embed'), config.init_scale, kind='embedding', dtype=dtype)
    learned = config.position == 'learned'
    self.positions = param(rngs, (config.max_length, D), ('position', 'embed'), config.init_scale, kind='embedding',
                           dtype=dtype) if learned else None
    self.blocks = jax.vmap(lambda key: Block(config, nnx.Rngs(params=key)))(jax.random.split(rngs.params(), config.L))
    self.final_norm = Norm(config, D, rngs)
    tied = config.tie_embeddings
    self.head = None if tied else param(rngs, (V, D), ('vocab', 'embed'), D**-0.5, kind='embedding', dtype=dtype)

  def __call__(self, tokens: Int[Array, 'B T'], positions: Int[Array, 'B T'] | None = None, segments: Int[Array, 'B T'] | None = None,
               cache: Cache | None = None) -> tuple[Float[Array, 'B T D'], Cache | None]:
    """Final hidden states, in the compute dtype, and the cache with the tokens appended.

    Args:
      positions: of each token in its document; default: 0..T-1, or after the row's cached tokens.
      segments: document of each token in a packed row; tokens of different segments never see each other.
      cache: what earlier calls left; the row's new tokens follow its cached ones. Not together with segments.
    """
    config, (B, T) = self.config, tokens.shape
    if cache is not None and segments is not None:
      raise ValueError('a cache holds one document a row: segments and cache exclude each other')
    if positions is None:
      index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
      positions = ax.place(index, 'batch', 'length') if cache is None else index + cache.lengths[:, None]
    packed = Mask(causal=True, window=config.window, query_segments=segments, key_segments=segments)
    mask = packed if cache is None else cache.mask(T, config.window)

    with jax.named_scope('embed'):
      x = lookup(use(self.embedding, config.dtype), tokens)
      if self.positions is not None:
        x = x + lookup(use(self.positions, config.dtype), positions)
    angles = rope_angles(positions, config.H, config.rope_base) if config.position == 'rope' else None

    def layer(carry, block):
      x, slots = carry
      x, slots = block(x, angles, mask, slots)
      return (x, slots and dataclasses.replace(slots, layer=slots.layer + 1)), None

    slots = cache and Slots(cache.k, cache.v, jnp.int32(0), cache.lengths)
    (x, slots), _ = jax.lax.scan(remat(layer, config.remat), (x, slots), self.blocks)
    cache = cache and Cache(slots.k, slots.v, cache.lengths + T)
    return self.final_norm(x), cache

  @property
  def output_embedding(self) -> nnx.Param:
    """[V, D] table that hidden states are scored against."""
    return self.embedding if self.head is None else self.head

  def logits(self, x: Float[Array, '*B D']) -> Float[Array, '*B V']:
    """Scores over the vocabulary in f32, of a few positions: training uses loss.cross_entropy, which never holds them all."""
    logits = jnp.einsum('...D,VD->...V', x, use(self.output_embedding, self.config.dtype), preferred_element_type=jnp.float32)
    cap = self.config.logit_softcap
    return cap * jnp.tanh(logits / cap) if cap else logits


def lookup(table: Float[Array, 'V D'], ids: Int[Array, 'B T']) -> Float[Array, 'B T D']:
  """Rows of a table, laid out as activations are."""
  return table.at[ids].get(out_sharding=ax.out('batch', 'length', 'width'))


def init(config: ModelConfig, seed: int) -> Decoder:
  """A new model, born sharded on the mesh in context. Traced: use under jit or jax.eval_shape."""
  return Decoder(config, nnx.Rngs(params=jax.random.key(seed)))
