"""Do drafts change nothing but the number of steps: greedy texts, the law of what is drawn,
log-probabilities, caches?
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from decode import loop, speculative
from decode.loop import Rules
from decode.sampling import History, law, make_sampling
from decode.speculative import (
  DraftModel,
  EarlyExit,
  Lookup,
  Speculation,
  accepted,
  looked_up,
  residual,
  speculate_chunk,
)
from model import transformer
from model.cache import init_cache
from model.config import LatentConfig, ModelConfig, MoEConfig
from model.execution import ExecutionConfig
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
  execution=ExecutionConfig(scan=False),
)
PAD, NEVER, NEW = 0, 99, 20
PROMPTS = [[1, 5, 9, 30], [1], [1, 7, 7, 7, 7, 12, 3]]
ROOM = max(map(len, PROMPTS)) + NEW  # to the last slot


@pytest.fixture(scope='module', autouse=True)
def mesh():
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])) as mesh:
    yield mesh


def make(config, seed=0):
  model = jax.jit(transformer.init, static_argnums=(0, 1))(config, seed)
  # logits that are far from alike
  return jax.tree.map(lambda x: x * 3 if x.ndim == 2 else x, model)


@pytest.fixture(scope='module')
def model():
  return make(CONFIG)


@pytest.fixture(scope='module')
def drafts(model):
  """Draft models, all of one program."""
  contrary = jax.tree.map(lambda x: x, model)
  contrary.head.tokens = transformer.nnx.Param(
    -model.head.tokens[...], **model.head.tokens.get_metadata()
  )
  return {
    'same': model,
    'random': make(CONFIG, 7),
    'contrary': contrary,
    'broken': jax.tree.map(lambda x: x * jnp.nan, model),
  }


def put(x):
  return jax.device_put(jnp.asarray(x), ax.spec('batch', *(None,) * (np.ndim(x) - 1)))


def start(model, prompts=PROMPTS, new=NEW, capacity=ROOM, append=256, source=None, dtype=''):
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  tokens = np.full((len(prompts), lengths.max()), PAD, np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt)] = prompt
  cache = init_cache(model.config, len(prompts), capacity, dtype, append)
  return loop.prefill(model, put(tokens), put(lengths), cache, put(lengths + new), source)


def rules(sampling, eos=NEVER):
  return Rules(jax.tree.map(put, sampling), put(np.full((len(sampling.seed), 4), eos, np.int32)))


def greedy(rows, **options):
  return make_sampling(rows, temperature=0.0, **options)


def read(chunks):
  """Ids, log-probabilities and alternatives of each row, as a caller reads them:
  those that are flagged as the row's.
  """
  chunks = jax.tree.map(np.asarray, chunks)
  assert all((chunk.ids[~chunk.real] == PAD).all() for chunk in chunks)
  return [
    [
      np.concatenate([getattr(chunk, name)[i, chunk.real[i]] for chunk in chunks]).tolist()
      for name in ('ids', 'raw', 'processed', 'alternatives', 'alternatives_raw')
    ]
    for i in range(len(chunks[0].real))
  ]


def plain(model, sampling, eos=NEVER, **how):
  state, chunk = loop.decode_chunk(
    model,
    start(model, **how),
    rules(sampling, eos),
    steps=how.get('new', NEW),
    pad=PAD,
    alternatives=2,
  )
  return read([chunk]), state


def memory_of(drafter, state, prompts=PROMPTS, capacity=ROOM, **how):
  if isinstance(drafter, Lookup):
    ids = np.full((len(prompts), capacity), NEVER, np.int32)
    for row, prompt in zip(ids, prompts):
      row[: len(prompt)] = prompt
    return put(ids)
  if isinstance(drafter, DraftModel):
    return start(drafter.model, prompts, capacity=capacity, **how).cache, put(
      np.zeros(len(prompts), np.int32)
    )


def speculated(model, drafter, sampling, k, eos=NEVER, least=0.0, run=None, steps=4, **how):
  """As `plain`; also the last chunk's Speculation."""
  state, chunks = start(model, **how), []
  carried = Speculation.of(state, memory_of(drafter, state, **how))
  drafter = dataclasses.replace(drafter, least=jnp.float32(least))
  while not np.asarray(carried.state.done).all():
    carried, chunk = (run or speculate_chunk)(
      model,
      drafter,
      carried,
      rules(sampling, eos),
      steps=steps,
      k=k,
      pad=PAD,
      alternatives=2,
    )
    chunks.append(chunk)
    assert len(chunks) <= how.get('new', NEW)
  return read(chunks), carried


