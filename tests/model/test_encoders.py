"""Does an encoder see everything of its own and nothing else,
and does a decoder see what the encoder made of its source?
"""

import dataclasses

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

from decode.loop import prefill
from model import rearranged, transformer
from model.cache import init_cache
from model.config import ModelConfig
from model.params import abstract, named_leaves
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh

T5 = ModelConfig(
  **laws.TINY
  | dict(
    kv_heads=4,
    encoder_layers=3,
    position='relative',
    relative_buckets=8,
    relative_distance=12,
    activation='gelu',
    attention_scale=1.0,
  )
)
ROPE = dataclasses.replace(
  T5, position='rope', kv_heads=2, norm_placement='both', tie_embeddings=True
)
BERT = ModelConfig(
  **laws.TINY
  | dict(
    kv_heads=4,
    causal=False,
    norm='layer',
    norm_placement='post',
    position='learned',
    biases='all',
    gated=False,
    activation='gelu_exact',
    tie_embeddings=True,
    head='mlm',
    pooler=True,
    token_types=2,
  )
)


@jax.jit
def scores(
  model, tokens, source, segments=None, source_segments=None, positions=None, source_positions=None
):
  return model.logits(
    model(
      tokens,
      positions,
      segments,
      source=source,
      source_segments=source_segments,
      source_positions=source_positions,
    ).hidden
  )


def source_of(config, rows, length):
  return laws.tokens_of(config, rows, length, seed=5)


def other(config, ids):
  return (ids + 7) % config.V


@pytest.mark.parametrize('config', [T5, ROPE], ids=['t5', 'rope'])
def test_a_decoder_sees_its_past_and_all_of_its_source(config, one_device):
  model, tokens, source = (
    laws.make_model(config),
    laws.tokens_of(config, 1, 6),
    source_of(config, 1, 7),
  )
  before = scores(model, tokens, source)
  for t in range(6):
    changed = np.asarray(
      (scores(model, tokens.at[0, t].set(other(config, tokens[0, t])), source) != before).any(-1)[0]
    )
    assert not changed[:t].any() and changed[t:].all(), t
  for s in range(7):
    assert (
      (scores(model, tokens, source.at[0, s].set(other(config, source[0, s]))) != before)
      .any(-1)
      .all()
    ), s


@pytest.mark.costly
@pytest.mark.parametrize('config', [T5, ROPE], ids=['t5', 'rope'])
def test_cached_decode_is_the_full_forward(config, one_device):
  model, tokens, source = (
    laws.make_model(config),
    laws.tokens_of(config, 2, 9),
    source_of(config, 2, 7),
  )
  counts = jnp.asarray([[1] * 7, [1] * 4 + [0] * 3], jnp.int32)
  full = np.asarray(scores(model, tokens, source, None, counts))
  step, read = laws.cached(), jax.jit(lambda model, *args: model.read(*args))
  for split in ([1] * 9, [4, 1, 4]):
    cache, seen = read(model, init_cache(config, 2, 16), source, counts.sum(1)), 0
    for size in split:
      logits, cache = step(model, tokens[:, seen : seen + size], cache)
      np.testing.assert_allclose(
        logits, full[:, seen : seen + size], rtol=1e-5, atol=1e-5 * np.abs(full).max()
      )
      seen += size


@pytest.mark.parametrize('config', [T5, ROPE], ids=['t5', 'rope'])
def test_layers_that_are_by_themselves_stay_as_they_are(config, one_device):
  """In the encoder, too: a run with model.execution.scan=False generates by its own layers."""
  once = rearranged.unstacked(laws.make_model(config))
  again = rearranged.unstacked(once)
  leaves, same = named_leaves(once), named_leaves(again)
  assert leaves.keys() == same.keys() and all((leaves[name] == same[name]).all() for name in same)
  queries = [np.asarray(block.attention.q[...]) for block in once.encoder.blocks]
  assert len(queries) == 3 and (queries[0] != queries[1]).all() and (queries[1] != queries[2]).all()


def test_a_window_of_an_encoder_looks_to_either_side(one_device):
  config = dataclasses.replace(BERT.with_execution(attention='blocked'), window=2)
  model, tokens = laws.make_model(config), laws.tokens_of(config, 1, 12)
  hidden = jax.jit(lambda model, tokens: model(tokens).hidden)
  changed = np.asarray(
    (hidden(model, tokens.at[0, 5].set(other(config, tokens[0, 5]))) != hidden(model, tokens)).any(
      -1
    )[0]
  )
  np.testing.assert_array_equal(
    changed, abs(np.arange(12) - 5) <= config.L
  )  # each layer one more on either side


def test_padding_of_a_source_changes_nothing(one_device):
  model, tokens, source = laws.make_model(T5), laws.tokens_of(T5, 1, 5), source_of(T5, 1, 7)
  counts = jnp.asarray([[1] * 5 + [0] * 2], jnp.int32)
  expected = scores(model, tokens, source, None, counts)
  np.testing.assert_array_equal(
    scores(model, tokens, jnp.where(counts > 0, source, other(T5, source)), None, counts), expected
  )
  np.testing.assert_allclose(
    scores(model, tokens, source[:, :5]), expected, rtol=1e-5, atol=1e-5
  )  # sums are regrouped
  state = prefill(
    model,
    tokens,
    jnp.asarray([5], jnp.int32),
    init_cache(T5, 1, 8),
    jnp.asarray([8], jnp.int32),
    (source, counts.sum(1)),
  )
  np.testing.assert_allclose(
    state.logits, expected[:, -1], rtol=1e-5, atol=1e-5 * np.abs(expected).max()
  )


