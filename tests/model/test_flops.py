"""Are the operations that the formulas count those of the matrix products
that a model's program holds?
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from analysis import generation_flops
from model import flops, transformer
from model.config import LatentConfig, ModelConfig, MoEConfig
from model.params import ParamSpec, specs

LETTERS = {
  'V': 'vocabulary',
  'D': 'width',
  'L': 'layers',
  'N': 'heads',
  'K': 'kv_heads',
  'H': 'head_width',
  'F': 'feed_forward',
}


def sizes(**changes):
  base = dict(V=97, D=24, L=3, N=4, K=2, H=6, F=40, gated=True, window=0)
  return ModelConfig(**{LETTERS.get(name, name): value for name, value in (base | changes).items()})


def loss(weights, tokens, m):
  """A decoder of nothing but its matrix products, written apart from the model's code."""
  x = weights['embedding'][tokens]
  for w in weights['layers']:
    q, k, v = ((x @ w[name]).reshape(len(tokens), -1, m.H) for name in 'qkv')
    k, v = (jnp.repeat(a, m.N // m.K, axis=1) for a in (k, v))
    scores = jnp.einsum('tnh,snh->nts', q, k)
    x = x + jnp.einsum('nts,snh->tnh', scores, v).reshape(len(tokens), -1) @ w['o']
    x = x + ((x @ w['up']) * (x @ w['gate'] if m.gated else 1)) @ w['down']
  return (x @ weights['head']).sum()


def shapes(m):
  layer = {
    'q': (m.D, m.N * m.H),
    'k': (m.D, m.K * m.H),
    'v': (m.D, m.K * m.H),
    'o': (m.N * m.H, m.D),
    'up': (m.D, m.F),
    'down': (m.F, m.D),
  } | ({'gate': (m.D, m.F)} if m.gated else {})
  tree = {'embedding': (m.V, m.D), 'head': (m.D, m.V), 'layers': [layer] * m.L}

  def is_shape(leaf):
    return isinstance(leaf, tuple)

  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree, is_leaf=is_shape
  )


def product_flops(function, *args, attention_share):
  """2 x multiply-adds of every dot_general; batched ones are attention's,
  of which only a share is unmasked.
  """
  total = 0
  for equation in jax.make_jaxpr(function)(*args).eqns:
    if equation.primitive.name == 'dot_general':
      (contracting, _), (batch, _) = equation.params['dimension_numbers']
      inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracting)
      share = attention_share if batch else 1
      total += 2 * inner * math.prod(equation.outvars[0].aval.shape) * share
  return total


def visible(T, window, document, causal=True):
  """The mask itself: query i sees key j."""
  i, j = np.arange(T)[:, None], np.arange(T)
  return (
    ((j <= i) | (not causal))
    & ((abs(i - j) < window) | (window == 0))
    & (i // document == j // document)
  )


@pytest.mark.parametrize(
  'changes',
  [
    {},
    dict(gated=False, K=4),
    dict(window=5),
    dict(window=64, N=2, K=1),
    dict(L=1),
    dict(causal=False),
    dict(causal=False, window=5),
  ],
  ids=str,
)
@pytest.mark.parametrize('document', [32, 8])
def test_counts_the_products_of_a_program(changes, document):
  m = sizes(**changes)
  T, weights = 32, shapes(m)
  tokens = jax.ShapeDtypeStruct((T,), jnp.int32)
  share = visible(T, m.window, document, m.causal).mean()
  forward = product_flops(lambda w, t: loss(w, t, m), weights, tokens, attention_share=share)
  both = product_flops(
    jax.value_and_grad(lambda w, t: loss(w, t, m)), weights, tokens, attention_share=share
  )
  assert flops.forward_flops_per_token(m, T, document) * T == pytest.approx(forward, rel=1e-12)
  assert flops.train_flops_per_token(m, T, document) * T == pytest.approx(both, rel=1e-12)


@settings(deadline=None)
@given(T=st.integers(1, 40), window=st.integers(0, 50))
def test_mean_keys_is_the_mean_of_the_mask(T, window):
  assert flops.mean_keys(T, window) == pytest.approx(visible(T, window, T).sum() / T)


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_mean_keys_of_packed_documents(lengths):
  starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
  i, j = np.arange(sum(lengths))[:, None], np.arange(sum(lengths))
  mask = (j <= i) & (j >= starts[:, None])
  weighted = sum(d * d for d in lengths) / sum(lengths)
  assert flops.mean_keys(sum(lengths), document_length=weighted) == pytest.approx(
    mask.sum() / sum(lengths)
  )


def test_impossible_lengths_are_refused():
  for arguments in ((0,), (8, -1), (8, 0, 0.5)):
    with pytest.raises(ValueError, match='lengths start at 1'):
      flops.mean_keys(*arguments)
  with pytest.raises(ValueError, match='vocabulary=0'):
    flops.forward_flops_per_token(sizes(V=0), 8)


@pytest.mark.parametrize(
  'changes',
  [
    {},
    dict(K=4, latent=LatentConfig(width=5, query_width=7, rope_width=4, value_width=3)),
    dict(K=4, latent=LatentConfig(width=5, rope_width=4)),
    dict(moe=MoEConfig(experts=3, per_token=3, feed_forward=8, shared_feed_forward=16, first=1)),
  ],
  ids=str,
)
def test_weights_that_multiply_are_the_parameters_that_are_matrices(changes):
  """All of them, where every expert is chosen."""
  m = sizes(**changes)
  tree = specs(jax.eval_shape(lambda: transformer.init(m, 0)))
  leaves = [
    x
    for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, ParamSpec))
    if x.kind == 'matrix'
  ]
  counted = sum(
    flops.attention_weights(m) + flops.feed_forward_weights(m, kind.moe) for kind in m.kinds
  )
  assert counted == sum(math.prod(x.shape) for x in leaves)


