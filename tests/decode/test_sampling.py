"""Are tokens drawn by the law that the options state, and by nothing else?"""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings, strategies as st

from decode.sampling import (
  History,
  Sampling,
  Stream,
  bad,
  greatest,
  law,
  logprobs,
  make_sampling,
  noise,
  penalised,
  sample,
)
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh

V, ROWS = 37, 4
OPTIONS = {
  'temperature': [0.0, 0.3, 1.0, 2.5],
  'top_k': [0, 1, 3, 11, 99],
  'top_p': [0.05, 0.5, 0.77, 1.0],
  'min_p': [0.0, 0.03, 0.4],
  'repetition_penalty': [1.0, 0.5, 2.0],
  'presence_penalty': [0.0, 0.5, -1.0],
  'frequency_penalty': [0.0, 0.25, -0.5],
  'logit_bias': [None, {0: 4.0, 5: -np.inf, 36: -1.5}],
  'masked': [False, True],
}
NEUTRAL = {
  'temperature': 1.0,
  'top_k': 0,
  'top_p': 1.0,
  'min_p': 0.0,
  'repetition_penalty': 1.0,
  'presence_penalty': 0.0,
  'frequency_penalty': 0.0,
  'logit_bias': None,
  'masked': False,
}
jitted_law, jitted_sample = jax.jit(law), jax.jit(sample, static_argnames='stream')
jitted_greatest = jax.jit(greatest)


def law64(
  logits,
  generated,
  prompt,
  allowed,
  temperature=1.0,
  top_k=0,
  top_p=1.0,
  min_p=0.0,
  repetition_penalty=1.0,
  presence_penalty=0.0,
  frequency_penalty=0.0,
  logit_bias=None,
):
  """Probabilities [V] by the definitions, in float64, and how far the nearest sum or ratio is from
  top_p's and min_p's border.
  """
  logits = np.asarray(logits, np.float64)
  temperature, top_p, min_p, repetition = (
    np.float64(np.float32(x)) for x in (temperature, top_p, min_p, repetition_penalty)
  )
  seen = prompt | (generated > 0)
  logits = np.where(
    seen & (logits > 0),
    logits / repetition,
    np.where(seen & (logits < 0), logits * repetition, logits),
  )
  logits = logits - presence_penalty * (generated > 0) - frequency_penalty * generated
  for id_, value in (logit_bias or {}).items():
    logits[id_] += value
  logits[~allowed] = -np.inf
  if temperature == 0:
    return np.eye(len(logits))[logits.argmax()], np.inf
  p, margin = scipy.special.softmax(logits / temperature), np.inf
  if top_k:
    p = np.where(p >= np.sort(p)[-min(top_k, len(p))], p, 0)
    p /= p.sum()
  if top_p < 1:
    order = np.argsort(-p)
    sums = np.cumsum(p[order])
    margin = np.abs(sums - top_p).min()
    p = np.where(p >= p[order][min(np.searchsorted(sums, top_p), len(p) - 1)], p, 0)
    p /= p.sum()
  if min_p:
    margin = min(margin, np.abs(p - min_p * p.max()).min())
    p = np.where(p >= min_p * p.max(), p, 0)
  return p / p.sum(), margin


def make_rows(seed, rows):
  """Logits with ties, some of them -inf, and a history and a mask, which leave token 0:
  numpy arrays.
  """
  rng = np.random.default_rng(seed)
  logits = rng.integers(-24, 24, (rows, V)).astype(np.float32) / 8
  logits[rng.random((rows, V)) < 0.1] = -np.inf
  logits[:, 0] = 1.0
  generated = (rng.integers(1, 4, (rows, V)) * (rng.random((rows, V)) < 0.3)).astype(np.int32)
  allowed = rng.random((rows, V)) < 0.6
  allowed[:, 0] = True
  return logits, generated, rng.random((rows, V)) < 0.3, allowed


def columns(rows):
  """make_sampling of one dict of options for each row."""
  names = {name for row in rows for name in row}
  return on_device(
    make_sampling(len(rows), vocabulary=V, **{name: [row[name] for row in rows] for name in names})
  )


def on_device(tree):
  return jax.tree.map(jnp.asarray, tree)


