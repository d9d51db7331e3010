"""Are a request's bytes the same alone, in any company, in any order of arrival, in any row? And
does an engine forget whoever has left, compile nothing on the way, and write what a Generator does?
"""

import contextlib
import dataclasses
import functools
import gc
import inspect
import textwrap
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tokenizers import ByteTokenizer
from decode import bulk, constrain, loop
from decode.bulk import complete, samples
from decode.engine import Engine, Request, Sizes
from decode.generating import generating, generating_model
from decode.generator import Generator
from decode.sampling import make_sampling, sample_seed
from kernels import cached
from model import cache, transformer
from model.config import LatentConfig, ModelConfig, MoEConfig
from model.execution import ExecutionConfig
from parallel.mesh import MeshConfig, make_mesh

V, IDS, B, C, CAPACITY = 260, 259, 6, 8, 48
TINY = dict(
  vocabulary=V,
  width=16,
  layers=2,
  heads=4,
  kv_heads=2,
  feed_forward=24,
  max_length=64,
  init_scale=1.0,
)
MODELS = {
  'llama': {},
  # Layers with rings of 16 slots, which turn, and one without.
  'windows': dict(window=8, global_every=2, attention_softcap=3.0),
  'experts': dict(moe=MoEConfig(experts=4, per_token=2, feed_forward=8)),
  'latent': dict(latent=LatentConfig(width=6, rope_width=4, value_width=3), kv_heads=4),
  'bytes': {},
  'seq2seq': dict(encoder_layers=2, position='relative', max_length=0),  # tests/decode/test_encoded
}
SIZES = Sizes(
  rows=B, capacity=CAPACITY, read_tokens=C, steps=5, bias=12, ends=4, states=70, classes=64
)


def one_device():
  return make_mesh(MeshConfig(), jax.devices()[:1])


@functools.cache
def model_of(name, dtype='float32', seed=0, mesh=None):
  """In the form in which it generates."""
  config = ModelConfig(**TINY | MODELS[name], execution=ExecutionConfig(dtype=dtype))
  with jax.set_mesh(mesh or one_device()):
    model = jax.jit(transformer.init, static_argnums=(0, 1))(generating(config), seed)
    # Scores that are far from alike.
    model = jax.tree.map(lambda x: x * 3 if x.ndim == 2 else x, model)
    weights = 'int8' if name == 'bytes' else ''
    return jax.jit(generating_model, static_argnames='weights')(model, weights=weights)


@functools.cache
def engine_of(name, dtype='float32', mesh=None, **sizes):
  model = model_of(name, dtype, mesh=mesh)
  if name == 'bytes':
    sizes['cache_dtype'] = 'int8'
  if name == 'seq2seq':
    sizes['source'] = CAPACITY
  sizes = dataclasses.replace(SIZES, **sizes)
  engine = Engine(model.config, mesh or one_device(), sizes, vocabulary=IDS)
  engine.compile(model)
  return engine


def prompt(n):
  return np.random.default_rng(n).integers(3, IDS, n).tolist()


def request(length, new=12, ends=(), **options):
  sampling = make_sampling(1, vocabulary=IDS, **options)
  return Request(prompt(length), new, sampling, ends)


# Of one token and several parts, of all options; one that its prompt nearly fills.
REQUESTS = [
  request(5, temperature=0.0),
  request(21, seed=7),
  request(1, temperature=0.7, top_k=9, top_p=0.9, seed=8),
  request(8, temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.2),
  request(9, logit_bias={3: 5.0, 40: -np.inf, 41: 2.5}, min_p=0.01, seed=1),
  request(47, new=1, seed=3),
  request(16, new=20, ends=[65, 66, *range(100, 102)], seed=4),
  request(30, new=18, temperature=1.5, seed=5),
]


def poison(engine):
  """Slots that no one has written, and whatever else a free row has, hold garbage."""

  def garbage(x):
    fill = np.nan if jnp.issubdtype(x.dtype, jnp.floating) else 77
    return jax.device_put(np.full(x.shape, fill, x.dtype), x.sharding)

  state, cache_ = engine.state, engine.state.cache
  held, memory = jax.tree.map(garbage, (cache_.held, cache_.memory))
  engine.state = dataclasses.replace(
    state,
    cache=dataclasses.replace(cache_, held=held, memory=memory),
    logits=garbage(state.logits),
    history=jax.tree.map(
      lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding), state.history
    ),
  )


