"""Does a person get the same bytes, alone or among others, in any order of arrival, whether his
prompt was read before or not, and after a restart? And what a Generator writes?
"""

import contextlib
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.generator import Generator
from decode.options import Options
from decode.sampling import make_sampling
from decode.sizes import Request
from model.config import LatentConfig
from model.execution import ExecutionConfig
from serving import call as calls, jobs
from serving.call import Call, Limits
from serving.rows import EngineRows, sizes_for
from serving.running import Running
from tests.decode.small import config_of, generator_of

BLOCK = 8
SIZES = dict(
  rows=3, capacity=56, read_tokens=BLOCK, block=BLOCK, steps=4, bias=8, ends=6, states=80
)
SIZES |= dict(classes=64, alternatives=3, last_tokens=3)
MODELS = {
  'llama': {},
  'windows': dict(window=8, global_every=2, attention_softcap=3.0),
  'latent': dict(latent=LatentConfig(width=6, rope_width=4, value_width=3), kv_heads=4),
}
SYSTEM = 'You answer as briefly as can be. '  # four blocks, and a few tokens more


@functools.cache
def generator(name='llama', dtype='float32', **sizes):
  changes = {'heads': 4, 'vocabulary_multiple': 4} | MODELS[name]
  config = config_of(64, **changes, execution=ExecutionConfig(dtype=dtype))
  made = generator_of(config, **sizes)
  # Scores that are far from alike.
  made.model = jax.tree.map(lambda x: x * 3 if x.ndim == 2 else x, made.model)
  return made


@contextlib.contextmanager
def running(made: Generator, limits: Limits = Limits(), **sizes):
  served = Running(made, limits=limits, **SIZES | sizes)
  assert served.ready(), served.error
  try:
    yield served
  finally:
    served.close()
    assert served.state == calls.CLOSED, served.error


@pytest.fixture(scope='module')
def served():
  with running(generator(), scores=True) as it:
    yield it


def call(text, new=12, *, salt='', index=None, **options):
  regex, adapter = options.pop('regex', None), options.pop('adapter', '')
  options = Options(max_new_tokens=new, adapter=adapter, **options)
  return Call(prompt=text, options=options, regex=regex, salt=salt, sample_index=index)


def result(ticket):
  """Of each sample: all that its events say together, and how it ended."""
  said = {}
  for event in ticket:
    ids, text, raw, processed, likeliest, _ = said.get(event.sample, ((), '', (), (), (), ''))
    said[event.sample] = (
      ids + event.ids,
      text + event.text,
      raw + event.logprobs,
      processed + event.processed,
      likeliest + event.alternatives,
      event.error or (event.finish, event.stopped_by),
    )
  return said


ASKED = [
  call(SYSTEM + 'Why?', seed=3, logprobs=2),
  call(SYSTEM + 'When?', temperature=0.0, logprobs=0),
  call(SYSTEM + 'What', temperature=0.7, top_k=9, top_p=0.9, min_p=0.01, seed=8),
  call('a', 20, temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.5),
  call(SYSTEM, 14, seed=5, num_samples=4, presence_penalty=0.3),
  call('ab', regex='[ab]{3,9}c', seed=1, temperature=2.0),
  call(SYSTEM + 'stop', 16, stop=['e', 40], seed=11, logit_bias={104: 3.0, 9: -np.inf}),
]


def apart(asked, number):
  """The same, of which nobody has read anything."""
  return dataclasses.replace(asked, salt=f'{number}')


def check_company(served, asked=ASKED, leaving=call(SYSTEM + 'and this', 14)):
  """Bit for bit: alone and not read before, read before, and among others in every order, one of
  whom leaves.
  """
  expected = []
  for i, one in enumerate(asked):
    ticket = served.submit(apart(one, i))
    expected.append(result(ticket))
    assert ticket.usage.cached == 0
  assert all(finish[0] in calls.OF_TEXTS for said in expected for *_, finish in said.values())
  assert len({repr(said) for said in expected}) == len(asked)

  again = [result(served.submit(apart(one, i))) for i, one in enumerate(asked)]
  assert again == expected
  n = len(asked)
  for order in (range(n), range(n - 1, -1, -1), [*range(1, n, 2), *range(0, n, 2)]):
    tickets = [(i, served.submit(asked[i])) for i in order]
    gone = served.submit(leaving)
    found = {i: result(ticket) for i, ticket in tickets}
    gone.cancel()
    assert [found[i] for i in range(n)] == expected
    assert set(result(gone)[0][-1]) & {'cancelled', 'stop', 'length'}
  return expected


