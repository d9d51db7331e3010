"""How does a token look at others? Projections, norms of queries and keys, positions, the cache; the mixing is kernels.attention.

B batch · T query length · S cache length · D width · N query heads · K key/value heads · H head width
"""
from flax import nnx
from jaxtyping import Array, Float

from model.cache import Slots
from kernels import attention as kernels
from kernels.mask import Mask
from model.config import ModelConfig
from model.layers import Norm, add_bias, project, rotate
from model.params import param, use
from parallel import axes as ax


class Attention(nnx.Module):
  """Multi-head attention with grouped keys and values (Ainslie et al., arXiv:2305.13245)."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    D, N, K, H, dtype = config.D, config.N, config.K, config.H, config.parameter_dtype
    self.dtype, self.backend, self.softcap = config.dtype, config.attention, config.attention_softcap
    self.q = param(rngs, (D, N, H), ('embed', 'heads', 'head_width'), D**-0.5, dtype=dtype)
    self.k = param(rngs, (D, K, H), ('embed', 'kv_heads', 'head_width'), D**-0.5, dtype=dtype)
    self.v = param(rngs, (D, K, H), ('embed', 'kv_heads', 'head_width'), D**-0.5, dtype=dtype)
    self.o = param(rngs, (N, H, D), ('heads', 'head_width', 'embed'), (N * H * 2 * config.L) ** -0.5, inputs=2, dtype=dtype)

    def bias(shape, axes):
      return param(rngs, shape, axes, 'zeros', kind='vector', dtype=dtype) if config.biases else None
    self.q_bias = bias((N, H), ('heads', 'head_width'))
    self.k_bias = bias((K, H), ('kv_heads', 'head_width'))
    self.v_bias = bias((K, H), ('kv_heads', 'head_width'))
    self.o_bias = bias((D,), ('norm',))
    self.q_norm = Norm(config, H, rngs, 'rms') if config.qk_norm else None
    self.k_norm = Norm(config, H, rngs, 'rms') if config.qk_norm else None

  def __call__(self, x: Float[Array, 'B T D'], angles: tuple[Array, Array] | None, mask: Mask,
               slots: Slots | None) -> tuple[Float[Array, 'B T D'], Slots | None]:
    """The mixed tokens; with `slots` keys and values are written there first and attention is over the whole cache.

    angles: of layers.rope_angles, or None for a model without rotary positions.
    """
    q = project('BTD,DNH->BTNH', x, self.q, self.q_bias, self.dtype)
    k = project('BTD,DKH->BTKH', x, self.k, self.k_bias, self.dtype)
    v = project('BTD,DKH->BTKH', x, self.v, self.v_bias, self.dtype)
    if self.q_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    if angles is not None:
      q, k = rotate(q, *angles), rotate(k, *angles)
    if slots is not None:
      slots, k, v = slots.append(k, v)
    out, _ = kernels.attention(q, k, v, mask, softcap=self.softcap, backend=self.backend)
    out = ax.einsum('BTNH,NHD->BTD', out, use(self.o, self.dtype), ('batch', 'length', 'width'))  # row-parallel
    return add_bias(out, self.o_bias, self.dtype), slots
