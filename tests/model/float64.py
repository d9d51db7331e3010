"""What should a decoder compute? A plain float64 forward, written from the papers,
sharing no line with model/.
"""

import math

import numpy as np


def norm(config, x, w, name, kind=''):
  """Of the config's kind; the parameters are `name`.scale and, where it is there, `name`.bias."""
  weight, bias = w[f'{name}.scale'] + config.norm_offset, w.get(f'{name}.bias')
  x = x - x.mean(-1, keepdims=True) if (kind or config.norm) == 'layer' else x
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * weight + (
    0 if bias is None else bias
  )


def frequencies(config, size, window):
  """Turns of each pair at a position, in radians, and what the result is multiplied with."""
  r, half = config.rope, size // 2
  local = window and r.local_base
  plain = (r.local_base if local else r.base) ** (-np.arange(half) / half)
  if local or r.scaling == 'none':
    return plain, 1.0
  if r.scaling == 'linear':
    return plain / r.factor, 1.0
  if r.scaling == 'llama3':
    turns = r.original_length / (2 * math.pi / plain)
    smooth = np.clip((turns - r.low) / (r.high - r.low), 0, 1)
    return (1 - smooth) * plain / r.factor + smooth * plain, 1.0

  def at(turns):
    return size * math.log(r.original_length / (2 * math.pi * turns)) / (2 * math.log(r.base))

  first, last = max(math.floor(at(r.high)), 0), min(math.ceil(at(r.low)), size - 1)
  ramp = np.clip((np.arange(half) - first) / (last - first), 0, 1)
  return plain / r.factor * ramp + plain * (1 - ramp), 0.1 * math.log(r.factor) + 1


def rope(config, x, window):
  """x [T, heads, H]: the complex numbers x[i] + i x[i + H/2] turned by position * frequency."""
  half = x.shape[-1] // 2
  each, scale = frequencies(config, x.shape[-1], window)
  turn = np.exp(1j * np.arange(len(x))[:, None, None] * each)
  z = (x[..., :half] + 1j * x[..., half:]) * turn * scale
  return np.concatenate([z.real, z.imag], -1)


ACTIVATIONS = {
  'silu': lambda x: x / (1 + np.exp(-x)),
  'gelu_exact': lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
  'gelu': lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
  'relu': lambda x: np.maximum(x, 0),
  'relu2': lambda x: np.maximum(x, 0) ** 2,
}


def logits(config, weights, tokens):
  """Logits [T, V] of one document.

  weights: name -> array, as model.params.named_leaves gives them.
  """
  w = {name: np.asarray(x, np.float64) for name, x in weights.items()}
  x = w['embedding.tokens'][tokens] * (math.sqrt(config.width) if config.embedding_scale else 1)
  if config.position == 'learned':
    x = x + w['embedding.positions'][: len(tokens)]
  for layer in range(config.layers):
    block = block_weights(config, w, layer)
    window = 0 if config.global_every and (layer + 1) % config.global_every == 0 else config.window
    for part, run in (
      ('attention', lambda h: attend(config, block, h, window, w.get('stack.relative'))),
      ('feed_forward', lambda h: feed_forward(config, block, h)),
    ):
      h = run(norm(config, x, block, f'{part}_norm'))
      x = x + (
        norm(config, h, block, f'{part}_post_norm') if config.norm_placement == 'both' else h
      )
  x = norm(config, x, w, 'stack.norm') * config.logit_scale
  scores = x @ w.get('head.tokens', w['embedding.tokens']).T
  return (
    config.logit_softcap * np.tanh(scores / config.logit_softcap)
    if config.logit_softcap
    else scores
  )


def block_weights(config, w, layer):
  """Those of one layer, found by walking the stacked leaves in order."""
  first, j = 0, 0
  for kinds, repeats in config.stacks:
    if layer < first + len(kinds) * repeats:
      repeat, place = divmod(layer - first, len(kinds))
      prefix = f'stack.blocks.{j + place}.'
      return {
        name.removeprefix(prefix): value[repeat]
        for name, value in w.items()
        if name.startswith(prefix)
      }
    first, j = first + len(kinds) * repeats, j + len(kinds)


def bucket(config, distance):
  """T5's, for a key `distance` before the query."""
  single = config.relative_buckets // 2
  if distance < single:
    return distance
  far = (
    math.log(distance / single)
    / math.log(config.relative_distance / single)
    * (config.relative_buckets - single)
  )
  return min(single + int(far), config.relative_buckets - 1)