def test_bytes_are_the_same_in_any_company(served):
  check_company(served)
  ticket = served.submit(ASKED[0])
  assert result(ticket) and ticket.usage.cached == len(SYSTEM) // BLOCK * BLOCK


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, dtype, sizes',
  [
    ('llama', 'float32', dict(read_rows=2)),
    pytest.param('windows', 'bfloat16', {}, marks=pytest.mark.long),
    pytest.param('latent', 'bfloat16', {}, marks=pytest.mark.long),
    pytest.param('llama', 'bfloat16', dict(cache_dtype='int8'), marks=pytest.mark.long),
  ],
)
def test_bytes_are_the_same_of_every_cache_and_after_a_restart(name, dtype, sizes):
  with running(generator(name, dtype), **sizes) as first:
    expected = check_company(first)
  with running(generator(name, dtype), **sizes) as second:
    tickets = [second.submit(one) for one in ASKED]
    assert [result(ticket) for ticket in tickets] == expected


def check_written(served, one: Call, completions):
  """What is served of a call are these completions of a Generator's."""
  said = result(served.submit(one))
  for sample, completion in enumerate(completions):
    ids, text, raw, processed, _, (finish, stopped_by) = said[sample]
    assert (list(ids), text) == (completion.ids, completion.text)
    assert (finish, stopped_by) == (completion.finish, completion.stopped_by)
    np.testing.assert_allclose(raw, completion.logprobs, atol=1e-4)
    np.testing.assert_allclose(processed, completion.processed, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('every', [False, pytest.param(True, marks=pytest.mark.long)])
def test_it_writes_what_a_generator_writes(served, every):
  """The same ids and texts, of greedy and of drawn ones, in f32; log-probabilities by rounding."""
  from decode.constrain import Constraint

  for one in ASKED if every else (ASKED[1], ASKED[6]):
    options = {
      name: getattr(one.options, name)
      for name in ('max_new_tokens', 'seed', 'temperature', 'top_k', 'top_p', 'min_p', 'stop')
    }
    options |= {
      name: getattr(one.options, name)
      for name in ('num_samples', 'logit_bias', 'repetition_penalty', 'frequency_penalty')
    }
    options['presence_penalty'] = one.options.presence_penalty
    if one.regex:
      options['constraint'] = Constraint(served.tokenizer, regex=one.regex)
    check_written(served, one, generator()(one.prompt, **options))


def test_a_sample_can_be_asked_for_alone(served):
  asked = call(SYSTEM + 'many', num_samples=5, seed=9)
  every = result(served.submit(asked))
  assert len(every) == 5 and len({repr(said) for said in every.values()}) == 5
  ((index, said),) = result(
    served.submit(call(SYSTEM + 'many', num_samples=5, seed=9, index=3))
  ).items()
  assert index == 3 and said == every[3]
  assert result(served.submit(call(SYSTEM + 'many', seed=9)))[0] == every[0]


def test_what_was_read_before_is_said(served):
  first = served.submit(call(SYSTEM + 'one', salt='new'))
  result(first)
  second = served.submit(call(SYSTEM + 'two', salt='new'))
  result(second)
  assert first.usage.cached == 0
  assert second.usage.cached == (1 + len(SYSTEM)) // BLOCK * BLOCK


def test_nothing_is_compiled_once_it_is_ready(served):
  from tests.decode.test_engine import compilations

  assert served.progress[0] == served.progress[1] == served.stats().compiled
  with compilations() as names:
    tickets = [served.submit(dataclasses.replace(one, salt='x')) for one in ASKED * 2]
    scores = [served.score(call(SYSTEM), 2), served.score(call('a'), 0)]
    [result(ticket) for ticket in tickets]
    [each.result(60) for each in scores]
  assert not names


def test_prompts_are_scored_as_a_forward_pass_scores_them(served):
  """Of one token, of less than a call's, across several calls, up to all that a row holds; also
  where a call before has failed half-way.
  """
  prompts = [[5], [5, 9], SYSTEM + 'Why?', 'x' * 54]
  expected = generator().score(prompts)
  scorer = served._engine._scorer
  program, scorer._program = scorer._program, lambda *_: 1 / 0
  with pytest.raises(jobs.JobFailed, match='ZeroDivisionError'):
    served.score(call(SYSTEM), 0).result(60)
  scorer._program = program
  for prompt, logprobs in zip(prompts, expected, strict=True):
    scores = served.score(call(prompt), 3).result(60)
    np.testing.assert_allclose(scores.logprobs, logprobs, atol=1e-5)
    ids = served.encoded(prompt)[1:]
    for i, value, rank, likeliest in zip(
      ids, scores.logprobs, scores.ranks, scores.alternatives, strict=True
    ):
      values = [each for _, each in likeliest]
      assert len(values) == 3 and values == sorted(values, reverse=True)
      assert (rank <= 3) == (i in dict(likeliest))
      assert rank > 3 or likeliest[rank - 1] == (i, pytest.approx(value, abs=1e-6))
  with pytest.raises(ValueError, match='of at most 56'):
    served.score(call('x' * 56), 0)


def test_a_device_that_fails_ends_who_had_a_row_and_goes_on(served, monkeypatch):
  expected = [result(served.submit(one)) for one in ASKED[:4]]
  engine = served._engine._engine
  run, left = engine._run, [5]

  def failing(name, *arguments):
    left[0] -= 1
    if left[0] == 0:
      run(name, *arguments)  # whose buffers are gone
      raise RuntimeError('RESOURCE_EXHAUSTED')
    return run(name, *arguments)

  monkeypatch.setattr(engine, '_run', failing)
  tickets = [served.submit(one) for one in ASKED[:4]]
  said = [result(ticket) for ticket in tickets]
  lost = [each for each in said if isinstance(each[0][-1], calls.Failure)]
  assert lost and all(each[0][-1].kind == calls.DEVICE for each in lost)
  assert all(each == expected[i] for i, each in enumerate(said) if each not in lost)
  assert [result(served.submit(one)) for one in ASKED[:4]] == expected
  assert served.stats().free == 3


def test_scores_that_are_not_finite_end_their_row_alone(served, monkeypatch):
  expected = result(served.submit(ASKED[1]))
  engine = served._engine._engine
  decode, ruined = engine.decode, []

  def ruining(weights, *arguments):
    row = next((r for r, each in engine._requests.items() if each.salt == 'ruined'), None)
    if row is not None and not ruined and row not in engine.reading:
      state = engine.state
      rows = jnp.arange(3)[:, None] == row
      logits = np.where(rows, np.nan, np.asarray(state.logits)).astype(np.float32)
      engine.state = dataclasses.replace(
        state, logits=jax.device_put(logits, state.logits.sharding)
      )
      ruined.append(row)
    return decode(weights, *arguments)

  monkeypatch.setattr(engine, 'decode', ruining)
  tickets = [served.submit(call('broken', salt='ruined')), served.submit(ASKED[1])]
  broken, other = map(result, tickets)
  assert ruined and broken[0][-1].kind == calls.BROKEN and other == expected


def test_texts_keep_to_a_schema(served):
  schema = {'type': 'object', 'properties': {'a': {'type': 'boolean'}}, 'required': ['a']}
  options = Options(max_new_tokens=24, seed=2)
  tickets = [
    served.submit(Call(prompt='b', options=options, schema=each))
    for each in (schema, json.dumps(schema))
  ]
  said = [result(ticket)[0] for ticket in tickets]
  assert json.loads(said[0][1]).keys() == {'a'} and said[0] == said[1]
  with pytest.raises(ValueError, match='of at most 65536'):
    served.submit(Call(prompt='b', options=options, schema={'description': 'x' * 70000}))


def test_a_hostile_constraint_is_its_own_mistake(served):
  many = call('a', regex='[ab]{200}')
  other = result(served.submit(ASKED[5]))
  tickets = [served.submit(one) for one in (many, ASKED[5])]
  with pytest.raises(ValueError, match='regex has 70000 characters'):
    served.submit(call('a', regex='a' * 70000))
  said = [result(ticket) for ticket in tickets]
  assert said[0][0][-1].kind == calls.INVALID
  assert 'states' in said[0][0][-1].message and 'of at most 79' in said[0][0][-1].message
  assert said[1] == other


def test_it_can_be_drained_and_stopped_at_any_time():
  """Also while it compiles; what is there then ends, and nothing is taken any more."""
  served = Running(generator(), **SIZES)
  with pytest.raises(calls.NotReady, match='starting'):
    served.submit(ASKED[0])
  served.drain(10.0)
  assert served.closed(60) and served.state == calls.CLOSED and served.progress[0] < 8


@pytest.mark.slow
def test_draining_lets_texts_end():
  with running(generator()) as served:
    tickets = [served.submit(one) for one in ASKED]
    served.drain(60.0)
    with pytest.raises(calls.NotReady, match='draining|closed'):
      served.submit(ASKED[0])
    ends = [said[-1][0] for ticket in tickets for said in result(ticket).values()]
    assert set(ends) <= {'stop', 'length'} and served.closed(10)


@pytest.mark.slow
@pytest.mark.long
def test_every_row_has_the_adapter_that_it_asks_for(monkeypatch):
  """As of the generator; and nobody goes on from what another adapter has read."""
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / 'decode')
  from test_several_adapters import models_of

  made = models_of().together()
  with running(made, scores=True) as served:
    for name in ('', 'tables', 'lengths'):
      (expected,) = made.score(SYSTEM, adapter=name)
      scores = served.score(call(SYSTEM, adapter=name), 0).result(60)
      np.testing.assert_allclose(scores.logprobs, expected, atol=1e-4)
    assert served.adapters == ('orders', 'tables', 'lengths')
    names, texts = ['', *served.adapters], {}
    for order in (names, names[::-1]):
      tickets = {name: served.submit(call(SYSTEM, adapter=name, seed=3)) for name in order}
      for name, ticket in tickets.items():
        (said,) = result(ticket).values()
        assert texts.setdefault(name, said) == said
    assert len({text for _, text, *_ in texts.values()}) == 4
    for name, (ids, text, raw, *_) in texts.items():
      (completion,) = made(SYSTEM, adapter=name, seed=3, max_new_tokens=12)
      assert (list(ids), text) == (completion.ids, completion.text)
    with pytest.raises(ValueError, match="adapter='order' is unknown; did you mean 'orders'"):
      served.submit(call('a', adapter='order'))


