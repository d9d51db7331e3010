"""Does an encoder-decoder's engine give a request the same bytes alone and in any company? And what
its full forward, and a Generator, make of the same source?
"""

import dataclasses

import jax
import numpy as np
import pytest

from data.tokenizers import ByteTokenizer
from decode import loop
from decode.bulk import complete
from decode.generator import Generator
from decode.sizes import Request
from kernels import cached
from model import cache, moves
from parallel.mesh import MeshConfig, make_mesh
from tests.decode.test_engine import (
  CAPACITY,
  IDS,
  REQUESTS,
  B,
  alone,
  check_company,
  check_samples,
  engine_of,
  model_of,
  one_device,
  plant,
  request,
  together,
  traced_anew as traced_anew,  # a fixture
)

NAME = 'seq2seq'


def of_source(request: Request) -> Request:
  """The request whose prompt an encoder reads; what is written begins with id 0."""
  return dataclasses.replace(request, source=request.prompt, prompt=[0])


# Their sources are read as 32 tokens, or as 48.
SOURCES = [of_source(each) for each in REQUESTS]


def of_encoder(dtype='float32', mesh=None, read_rows=2):
  """An engine, and its model."""
  return engine_of(NAME, dtype, mesh=mesh, read_rows=read_rows), model_of(NAME, dtype, mesh=mesh)


def check(engine, model):
  check_company(engine, model, SOURCES)
  check_samples(engine, model, SOURCES[1], parts=1)


def check_greedy(engine, model):
  """By the pass that trains, of a source without padding."""
  full = jax.jit(lambda model, *args: model.logits(model(args[0], source=args[1]).hidden))
  asked = [of_source(request(n, new=10, temperature=0.0)) for n in (1, 7, 17, 32, 33, 48)]
  engine.reset()
  for index, (ids, raw, *_) in together(engine, model, asked).items():
    tokens, source = np.int32([[0, *ids[:-1]]]), np.int32([asked[index].source])
    with jax.set_mesh(one_device()):
      law = np.asarray(jax.nn.log_softmax(full(model, tokens, source)[0, :, :IDS]))
    assert len(set(ids)) > 2 and ids == law.argmax(1).tolist()
    np.testing.assert_allclose(raw, law.max(1), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_requests_bytes_do_not_depend_on_company(dtype):
  engine, model = of_encoder(dtype)
  assert [shape.source for shape in engine._reads.shapes] == [32, CAPACITY]
  check(engine, model)


def test_greedy_is_the_argmax_of_the_full_forward():
  check_greedy(*of_encoder())


@pytest.mark.slow
@pytest.mark.parametrize(
  'sizes', [dict(pages=24, block=8), dict(pages=6, host_pages=24, block=8), dict(lookup=2)], ids=str
)
def test_rows_in_pages_and_rows_that_draft_write_what_a_generator_writes(sizes):
  from serving.rows import ENGINES

  tokenizer, model = ByteTokenizer(), model_of(NAME)
  sizes = dict(draft_tokens=3) | sizes
  made = ENGINES[bool(sizes.get('lookup')), bool(sizes.get('pages'))]
  plain = of_encoder()[0].sizes
  sizes = dataclasses.replace(plain, **sizes)
  engine = made(model.config, one_device(), sizes, vocabulary=IDS)
  generator = Generator(model, tokenizer, one_device())
  asked = [
    dataclasses.replace(each, ends=[tokenizer.eos, *each.ends], prompt=[tokenizer.pad])
    for each in SOURCES
    if each.sampling.temperature == 0
  ]
  for index, written in complete(engine, model, asked * 3):
    source = asked[index % len(asked)]
    law = dict(temperature=0.0)
    if source.sampling.repetition_penalty != 1:
      law |= dict(repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.2)
    (expected,) = generator([source.source], max_new_tokens=source.max_new_tokens, **law)
    assert written.ids == expected.ids
    np.testing.assert_allclose(written.raw, expected.logprobs, atol=1e-4)
  assert engine.free == list(range(B))
  assert (engine.use().preempted > 0) == bool(sizes.host_pages)


@pytest.mark.slow
@pytest.mark.long
def test_devices_that_share_an_engine_are_one():
  expected = [alone(*of_encoder(), asked, 0) for asked in SOURCES]
  mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
  engine, model = of_encoder(mesh=mesh, read_rows=4)
  check_company(engine, model, SOURCES)
  engine.reset()
  check_samples(engine, model, SOURCES[1], parts=1)
  for index, (ids, raw, *_) in together(engine, model, SOURCES).items():
    assert expected[index][0] == ids
    np.testing.assert_allclose(raw, expected[index][1], atol=1e-4)


def test_what_does_not_go_together_or_does_not_fit_is_said():
  engine, model = of_encoder()
  engine.reset()
  short, long, other = (of_source(request(n)) for n in (32, 33, 5))
  for row, asked in enumerate((short, long, other)):
    engine.join(row, asked)
  with pytest.raises(ValueError, match=r'sources that are read as \[32, 48\] tokens do not go'):
    engine.read(model, [0, 1])
  assert engine.read(model) == [0, 2] and engine.read(model) == [1], 'by lengths'
  engine.reset()
  for change, words in (
    (dict(source=[]), 'a source of 0 tokens, in an engine for at most source=48'),
    (dict(source=[5] * 49), 'a source of 49 tokens, of at most 48 that the encoder reads'),
    (dict(source=[5, IDS]), f'a prompt has the id {IDS}'),
    (dict(prompt=[0] * 9), '9 tokens begin what a decoder writes'),
  ):
    with pytest.raises(ValueError, match=words):
      engine.join(0, dataclasses.replace(short, **change))
  with pytest.raises(ValueError, match='a source of 5 tokens, in an engine for at most source=0'):
    engine_of('llama').check(other)


# (where, whose text, what of it, what in its place)
FAULTS = {
  'the source of another row': (cache.Slots, 'recall', 'rows = self.rows', 'rows = None'),
  'a source is written over another': (cache, '_with_first', 'x.at[:, rows', 'x.at[:, rows * 0'),
  'lengths of other sources': (
    cache.Cache,
    'places',
    'sources if rows is None else rows_of(sources, rows)',
    'sources if rows is None else sources[: rows.shape[0]]',
  ),
  'samples go on without the source': (
    moves,
    '_each',
    'if cache.memory is None:',
    'if True:',
  ),
  'what is behind a source is looked at': (
    cached,
    'blocks',
    'used = (where >= 0) & (where < lengths[:, None, None])',
    'used = (where >= 0) & (where < lengths[:, None, None] + 1)',
  ),
  'padding of sources is read': (
    loop,
    'read',
    'model.read(state.cache, *source, rows)',
    'model.read(state.cache, source[0], source[1] * 0 + source[0].shape[1], rows)',
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize('fault', FAULTS)
def test_planted_faults_are_noticed(fault, monkeypatch, traced_anew):  # noqa: F811
  plant(monkeypatch, *FAULTS[fault])
  engine, model = engine_of.__wrapped__(NAME, read_rows=2), model_of(NAME)
  with pytest.raises((AssertionError, RuntimeError)):
    check(engine, model)
    check_greedy(engine, model)  # what is always the same may be wrong