def bits(written):
  assert not written.broken
  assert np.isfinite(written.raw).all() and len(written.raw) == len(written.ids)
  return written.ids, written.raw, written.processed, written.ended


def alone(engine, model, request, row):
  """What a row writes in an engine where no one else ever was."""
  engine.reset()
  poison(engine)
  engine.join(row, request)
  while engine.reading:
    engine.read(model)
  written = bulk.Written()
  to_its_end(engine, model, request, row, written)
  engine.release([row])
  return bits(written)


def to_its_end(engine, model, request, row, written):
  for _ in range(CAPACITY // SIZES.steps + 1):
    if written.add(jax.tree.map(np.asarray, engine.decode(model)), row, request):
      return
  raise AssertionError(f'row {row} does not end')


def together(engine, model, requests):
  return {index: bits(written) for index, written in complete(engine, model, requests)}


def check_company(engine, model, requests=REQUESTS):
  """Bit for bit the same alone, among others in every order, in any row, after others."""
  expected = [alone(engine, model, asked, 0) for asked in requests]
  assert len({tuple(ids) for ids, *_ in expected}) == len(requests)
  for index in (1, 4):
    assert alone(engine, model, requests[index], 5) == expected[index], 'in another row'

  orders = [range(8), range(7, -1, -1), (3, 3, 6, 1, 1, 0, 2, 7, 5, 4, 6)]
  engine.reset()
  poison(engine)
  for order in orders:  # each after all that the one before has left behind
    found = together(engine, model, [requests[i] for i in order])
    assert [found[n] for n in range(len(found))] == [expected[i] for i in order]


FAST = [('llama', 'float32'), ('windows', 'bfloat16')]
REST = [('bytes', 'bfloat16'), ('experts', 'float32'), ('latent', 'bfloat16')]


@pytest.mark.costly
@pytest.mark.parametrize('name, dtype', FAST + REST)
def test_a_requests_bytes_do_not_depend_on_company(name, dtype):
  check_company(engine_of(name, dtype), model_of(name, dtype))


@pytest.mark.parametrize(
  'name', ['llama', *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[1:4])]
)
def test_greedy_is_the_argmax_of_the_full_forward(name):
  check_argmax(engine_of(name), model_of(name))


def check_argmax(engine, model):
  """By the pass that trains, token by token."""

  @jax.jit
  def full(model, tokens):
    return model.logits(model(tokens).hidden)[..., :IDS]

  asked = [request(n, new=10, temperature=0.0) for n in (1, 7, 8, 17, 30, 2, 25)]
  for index, (ids, raw, *_) in together(engine, model, asked).items():
    tokens = np.zeros((1, CAPACITY), np.int32)
    text = [*asked[index].prompt, *ids]
    tokens[0, : len(text)] = text
    with jax.set_mesh(one_device()):
      law = np.asarray(jax.nn.log_softmax(full(model, tokens)[0]))
    law = law[len(text) - len(ids) - 1 : len(text) - 1]
    assert len(set(ids)) > 2 and ids == law.argmax(1).tolist()
    np.testing.assert_allclose(raw, law.max(1), atol=1e-4)


@pytest.mark.slow
def test_it_writes_what_a_generator_writes():
  tokenizer = ByteTokenizer()
  model = model_of('llama')
  generator = Generator(model, tokenizer, one_device())
  constraint = constrain.Constraint(tokenizer, regex='[ab]{3,40}c')
  options = [
    dict(temperature=0.0),
    dict(seed=3, top_p=0.9, top_k=50),
    dict(seed=4, logit_bias={70: 4.0, 71: -np.inf}, repetition_penalty=1.3),
    dict(seed=5, stop=[5, 80, 90]),
    dict(seed=6, constraint=constraint),
    dict(seed=9, temperature=0.6, min_p=0.05, constraint=constraint),
  ]
  requests, expected = [], []
  for n, given in enumerate(options):
    law = {name: x for name, x in given.items() if name not in ('stop', 'constraint')}
    requests.append(
      Request(
        prompt(4 + 5 * n),
        14,
        make_sampling(1, vocabulary=tokenizer.vocabulary, **law),
        [tokenizer.eos, *given.get('stop', ())],
        given.get('constraint'),
      )
    )
    (completion,) = generator([prompt(4 + 5 * n)], max_new_tokens=14, **given)
    expected.append(completion)
  engine = engine_of('llama')
  engine.reset()
  found = dict(complete(engine, model, requests))
  for index, completion in enumerate(expected):
    assert found[index].ids == completion.ids, options[index]
    np.testing.assert_allclose(found[index].raw, completion.logprobs, atol=1e-4)
    np.testing.assert_allclose(found[index].processed, completion.processed, atol=1e-4)
    assert found[index].ended == (completion.finish == 'stop')


