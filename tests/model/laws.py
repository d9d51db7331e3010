"""Which laws does every decoder obey? Checks that raise AssertionError when one is broken,
as planted faults must.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from model import transformer
from model.cache import init_cache
from model.config import LatentConfig, ModelConfig, MoEConfig, RopeConfig
from model.execution import ExecutionConfig
from model.params import abstract
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh

TINY = dict(vocabulary=50, width=16, layers=2, heads=4, kv_heads=2, feed_forward=24, max_length=24)
CONFIGS = {
  'llama': {},
  'gpt2': dict(
    norm='layer',
    position='learned',
    gated=False,
    activation='gelu',
    biases='all',
    tie_embeddings=True,
    kv_heads=4,
  ),
  'no positions': dict(position='none', activation='relu', layers=1),
  'qwen3': dict(qk_norm=True, head_width=6, kv_heads=1, rope=RopeConfig(base=100.0)),
  'mistral': dict(window=3, biases='qkv', activation='gelu_exact'),
  'gemma2': dict(
    attention_softcap=2.0,
    logit_softcap=1.5,
    window=5,
    global_every=2,
    norm_placement='both',
    norm_offset=True,
    attention_scale=0.3,
    embedding_scale=True,
    tie_embeddings=True,
    activation='gelu',
  ),
  'gemma3': dict(
    layers=5,
    window=3,
    global_every=2,
    norm_placement='both',
    qk_norm=True,
    rope=RopeConfig(base=1000.0, local_base=10.0, scaling='linear', factor=4.0),
  ),
  'gpt-oss': dict(
    window=4,
    global_every=2,
    sinks=True,
    biases='all',
    activation='clamped_silu',
    rope=RopeConfig(base=100.0, scaling='yarn', factor=4.0, original_length=8, high=8.0),
  ),
  'deepseek': dict(
    kv_heads=4,
    head_width=6,
    latent=LatentConfig(width=6, query_width=8, rope_width=4, value_width=3),
    rope=RopeConfig(base=50.0, scaling='llama3', factor=8.0, original_length=16),
  ),
  'relative': dict(
    position='relative',
    relative_buckets=8,
    relative_distance=12,
    kv_heads=4,
    attention_scale=1.0,
    logit_scale=0.25,
    tie_embeddings=True,
  ),
  'mixtral': dict(moe=MoEConfig(experts=4, feed_forward=8)),
  'deepseek moe': dict(
    layers=3,
    moe=MoEConfig(
      experts=8,
      per_token=3,
      feed_forward=8,
      shared_feed_forward=12,
      first=1,
      router='sigmoid',
      groups=4,
      groups_per_token=2,
      selection_bias=True,
      scale=1.5,
    ),
  ),
  'layer norm': dict(norm='layer', gated=False, activation='relu2', layers=3),
  'bfloat16': dict(execution=ExecutionConfig(dtype='bfloat16'), qk_norm=True),
}


def make_config(name: str = 'llama', **changes) -> ModelConfig:
  return ModelConfig(**TINY | CONFIGS[name] | changes)


def on_one_device(function):
  """`function` under a mesh of one device."""

  @functools.wraps(function)
  def run(*args, **kwargs):
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
      return function(*args, **kwargs)

  return run


def randomised(model, seed: int = 0):
  """The model with every weight drawn anew, norm scales and biases too,
  so that none of them is 0 or 1.
  """

  def drawn(index, x):
    draw = np.random.default_rng([seed, index]).normal(size=x.shape)
    values = draw * 0.3 + (1 if x.ndim < 3 and draw.size < 100 else 0)
    return jax.device_put(values.astype(x.dtype), x.sharding)

  leaves, structure = jax.tree.flatten(model)
  return jax.tree.unflatten(structure, [drawn(index, x) for index, x in enumerate(leaves)])


def make_model(config: ModelConfig, seed: int = 0):
  """A randomised model on the mesh in context; nothing is compiled."""
  return randomised(abstract(lambda: transformer.init(config, 0), jax.sharding.get_mesh()), seed)


def tokens_of(config: ModelConfig, rows: int, length: int, seed: int = 0):
  return jnp.asarray(np.random.default_rng(seed).integers(0, config.V, (rows, length)), jnp.int32)


def forward():
  """A new jitted (model, tokens, positions, segments) -> logits [B, T, V]:
  new, so that a planted fault is traced.
  """
  return jax.jit(lambda model, *inputs: model.logits(model(*inputs).hidden))


def cached():
  """A new jitted step: (model, tokens, cache, fresh=False) -> (logits, cache)."""

  def run(model, tokens, cache, fresh=False):
    x, cache, _ = model(tokens, cache=cache, fresh=fresh)
    return model.logits(x), cache

  return jax.jit(run, static_argnames='fresh')


@on_one_device
def check_causality(config: ModelConfig):
  """Changing token t changes no logit before t, bitwise, and does change one at t."""
  model, run = make_model(config), forward()
  tokens = tokens_of(config, 1, 9)
  before = run(model, tokens)
  for t in range(9):
    after = run(model, tokens.at[0, t].set((tokens[0, t] + 7) % config.V))
    changed = np.asarray((before != after).any(-1)[0])
    assert not changed[:t].any(), f'token {t} reached back to {np.flatnonzero(changed[:t])}'
    assert changed[t], f'token {t} changes nothing'
    assert changed[t + 1 : t + 2].all() or (config.window == 1), (
      f'token {t} is not seen by the one after it'
    )


@on_one_device
def check_window(config: ModelConfig):
  """With L layers a token is seen at most L * (window - 1) tokens later."""
  model, run = make_model(config), forward()
  tokens, reach = tokens_of(config, 1, 16), config.L * (config.window - 1)
  other = tokens.at[0, 2].set((tokens[0, 2] + 7) % config.V)
  seen = np.flatnonzero(np.asarray((run(model, tokens) != run(model, other)).any(-1)[0]))
  assert seen.min() == 2 and seen.max() == 2 + reach, f'token 2 is seen at {seen}, reach {reach}'


@on_one_device
def check_segments(config: ModelConfig):
  """Documents packed in a row are isolated: another document's tokens change nothing, bitwise;
  alone it is the same.
  """
  model, run = make_model(config), forward()
  sizes = [5, 3, 4]
  segments = jnp.asarray(np.repeat([1, 2, 3], sizes), jnp.int32)[None]
  positions = jnp.concatenate([jnp.arange(n, dtype=jnp.int32) for n in sizes])[None]
  tokens = tokens_of(config, 1, 12)
  packed = run(model, tokens, positions, segments)
  for other in (1, 2, 3):
    changed = run(
      model, jnp.where(segments == other, (tokens + 7) % config.V, tokens), positions, segments
    )
    same = np.asarray((changed == packed).all(-1))
    assert (same == np.asarray(segments != other)).all(), (
      f'changing document {other} reached another one'
    )

  # The second document alone in a row of padding:
  # the same keys stand elsewhere in the row, so sums are regrouped.
  def alone(x):
    return jnp.pad(x[:, 5:8], ((0, 0), (0, 9)))

  actual = run(model, alone(tokens), alone(positions), alone(segments))
  np.testing.assert_allclose(actual[:, :3], packed[:, 5:8], rtol=1e-5, atol=1e-5)


@functools.cache
@on_one_device
def full_logits(config: ModelConfig) -> np.ndarray:
  """Of tokens_of(config, 2, 9), by the full forward,
  which a planted fault of the cache leaves as it is.
  """
  return np.asarray(forward()(make_model(config), tokens_of(config, 2, 9)))


@on_one_device
def check_cached_decode(
  config: ModelConfig, tolerance: float = 1e-5, splits=([1] * 9, [4, 1, 4], [1, 4, 4])
):
  """The logits of prefill and decode, however a sequence is split into calls,
  are those of the full forward.
  """
  model, step = make_model(config), cached()
  tokens, full = tokens_of(config, 2, 9), full_logits(config)
  scale = max(1.0, np.abs(full).max())
  for split in splits:
    cache, seen = init_cache(config, 2, 16), 0
    for size in split:
      logits, cache = step(model, tokens[:, seen : seen + size], cache)
      error = np.abs(np.asarray(logits) - full[:, seen : seen + size]).max() / scale
      assert error <= tolerance, f'split {split}, tokens {seen}:{seen + size}: error {error:.2g}'
      seen += size
    assert cache.lengths.tolist() == [9, 9]


@on_one_device
def check_unused_slots(config: ModelConfig):
  """What lies in unused slots of a cache, NaN included, changes no logit, bitwise."""
  model, step = make_model(config), cached()
  tokens = tokens_of(config, 2, 6)
  clean = init_cache(config, 2, 16)
  dirty = jax.tree.map(lambda x: jnp.full_like(x, np.nan) if x.ndim == 5 else x, clean)
  for size in (5, 1):
    expected, clean = step(model, tokens[:, -size:], clean)
    actual, dirty = step(model, tokens[:, -size:], dirty)
    np.testing.assert_array_equal(actual, expected)


def appending(room: int):
  """A new jitted (model, cache, ids [B, room], counts [B], fresh=False) -> (logits, cache)."""

  def run(model, cache, ids, counts, fresh=False):
    x, cache, _ = model(ids, cache=cache, counts=counts, fresh=fresh)
    return model.logits(x), cache

  return jax.jit(run, static_argnames='fresh')


# Tokens of a call, and how many of them are each row's:
# prompts longer than a ring, some rows ahead of others, single tokens.
CALLS = [
  (20, (20, 17, 3)),
  (9, (0, 1, 9)),
  (1, (1, 0, 1)),
  (9, (9, 5, 8)),
  (9, (1, 9, 9)),
  (1, (1, 1, 1)),
  (1, (0, 1, 1)),
  (9, (8, 9, 7)),
  (9, (9, 9, 9)),
  (1, (1, 1, 1)),
]
TAKEN_BACK = 8


@on_one_device
def check_appending(
  config: ModelConfig,
  tolerance: float = 1e-5,
  dtype: str = '',
  least: float = 0.0,
  calls=CALLS,
  rings: int | None = None,
):
  """Rows of unequal lengths grow by unequal pieces: the logits are those of the full forward.

  Bitwise the same are those of a cache whose unused slots hold NaN, to which padding has other ids,
  and from which tokens were taken back.

  Args:
    dtype: of the cache. least: what the error must be above, somewhere,
      where a cache is to be less exact. rings: how many there are.
  """
  config = dataclasses.replace(config, max_length=64)
  model, run, draw = make_model(config), appending(9), np.random.default_rng(5)
  tokens = tokens_of(config, 3, sum(room for room, _ in calls))
  full = np.asarray(forward()(model, tokens[:, :64]))
  clean = init_cache(config, 3, 60, dtype, append=9)
  assert rings is None or sum(layer.ring for layer in clean.held) == rings
  dirty = jax.tree.map(
    lambda x: jnp.full_like(x, np.nan) if x.ndim > 3 and x.dtype != jnp.int8 else x, clean
  )

  def put(x):
    return jnp.asarray(x, jnp.int32)

  lengths, errors = np.zeros(3, int), [0.0]
  for room, counts in calls:
    ids, others = draw.integers(0, config.V, (2, 3, room))
    filled = np.arange(room)[None] < np.array(counts)[:, None]
    for row, count in enumerate(counts):
      ids[row, :count] = tokens[row, lengths[row] : lengths[row] + count]
    if room == 1 and lengths.min() > 0:  # a draft, all of it refused
      _, dirty = run(model, dirty, put(draw.integers(0, config.V, (3, 9))), put([TAKEN_BACK, 3, 0]))
      dirty = dataclasses.replace(dirty, lengths=put(lengths))
    logits, clean = run(model, clean, put(ids), put(counts), fresh=not lengths.any())
    same, dirty = run(
      model, dirty, put(np.where(filled, ids, others)), put(counts), fresh=not lengths.any()
    )
    np.testing.assert_array_equal(np.asarray(same)[filled], np.asarray(logits)[filled])
    for row, count in enumerate(counts):
      wanted = full[row, lengths[row] : lengths[row] + count]
      errors.append(
        np.abs(np.asarray(logits)[row, :count] - wanted).max(initial=0)
        / max(1.0, np.abs(full).max())
      )
    lengths += counts
    assert max(errors) <= tolerance, (
      f'{counts} tokens behind {lengths - counts}: error {max(errors):.2g}'
    )
    assert clean.lengths.tolist() == lengths.tolist()
  assert max(errors) >= least, f'error {max(errors):.2g}: it is as exact as another'


def padded_prefill(model, tokens, lengths, capacity):
  """The logits of each row's next token after `tokens` [B, bucket], and after one token more."""
  from decode.loop import prefill

  run = jax.jit(prefill.__wrapped__)
  lengths = jax.device_put(np.asarray(lengths, np.int32), ax.spec('batch'))
  state = run(
    model, tokens, lengths, init_cache(model.config, tokens.shape[0], capacity), lengths + 4
  )
  after, _ = cached()(model, jnp.full((tokens.shape[0], 1), 3, jnp.int32), state.cache)
  return np.asarray(state.logits), np.asarray(after[:, 0])


@on_one_device
def check_padding_and_neighbours(config: ModelConfig, tolerance: float = 1e-6):
  """Padding ids and a batch's other rows change nothing, bitwise;
  another bucket, capacity or batch size only rounds.

  (Another size is another program: products of other shapes are summed in another order.)
  """
  model = make_model(config)
  tokens, lengths = tokens_of(config, 3, 8), [8, 5, 2]
  expected = padded_prefill(model, tokens, lengths, 16)
  other = tokens_of(config, 3, 8, seed=1)
  padding = jnp.arange(8)[None] >= jnp.asarray(lengths)[:, None]
  for a, b in zip(padded_prefill(model, jnp.where(padding, other, tokens), lengths, 16), expected):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(padded_prefill(model, other.at[1].set(tokens[1]), [3, 5, 8], 16), expected):
    np.testing.assert_array_equal(a[1], b[1])
  for a, b in zip(
    padded_prefill(model, jnp.pad(tokens, ((0, 0), (0, 4)))[1:], lengths[1:], 20), expected
  ):
    np.testing.assert_allclose(a, b[1:], rtol=tolerance, atol=tolerance * np.abs(b).max())