def check_against_float64(law, rows, seed=0):
  """Each row of options against the definitions, on inputs of its own."""
  logits, generated, prompt, allowed = make_rows(seed, len(rows))
  rows = [dict(row) for row in rows]
  masked = np.array([row.pop('masked', True) for row in rows])
  allowed |= ~masked[:, None]
  found = np.exp(law(*on_device((logits, columns(rows), History(generated, prompt), allowed))))
  for i, row in enumerate(rows):
    expected, margin = law64(logits[i], generated[i], prompt[i], allowed[i], **row)
    if margin > 1e-6:  # on the border the last bit of a sum decides
      np.testing.assert_allclose(found[i], expected, atol=1e-6, err_msg=str(row))


def test_law_over_every_pair_of_options():
  rows = [
    {a: x, b: y}
    for a, b in itertools.combinations(OPTIONS, 2)
    for x in OPTIONS[a]
    for y in OPTIONS[b]
  ]
  # in no way exact
  rows += [
    {'repetition_penalty': x, 'presence_penalty': y, 'frequency_penalty': 0.17}
    for x, y in ((1.3, 0.3), (0.7, -0.1))
  ]
  check_against_float64(jitted_law, [{**NEUTRAL, **row} for row in rows])


anything = st.fixed_dictionaries(
  {name: st.sampled_from(values) for name, values in OPTIONS.items()}
  | {
    'top_p': st.sampled_from([0.5, 1.0]) | st.floats(0.01, 1),
    'min_p': st.just(0.0) | st.floats(0, 1),
    'top_k': st.integers(0, V + 2),
  }
)


@given(st.integers(0, 2**31), st.lists(anything, min_size=ROWS, max_size=ROWS))
@settings(max_examples=150)
def test_law_as_a_property(seed, rows):
  rows[0]['logit_bias'] = {3: 0.5}  # with a bias or without are two programs
  check_against_float64(jitted_law, rows, seed)


def small(first, second=None):
  """Probabilities of one row of five tokens after these options, one call of `law` after another;
  'allowed' is among them.
  """
  found = jnp.log(jnp.asarray([[0.35, 0.3, 0.2, 0.1, 0.05]], jnp.float32))
  history = on_device(History(np.array([[2, 0, 0, 1, 0]], np.int32), np.zeros((1, 5), bool)))
  for options in (first, second):
    if options is not None:
      options = dict(options)
      allowed = jnp.asarray([options.pop('allowed', [True] * 5)])
      found = jitted_law(
        found, on_device(make_sampling(1, vocabulary=5, **options)), history, allowed
      )
  return np.exp(np.asarray(found[0]))


@pytest.mark.parametrize(
  'first, second',
  [
    ({'presence_penalty': 1.0}, {'temperature': 0.5}),
    ({'frequency_penalty': 1.0}, {'top_k': 2}),
    ({'logit_bias': {3: 2.0}}, {'temperature': 2.0}),
    ({'logit_bias': {3: 2.0}}, {'top_k': 2}),
    ({'allowed': [False, True, False, True, True]}, {'top_k': 2}),
    ({'temperature': 0.5}, {'top_p': 0.45}),
    ({'temperature': 0.5}, {'min_p': 0.5}),
    ({'top_k': 3}, {'top_p': 0.7}),
    ({'top_p': 0.36}, {'min_p': 0.5}),
  ],
  ids=str,
)
def test_the_order_is_fixed(first, second):
  """Both at once are the first and then the second. The other way round is another law,
  which this would not let pass.
  """
  np.testing.assert_allclose(small({**first, **second}), small(first, second), atol=1e-6)
  assert np.abs(small(second, first) - small(first, second)).max() > 1e-2


def test_the_float64_law_catches_another_order():
  """top-p, planted before temperature."""

  def planted(logits, sampling, history, allowed):
    plain = on_device(make_sampling(1))
    kept = jnp.isfinite(
      law(
        logits, Sampling(**{**vars(sampling), 'temperature': plain.temperature}), history, allowed
      )
    )
    return law(
      logits, Sampling(**{**vars(sampling), 'top_p': plain.top_p}), history, allowed & kept
    )

  rows = [{'temperature': 0.5, 'top_p': 0.6, 'logit_bias': {3: 0.0}}]
  check_against_float64(law, rows)
  with pytest.raises(AssertionError, match='Mismatched elements'):
    check_against_float64(planted, rows)