@contextlib.contextmanager
def compilations():
  """Names of programs that are compiled meanwhile."""
  names = []

  def listen(event, seconds, **about):
    if event == '/jax/core/compile/backend_compile_duration':
      names.append(about.get('fun_name'))

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_is_compiled_after_the_start():
  engine, other = engine_of('llama', alternatives=3), model_of('llama', seed=1)
  model = model_of('llama')
  constraint = constrain.Constraint(ByteTokenizer(), regex='[ab]{3,9}')
  asked = [*REQUESTS, dataclasses.replace(REQUESTS[0], constraint=constraint)]
  engine.reset()
  with compilations() as names:
    first = together(engine, model, asked)
    engine.reset()
    second = together(engine, other, asked)
    engine.join(0, asked[1])
    while engine.reading:
      engine.read(other)
    engine.decode(other, 2, alternatives=True)
    engine.release([0])
  assert not names
  assert first != second, 'other weights write something else'
  with compilations() as names:
    jax.jit(lambda x: x + 1.5)(1.0)
  assert names, 'and this counts what is compiled'


def test_an_engine_at_rest_keeps_neither_weights_nor_caches():
  """And is as it was once it begins again, without compiling anything."""
  engine = engine_of('llama', alternatives=3)
  weights = jax.tree.map(jnp.copy, model_of('llama'))
  engine.reset()
  expected = together(engine, weights, REQUESTS)
  alive = [weakref.ref(x) for x in jax.tree.leaves((weights, engine.state.cache))]
  assert all(x() is not None for x in alive)
  del weights
  engine.rest()
  gc.collect()
  assert not [x for x in alive if x() is not None]
  with compilations() as names:
    engine.reset()
    assert together(engine, model_of('llama'), REQUESTS) == expected
  assert not names


def test_other_shapes_raise():
  engine = engine_of('llama')
  engine.reset()
  engine.join(0, REQUESTS[0])
  with pytest.raises(TypeError):
    engine.read(model_of('bytes'))
  engine.reset()


def test_alternatives_change_no_bit():
  engine, model = engine_of('llama', alternatives=3), model_of('llama')
  engine.reset()
  expected = alone(engine, model, REQUESTS[1], 2)
  engine.join(2, REQUESTS[1])
  while engine.reading:
    engine.read(model)
  written = bulk.Written()
  over = False
  for _ in range(CAPACITY):
    if over:
      break
    chunk = jax.tree.map(np.asarray, engine.decode(model, 3, alternatives=True))
    over = written.add(chunk, 2, REQUESTS[1])
    assert chunk.alternatives.shape == (B, SIZES.steps, 3)
  engine.release([2])
  assert bits(written) == expected, 'nor do chunks of another size'


def check_between_chunks(engine, model):
  """A prompt that is read part by part, while others write."""
  expected = alone(engine, model, REQUESTS[1], 4)
  engine.join(0, REQUESTS[0])
  engine.read(model)
  engine.join(4, REQUESTS[1])
  written = bulk.Written()
  while engine.reading:
    engine.read(model, [4])
    chunk = jax.tree.map(np.asarray, engine.decode(model, 1))
    written.add(chunk, 4, REQUESTS[1])
    assert len(written.ids) == (not engine.reading)
  to_its_end(engine, model, REQUESTS[1], 4, written)
  engine.release([0, 4])
  assert bits(written) == expected


def test_prompts_are_read_while_others_write():
  check_between_chunks(engine_of('llama'), model_of('llama'))


def test_samples_are_requests_of_their_own():
  engine, model = engine_of('llama'), model_of('llama')
  engine.reset()
  many = samples(REQUESTS[1], 9)
  found = together(engine, model, many)
  assert found[0] == alone(engine, model, REQUESTS[1], 3)
  assert found[8] == alone(engine, model, many[8], 4)
  assert len({tuple(ids) for ids, *_ in found.values()}) == 9
  seeds = [sample_seed(seed, i) for seed in range(50) for i in range(20)]
  assert len(set(seeds)) == 1000 and max(seeds) < 2**32 and sample_seed(5, 0) == 5