def assert_same(found, expected):
  """Ids and alternatives exactly; log-probabilities but for rounding:
  other programs add in another order.
  """
  for one, other in zip(found, expected, strict=True):
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
      if i in (0, 3):
        assert a == b
      else:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def assert_same_slots(one, other, config):
  """Valid slots of two caches of the same size."""
  np.testing.assert_array_equal(one.lengths, other.lengths)
  for a, b, (kind, _) in zip(one.held, other.held, config.places):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
      x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
      for row, length in enumerate(np.asarray(one.lengths)):
        seen = np.arange(max(0, length - kind.window) if a.ring else 0, length) % x.shape[3]
        np.testing.assert_allclose(
          x[:, row][:, :, seen], y[:, row][:, :, seen], rtol=1e-4, atol=1e-4
        )


@pytest.fixture(scope='module')
def expected(model):
  free, _ = plain(model, greedy(3))
  eos = free[0][0][7]
  return {eos: plain(model, greedy(3), eos) for eos in (NEVER, eos)}


@pytest.mark.slow
@pytest.mark.parametrize(
  'k', [k if k == 4 else pytest.param(k, marks=pytest.mark.slow) for k in range(1, 9)]
)
def test_greedy_is_plain_greedy(model, drafts, expected, k):
  """To the cache's last slot, and with an end in the middle of drafts;
  rows go on at speeds of their own.
  """
  drafters = {name: DraftModel(draft) for name, draft in drafts.items()} | {
    'lookup': Lookup(1),
    'exit': EarlyExit(1),
  }
  for eos, (rows, state) in expected.items():
    for name, drafter in drafters.items():
      if k % 4 != 1 and not isinstance(drafter, DraftModel) or k != 4 and name == 'broken':
        continue  # programs take long to compile
      found, carried = speculated(model, drafter, greedy(3), k, eos)
      assert_same(found, rows)
      assert_same_slots(carried.state.cache, state.cache, CONFIG)
      np.testing.assert_array_equal(carried.state.history.generated, state.history.generated)
      drafted, kept = np.asarray(carried.drafted), np.asarray(carried.accepted)
      wanted = {
        'same': (kept == drafted) | (eos != NEVER),
        'contrary': kept == 0,
        'broken': drafted == 0,
      }.get(name, kept <= drafted)
      assert wanted.all(), f'{name}: {kept} of {drafted} kept'
      if name in ('same', 'contrary', 'random', 'exit'):
        assert drafted.min() > 0


T5 = dict(
  position='relative', relative_buckets=8, relative_distance=12, kv_heads=4, encoder_layers=1
)
FAMILIES = {
  'windows in rings': dict(window=3, global_every=2),
  'latent': dict(
    kv_heads=4,
    head_width=6,
    latent=LatentConfig(width=6, query_width=8, rope_width=4, value_width=3),
  ),
  'experts': dict(moe=MoEConfig(experts=4, feed_forward=8, shared_feed_forward=8, first=1)),
  'encoder': T5,
  'bytes': {},
  'shared layers': dict(layers=4, shared_layers=2),
}


@pytest.mark.slow
@pytest.mark.parametrize(
  'family',
  [
    'windows in rings',
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ('encoder', 'latent', 'experts', 'bytes', 'shared layers')
    ),
  ],
)
def test_families(family):
  """Rings go round several times; drafts are read into caches of the same kind."""
  model = make(dataclasses.replace(CONFIG, **FAMILIES[family]))
  how = dict(append=5, dtype='int8' if family == 'bytes' else '')
  if family == 'encoder':
    how['source'] = (
      put(np.arange(15, dtype=np.int32).reshape(3, 5)),
      put(np.array([5, 2, 4], np.int32)),
    )
  rows, state = plain(model, greedy(3), **how)
  if family == 'windows in rings':
    assert state.cache.held[0].ring and state.cache.held[0].slots < ROOM / 3
  drafter = (
    DraftModel(make(model.config, 3))
    if family in ('windows in rings', 'encoder')
    else EarlyExit(model.config.shared_layers)
  )
  found, carried = speculated(model, drafter, greedy(3), 4, **how)
  assert_same(found, rows)
  assert_same_slots(carried.state.cache, state.cache, model.config)
  assert (carried.accepted < carried.drafted).all()