def one(logits, **options):
  """The law of one row, as probabilities."""
  logits = jnp.asarray([logits], jnp.float32)
  return np.exp(
    np.asarray(
      jitted_law(logits, on_device(make_sampling(1, vocabulary=logits.shape[1], **options)))
    )
  )[0]


def test_ties_at_a_border_stay_together():
  for options in (
    {'top_k': 2},
    {'top_p': 0.5},
    {'min_p': 0.3},
    {'top_k': 1, 'logit_bias': {1: -1.0}},
  ):
    assert (one([1.0, 3.0, 2.0, 2.0, 2.0, -1.0], **options) > 0).tolist() == [
      False,
      True,
      True,
      True,
      True,
      False,
    ], options
  assert (one([0.0, -0.0, -1.0], top_k=1) > 0).tolist() == [True, True, False]


@pytest.mark.parametrize('options', [{}, {'top_k': 2}, {'top_p': 0.99}, {'min_p': 1e-3}], ids=str)
@pytest.mark.parametrize('temperature', [1e-6, 2e-38, 1e-40, 1e30, 3e38])
def test_extreme_temperatures_give_a_law(temperature, options):
  cold = np.array([1, 0, 0, 0])
  hot = np.array([1, 0, 1, 0]) / 2 if 'top_k' in options else np.full(4, 0.25)
  np.testing.assert_allclose(
    one([30.0, -2.0, 29.0, 1.0], temperature=temperature, **options),
    cold if temperature < 1 else hot,
    atol=1e-6,
  )


def test_logits_far_apart_and_options_at_their_ends_give_a_law():
  for logits in ([3e38, -3e38, 0.0], [0.0, -1e-38, -80.0], [-np.inf, 2.0, -np.inf]):
    for options in (
      {'top_k': 1},
      {'top_p': 1e-38},
      {'top_p': 1e-7},
      {'min_p': 1.0},
      {'temperature': 0.0},
      {'top_k': 2**31 - 1, 'min_p': 1e-38},
    ):
      found = one(logits, **options)
      assert abs(found.sum() - 1) < 1e-6 and found.argmax() == np.argmax(logits), (logits, options)
      assert (found[np.isneginf(logits)] == 0).all()


@pytest.mark.parametrize('temperature', [0.0, 1.0])
@pytest.mark.parametrize('options', [{}, {'top_k': 3}, {'top_p': 0.5}, {'min_p': 0.1}], ids=str)
def test_rows_that_have_no_law_are_bad_and_leave_the_others_alone(options, temperature):
  logits = np.zeros((5, V), np.float32)
  logits[0, 4], logits[1, 4], logits[2] = np.nan, np.inf, -np.inf
  logits[3, 4] = np.nan
  allowed = np.ones((5, V), bool)
  allowed[3, 4] = False  # a mask does not hide that the model is broken
  sampling = on_device(make_sampling(5, temperature=temperature, **options))
  found = jitted_law(jnp.asarray(logits), sampling, None, jnp.asarray(allowed))
  assert bad(jnp.asarray(logits)).tolist() == bad(found).tolist() == [True, True, True, True, False]
  assert jnp.isnan(found[:4]).all() and not jnp.isnan(found[4]).any()
  assert bad(law(jnp.zeros((1, V)), on_device(make_sampling(1)), None, jnp.zeros((1, V), bool)))[
    0
  ], 'nothing is allowed'


def test_penalties_without_a_history_are_bad_and_not_forgotten():
  for options in (
    {'repetition_penalty': [1.0, 1.2]},
    {'presence_penalty': [0, 0.1]},
    {'frequency_penalty': [0, -0.1]},
  ):
    sampling = make_sampling(2, **options)
    assert sampling.penalises().tolist() == [False, True]
    assert bad(law(jnp.zeros((2, V)), on_device(sampling))).tolist() == [False, True]