@contextlib.contextmanager
def counted_reads(engine):
  """Calls of the program that reads, meanwhile."""
  run, calls = engine._run, []

  def counting(name, *arguments):
    calls.extend([name] * name.startswith('read'))
    return run(name, *arguments)

  engine._run = counting
  try:
    yield calls
  finally:
    del engine._run


PARTS = -(-len(REQUESTS[1].prompt) // C)  # in which a prompt is read


def check_samples(engine, model, request=REQUESTS[1], parts=PARTS):
  """Rows that join with one prompt read it once on each part of the mesh, all parts at a time, and
  write bit for bit what each would have written alone. parts: calls that read it.
  """
  poison(engine)
  many = samples(request, B)
  with counted_reads(engine) as calls:
    found = together(engine, model, many)
  assert len(calls) == parts
  for row in (0, 1, B - 1):
    assert found[row] == alone(engine, model, many[row], row)
  assert len({tuple(ids) for ids, *_ in found.values()}) == B


@pytest.mark.parametrize(
  'name, dtype',
  [FAST[0], *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (FAST[1], REST[0]))],
)
def test_samples_share_the_reading_of_their_prompt(name, dtype):
  engine = engine_of(name, dtype)
  engine.reset()
  check_samples(engine, model_of(name, dtype))


@pytest.mark.parametrize('leaves', [False, True])
def test_a_prompt_that_is_half_read_is_shared_and_its_reader_may_leave(leaves):
  """Then the next one reads it from its beginning, for those that are left."""
  engine, model = engine_of('llama'), model_of('llama')
  many = samples(REQUESTS[1], 3)
  expected = [alone(engine, model, asked, row) for row, asked in enumerate(many)]
  engine.reset()
  poison(engine)
  engine.join(0, many[0])
  assert engine.read(model) == []
  for row in (1, 2):
    engine.join(row, many[row])
  assert engine.reading == [0]
  if leaves:
    engine.release([0])
    assert engine.reading == [1]
  rows = [1, 2] if leaves else [0, 1, 2]
  with counted_reads(engine) as calls:
    ended = [row for _ in range(PARTS - (not leaves)) for row in engine.read(model)]
  assert sorted(ended) == rows and not engine.reading
  assert len(calls) == PARTS - (not leaves)

  texts = {row: bulk.Written() for row in rows}
  while len(texts) > len(over := [r for r in texts if len(texts[r].ids) == 12]):
    chunk = jax.tree.map(np.asarray, engine.decode(model, 3))
    for row in texts.keys() - {*over}:
      texts[row].add(chunk, row, many[row])
  engine.release(rows)
  assert {row: bits(written) for row, written in texts.items()} == {r: expected[r] for r in rows}


def check_options(engine, model):
  """What a request asks for holds for it, and for no one after it in its row."""
  engine.reset()
  plain = alone(engine, model, REQUESTS[1], 0)
  for n in (50, 60):
    biased = [request(4, new=4, logit_bias={n + row: 1e4}) for row in range(B)]
    for row, (ids, *_) in together(engine, model, biased).items():
      assert ids == [n + row] * 4
    assert together(engine, model, [REQUESTS[1]] * B) == dict.fromkeys(range(B), plain)


def test_options_are_of_one_request():
  check_options(engine_of('llama'), model_of('llama'))


def test_rows_are_conserved_and_released_ones_cost_nothing():
  check_conservation(engine_of('llama'), model_of('llama'))


def check_conservation(engine, model):
  engine.reset()
  random = np.random.default_rng(0)
  busy = set()
  for _ in range(60):
    choice = random.integers(4)
    if choice == 0 and engine.free:
      row = int(random.choice(engine.free))
      engine.join(row, REQUESTS[random.integers(len(REQUESTS))])
      busy.add(row)
    elif choice == 1 and engine.reading:
      engine.read(model)
    elif choice == 2:
      engine.decode(model, int(random.integers(1, 6)))
    elif busy:
      row = int(random.choice(sorted(busy)))
      engine.release([row])
      busy.remove(row)
    assert sorted([*engine.free, *busy]) == list(range(B)) and set(engine.reading) <= busy
    lengths = np.asarray(engine.state.cache.lengths)
    done, sampling = np.asarray(engine.state.done), engine.rules.sampling
    for row in engine.free:
      assert lengths[row] == 0 and done[row]
      assert np.asarray(sampling.temperature)[row] == 0
      assert (np.asarray(sampling.bias.ids)[row] == -1).all()
  engine.release(busy)
  assert engine.free == list(range(B)) and not np.asarray(engine.state.cache.lengths).any()