@pytest.mark.slow
def test_penalties_and_bias_are_those_of_every_drafted_position(model, drafts):
  sampling = greedy(
    3,
    repetition_penalty=1.5,
    presence_penalty=0.7,
    frequency_penalty=0.4,
    logit_bias={7: -np.inf, 35: 2.0},
    vocabulary=40,
  )
  rows, _ = plain(model, sampling)
  for drafter in (DraftModel(drafts['same']), Lookup(1)):
    found, carried = speculated(model, drafter, sampling, 4)
    assert_same(found, rows)
  assert rows[0][0] != plain(model, greedy(3))[0][0][0]


@pytest.mark.slow
def test_rows_that_are_broken_end_and_say_so(model, drafts):
  state = start(model)
  state = dataclasses.replace(state, logits=state.logits.at[1].set(jnp.nan))
  drafter = DraftModel(drafts['same'])
  carried = Speculation.of(state, memory_of(drafter, state))
  carried, chunk = speculate_chunk(
    model, drafter, carried, rules(greedy(3)), steps=4, k=4, pad=PAD, alternatives=2
  )
  assert (
    chunk.broken.tolist() == [False, True, False]
    and not chunk.real[1].any()
    and chunk.real[0].all()
  )
  assert carried.state.cache.lengths.tolist() == [24, 1, 27]


def lookup_by_hand(ids, n, k):
  at = max((i for i in range(len(ids) - n) if ids[i : i + n] == ids[-n:]), default=None)
  if at is None:
    return None
  for _ in range(k):  # what is copied may be part of what is copied from
    ids = [*ids, ids[at + n]]
    at += 1
  return ids[-k:]


def test_lookup():
  rng, k = np.random.default_rng(0), 5
  for n in (1, 2, 3):
    memory, lengths = (
      rng.integers(0, 3, (64, 12), np.int32),
      rng.integers(1, 13, 64).astype(np.int32),
    )
    ids, found = jax.jit(looked_up, static_argnums=(2, 3))(put(memory), put(lengths), n, k)
    for row, length, new, there in zip(memory, lengths, np.asarray(ids), np.asarray(found)):
      by_hand = lookup_by_hand(row[:length].tolist(), n, k)
      assert by_hand == (new.tolist() if there else None)


@pytest.mark.slow
def test_repetitive_texts_are_drafted_by_lookup(model):
  """A bias makes the text go round; then all but the first drafts are kept."""
  sampling = greedy(3, logit_bias={5: 60.0}, vocabulary=40)
  found, carried = speculated(model, Lookup(2), sampling, 4, steps=2)
  assert_same(found, plain(model, sampling)[0])
  assert found[1][0] == [5] * NEW and carried.accepted[1] == carried.drafted[1] >= 12


# The law of what is drawn.

# temperatures, top_k, top_p
GRID = list(itertools.product([0.0, 0.5, 1.0, 2.0], [0, 1, 3], [0.4, 0.8, 1.0]))


def judgement(log_p, log_q, accepted=accepted, residual=residual):
  """Of laws [M, V]: the probability [M, V] that a draft is kept as each token,
  and that each comes instead of a rejected one.
  """
  M, V = log_p.shape
  accepted, residual = jax.jit(accepted), jax.jit(residual)
  ids = jnp.tile(jnp.arange(V, dtype=jnp.int32), M)

  def rows(x):
    return jnp.repeat(x, V, 0)

  def halve(_, ends):  # a draft is kept for noise below some border, which is the probability
    low, high = ends
    yes = accepted(rows(log_p), rows(log_q), ids, (low + high) / 2)
    return jnp.where(yes, (low + high) / 2, low), jnp.where(yes, high, (low + high) / 2)

  border, _ = jax.lax.fori_loop(0, 30, halve, (jnp.zeros(M * V), jnp.ones(M * V)))
  kept = np.exp(np.asarray(log_q, np.float64)) * np.asarray(border, np.float64).reshape(M, V)
  return kept, (1 - kept.sum(1, keepdims=True)) * np.exp(
    np.asarray(residual(log_p, log_q), np.float64)
  )