def test_history_counts_what_is_real():
  tokens, lengths = (
    jnp.asarray([[5, 5, 2, 9], [1, 0, 0, 0]], jnp.int32),
    jnp.asarray([3, 1], jnp.int32),
  )
  history = History.of(tokens, lengths, 10)
  assert [np.flatnonzero(row).tolist() for row in history.prompt] == [
    [2, 5],
    [1],
  ] and not history.generated.any()
  for ids, real in (([3, 3], [True, True]), ([3, 4], [True, False]), ([0, 3], [True, True])):
    history = history.add(jnp.asarray(ids, jnp.int32), jnp.asarray(real))
  assert history.generated.tolist() == [
    [1, 0, 0, 2, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 2, 0, 0, 0, 0, 0, 0],
  ]
  sampling = on_device(
    make_sampling(2, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
  )
  found = penalised(jnp.asarray([[-1.0] * 5 + [1.0] * 5] * 2), sampling, history)
  assert found[0].tolist() == [-2.75, -1, -2, -3.0, -1, 0.5, 1, 1, 1, 1], (
    'the prompt counts for repetition only'
  )
  assert found[1].tolist() == [-1, -2, -1, -3.0, -1, 1, 1, 1, 1, 1]


def test_greedy_takes_the_first_best():
  logits = jnp.asarray([[0.0, 5.0, 5.0, 1.0], [3.0, 2.0, 1.0, 0.0]])
  for seed in range(5):
    sampling = on_device(make_sampling(2, temperature=0, top_k=2, top_p=0.5, seed=seed))
    assert jitted_sample(
      jitted_law(logits, sampling), sampling.seed, jnp.asarray([seed, 7], jnp.int32)
    ).tolist() == [1, 0]


@given(
  rows=st.lists(
    st.lists(
      st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 2.0, 2.0, np.inf, np.nan]), min_size=5, max_size=5
    ),
    min_size=3,
    max_size=3,
  )
)
@settings(max_examples=100, deadline=None)
def test_the_greatest_is_argmax(rows):
  """Ties, infinities and NaN included, and whatever is in other rows."""
  x = np.array(rows, np.float32)
  assert jitted_greatest(x).tolist() == np.argmax(x, 1).tolist()


def places(over, n):
  """n seeds and positions: one of them counts, or both together as those of rows that generate side
  by side.
  """
  numbers, same = np.arange(n), np.full(n, 3)
  seeds, positions = {
    'seeds': (numbers, same),
    'positions': (same, numbers),
    'rows': (numbers % 50, numbers // 50),
  }[over]
  return jnp.asarray(seeds, jnp.uint32), jnp.asarray(positions, jnp.int32)


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'temperature': 0.7, 'top_k': 5},
    {'temperature': 1.5, 'top_p': 0.8},
    {'top_k': 20, 'min_p': 0.1},
  ],
  ids=str,
)
@pytest.mark.parametrize('over', ['seeds', 'positions', 'rows'])
def test_draws_follow_the_law(options, over):
  n = 4000
  logits = np.random.default_rng(1).normal(0, 1.5, V).astype(np.float32)
  log_law = jitted_law(jnp.asarray(logits[None]), on_device(make_sampling(1, **options)))
  drawn = jitted_sample(jnp.broadcast_to(log_law, (n, V)), *places(over, n))
  counts, (p, _) = (
    np.bincount(drawn, minlength=V),
    law64(logits, np.zeros(V), np.zeros(V, bool), np.ones(V, bool), **options),
  )
  assert (counts[p == 0] == 0).all(), 'a token that is ruled out was drawn'
  assert scipy.stats.chisquare(counts[p > 0], n * p[p > 0]).pvalue > 1e-4


@jax.jit
def of_eight(seeds, positions, ids):
  """Which of eight equally likely ids of 20000 is drawn."""
  log_law = jnp.full(20000, -jnp.inf).at[ids].set(-jnp.log(8.0))

  def draw(place):
    return sample(log_law[None], place[0][None], place[1][None])[0]

  return jnp.argmax(jax.lax.map(draw, (seeds, positions))[:, None] == ids[None], -1)