def attend(config, block, x, window, relative):
  def project(name, x=x):
    return np.einsum('td,dnh->tnh', x, block[f'attention.{name}']) + block.get(
      f'attention.{name}_bias', 0
    )

  if config.latent.width:
    q, k, v = latent(config, block, x, project)
  else:
    q, k, v = (project(name) for name in 'qkv')
    if config.qk_norm:
      q, k = (
        norm(config, q, block, 'attention.q_norm', 'rms'),
        norm(config, k, block, 'attention.k_norm', 'rms'),
      )
    if config.position == 'rope':
      q, k = rope(config, q, window), rope(config, k, window)
  heads, mixed = q.shape[1], np.zeros((*q.shape[:2], v.shape[2]))
  for t in range(len(x)):
    first = max(0, t - window + 1) if window else 0
    for n in range(heads):
      head = n // (heads // k.shape[1])
      scores = (
        k[first : t + 1, head] @ q[t, n] * (config.attention_scale or 1 / math.sqrt(q.shape[-1]))
      )
      if relative is not None:
        scores = scores + [relative[bucket(config, t - s), n] for s in range(first, t + 1)]
      if config.attention_softcap:
        scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
      weights = np.exp(scores - scores.max())
      total = weights.sum() + (
        np.exp(block['attention.sinks'][n] - scores.max()) if config.sinks else 0
      )
      mixed[t, n] = weights / total @ v[first : t + 1, head]
  return np.einsum('tnh,nhd->td', mixed, block['attention.o']) + block.get('attention.o_bias', 0)


def latent(config, block, x, project):
  """Queries, keys and values of latent attention, every key formed."""
  down = norm(config, x @ block['attention.q_down'], block, 'attention.q_down_norm')
  q, small = (
    project('q', down),
    norm(config, x @ block['attention.kv_down'], block, 'attention.kv_norm'),
  )
  turned = rope(config, q[..., config.H :], 0)
  shared = rope(config, (x @ block['attention.rope_key'])[:, None], 0)
  k = np.concatenate([project('k', small), np.repeat(shared, q.shape[1], 1)], -1)
  return np.concatenate([q[..., : config.H], turned], -1), k, project('v', small)


def feed_forward(config, block, x):
  if 'feed_forward.router' in block:
    return experts(config, block, x)
  return dense(
    config, {name.removeprefix('feed_forward.'): value for name, value in block.items()}, x
  )


def experts(config, block, x):
  """Token by token, expert by expert."""
  moe, out = config.moe, np.zeros_like(x)
  of = {
    name.removeprefix('feed_forward.'): value
    for name, value in block.items()
    if name.startswith('feed_forward.')
  }
  for t, scores in enumerate(x @ of['router']):
    scores = (
      1 / (1 + np.exp(-scores))
      if moe.router == 'sigmoid'
      else np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    )
    wanted = scores + of.get('selection_bias', 0)
    if moe.groups > 1:
      best = [
        np.sort(group)[-2 if moe.router == 'sigmoid' else -1 :].sum()
        for group in np.split(wanted, moe.groups)
      ]
      outside = np.argsort(best)[: moe.groups - moe.groups_per_token]
      for group in outside:
        np.split(wanted, moe.groups)[group][:] = 0.0  # as transformers: not -inf
    chosen = np.argsort(-wanted)[: moe.per_token]
    gates = scores[chosen] / (scores[chosen].sum() if moe.renormalise else 1) * moe.scale
    for e, gate in zip(chosen, gates):
      out[t] += gate * dense(
        config, {name: of[name][e] for name in ('gate', 'up', 'down') if name in of}, x[t]
      )
  shared = {
    name.removeprefix('shared.'): value for name, value in of.items() if name.startswith('shared.')
  }
  return out + (dense(config, shared, x) if shared else 0)


def dense(config, block, x):
  up = x @ block['up'] + block.get('up_bias', 0)
  gate = x @ block['gate'] + block.get('gate_bias', 0) if config.gated else None
  if config.activation == 'clamped_silu':
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
  else:
    act = ACTIVATIONS[config.activation]
    hidden = act(gate) * up if config.gated else act(up)
  return hidden @ block['down'] + block.get('down_bias', 0)