def worst_error(**faults):
  """Of the law of two tokens, by enumeration of two drafts and of what becomes of them,
  against the model's; over the grid.
  """
  rng, V, n = np.random.default_rng(0), 5, len(GRID)
  options = dict(
    zip(('temperature', 'top_k', 'top_p'), zip(*[case for case in GRID for _ in range(V + 1)]))
  )
  sampling = jax.tree.map(jnp.asarray, make_sampling(n * (V + 1), **options))
  log_p, log_q = (
    jax.jit(law)(jnp.asarray(rng.normal(size=(n * (V + 1), V)) * 2, jnp.float32), sampling)
    for _ in range(2)
  )
  sure = jnp.log(jnp.eye(V))[rng.integers(0, V, n * (V + 1))]  # of drafts that are looked up
  worst = 0.0
  for log_q in (log_q, sure):
    # of the first token, and of the second one after each first
    p = np.exp(np.asarray(log_p, np.float64)).reshape(n, V + 1, V)
    kept, instead = (x.reshape(n, V + 1, V) for x in judgement(log_p, log_q, **faults))
    found = kept[:, 0, :, None] * (kept + instead)[:, 1:] + instead[:, 0, :, None] * p[:, 1:]
    worst = max(worst, np.abs(found - p[:, 0, :, None] * p[:, 1:]).max())
  return worst


def test_the_law_of_two_tokens_is_exact():
  assert worst_error() < 1e-6


@pytest.mark.parametrize(
  'fault',
  [
    dict(accepted=lambda log_p, log_q, ids, noise: noise < 1),
    dict(residual=lambda log_p, log_q: log_p),
  ],
)
def test_faults_of_the_arithmetic_change_the_law(fault):
  assert worst_error(**fault) > 0.01


SMALL = ModelConfig(
  vocabulary=5,
  width=8,
  layers=2,
  heads=2,
  feed_forward=8,
  max_length=16,
  init_scale=1.0,
  execution=ExecutionConfig(scan=False),
)
PROMPT, DRAWS = [1, 3], 4096
CHOICES = dict(
  temperature=0.8,
  top_p=0.95,
  repetition_penalty=1.3,
  presence_penalty=0.3,
  logit_bias={2: 0.5},
  vocabulary=5,
)


@functools.cache
def law_of_three():
  """The model, and the law [5, 5, 5] of the three tokens after PROMPT:
  by the full forward and the law of sampling, token by token.
  """
  model, found, before = make(SMALL, 3), np.ones(()), [[]]
  for _ in range(3):
    tokens = np.array([PROMPT + past for past in before], np.int32)
    history = History.of(put(tokens[:, :2]), put(np.full(len(before), 2, np.int32)), 5)
    for new in tokens[:, 2:].T:
      history = history.add(put(new), put(np.ones(len(before), bool)))
    logits = jax.jit(lambda model, tokens: model.logits(model(tokens).hidden[:, -1]))(
      model, put(tokens)
    )
    next_ = np.exp(
      np.asarray(
        jax.jit(law)(logits, jax.tree.map(put, make_sampling(len(before), **CHOICES)), history),
        np.float64,
      )
    )
    found = found[..., None] * next_.reshape(*found.shape, 5)
    before = [[*past, new] for past in before for new in range(5)]
  return model, found


def check_draws(drafter, run=None):
  """Chi-square of real draws of many seeds, two drafts at a time;
  the share of drafts that were kept.
  """
  model, expected = law_of_three()
  prompts = [PROMPT] * DRAWS
  rows, carried = speculated(
    model,
    drafter,
    make_sampling(DRAWS, seed=11, **CHOICES),
    2,
    prompts=prompts,
    new=3,
    capacity=8,
    run=run,
    steps=3,
  )
  counts = np.zeros((5, 5, 5))
  np.add.at(counts, tuple(np.array([row[0] for row in rows]).T), 1)
  assert (counts[expected == 0] == 0).all()
  often = expected * DRAWS >= 5

  def pooled(x):
    return np.append(x[often], x[~often].sum())

  observed, wanted = pooled(counts), pooled(expected * DRAWS)
  keep = wanted > 0
  assert scipy.stats.chisquare(observed[keep], wanted[keep], sum_check=False).pvalue > 1e-4
  return np.asarray(carried.accepted).sum() / np.asarray(carried.drafted).sum()