@pytest.mark.slow
@pytest.mark.parametrize(
  'over', ['seeds', 'positions', pytest.param('rows', marks=pytest.mark.slow)]
)
def test_few_ids_of_many_are_drawn_alike_and_each_anew(over):
  ids = np.sort(np.random.default_rng(4).choice(20000, 8, replace=False))
  drawn = np.asarray(of_eight(*places(over, 1600), jnp.asarray(ids)))
  assert scipy.stats.chisquare(np.bincount(drawn, minlength=8)).pvalue > 1e-4
  for lag in (1, 2, 3, 8, 50):
    assert scipy.stats.pearsonr(drawn[:-lag], drawn[lag:]).pvalue > 1e-4, f'draws {lag} apart'
    pairs = np.bincount(8 * drawn[:-lag] + drawn[lag:], minlength=64)
    assert scipy.stats.chisquare(pairs).pvalue > 1e-4, f'draws {lag} apart'


def test_streams_are_independent_and_uniform():
  n = 4000
  seeds, positions = places('rows', n)
  uniform = [np.asarray(noise(seeds, positions, stream)) for stream in Stream]
  law_ = jnp.full((n, 8), -jnp.log(8.0))
  drawn = [np.asarray(sample(law_, seeds, positions, stream)) for stream in Stream]
  for numbers in uniform:
    assert ((numbers >= 0) & (numbers < 1)).all() and scipy.stats.kstest(
      numbers, 'uniform'
    ).pvalue > 1e-4
  for one, other in itertools.permutations(Stream, 2):
    for a, b in (
      (uniform[one], uniform[other]),
      (drawn[one], drawn[other]),
      (uniform[one], drawn[other]),
    ):
      assert scipy.stats.pearsonr(a, b).pvalue > 1e-4, (one, other)
  assert noise(seeds, positions, Stream.ACCEPT, (3,)).shape == (n, 3)


def test_a_row_depends_on_itself_only():
  """Bitwise, among neighbours of any other options; alone, the same tokens."""
  logits, generated, prompt, allowed = make_rows(2, 5)
  rows = [
    {'temperature': 1.0, 'seed': 7},
    {'temperature': 0.8, 'top_k': 4, 'top_p': 0.9, 'seed': 8},
    {'temperature': 0.0, 'seed': 9},
    {'temperature': 2.0, 'top_p': 0.5, 'seed': 10},
    {
      'min_p': 0.2,
      'presence_penalty': 1.0,
      'frequency_penalty': 0.5,
      'repetition_penalty': 2.0,
      'seed': 11,
    },
  ]
  rows = [
    {name: value for name, value in {**NEUTRAL, **row}.items() if name != 'masked'} for row in rows
  ]
  positions = np.array([4, 9, 2, 7, 1], np.int32)

  def run(order, rows):
    sampling, inputs = (
      columns(rows),
      on_device([x[order] for x in (logits, generated, prompt, allowed)]),
    )
    found = jitted_law(inputs[0], sampling, History(*inputs[1:3]), inputs[3])
    return np.asarray(found), np.asarray(
      jitted_sample(found, sampling.seed, jnp.asarray(positions[order]))
    )

  together, drawn = run(np.arange(5), rows)
  for i, row in enumerate(rows):
    copies, _ = run(np.full(5, i), [row] * 5)
    np.testing.assert_array_equal(copies, np.broadcast_to(together[i], copies.shape))
    assert run(np.array([i]), [row])[1][0] == drawn[i]
  order = np.array([3, 0, 4, 2, 1])
  permuted, drawn_permuted = run(order, [rows[i] for i in order])
  np.testing.assert_array_equal(permuted, together[order])
  assert (drawn_permuted == drawn[order]).all()


def test_other_values_compile_nothing():
  fresh = jax.jit(lambda *inputs: sample(law(*inputs[:3]), inputs[1].seed, inputs[3]))
  logits, generated, prompt, _ = on_device(make_rows(0, ROWS))
  for position, options in enumerate(
    (
      {},
      {'temperature': 0},
      {'top_k': [1, 2, 3, 4]},
      {'top_p': 0.2, 'seed': [9, 2, 3, 1]},
      {'min_p': 0.5, 'presence_penalty': 1.0},
    )
  ):
    fresh(
      logits,
      on_device(make_sampling(ROWS, **options)),
      History(generated, prompt),
      jnp.full(ROWS, position, jnp.int32),
    )
  assert fresh._cache_size() == 1


