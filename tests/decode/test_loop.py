"""Do prefill and decode_chunk generate what the full forward says, whatever the chunk,
bucket and neighbours are?
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode import loop
from decode.generating import generating_model
from decode.loop import Rules, decode_chunk, prefill
from decode.sampling import make_sampling
from model import transformer
from model.cache import init_cache
from model.config import ModelConfig
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh

CONFIG = ModelConfig(
  vocabulary=40,
  width=16,
  layers=2,
  heads=4,
  kv_heads=2,
  feed_forward=24,
  max_length=64,
  init_scale=1.0,
)
PAD, EOS, NEVER = 0, 2, 99
PROMPTS = [[1, 5, 9, 30], [1], [1, 7, 7, 7, 7, 12, 3]]


@pytest.fixture(scope='module', autouse=True)
def mesh():
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])) as mesh:
    yield mesh


@pytest.fixture(scope='module')
def model():
  model = jax.jit(transformer.init, static_argnums=(0, 1))(CONFIG, 0)
  # logits that are far from alike
  return jax.tree.map(lambda x: x * 3 if x.ndim == 2 else x, model)


def put(x):
  return jax.device_put(jnp.asarray(x), ax.spec('batch', *(None,) * (np.ndim(x) - 1)))


def start(model, prompts, bucket=8, capacity=32, new=12):
  tokens = np.full((len(prompts), bucket), PAD, np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt)] = prompt
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  return prefill(
    model,
    put(tokens),
    put(lengths),
    init_cache(model.config, len(prompts), capacity),
    put(lengths + new),
  )


def rules(sampling, eos=NEVER):
  return Rules(jax.tree.map(put, sampling), put(np.full((len(sampling.seed), 4), eos, np.int32)))


def generate(model, prompts, sampling, *, chunks=(12,), eos=NEVER, **options):
  """New ids of each row, read as a caller does: those that are flagged as the row's."""
  state, rows = start(model, prompts, **options), [[] for _ in prompts]
  for steps in chunks:
    state, chunk = decode_chunk(model, state, rules(sampling, eos), steps=steps, pad=PAD)
    for row, new, flags in zip(rows, np.asarray(chunk.ids), np.asarray(chunk.real)):
      assert (new[~flags] == PAD).all() and not (np.diff(flags.astype(int)) > 0).any()
      row.extend(new[flags].tolist())
  return rows, state


def greedy(rows):
  return make_sampling(rows, temperature=0.0)


def drawn(rows, seed=5):
  return make_sampling(rows, top_p=0.95, seed=seed)


@jax.jit
def full_forward(model, tokens):
  return model.logits(model(tokens).hidden)


def teacher_forced(model, prompt, new):
  """The argmax of the full forward after the prompt and each of the tokens that were generated."""
  tokens = np.zeros((1, 24), np.int32)
  tokens[0, : len(prompt) + len(new)] = prompt + new
  best = np.asarray(full_forward(model, put(tokens)).argmax(-1))[0]
  return best[len(prompt) - 1 : len(prompt) + len(new) - 1].tolist()


def check_greedy(model):
  rows, _ = generate(model, PROMPTS, greedy(3))
  assert len({tuple(row) for row in rows}) == 3 and all(len(set(row)) > 2 for row in rows), (
    'too dull to tell anything'
  )
  for prompt, row in zip(PROMPTS, rows):
    assert row == teacher_forced(model, prompt, row)


def test_greedy_is_the_argmax_of_the_full_forward(model):
  check_greedy(model)


@pytest.mark.parametrize('fault', ['last position', 'lengths'])
def test_planted_faults_break_it(model, fault, monkeypatch):
  """Scores read one token too early; padding that counts as part of the prompt."""

  def broken(model, tokens, lengths, cache, stop_at):
    if fault == 'last position':
      lengths = jnp.maximum(lengths - 1, 1)
    else:
      lengths, stop_at = jnp.full_like(lengths, tokens.shape[1]), stop_at + 8
    return loop.prefill.__wrapped__(model, tokens, lengths, cache, stop_at)

  monkeypatch.setitem(globals(), 'prefill', jax.jit(broken))
  with pytest.raises(AssertionError):
    check_greedy(model)