def test_layers_have_their_own_windows():
  each = [flops.forward_flops_per_token(sizes(L=1, window=window), 32) for window in (5, 0)]
  head = 2 * 24 * 97
  assert (
    flops.forward_flops_per_token(sizes(L=5, window=5, global_every=2), 32)
    == 3 * each[0] + 2 * each[1] - 4 * head
  )


def test_approaches_6nd_when_attention_and_embedding_vanish():
  m = sizes(D=512, H=64, N=8, K=8, F=2048, L=12, V=1000)
  parameters = m.L * (4 * m.D**2 + 3 * m.D * m.F) + m.D * m.V
  assert flops.train_flops_per_token(m, 1) == pytest.approx(flops.six_nd(parameters, 1), rel=2e-3)


def test_mfu():
  assert flops.mfu(150e12, 3, 100e12) == 0.5
  assert flops.mfu(150e12, 3, None) is None


@pytest.mark.parametrize(
  'changes',
  [{}, {'window': 5}, {'window': 1}, {'K': 4, 'latent': LatentConfig(width=8, rope_width=2)}],
  ids=str,
)
def test_decoding_token_by_token_is_the_forward_pass(changes):
  m, T = sizes(**changes), 17
  one_by_one = sum(generation_flops.decode_flops(m, 3, context) for context in range(1, T + 1))
  assert one_by_one == pytest.approx(3 * T * flops.forward_flops_per_token(m, T))
  whole = generation_flops.prefill_flops(m, 3, T)
  assert whole == pytest.approx(one_by_one - 3 * (T - 1) * 2 * m.D * m.V)
  last = generation_flops.decode_flops(m, 3, T)
  assert generation_flops.read_flops(m, 3, 1, T) == last
  part = 3 * 2 * m.D * m.V  # the head, of each token but the last
  assert generation_flops.read_flops(m, 3, 4, T) == pytest.approx(4 * last - 3 * part)


@pytest.mark.parametrize('changes', [{}, {'gated': False, 'K': 4}, {'window': 3}], ids=str)
def test_a_source_and_a_target_are_an_encoder_a_decoder_and_what_crosses(changes):
  m, S, T = sizes(encoder_layers=2, **changes), 11, 5
  head, per_key = 2 * m.D * m.V, 4 * m.N * m.H
  encoder = flops.forward_flops_per_token(sizes(**changes | dict(L=2, causal=False, window=0)), S)
  decoder = flops.forward_flops_per_token(sizes(**changes), T)
  # By the products: queries and output of the target, keys and values of the source, and scores
  # and sums of every query over all of the source.
  queries, keys = 2 * 2 * m.D * m.N * m.H * T, 2 * 2 * m.D * m.K * m.H * S
  crossed = m.L * (queries + keys + per_key * S * T)
  expected = S * (encoder - head) + T * decoder + crossed
  assert flops.pair_flops(m, S, T) == pytest.approx(expected, rel=1e-12)


def test_a_pair_is_of_an_encoder_decoder_of_known_size():
  for m in (sizes(), sizes(encoder_layers=2, V=0)):
    with pytest.raises(ValueError, match='only an encoder-decoder whose vocabulary is known'):
      flops.pair_flops(m, 4, 4)