def everything(logits, sampling, tokens, lengths, allowed, positions):
  history = History.of(tokens, lengths, V).add(tokens[:, 0], positions > 2)
  found = law(logits, sampling, history, allowed)
  drawn = sample(found, sampling.seed, positions)
  return (
    found,
    drawn,
    noise(sampling.seed, positions, Stream.ACCEPT, (2,)),
    history,
    bad(logits),
    logprobs(logits, drawn, 3),
  )


@pytest.mark.costly
@pytest.mark.parametrize(
  'axis_type', [jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto], ids=str
)
@pytest.mark.parametrize('sizes', [{'data': 8}, {'data': 2, 'fsdp': 2, 'tensor': 2}], ids=str)
def test_a_mesh_draws_the_same_and_sends_nothing(sizes, axis_type):
  logits, _, _, allowed = make_rows(6, 8)
  sampling = make_sampling(
    8,
    temperature=[0, 1, 1, 2, 1, 1, 0.5, 1],
    top_k=[0, 0, 3, 0, 0, 0, 5, 0],
    top_p=[1, 1, 1, 0.5, 1, 1, 0.8, 1],
    min_p=[0, 0, 0, 0, 0.1, 0, 0, 0],
    presence_penalty=0.5,
    repetition_penalty=1.5,
    logit_bias={3: 1.0},
    vocabulary=V,
  )
  rng = np.random.default_rng(0)
  inputs = (
    logits,
    sampling,
    rng.integers(0, V, (8, 6)).astype(np.int32),
    np.arange(8, dtype=np.int32) % 6 + 1,
    allowed,
    np.arange(8, dtype=np.int32),
  )
  expected = jax.jit(everything)(*on_device(inputs))
  mesh = make_mesh(MeshConfig(**sizes), axis_type=axis_type)
  with jax.set_mesh(mesh):

    def put(x):
      return jax.device_put(
        x, jax.NamedSharding(mesh, ax.spec('batch', *(None,) * (np.ndim(x) - 1)))
      )

    inputs = jax.tree.map(put, inputs)
    compiled = jax.jit(everything).lower(*inputs).compile()
    found = compiled(*inputs)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert a.dtype == jnp.float32 or (np.asarray(a) == np.asarray(b)).all()
  assert not re.search(
    'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter', compiled.as_text()
  )


def test_logprobs_are_the_models_own():
  logits = make_rows(8, 3)[0]
  ids = jnp.asarray([0, 3, 30], jnp.int32)
  chosen, which, likeliest = logprobs(jnp.asarray(logits), ids, 5)
  expected = scipy.special.log_softmax(logits.astype(np.float64), -1)
  np.testing.assert_allclose(chosen, expected[np.arange(3), ids], atol=1e-6)
  np.testing.assert_allclose(likeliest, -np.sort(-expected, -1)[:, :5], atol=1e-6)
  np.testing.assert_allclose(
    np.take_along_axis(expected, np.asarray(which), -1), likeliest, atol=1e-6
  )
  assert logprobs(jnp.asarray(logits), ids, 0)[1].shape == (3, 0)