def test_packed_pairs_are_each_alone(one_device):
  model, tokens, source = laws.make_model(T5), laws.tokens_of(T5, 1, 7), source_of(T5, 1, 9)

  def index(*sizes):
    return (
      jnp.asarray(np.repeat(range(1, len(sizes) + 1), sizes), jnp.int32)[None],
      jnp.concatenate([jnp.arange(n, dtype=jnp.int32) for n in sizes])[None],
    )

  (segments, positions), (source_segments, source_positions) = index(4, 3), index(3, 6)
  packed = scores(model, tokens, source, segments, source_segments, positions, source_positions)
  for document, its in ((slice(0, 4), slice(0, 3)), (slice(4, 7), slice(3, 9))):
    alone = scores(model, tokens[:, document], source[:, its])
    np.testing.assert_allclose(
      packed[:, document], alone, rtol=1e-5, atol=1e-5 * np.abs(alone).max()
    )


def test_an_encoder_sees_all_of_its_document(one_device):
  model, tokens = laws.make_model(BERT), laws.tokens_of(BERT, 1, 8)
  segments = jnp.asarray([[1] * 5 + [2] * 3], jnp.int32)
  positions = jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2]], jnp.int32)
  run = laws.forward()
  before = run(model, tokens, positions, segments)
  for t in range(8):
    changed = run(model, tokens.at[0, t].set(other(BERT, tokens[0, t])), positions, segments)
    assert ((changed != before).any(-1) == (segments == segments[0, t])).all(), t
  alone = run(model, tokens[:, 5:])
  np.testing.assert_allclose(before[:, 5:], alone, rtol=1e-5, atol=1e-5 * np.abs(alone).max())


def test_token_types_pooler_and_head(one_device):
  model, tokens = laws.make_model(BERT), laws.tokens_of(BERT, 2, 6)
  types = jnp.asarray([[0, 0, 0, 1, 1, 1]] * 2, jnp.int32)
  run = jax.jit(lambda model, types: model(tokens, types=types).hidden)
  hidden = run(model, None)
  assert (run(model, types) != hidden).any() and (run(model, 0 * types) == hidden).all()
  pooled, logits = jax.jit(lambda model, x: (model.pooler(x), model.logits(x)))(model, hidden)
  w = {name: np.asarray(x, np.float64) for name, x in named_leaves(model).items()}
  x = np.asarray(hidden, np.float64)
  np.testing.assert_allclose(
    pooled,
    np.tanh(x[:, 0] @ w['pooler.dense'] + w['pooler.bias']),
    rtol=1e-4,
    atol=1e-5,
  )
  from float64 import ACTIVATIONS, norm

  y = norm(
    BERT, ACTIVATIONS['gelu_exact'](x @ w['head.dense'] + w['head.dense_bias']), w, 'head.norm'
  )
  expected = y @ w['embedding.tokens'].T + w['head.bias']
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize('config', [T5, BERT], ids=['t5', 'bert'])
def test_a_mesh_is_one_device(config):
  def run(mesh):
    with jax.set_mesh(mesh):
      model = laws.randomised(abstract(lambda: transformer.init(config, 0), mesh))

      def put(x):
        return jax.device_put(x, jax.NamedSharding(mesh, ax.spec('batch', 'length')))

      arguments = (
        put(laws.tokens_of(config, 4, 6)),
        *((put(source_of(config, 4, 7)),) if config.encoder_layers else ()),
      )
      score = (
        (lambda model: scores(model, *arguments))
        if config.encoder_layers
        else (lambda model: laws.forward()(model, *arguments))
      )
      return jax.device_get(
        jax.jit(jax.value_and_grad(lambda model: jnp.mean(jnp.sin(score(model)))))(model)
      )

  alone = run(make_mesh(MeshConfig(), jax.devices()[:1]))
  many = run(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
  for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(alone), strict=True):
    np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max() + 1e-8
    )  # added up in another order


def test_bad_calls_raise(one_device):
  model, bert, tokens = laws.make_model(T5), laws.make_model(BERT), laws.tokens_of(T5, 1, 4)
  with pytest.raises(ValueError, match='needs its source'):
    model(tokens)
  with pytest.raises(ValueError, match='holds no source; call EncoderDecoder.read first'):
    model(tokens, cache=init_cache(T5, 1, 8))
  with pytest.raises(ValueError, match='an encoder sees all tokens at once'):
    init_cache(BERT, 1, 8)
  with pytest.raises(ValueError, match='25 tokens in a row pass model.max_length=24'):
    bert(laws.tokens_of(BERT, 1, 25))
  with pytest.raises(ValueError, match='without a table of them; set model.token_types'):
    laws.make_model(laws.make_config())(tokens, types=tokens)