@pytest.mark.parametrize('sampling', [greedy, drawn])
def test_chunks_buckets_capacities_and_neighbours_change_nothing(model, sampling):
  expected, _ = generate(model, PROMPTS, sampling(3))
  assert generate(model, PROMPTS, sampling(3), chunks=(1,) * 12)[0] == expected
  assert generate(model, PROMPTS, sampling(3), chunks=(7, 7))[0] == expected
  assert generate(model, PROMPTS, sampling(3), chunks=(16,), bucket=16, capacity=64)[0] == expected
  for i, prompt in enumerate(PROMPTS):
    alone = jax.tree.map(lambda x, i=i: x[i : i + 1], sampling(3))
    assert generate(model, [prompt], alone, chunks=(16,))[0] == [expected[i]]


def test_another_seed_is_another_text(model):
  assert generate(model, PROMPTS, drawn(3))[0] != generate(model, PROMPTS, drawn(3, seed=77))[0]


def test_a_row_ends_at_eos_and_leaves_its_neighbours_alone(model):
  free, _ = generate(model, PROMPTS, drawn(3))
  eos = free[0][4]
  rows, state = generate(model, PROMPTS, drawn(3), eos=eos, chunks=(5, 7))

  def cut(row):
    return row[: row.index(eos) + 1] if eos in row else row

  assert rows == [cut(row) for row in free] and len(rows[0]) <= 5
  assert state.done.all(), 'stopped by length, or by the end-of-text'
  assert state.cache.lengths.tolist() == [len(p) + len(r) for p, r in zip(PROMPTS, rows)]
  for prompt, row, logits in zip(PROMPTS, rows, state.logits):
    ids = prompt + row
    tokens = put(np.array([ids + [PAD] * (24 - len(ids))], np.int32))
    (
      np.testing.assert_allclose(logits, full_forward(model, tokens)[0, len(ids) - 1], atol=1e-4),
      'what comes next stays known',
    )


@pytest.mark.slow
def test_a_row_stops_at_its_length(model):
  for new in (1, 3):
    rows, state = generate(model, PROMPTS, greedy(3), chunks=(7,), new=new)
    assert [len(row) for row in rows] == [new] * 3 and state.done.all()
  full, _ = generate(model, PROMPTS[:1], greedy(1), chunks=(4,), new=4, capacity=8)
  assert full == [generate(model, PROMPTS[:1], greedy(1))[0][0][:4]], (
    'a cache that is filled to its last slot'
  )


@pytest.mark.slow
@pytest.mark.parametrize('rows', [1, 3])
def test_the_cache_is_rewritten_in_place(model, rows):
  model = jax.jit(generating_model)(model)
  state = start(model, PROMPTS[:rows])
  compiled = decode_chunk.lower(model, state, rules(greedy(rows)), steps=4, pad=PAD).compile()
  size = sum(x.nbytes for x in jax.tree.leaves(state.cache.held))
  assert compiled.memory_analysis().alias_size_in_bytes >= size
  buffer = ','.join(map(str, state.cache.held[0].keys.shape))
  assert not re.findall(rf'f32\[{buffer}\]\S* copy\(', compiled.as_text()), 'all slots are copied'
  tokens, lengths = put(np.ones((rows, 8), np.int32)), put(np.full(rows, 8, np.int32))
  reading = prefill.lower(
    model, tokens, lengths, init_cache(model.config, rows, 32), lengths
  ).compile()
  assert reading.memory_analysis().alias_size_in_bytes >= size


def test_other_options_compile_nothing(model):
  def programs():
    return decode_chunk._cache_size() + prefill._cache_size()

  generate(model, PROMPTS, make_sampling(3))
  before = programs()
  for options in (
    dict(temperature=0.0),
    dict(temperature=0.7, top_k=5, seed=1),
    dict(temperature=2.0, top_p=0.5, seed=2),
    dict(
      temperature=0.3, top_k=7, top_p=0.2, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.5
    ),
  ):
    generate(model, PROMPTS, make_sampling(3, **options))
  mixed = make_sampling(
    3,
    temperature=[0, 1, 0.5],
    top_k=[0, 3, 9],
    top_p=[1, 0.9, 0.5],
    frequency_penalty=[0, 0, 1],
    seed=[1, 2, 3],
  )
  generate(model, PROMPTS[::-1], mixed)
  assert programs() == before
