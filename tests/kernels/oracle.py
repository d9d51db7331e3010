"""What is attention, one query and one key at a time? Plain float64 loops that share no line with
kernels/.

`parts` are the keywords of a Mask, as numpy arrays; those that are not set are left out.
"""

import jax.numpy as jnp
import numpy as np

from kernels.mask import Mask


def mask(parts: dict) -> Mask:
  """The spec that the oracle's parts stand for."""
  return Mask(
    **{
      name: jnp.asarray(part) if isinstance(part, np.ndarray) else part
      for name, part in parts.items()
    }
  )


def visible(parts: dict, b: int, t: int, s: int) -> bool:
  query = parts['query_positions'][b, t] if 'query_positions' in parts else t
  key = parts['key_positions'][b, s] if 'key_positions' in parts else s
  causal = parts.get('causal', True)
  ahead = causal and key > query and not key < parts.get('prefix', np.zeros(99))[b]
  far = parts.get('window', 0) and (
    query - key >= parts['window'] or not causal and key - query >= parts['window']
  )
  foreign = (
    'query_segments' in parts and parts['query_segments'][b, t] != parts['key_segments'][b, s]
  )
  return not (ahead or far or foreign)


def attention(q, k, v, parts, *, softcap=0.0, sinks=None, scale=None):
  """Same contract as kernels.attention.attention."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
  out, lse = np.zeros((B, T, N, v.shape[-1])), np.full((B, T, N), -np.inf)
  for b, t, n in np.ndindex(B, T, N):
    head = n * K // N
    keys = [s for s in range(S) if visible(parts, b, t, s)]
    scores = [q[b, t, n] @ k[b, s, head] * (H**-0.5 if scale is None else scale) for s in keys]
    if softcap:
      scores = [softcap * np.tanh(score / softcap) for score in scores]
    everything = scores + ([float(sinks[n])] if sinks is not None else [])
    if everything:
      lse[b, t, n] = np.logaddexp.reduce(everything)
      for score, s in zip(scores, keys):
        out[b, t, n] += np.exp(score - lse[b, t, n]) * v[b, s, head]
  return out, lse