def test_whoever_stops_to_listen_frees_the_rows():
  engine, model = engine_of('llama'), model_of('llama')
  engine.reset()
  written = complete(engine, model, iter(REQUESTS))
  next(written)
  assert len(engine.free) < B
  written.close()
  assert len(engine.free) == B


def test_requests_join_when_as_many_as_are_read_together_can(monkeypatch):
  """Who joins alone makes a call that costs as much as one for several."""
  rows, enough = 8, 2
  engine, model = engine_of('llama', rows=rows, read_rows=enough), model_of('llama')
  engine.reset()
  reads, read = [], engine.read
  monkeypatch.setattr(engine, 'read', lambda weights: reads.append(engine.reading) or read(weights))

  # They end one after another, a chunk apart. All have one prompt, and all that come late another.
  asked = [request(4, new=SIZES.steps * (1 + i), seed=i) for i in range(rows)]
  late = [request(5, new=2, seed=40 + i) for i in range(2 * enough)]
  assert len([*complete(engine, model, [*asked, *late])]) == len(asked + late)
  assert len(reads) == 1 + len(late) // enough, reads


def test_constraints_come_and_go():
  tokenizer = ByteTokenizer()
  each = [constrain.Constraint(tokenizer, regex=f'[{x}]{{2,8}}') for x in 'abcd']
  tables = constrain.Tables(V, 28, 12)
  assert tables.add(None) == constrain.FREE and (tables.automaton.next[0, 0] == 0).all()
  first, second = tables.add(each[0]), tables.add(each[1])
  assert tables.add(each[0]) == first != second
  with pytest.raises(ValueError, match='finds no room among 28'):
    [tables.add(constrain.Constraint(tokenizer, regex=f'x{{{n}}}')) for n in (9, 11)]
  tables.remove(each[0])
  kept = tables.automaton
  tables.remove(each[0])
  # Who asks the same finds it, and nobody waits for new tables; until others need its room.
  assert tables.add(each[0]) == first and tables.automaton is kept
  tables.remove(each[0])
  assert tables.add(each[2]) not in (first, second)
  assert tables.add(each[3]) == first and kept.next is not tables.automaton.next
  alone, (begin,) = constrain.Automaton.of([each[1]], V)
  np.testing.assert_array_equal(
    tables.automaton.next[second][tables.automaton.classes] >= 0,
    alone.next[begin][alone.classes] >= 0,
  )
  with pytest.raises(ValueError, match='classes of tokens apart together, of at most 1'):
    constrain.Tables(V, 28, 1).add(each[0])


def test_constraints_that_no_row_has_are_few(monkeypatch):
  """For each makes the next one's coming longer."""
  monkeypatch.setattr(constrain, 'IDLE', 2)
  tables = constrain.Tables(V, 1000, 64)
  each = [constrain.Constraint(ByteTokenizer(), regex=x) for x in 'abcd']
  for one in each:
    tables.add(one)
  for one in each:
    tables.remove(one)
  kept = tables.automaton
  tables.add(each[2])
  tables.add(each[3])
  assert tables.automaton is kept
  tables.add(each[0])
  assert tables.automaton is not kept


def test_a_released_row_gives_the_room_of_its_constraint_back():
  """Of seventy states a constraint takes nine: twenty that come one after another find room."""
  engine = engine_of('llama')
  for i in range(20):
    constraint = constrain.Constraint(ByteTokenizer(), regex=f'{chr(97 + i)}{{2,8}}')
    sampling = make_sampling(1, vocabulary=V)
    engine.join(0, Request([3, 4], 2, sampling, constraint=constraint))
    engine.release([0])
  assert 0 in engine.free


