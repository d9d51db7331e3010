"""What should a decoder compute? A plain float64 forward, written from the papers, sharing no line with model/."""
import math

import numpy as np


def norm(x, weight, bias, kind, epsilon):
  x = x - x.mean(-1, keepdims=True) if kind == 'layer' else x
  return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + epsilon) * weight + (0 if bias is None else bias)


def rope(x, position, base):
  """x [heads, H]: the complex numbers x[i] + i x[i + H/2] turned by position / base^(2i/H)."""
  half = x.shape[-1] // 2
  turn = np.exp(1j * position * base ** (-np.arange(half) / half))
  z = (x[:, :half] + 1j * x[:, half:]) * turn
  return np.concatenate([z.real, z.imag], -1)


ACTIVATIONS = {
    'silu': lambda x: x / (1 + np.exp(-x)),
    'gelu': lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))),
    'relu': lambda x: np.maximum(x, 0),
    'relu2': lambda x: np.maximum(x, 0) ** 2,
}


def logits(config, weights, tokens):
  """Logits [T, V] of one document. weights: name -> array, as training.checkpoint.named_leaves gives them."""
  w = {name: np.asarray(x, np.float64) for name, x in weights.items()}
  x = w['embedding'][tokens]
  if config.position == 'learned':
    x = x + w['positions'][:len(tokens)]
  for layer in range(config.layers):
    block = {name.removeprefix('blocks.'): value[layer] for name, value in w.items() if name.startswith('blocks.')}
    x = x + attend(config, block, block_norm(config, block, 'attention_norm', x))
    x = x + feed_forward(config, block, block_norm(config, block, 'feed_forward_norm', x))
  x = norm(x, w['final_norm.scale'], w.get('final_norm.bias'), config.norm, config.norm_epsilon)
  scores = x @ w.get('head', w['embedding']).T
  return config.logit_softcap * np.tanh(scores / config.logit_softcap) if config.logit_softcap else scores


def block_norm(config, block, name, x, kind=''):
  return norm(x, block[f'{name}.scale'], block.get(f'{name}.bias'), kind or config.norm, config.norm_epsilon)


def attend(config, block, x):
  T = len(x)
  project = lambda name: np.einsum('td,dnh->tnh', x, block[name]) + block.get(f'{name}_bias', 0)
  q, k, v = (project(f'attention.{name}') for name in 'qkv')
  if config.qk_norm:
    q, k = (block_norm(config, block, f'attention.{name}_norm', y, 'rms') for name, y in (('q', q), ('k', k)))
  if config.position == 'rope':
    q, k = (np.stack([rope(y[t], t, config.rope_base) for t in range(T)]) for y in (q, k))
  heads, mixed = q.shape[1], np.zeros_like(q)
  for t in range(T):
    first = max(0, t - config.window + 1) if config.window else 0
    for n in range(heads):
      head = n // (heads // k.shape[1])
      scores = k[first:t + 1, head] @ q[t, n] / math.sqrt(q.shape[-1])
      if config.attention_softcap:
        scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
      weights = np.exp(scores - scores.max())
      mixed[t, n] = weights / weights.sum() @ v[first:t + 1, head]
  return np.einsum('tnh,nhd->td', mixed, block['attention.o']) + block.get('attention.o_bias', 0)


def feed_forward(config, block, x):
  act = ACTIVATIONS[config.activation]
  up = x @ block['feed_forward.up'] + block.get('feed_forward.up_bias', 0)
  if config.gated:
    hidden = act(x @ block['feed_forward.gate'] + block.get('feed_forward.gate_bias', 0)) * up
  else:
    hidden = act(up)
  return hidden @ block['feed_forward.down'] + block.get('feed_forward.down_bias', 0)
