"""Does a server that drafts give everybody the same bytes, alone and in any company, and what a
Generator with the same drafts writes?
"""

import dataclasses
import pathlib

import pytest

from decode.constrain import Constraint
from serving.call import Call
from tests.serving.test_serving import (
  ASKED,
  SIZES,
  call,
  check_company,
  check_written,
  generator,
  running,
)

DRAFTS = dict(lookup=2, draft_tokens=3)
AGAIN = 'to be, or not to be, or not to be, '
# Texts in which a little model's greedy loops, and a law that is nearly one, find drafts.
REPEATING = [
  call(AGAIN, 20, temperature=0.0),
  call(AGAIN + 'or', 17, temperature=0.6, seed=4, top_k=3),
  call(AGAIN, 14, seed=2, num_samples=2, temperature=0.5, frequency_penalty=0.4),
  *(ASKED[i] for i in (3, 5, 6)),
]


@pytest.fixture(scope='module')
def drafting():
  with running(generator(), **DRAFTS, alternatives=0) as it:
    yield it


def options_of(one: Call) -> dict:
  """As a Generator takes them."""
  names = [field.name for field in dataclasses.fields(one.options)]
  given = {name: getattr(one.options, name) for name in names}
  given = {name: value for name, value in given.items() if name not in ('draft', 'early_exit')}
  given |= {'lookup': DRAFTS['lookup'], 'draft_tokens': DRAFTS['draft_tokens']}
  if one.regex:
    given['constraint'] = Constraint(generator().tokenizer, regex=one.regex)
  return given


@pytest.mark.slow
def test_bytes_are_the_same_in_any_company(drafting):
  check_company(drafting, REPEATING)
  stats = drafting.stats()
  assert stats.drafted > stats.accepted > 20


@pytest.mark.slow
def test_it_writes_what_a_generator_with_the_same_drafts_writes(drafting):
  for one in REPEATING:
    check_written(drafting, one, generator()(one.prompt, **options_of(one)))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
  'name, dtype, sizes',
  [('windows', 'bfloat16', {}), ('llama', 'bfloat16', dict(cache_dtype='int8'))],
)
def test_bytes_are_the_same_of_every_cache(name, dtype, sizes):
  with running(generator(name, dtype), **DRAFTS, **sizes) as it:
    check_company(it, [*ASKED[:3], *REPEATING])


def test_drafts_that_a_ring_has_no_room_for_are_refused():
  from serving.rows import sizes_for

  with pytest.raises(ValueError, match='draft_tokens=8 of an engine must be below read_tokens=8'):
    sizes_for(generator(), **SIZES | dict(lookup=2, draft_tokens=8))


@pytest.mark.slow
@pytest.mark.long
def test_every_row_drafts_with_its_adapter(monkeypatch):
  """What is kept of drafts is what the row's own adapter finds, whoever is beside it."""
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / 'decode')
  from test_several_adapters import models_of

  made = models_of().together()
  names = ['', 'orders', 'tables', 'lengths']
  asked = [call(AGAIN, 20, adapter=name, temperature=0.0) for name in names]
  asked += [call(AGAIN, 16, adapter=name, seed=3, temperature=0.6, top_k=3) for name in names]
  with running(made, **DRAFTS) as served:
    expected = check_company(served, asked)
    stats = served.stats()
    assert stats.drafted > stats.accepted > 0
    for one, said in zip(asked, expected, strict=True):
      (completion,) = made(one.prompt, **options_of(one))
      assert list(said[0][0]) == completion.ids, one.options.adapter
