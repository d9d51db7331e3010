"""How are tokens generated? Prefill, then jitted chunks of steps over a cache that is rewritten in place.

B rows · T prompt bucket · V vocabulary
"""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from decode.sampling import Sampling, sample
from model.cache import Cache
from model.transformer import Decoder
from parallel import axes as ax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """What generation carries from token to token; its buffers are donated.

  The fields are annotated Any because JAX rebuilds registered dataclasses with tracers, specs and placeholders.

  Attributes:
    cache: of all tokens so far. logits: [B, V] f32 for each row's next token.
    done: [B] bool, rows that have ended. stop_at: [B] int32, length, prompt included, at which a row ends at the latest.
  """
  cache: Any
  logits: Any
  done: Any
  stop_at: Any


@functools.partial(jax.jit, static_argnames='vocabulary', donate_argnums=3)
def prefill(model: Decoder, tokens: Int[Array, 'B T'], lengths: Int[Array, 'B'], cache: Cache, stop_at: Int[Array, 'B'],
            source: tuple[Int[Array, 'B S'], Int[Array, 'B S']] | None = None, *, vocabulary: int = 0) -> DecodeState:
  """Reads prompts into an empty cache.

  tokens: each row's prompt, then padding, whose ids are free: it is never seen. lengths: of the prompts, at least 1.
  source: of an encoder-decoder, what the encoder reads: ids, and 1 where they count, 0 where they are padding.
  vocabulary: ids from here on are never generated; 0: all may be.
  """
  if source is not None:
    cache = model.read(cache, *source)
  x, cache, _ = model(tokens, cache=cache)
  last = jnp.arange(tokens.shape[1])[None] == lengths[:, None] - 1
  x = jnp.where(last[..., None], x, 0).sum(1)
  # Slots behind the prompt hold padding; from here on they count as unused.
  return DecodeState(dataclasses.replace(cache, lengths=lengths), _scores(model, x, vocabulary), lengths >= stop_at, stop_at)


@functools.partial(jax.jit, static_argnames=('steps', 'eos', 'pad', 'vocabulary'), donate_argnums=1)
def decode_chunk(model: Decoder, state: DecodeState, sampling: Sampling, *, steps: int, eos: int, pad: int,
                 vocabulary: int = 0) -> tuple[DecodeState, Int[Array, 'B C'], Bool[Array, 'B C']]:
  """`steps` more tokens of each row: the new state, the ids, and which of them are the row's (not after its end).

  The id `eos` ends a row and belongs to it; behind a row's end ids are `pad`. vocabulary: as of prefill.
  """
  def step(state, _):
    position = state.cache.lengths
    ids = jnp.where(state.done, pad, sample(state.logits, sampling, position))
    real = ~state.done
    x, cache, _ = model(ids[:, None], cache=state.cache)
    lengths = jnp.where(real, cache.lengths, position)  # a row that has ended stays as it is
    done = state.done | (ids == eos) | (lengths >= state.stop_at)
    new = DecodeState(dataclasses.replace(cache, lengths=lengths), _scores(model, x[:, 0], vocabulary), done, state.stop_at)
    return new, (ids, real)
  state, (ids, real) = jax.lax.scan(step, state, None, length=steps)
  return state, ids.T, real.T


def _scores(model, x, vocabulary):
  logits = ax.place(model.logits(x), 'batch', None)  # sampling ranks the whole vocabulary of a row
  return jnp.where(jnp.arange(logits.shape[1])[None] < vocabulary, logits, -jnp.inf) if vocabulary else logits