@pytest.mark.parametrize(
  'change, words',
  [
    (dict(prompt=[]), 'a prompt of 0 tokens'),
    (dict(prompt=[IDS]), r'a prompt has the id 259; ids are in \[0, 259\)'),
    (
      dict(prompt=[7] * 48),
      'a prompt of 48 tokens leaves no room for new ones in capacity=48 of a row; shorten',
    ),
    (dict(ends=range(5)), '5 ids end a row, of at most 4'),
    (dict(sampling=make_sampling(2)), r'its sampling is of \(2,\)'),
    (
      dict(sampling=make_sampling(1, vocabulary=V, logit_bias={i: 1 for i in range(13)})),
      'logit_bias has 13 ids; at most 12',
    ),
  ],
)
def test_requests_that_do_not_fit_raise_and_take_no_row(change, words):
  engine = engine_of('llama')
  engine.reset()
  with pytest.raises(ValueError, match=words):
    engine.join(0, dataclasses.replace(REQUESTS[0], **change))
  assert len(engine.free) == B


def test_calls_that_make_no_sense_raise():
  engine, model = engine_of('llama'), model_of('llama')
  engine.reset()
  engine.join(1, REQUESTS[0])
  with pytest.raises(ValueError, match='row 1 is not free'):
    engine.join(1, REQUESTS[0])
  with pytest.raises(ValueError, match='row 9 is not free'):
    engine.join(9, REQUESTS[0])
  with pytest.raises(ValueError, match='row 2 has nothing to read'):
    engine.read(model, [2])
  with pytest.raises(ValueError, match='row 2 has no request'):
    engine.release([2])
  with pytest.raises(ValueError, match=r'count=6 of a chunk must be in \[1, 5\]'):
    engine.decode(model, 6)
  with pytest.raises(ValueError, match='gives no alternatives'):
    engine.decode(model, alternatives=True)
  engine.join(2, REQUESTS[1])
  with pytest.raises(ValueError, match=r'rows \[1, 2\] do not go together: 1 at a time'):
    engine.read(model, [1, 2])
  engine.reset()


@pytest.mark.parametrize(
  'config, mesh, sizes, error, words',
  [
    ({}, dict(data=2), dict(rows=3), ValueError, 'rows=3 do not split over the 2 parts'),
    ({}, dict(data=2), dict(read_rows=1), ValueError, 'read_rows=1 do not split'),
    ({}, dict(data=1, stage=2), {}, NotImplementedError, 'an engine over mesh.stage=2'),
    (
      dict(encoder_layers=1),
      {},
      {},
      ValueError,
      'source=0 of an engine for model.encoder_layers=1',
    ),
    ({}, {}, dict(source=8), ValueError, 'source=8 of an engine for model.encoder_layers=0'),
    (
      dict(encoder_layers=1),
      {},
      dict(source=80),
      ValueError,
      'source=80 of an engine passes model.max_length=64',
    ),
    (
      dict(moe=MoEConfig(experts=2, dispatch='capacity', feed_forward=8)),
      {},
      {},
      ValueError,
      "dispatch='capacity' drops tokens",
    ),
    ({}, {}, dict(capacity=80), ValueError, 'passes model.max_length=64'),
  ],
)
def test_what_has_no_engine_says_so(config, mesh, sizes, error, words):
  count = int(np.prod(list(mesh.values()) or [1]))
  mesh = make_mesh(MeshConfig(**mesh), jax.devices()[:count])
  with pytest.raises(error, match=words):
    Engine(ModelConfig(**TINY | config), mesh, dataclasses.replace(SIZES, **sizes))
  with pytest.raises(ValueError, match='steps=0 of an engine must be at least 1'):
    Sizes(steps=0)


def test_rows_of_a_cache_that_cannot_be_named_raise():
  model = model_of('llama')
  tokens = jnp.zeros((1, 4), jnp.int32)
  row = jnp.zeros(1, jnp.int32)
  with jax.set_mesh(one_device()):
    empty = cache.init_cache(model.config, 2, 16)
    with pytest.raises(NotImplementedError, match='rows or pages of a cache with fresh=True'):
      jax.eval_shape(lambda: model(tokens, cache=empty, rows=row, fresh=True))
    paged = cache.init_cache(model.config, 1, 16, pages=4, page=8)
    with pytest.raises(NotImplementedError, match='pages of a cache with fresh=True'):
      jax.eval_shape(lambda: model(tokens, cache=paged, fresh=True))


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, sizes',
  [
    ('llama', dict(data=2, tensor=2)),
    pytest.param('windows', dict(data=2, tensor=2), marks=pytest.mark.slow),
    pytest.param('experts', dict(data=2, tensor=2), marks=pytest.mark.slow),
    pytest.param('experts', dict(data=1, expert=2), marks=pytest.mark.slow),
    pytest.param('latent', dict(data=2, tensor=2), marks=pytest.mark.slow),
    pytest.param('llama', dict(data=2, context=2), marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_devices_that_share_an_engine_are_one(name, sizes):
  """The same tokens as on one device; the same bits whoever else is there."""
  expected = [alone(engine_of(name), model_of(name), asked, 0) for asked in REQUESTS]
  mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])
  engine, model = engine_of(name, mesh=mesh, read_rows=4), model_of(name, mesh=mesh)
  row, other = alone(engine, model, REQUESTS[1], 0), alone(engine, model, REQUESTS[1], 5)
  assert row == other, 'on another device'
  engine.reset()
  poison(engine)
  found = together(engine, model, REQUESTS)
  assert found[1] == row
  check_samples(engine, model)
  for index, (ids, raw, *_) in enumerate(expected):
    assert found[index][0] == ids
    np.testing.assert_allclose(found[index][1], raw, atol=1e-4)