@pytest.mark.parametrize(
  'options, words',
  [
    ({'temperature': -0.1}, r'temperature=-0.1 must be 0 \(greedy\) or positive'),
    ({'temperature': float('nan')}, 'temperature=nan must be'),
    ({'temperature': float('inf')}, 'temperature=inf must be'),
    ({'temperature': 1e39}, r'temperature=1e\+39 must be .* finite'),
    ({'temperature': 'hot'}, "temperature='hot' must be"),
    ({'temperature': [1.0, None]}, r'temperature=\[1.0, None\] must be'),
    ({'temperature': [1.0, -2.0]}, 'temperature=-2.0 must be'),
    (
      {'temperature': [1.0, 1.0, 1.0]},
      r'temperature has shape \(3,\) for 2 rows; give one value for all, or one for each',
    ),
    ({'top_k': -1}, 'top_k=-1 must be 0'),
    ({'top_k': 1.5}, 'top_k=1.5 must be .* whole'),
    ({'top_k': 2**31}, 'top_k=2147483648 must be .* below'),
    ({'top_k': float('inf')}, 'top_k=inf must be'),
    ({'top_p': 0.0}, 'top_p=0.0 must be above 0 and at most 1'),
    ({'top_p': 1.5}, 'top_p=1.5 must be'),
    ({'top_p': 1e-50}, 'top_p=1e-50 must be above 0'),
    ({'min_p': -0.5}, r'min_p=-0.5 must be in \[0, 1\]'),
    ({'min_p': [0.5, 2]}, 'min_p=2.0 must be'),
    ({'repetition_penalty': 0}, 'repetition_penalty=0 must be positive and finite; 1 is none'),
    ({'presence_penalty': float('nan')}, 'presence_penalty=nan must be finite; 0 is none'),
    ({'frequency_penalty': float('-inf')}, 'frequency_penalty=-inf must be finite'),
    ({'seed': -1}, r'seed=-1 must be in \[0, 2\*\*32\)'),
    ({'seed': 2**32}, 'seed=4294967296 must be'),
    ({'seed': 2**70}, 'seed=1180591620717411303424 must be'),
    ({'seed': [1]}, r'seed has shape \(1,\) for 2 rows'),
    (
      {'logit_bias': {3: 1.0}},
      r'logit_bias has the id 3; ids are whole numbers in \[0, vocabulary=0\)',
    ),
    (
      {'logit_bias': {3: 1.0}, 'vocabulary': 3},
      r'logit_bias has the id 3; ids are whole numbers in \[0, vocabulary=3\)',
    ),
    ({'logit_bias': [None, {-1: 1.0}], 'vocabulary': 3}, 'logit_bias has the id -1'),
    ({'logit_bias': {'1': 1.0}, 'vocabulary': 3}, "logit_bias has the id '1'"),
    (
      {'logit_bias': {1: float('nan')}, 'vocabulary': 3},
      'logit_bias=nan of id 1 must be finite, or -inf to forbid the token',
    ),
    ({'logit_bias': {1: float('inf')}, 'vocabulary': 3}, 'logit_bias=inf of id 1 must be'),
    ({'logit_bias': [{}]}, r'logit_bias has shape \(1,\) for 2 rows'),
    (
      {'logit_bias': {i: float('-inf') for i in range(3)}, 'vocabulary': 3},
      'logit_bias forbids all ids .* leave at least one',
    ),
  ],
)
def test_options_that_make_no_sense_raise(options, words):
  with pytest.raises(ValueError, match=words):
    make_sampling(2, **options)


def test_options_become_columns():
  assert make_sampling(3, seed=2**32 - 2).seed.tolist() == [2**32 - 2, 2**32 - 1, 0], (
    'rows have seeds of their own'
  )
  made = make_sampling(
    2,
    temperature=[1, 0.5],
    top_k=np.array([3, 4]),
    seed=[7, 7],
    logit_bias=[None, {1: 2.0}],
    vocabulary=3,
  )
  assert (
    made.temperature.tolist() == [1, 0.5]
    and made.top_k.tolist() == [3, 4]
    and made.seed.tolist() == [7, 7]
  )
  assert made.bias.added(jnp.zeros((2, 3))).tolist() == [[0, 0, 0], [0, 2, 0]]
  assert make_sampling(2, logit_bias=[None, {}]).bias.ids.shape == (2, 0), 'which costs nothing'
  assert [x.dtype for x in jax.tree.leaves(made)] == [
    np.float32,
    np.int32,
    *[np.float32] * 5,
    np.int32,
    np.float32,
    np.uint32,
  ]


@pytest.mark.parametrize('temperature', [1e-38, 1e-45, np.finfo(np.float32).tiny])
def test_no_temperature_is_too_small(temperature):
  """1e-38 is a float that hardware takes for 0, which 0 must not be divided by."""
  logits = jnp.asarray([[0.0, 3.0, -1.0, 2.0]], jnp.float32)
  for compute in (law, jax.jit(law)):
    log_law = compute(logits, make_sampling(1, temperature=temperature))
    np.testing.assert_array_equal(np.exp(log_law), [[0.0, 1.0, 0.0, 0.0]])