@pytest.mark.slow
@pytest.mark.long
def test_a_short_last_part_keeps_nobody_waiting():
  """Of 9 tokens and of 16, 8 at a time: what is left of the first is read with the second's first
  part, in one step.
  """
  made = generator()
  rows = EngineRows(made, sizes_for(made, **SIZES))
  rows.begin(lambda done, total: None)
  for row, tokens in enumerate((9, 16)):
    sampling = make_sampling(1, vocabulary=made.vocabulary)
    rows.join(row, Request(range(3, 3 + tokens), 4, sampling))
  assert rows.read() == [] and rows.read() == [0]
  assert rows.read() == [1] and not rows.reading


@pytest.mark.parametrize('sizes', [dict(data=2, tensor=2), dict(data=1, context=2)], ids=str)
def test_devices_that_share_a_server_are_one(sizes):
  with running(generator()) as one:
    expected = [result(one.submit(each)) for each in ASKED]
  with running(generator(**sizes), rows=4, scores=True) as many:
    scores = many.score(call(SYSTEM), 2).result(60)
    np.testing.assert_allclose(scores.logprobs, generator().score(SYSTEM)[0], atol=1e-4)
    assert [
      {sample: said[:2] for sample, said in result(many.submit(each)).items()} for each in ASKED
    ] == [{sample: said[:2] for sample, said in each.items()} for each in expected]
    check_company(many)


@pytest.mark.slow
@pytest.mark.long
def test_many_calls_leave_nothing_behind():
  """Memory over the last quarter is what it was over the second."""
  # Calls of the device are what it costs: many rows share each.
  with running(generator(), rows=8, read_rows=4, read_tokens=16, block=16) as served:
    soak(served, 50)


def soak(served, hundreds: int):
  """So many hundreds of calls in each of four quarters, some of which are cancelled."""
  import resource

  draw, sizes = np.random.default_rng(0), []
  for _ in range(4):
    for _ in range(hundreds):
      tickets = [
        served.submit(call(SYSTEM[: draw.integers(1, 30)], int(draw.integers(1, 9)), seed=int(i)))
        for i in draw.integers(0, 1000, 100)
      ]
      for ticket in tickets:
        if draw.random() < 0.1:
          ticket.cancel()
        result(ticket)
    with open('/proc/self/statm') as file:
      sizes.append(int(file.read().split()[1]) * resource.getpagesize())
  after = served.stats()
  assert sizes[3] <= 1.01 * sizes[1], sizes
  assert after.free == after.rows and after.waiting == 0
  assert sum(after.finished.values()) == 400 * hundreds