# (where, whose text, what of it, what in its place, the law that notices)
FAULTS = {
  'rows ignored where tokens are written': (
    cache.Slots,
    '_scatter',
    'if which is None else which\n',
    'if which is None else jnp.arange(x.shape[0], dtype=jnp.int32)\n',
    check_company,
  ),
  'rows ignored where slots are looked at': (
    cached,
    '_local',
    "named = optional.get('named')",
    'named = jnp.arange(B) if held.keys.shape[1] > B else None',
    check_company,
  ),
  'positions of other rows': (
    cache.Cache,
    'lengths_of',
    'rows_of(self.lengths, rows)',
    'self.lengths[: rows.shape[0]]',
    check_company,
  ),
  'a released row keeps its length': (
    loop,
    'release',
    'jnp.where(leaving, 0, lengths)',
    'lengths',
    check_conservation,
  ),
  'a released row keeps its bias': (
    loop,
    'release',
    'jax.tree.map(cleared, sampling, idle)',
    'sampling',
    check_conservation,
  ),
  'the bias of the row before': (
    loop,
    'join',
    'with_rows(rules, rows, joining)',
    'dataclasses.replace(with_rows(rules, rows, joining), sampling=dataclasses.replace('
    'with_rows(rules.sampling, rows, joining.sampling), bias=rules.sampling.bias))',
    check_options,
  ),
  'the history of the row before': (
    loop,
    'join',
    'with_rows(state.history, rows, jax.tree.map(jnp.zeros_like, history))',
    'state.history',
    check_company,
  ),
  'a row is written on before its prompt ends': (
    loop,
    'read',
    '~ends | (cache',
    '(cache',
    check_between_chunks,
  ),
  'samples go on from the logits of another row': (
    loop,
    'share',
    'rows_of((state.logits, state.history.prompt), sources)',
    'rows_of((state.logits, state.history.prompt), rows)',
    check_samples,
  ),
  'keys of a prompt that is shared are left out': (
    loop,
    'copied',
    '.get(mode=',
    '.mul(0).at[*index, sources].get(mode=',
    check_samples,
  ),
  'logits of another row': (
    loop,
    'read',
    'with_rows(state.logits, rows, logits)',
    'with_rows(state.logits, rows * 0, logits)',
    check_company,
  ),
}
FIRST = [
  'rows ignored where tokens are written',
  'rows ignored where slots are looked at',
  'a released row keeps its length',
]


@pytest.fixture
def traced_anew():
  """Nothing that a fault is in, or is to be in, was traced before."""
  jax.clear_caches()
  yield
  jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize(
  'fault',
  [*FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in FAULTS if name not in FIRST)],
)
def test_planted_faults_are_noticed(fault, monkeypatch, traced_anew):
  *what, check = FAULTS[fault]
  plant(monkeypatch, *what)
  engine, model = engine_of.__wrapped__('llama'), model_of('llama')
  with pytest.raises((AssertionError, RuntimeError)):
    check(engine, model)


def plant(monkeypatch, owner, name, old, new):
  """A fault, in the text of a function of a module or class."""
  function = getattr(owner, name)
  text = textwrap.dedent(inspect.getsource(function))
  assert text.count(old) == 1, f'{old!r} is not what it says any more'
  names = dict(vars(inspect.getmodule(function)))
  exec(text.replace(old, new), names)
  monkeypatch.setattr(owner, name, names[name])