@pytest.mark.slow
@pytest.mark.parametrize('drafter', ['lookup', 'model', 'exit'])
def test_draws_have_the_law_of_the_model(drafter):
  assert (
    0.05
    < check_draws(
      {'model': DraftModel(make(SMALL, 5)), 'lookup': Lookup(1), 'exit': EarlyExit(1)}[drafter]
    )
    < 0.95
  )


def anew():
  """speculate_chunk, traced again: with a planted fault."""
  names = ('steps', 'k', 'pad', 'vocabulary', 'alternatives')
  return jax.jit(
    lambda *args, **options: speculate_chunk.__wrapped__(*args, **options), static_argnames=names
  )


@pytest.mark.slow
@pytest.mark.parametrize('fault', ['always accepted', 'p for the residual'])
def test_faults_of_the_arithmetic_change_the_draws(monkeypatch, fault):
  if fault == 'always accepted':
    monkeypatch.setattr(
      speculative, 'accepted', lambda log_p, log_q, ids, noise: (noise < 1) & (noise < jnp.inf)
    )
  else:
    monkeypatch.setattr(speculative, 'residual', lambda log_p, log_q: log_p)
  with pytest.raises(AssertionError):
    check_draws(DraftModel(make(SMALL, 5)), anew())


@pytest.mark.slow
@pytest.mark.parametrize(
  'fault', ['nothing is taken back', pytest.param('always accepted', marks=pytest.mark.slow)]
)
def test_faults_change_greedy_texts(model, drafts, expected, monkeypatch, fault):
  if fault == 'always accepted':
    monkeypatch.setattr(speculative, 'accepted', lambda log_p, log_q, ids, noise: noise < 1)
  else:
    monkeypatch.setattr(speculative, 'taken_back', lambda cache, lengths: cache)
  with pytest.raises(AssertionError):
    assert_same(
      speculated(model, DraftModel(drafts['random']), greedy(3), 4, run=anew())[0],
      expected[NEVER][0],
    )


@pytest.mark.slow
def test_a_seed_draws_the_same_in_other_company(model, drafts):
  """Chunks, neighbours, their ends and a row's own length change nothing;
  a row that gives up drafting does so by itself.
  """
  sampling, drafter = make_sampling(3, top_p=0.95, seed=5), DraftModel(drafts['random'])
  rows, carried = speculated(model, drafter, sampling, 4, least=0.9)
  assert max(carried.drafted) < 40 <= 4 * NEW, 'rows stop drafting after a trial'
  alone = [1, 1, 0]
  turned, _ = speculated(
    model,
    drafter,
    jax.tree.map(lambda x: x[np.array(alone)], sampling),
    4,
    least=0.9,
    prompts=[PROMPTS[i] for i in alone],
  )
  assert [row[0] for row in turned] == [rows[i][0] for i in alone]
  shorter, _ = speculated(model, drafter, sampling, 4, least=0.9, new=9, steps=1)
  assert [row[0] for row in shorter] == [row[0][:9] for row in rows]


@pytest.mark.slow
def test_other_options_compile_nothing(model, drafts):
  def run(sampling, eos=NEVER, least=0.0):
    return speculated(model, DraftModel(drafts['same']), sampling, 4, eos, least)

  run(greedy(3))
  before = speculate_chunk._cache_size()
  run(
    make_sampling(
      3,
      temperature=[0, 1, 0.5],
      top_k=[0, 3, 9],
      top_p=[1, 0.9, 0.5],
      frequency_penalty=[0, 0, 1],
      seed=[1, 2, 3],
    ),
    5,
    0.5,
  )
  assert speculate_chunk._cache_size() == before


@pytest.mark.slow
@pytest.mark.parametrize('drafter', [EarlyExit(1), Lookup(2)])
def test_buffers_are_rewritten_in_place(model, drafter):
  state = start(model)
  carried = Speculation.of(
    state, None if drafter.always else jnp.zeros((3, state.cache.capacity), jnp.int32)
  )
  compiled = speculate_chunk.lower(
    model, drafter, carried, rules(greedy(3)), steps=4, k=4, pad=PAD
  ).compile()
  assert compiled.memory_analysis().alias_size_in_bytes >= sum(
    x.nbytes for x in jax.tree.leaves(state.cache.held)
  )
  buffer = ','.join(map(str, state.cache.held[0].keys.shape))
  assert not re.findall(rf'f32\[{buffer}\]\S* copy\(', compiled.as_text()), 'all slots are copied'
