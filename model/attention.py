"""How does a token look at others? Projections, norms of queries and keys, positions, the cache;
the mixing is kernels.attention.

B batch · T query length · S key or cache length · D width · N query heads · K key/value heads ·
H head width · R latent width
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

import names
from kernels import attention as kernels
from kernels.mask import Mask, Relative
from kernels.scoring import Scoring
from model.config import ModelConfig
from model.layers import Angles, Norm, add_bias, project, rotate
from model.params import param
from model.places import AnySlots
from model.weights import read
from parallel import axes as ax
from parallel.remat import named


@dataclasses.dataclass(frozen=True)
class View:
  """What the layers of a stack share.

  Attributes:
    mask: who sees whom, but for the layer's window. angles, local_angles: of rotary positions, the
      second for layers with a window; None without. relative: T5's table, or None.
    memory: [B, S, D], what cross-attention looks at, or None: there is none, or the cache holds its
      keys and values. memory_mask: who sees what of it.
    drawn: what training draws (model.drawn.Drawn); None: nothing.
    prefix: [B, T] int32, which keys and values of the layer's prefix stand in a token's place
      (model.soft); negative: the token's own. None where no layer has one.
  """

  mask: Mask
  angles: Angles | None = None
  local_angles: Angles | None = None
  relative: Relative | None = None
  memory: Any = None
  memory_mask: Mask | None = None
  drawn: Any = None
  prefix: Any = None

  def dropped(self, x: Float[Array, 'B T *S'], site: str) -> Float[Array, 'B T *S']:
    """What a site of model.drawn.SITES lets through."""
    return x if self.drawn is None else self.drawn.dropped(x, site)

  def dropout(self, site: str):
    """What attention leaves out of its weights; None for nothing."""
    return self.drawn and self.drawn.dropout(site)


class Attention(nnx.Module):
  """Multi-head attention with grouped keys and values (Ainslie et al., arXiv:2305.13245); `cross`:
  to another sequence.
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, window: int = 0, cross: bool = False):
    D, N, K, H, dtype = config.D, config.N, config.K, config.H, config.execution.parameter_dtype
    self.dtype, self.backend, self.softcap = (
      config.execution.dtype,
      config.execution.attention,
      config.attention_softcap,
    )
    self.blocks, self.context = config.execution.attention_blocks, config.execution.context
    self.scale, self.window = config.attention_scale or H**-0.5, window
    kv_heads = ax.whole_or('kv_heads', K)
    self.q = param(rngs, (D, N, H), ('embed', 'heads', 'head_width'), D**-0.5, dtype=dtype)
    self.k = param(rngs, (D, K, H), ('embed', kv_heads, 'head_width'), D**-0.5, dtype=dtype)
    self.v = param(rngs, (D, K, H), ('embed', kv_heads, 'head_width'), D**-0.5, dtype=dtype)
    self.o = param(
      rngs,
      (N, H, D),
      ('heads', 'head_width', 'embed'),
      (N * H * 2 * config.L) ** -0.5,
      inputs=2,
      dtype=dtype,
    )

    def vector(wanted, *axes):
      sizes = {'heads': N, 'kv_heads': K, None: K, 'head_width': H, 'norm': D}
      return (
        param(rngs, tuple(sizes[a] for a in axes), axes, 'zeros', kind='vector', dtype=dtype)
        if wanted
        else None
      )

    inner, outer = config.biases != 'none', config.biases == 'all'
    self.q_bias, self.o_bias = vector(inner, 'heads', 'head_width'), vector(outer, 'norm')
    self.k_bias, self.v_bias = (
      vector(inner, kv_heads, 'head_width'),
      vector(inner, kv_heads, 'head_width'),
    )
    self.sinks = vector(config.sinks and not cross, 'heads')
    normed = config.qk_norm and not cross
    self.q_norm = Norm(config, H, rngs, 'rms') if normed else None
    self.k_norm = Norm(config, H, rngs, 'rms') if normed else None
    # [P, K, H] each, of an adapter (model.soft): no model is born with them.
    self.prefix_keys = self.prefix_values = None

  def __call__(
    self, x: Float[Array, 'B T D'], view: View, slots: AnySlots | None
  ) -> tuple[Float[Array, 'B T D'], AnySlots | None]:
    """The mixed tokens; with `slots` keys and values are written there first, and attention is to
    all that they hold.
    """
    q = project('BTD,DNH->BTNH', x, self.q, self.q_bias, self.dtype)
    k, v = self.keys_values(x)
    if self.q_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    angles = view.local_angles if self.window else view.angles
    if angles is not None:
      q, k = rotate(q, angles), rotate(k, angles)
    if view.prefix is not None:
      k, v = names.imported('model.prefix.with_prefix')(self, k, v, view.prefix)
    q, k, v = named(q, 'query'), named(k, 'key'), named(v, 'value')
    scoring = Scoring(
      Mask(window=self.window),
      softcap=self.softcap,
      sinks=None if self.sinks is None else self.sinks[...],
      relative=view.relative,
      scale=self.scale,
      dropout=view.dropout('weights'),
    )
    slots = slots and slots.append(k, v, self.window)
    if slots is not None and not slots.fresh:
      return self._out(slots.look(q, scoring=scoring)), slots
    mask = dataclasses.replace(view.mask, window=self.window)
    return self._mix(q, k, v, dataclasses.replace(scoring, mask=mask)), slots

  def cross(
    self, x: Float[Array, 'B T D'], view: View, slots: AnySlots | None
  ) -> Float[Array, 'B T D']:
    """The same of another sequence: of view.memory, or of what the cache holds of it."""
    q = project('BTD,DNH->BTNH', x, self.q, self.q_bias, self.dtype)
    scoring = Scoring(Mask(), softcap=self.softcap, scale=self.scale)
    if slots is not None:
      return self._out(slots.recall(q, scoring=scoring))
    dropout = view.dropout('cross_weights')
    scoring = dataclasses.replace(scoring, mask=view.memory_mask, dropout=dropout)
    return self._mix(q, *self.keys_values(view.memory), scoring)

  def keys_values(
    self, x: Float[Array, 'B S D']
  ) -> tuple[Float[Array, 'B S K H'], Float[Array, 'B S K H']]:
    """Keys, without norm and position, and values of tokens."""
    return project('BTD,DKH->BTKH', x, self.k, self.k_bias, self.dtype), project(
      'BTD,DKH->BTKH', x, self.v, self.v_bias, self.dtype
    )

  def _mix(self, q, k, v, scoring):
    copies = ax.size('heads') // k.shape[2]
    # Fewer keys than devices that share the queries: each holds the one that its queries need.
    if copies > 1:
      k, v = (
        ax.place(jnp.repeat(x, copies, 2), 'batch', 'length', 'heads', 'head_width') for x in (k, v)
      )
    out, _ = kernels.attention(
      q, k, v, scoring, backend=self.backend, blocks=self.blocks, context=self.context
    )
    return self._out(out)

  def _out(self, x):
    # Row-parallel.
    x = read(self.o).product('BTNH,NHD->BTD', x, self.dtype, ax.residual(x.shape[1]))
    return add_bias(x, self.o_bias, self.dtype)


