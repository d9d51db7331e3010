"""Is a prompt's last part, where it is short, read by a program of its own, which the prompt alone
has chosen? Then nothing depends on who else is read, nor on what others have read before.
"""

import dataclasses

import jax
import numpy as np
import pytest

from decode import reads
from decode.bulk import Written
from decode.paged import PagedEngine
from decode.reads import Reads, Shape
from tests.decode import test_engine, test_prefixes
from tests.decode.test_engine import (
  IDS,
  REQUESTS,
  alone,
  bits,
  check_company,
  check_samples,
  counted_reads,
  model_of,
  one_device,
  request,
)
from tests.decode.test_prefixes import LONG, C, asked, check_hits, missed

LAST = 5
SHAPES = dict(last_tokens=LAST, read_rows=2)


def names(*tokens):
  return [f'read {Shape(n)}' for n in tokens]


def test_it_is_the_prompt_that_says_which_program_reads():
  """Parts of C = 8 tokens, and of 5 at the end where no more are left."""
  engine, model = test_engine.engine_of('llama', **SHAPES), model_of('llama')
  for length, expected in {1: [5], 5: [5], 6: [8], 8: [8], 9: [8, 5], 21: [8, 8, 5]}.items():
    engine.reset()
    engine.join(0, request(length))
    with counted_reads(engine) as calls:
      while engine.reading:
        engine.read(model)
    assert calls == names(*expected), length


def test_a_requests_bytes_do_not_depend_on_company():
  engine, model = test_engine.engine_of('llama', **SHAPES), model_of('llama')
  check_company(engine, model)
  engine.reset()
  check_samples(engine, model)
  test_engine.check_argmax(engine, model)


@pytest.mark.slow
@pytest.mark.parametrize('name, dtype', [('windows', 'bfloat16'), ('bytes', 'bfloat16')])
def test_nor_do_those_of_other_models(name, dtype):
  check_company(test_engine.engine_of(name, dtype, **SHAPES), model_of(name, dtype))


@pytest.mark.slow
@pytest.mark.parametrize('name, dtype', [('llama', 'float32'), ('windows', 'bfloat16')])
def test_a_hit_is_a_miss(name, dtype):
  check_hits(test_prefixes.engine_of(name, dtype, **SHAPES), model_of(name, dtype))


@pytest.mark.parametrize('made', [None, pytest.param(PagedEngine, marks=pytest.mark.slow)])
def test_who_has_less_left_than_it_seemed_is_read_by_itself(made):
  """Two begin together, 21 tokens and 24 to read; of the former 16 are there, so that a last part
  is left: it goes by another program than the other's first part.
  """
  model = model_of('llama')
  if made is None:
    engine = test_prefixes.engine_of('llama', **SHAPES)
  else:
    sizes = dataclasses.replace(test_prefixes.SIZES, pages=21, host_pages=7, **SHAPES)
    engine = made(model.config, one_device(), sizes, vocabulary=IDS)
  both = [asked(LONG[:21]), asked(LONG[1:25])]
  expected = [missed(engine, model, each) for each in both]

  engine.reset()
  test_prefixes.run(engine, model, 0, asked(LONG[:17], new=1))
  for row, each in enumerate(both, 1):
    engine.join(row, each)
  with counted_reads(engine) as calls:
    while engine.reading:
      engine.read(model)
  assert calls == names(5, 8, 8, 8)
  assert [engine.cached(row) for row in (1, 2)] == [16, 0]
  chunks = [jax.tree.map(np.asarray, engine.decode(model)) for _ in range(2)]
  for row, each in enumerate(both, 1):
    written = Written()
    assert any([written.add(chunk, row, each) for chunk in chunks])
    assert bits(written) == expected[row - 1]


def test_what_does_not_go_together_or_does_not_fit_is_said():
  engine, model = test_engine.engine_of('llama', **SHAPES), model_of('llama')
  engine.reset()
  engine.join(0, request(5))
  engine.join(1, request(8))
  with pytest.raises(ValueError, match=r'parts that are read as \[5, 8\] tokens do not go'):
    engine.read(model, [0, 1])
  with pytest.raises(ValueError, match='row 3 has nothing to read'):
    engine.read(model, [3])
  with pytest.raises(ValueError, match='row 1 has nothing to read; these have, each once'):
    engine.read(model, [1, 1])
  assert engine.read(model) == [0] and engine.read(model) == [1]
  sizes = test_engine.SIZES
  with pytest.raises(ValueError, match='last_tokens=8 of an engine must be below read_tokens=8'):
    dataclasses.replace(sizes, last_tokens=C)
  with pytest.raises(ValueError, match='last_tokens=5 of an engine with a source of 48 tokens'):
    dataclasses.replace(sizes, last_tokens=LAST, source=48)
  small = dataclasses.replace(sizes, last_tokens=LAST).within(4)
  assert (small.read_tokens, small.last_tokens) == (4, 0)
  assert dataclasses.replace(sizes, last_tokens=LAST).within(7).last_tokens == LAST


def test_who_chose_by_company_would_be_seen(monkeypatch):
  """A last part that goes with whoever is read first, which is what sparing a call would be."""

  def first(self, shapes):
    return [*shapes]

  def largest(self, shapes):
    return max(shapes, default=self.shapes[0])

  engine, model = test_engine.engine_of('llama', **SHAPES), model_of('llama')
  expected = [alone(engine, model, REQUESTS[i], 0) for i in (0, 3)]
  monkeypatch.setattr(reads.Reads, 'alike', first)
  monkeypatch.setattr(reads.Reads, 'common', largest)
  engine.reset()
  together = test_engine.together(engine, model, [REQUESTS[i] for i in (0, 3)])
  assert expected[1] == together[1] and expected[0] != together[0]
  engine.reset()


def test_reads_of_no_one():
  of_decoder = Reads(test_engine.SIZES, 2, 0)
  assert of_decoder.common([]) == Shape(C) and of_decoder.sources({}, 0) is None
  assert of_decoder.alike({}) == []