class LatentAttention(nnx.Module):
  """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

  A token's keys and values of all heads come from one latent vector of R; positions go through a
  separate part of H' that all heads share. The cache holds R + H' numbers per token. Against a
  cache, keys are never formed: the key projection is applied to the queries instead, and the value
  projection to the mixed latents, which leaves attention with one key/value head.
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, window: int = 0):
    D, N, H, dtype, latent = (
      config.D,
      config.N,
      config.H,
      config.execution.parameter_dtype,
      config.latent,
    )
    R, Hr, Hv, Q = latent.width, latent.rope_width, config.value_width, latent.query_width
    self.dtype, self.backend, self.softcap = (
      config.execution.dtype,
      config.execution.attention,
      config.attention_softcap,
    )
    self.blocks, self.context = config.execution.attention_blocks, config.execution.context
    self.scale, self.window, self.nope = config.attention_scale or (H + Hr) ** -0.5, window, H
    self.q_down = param(rngs, (D, Q), ('embed', 'latent'), D**-0.5, dtype=dtype) if Q else None
    self.q_down_norm = Norm(config, Q, rngs) if Q else None
    self.q = param(
      rngs, (Q or D, N, H + Hr), ('embed', 'heads', 'head_width'), (Q or D) ** -0.5, dtype=dtype
    )
    self.kv_down = param(rngs, (D, R), ('embed', 'latent'), D**-0.5, dtype=dtype)
    self.kv_norm = Norm(config, R, rngs)
    self.rope_key = param(rngs, (D, Hr), ('embed', 'head_width'), D**-0.5, dtype=dtype)
    self.k = param(rngs, (R, N, H), ('embed', 'heads', 'head_width'), R**-0.5, dtype=dtype)
    self.v = param(rngs, (R, N, Hv), ('embed', 'heads', 'head_width'), R**-0.5, dtype=dtype)
    self.o = param(
      rngs,
      (N, Hv, D),
      ('heads', 'head_width', 'embed'),
      (N * Hv * 2 * config.L) ** -0.5,
      inputs=2,
      dtype=dtype,
    )

  def __call__(
    self, x: Float[Array, 'B T D'], view: View, slots: AnySlots | None
  ) -> tuple[Float[Array, 'B T D'], AnySlots | None]:
    """As Attention.__call__."""
    angles = view.local_angles if self.window else view.angles
    queries = (
      x
      if self.q_down is None
      else self.q_down_norm(project('BTD,DQ->BTQ', x, self.q_down, None, self.dtype))
    )
    q = project('BTD,DNH->BTNH', queries, self.q, None, self.dtype)
    q, q_rope = q[..., : self.nope], rotate(q[..., self.nope :], angles)
    latent = self.kv_norm(project('BTD,DR->BTR', x, self.kv_down, None, self.dtype))
    rope_key = rotate(
      project('BTD,DH->BTH', x, self.rope_key, None, self.dtype)[:, :, None, :], angles
    )
    scoring = Scoring(
      Mask(window=self.window),
      softcap=self.softcap,
      scale=self.scale,
      dropout=view.dropout('weights'),
    )
    slots = slots and slots.append(
      jnp.concatenate([latent[:, :, None, :], rope_key], -1), None, self.window
    )
    if slots is None or slots.fresh:
      k = project('BSR,RNH->BSNH', latent, self.k, None, self.dtype)
      shared = ax.place(
        jnp.broadcast_to(rope_key, (*k.shape[:3], rope_key.shape[3])),
        'batch',
        'length',
        'heads',
        'head_width',
      )
      mask = dataclasses.replace(view.mask, window=self.window)
      out = self._mix(
        q,
        q_rope,
        jnp.concatenate([k, shared], -1),
        project('BSR,RNH->BSNH', latent, self.v, None, self.dtype),
        dataclasses.replace(scoring, mask=mask),
      )
    else:
      q = read(self.k).product('BTNH,RNH->BTNR', q, self.dtype)
      q = jnp.concatenate([q, q_rope], -1)
      out = slots.look(q, scoring=scoring, value_width=latent.shape[-1])
      out = read(self.v).product('BTNR,RNH->BTNH', out, self.dtype)
    # Row-parallel.
    out = read(self.o).product('BTNH,NHD->BTD', out, self.dtype, ax.residual(out.shape[1]))
    return out, slots

  def _mix(self, q, q_rope, k, v, scoring):
    q, k, v = named(jnp.concatenate([q, q_rope], -1), 'query'), named(k, 'key'), named(v, 'value')
    return kernels.attention(
      q, k, v, scoring, backend=self.backend, blocks=self.blocks, context=self.context
    )[0]
