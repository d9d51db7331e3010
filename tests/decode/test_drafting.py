"""Does a call that drafts write what it would without, say what is wrong with a draft,
and stop drafting where it loses?
"""

import dataclasses
import re
import types

import numpy as np
import pytest

from data.tokenizers import ByteTokenizer
from decode import drafting
from decode.constrain import Constraint
from decode.drafting import Course
from decode.generator import Generator
from decode.speculative import TRIAL
from tests.decode.small import config_of, generator_of

MODEL = config_of(128)
PROMPTS = ['def main(', '', 'aaaa']
DRAFTS = ('draft', 'lookup', 'early_exit')


@pytest.fixture(scope='module')
def generator():
  return generator_of(MODEL)


@pytest.fixture(scope='module')
def other(generator):
  return generator_of(dataclasses.replace(MODEL, layers=1, max_length=64), 4)


def options_of(kind, other):
  return {'draft': {'draft': other}, 'lookup': {'lookup': 1}, 'early_exit': {'early_exit': 1}}[kind]


def assert_same(found, expected):
  """Completions are the same but for drafts, and for rounding."""
  for one, two in zip(found, expected, strict=True):
    for name in ('logprobs', 'processed'):
      np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=1e-4, atol=1e-5)
    for a, b in zip(one.alternatives, two.alternatives, strict=True):
      assert [id_ for id_, _ in a] == [id_ for id_, _ in b]
      np.testing.assert_allclose([x for _, x in a], [x for _, x in b], rtol=1e-4, atol=1e-5)
    neutral = dict(logprobs=[], processed=[], alternatives=[], drafted=0, accepted=0)
    assert dataclasses.replace(one, **neutral) == dataclasses.replace(two, **neutral)


@pytest.fixture(scope='module')
def expected(generator):
  return generator(PROMPTS, max_new_tokens=30, temperature=0.0, logprobs=2)


@pytest.mark.slow
@pytest.mark.parametrize('kind', DRAFTS)
def test_greedy_completions_are_those_without_drafts(generator, other, expected, kind):
  found = generator(
    PROMPTS, max_new_tokens=30, temperature=0.0, logprobs=2, **options_of(kind, other)
  )
  assert_same(found, expected)
  report = generator.report
  assert (
    report.drafted == sum(c.drafted for c in found) > 0
    and report.accepted == sum(c.accepted for c in found) < report.drafted
  )
  assert np.isnan(report.share_of_bandwidth()) and report.new_tokens == sum(
    len(c.ids) for c in found
  )


@pytest.mark.slow
def test_a_model_that_drafts_for_itself_is_right(generator, expected):
  found = generator(
    PROMPTS,
    max_new_tokens=30,
    temperature=0.0,
    logprobs=2,
    draft=generator,
    draft_tokens=7,
    chunk=9,
  )
  assert_same(found, expected)
  assert all(c.accepted == c.drafted >= 20 or c.finish == 'stop' for c in found)


@pytest.mark.slow
@pytest.mark.long
def test_draws_are_scored_and_streamed_as_they_are(generator, other):
  """Log-probabilities are the model's by the training forward pass, and,
  where no option changes the law, those of the draws.
  """
  options = dict(max_new_tokens=24, seed=3, draft=other)
  found = generator(PROMPTS, **options)
  for completion in found:
    scores = generator.score([[*completion.prompt_ids, *completion.ids]])[0][-len(completion.ids) :]
    np.testing.assert_allclose(completion.logprobs, scores, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(completion.processed, completion.logprobs, rtol=1e-4, atol=1e-4)
  assert ''.join(generator.stream(PROMPTS[0], **options)) == found[0].text
  stop = next(c.text for c in found if len(c.text) > 6)[4:6]
  for one, whole in zip(generator(PROMPTS, stop=stop, **options), found):
    assert one.text == whole.text.split(stop)[0]


@pytest.mark.slow
def test_constraints_hold_at_every_drafted_position(generator):
  options = dict(
    max_new_tokens=24,
    constraint=Constraint(generator.tokenizer, regex='(ab|cd[0-9])*'),
    repetition_penalty=1.2,
  )
  assert_same(
    generator(PROMPTS, temperature=0.0, lookup=1, **options),
    generator(PROMPTS, temperature=0.0, **options),
  )
  for completion in generator(PROMPTS, seed=1, lookup=1, **options):
    assert (completion.drafted or len(completion.ids) < 3) and re.fullmatch(
      '(ab|cd[0-9])*(a|cd?)?', completion.text
    )


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('sizes', [dict(data=2, tensor=2), dict(stage=2)])
def test_meshes(sizes):
  whole = dataclasses.replace(MODEL, vocabulary=264)
  split = generator_of(whole, **sizes)
  plain = generator_of(whole)(PROMPTS, max_new_tokens=12, temperature=0.0)
  for options in (dict(lookup=1), dict(draft=split) if 'stage' in sizes else dict(early_exit=1)):
    assert_same(split(PROMPTS, max_new_tokens=12, temperature=0.0, **options), plain)
  if 'stage' in sizes:
    with pytest.raises(NotImplementedError, match='early_exit=1 on a mesh with stages'):
      split('a', max_new_tokens=4, early_exit=1)


def ticking(monkeypatch, with_drafts, without):
  """A clock that says that chunks took so long."""
  now, came = [0.0], Course.came

  def coming(self, rows):
    now[0] += (with_drafts if self._asked[0] else without) if self._asked else 1.0
    came(self, rows)

  monkeypatch.setattr(Course, 'came', coming)
  monkeypatch.setattr(drafting, 'time', types.SimpleNamespace(perf_counter=lambda: now[0]))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('kind', DRAFTS)
@pytest.mark.parametrize('faster', ['drafts', 'none'])
def test_the_clock_decides_and_changes_no_greedy_text(generator, other, monkeypatch, kind, faster):
  options = dict(max_new_tokens=50, temperature=0.0, chunk=5)
  plain = generator('def main(', **options)
  ticking(monkeypatch, 1.0, 50.0 if faster == 'drafts' else 0.01)
  assert_same(generator('def main(', **options, **options_of(kind, other)), plain)
  assert generator.report.fell_back == (faster == 'none')


@pytest.mark.slow
def test_a_call_of_one_chunk_is_judged_before_it_ends(generator, monkeypatch):
  ticking(monkeypatch, 1.0, 0.01)
  generator(
    'def main(',
    max_new_tokens=100,
    temperature=0.0,
    chunk=100,
    early_exit=1,
    logit_bias={generator.tokenizer.eos: -float('inf')},
  )
  assert generator.report.fell_back


@pytest.mark.slow
@pytest.mark.long
def test_rows_that_draw_stop_drafting_by_themselves(generator):
  # As many bytes as the model has: all drafts would have to be kept.
  costly = generator_of(MODEL, 9)
  found = generator(PROMPTS, max_new_tokens=60, draft=costly, chunk=5)
  assert generator.report.fell_back
  assert all(
    TRIAL <= c.drafted < TRIAL + 4 and len(c.ids) > 30 or c.finish == 'stop' for c in found
  )
  assert (
    generator(PROMPTS[1], max_new_tokens=60, draft=costly, seed=1, chunk=9)[0].ids == found[1].ids
  )


@pytest.mark.parametrize(
  'options, words',
  [
    (dict(lookup=1, early_exit=1), 'lookup and early_exit are given: one of them can draft'),
    (dict(lookup=-1), 'lookup=-1 must be at least 0'),
    (dict(lookup=1, draft_tokens=0), 'draft_tokens=0 must be at least 1'),
    (dict(lookup=1, draft_tokens=256), 'draft_tokens=256 must be below 256'),
    (dict(early_exit=2), 'early_exit=2 must be below model.layers=2'),
  ],
)
def test_bad_options_raise_at_once(generator, options, words):
  with pytest.raises(ValueError, match=words):
    generator.stream('a', max_new_tokens=4, **options)


@pytest.mark.slow
def test_a_draft_that_does_not_fit_raises(generator, other):
  with pytest.raises(
    ValueError,
    match='draft: it has model.max_length=64, and rows of 81 tokens are asked for; ask for fewer',
  ):
    generator('', max_new_tokens=80, draft=other)
  with pytest.raises(ValueError, match='draft: it has model.vocabulary=300, the model 259'):
    generator('', max_new_tokens=4, draft=generator_of(dataclasses.replace(MODEL, vocabulary=300)))
  stranger = Generator(other.model, ByteTokenizer(), other.mesh)
  stranger.tokenizer.eos = 65
  with pytest.raises(ValueError, match="draft: it has another tokenizer"):
    generator('', max_new_tokens=4, draft=stranger)
  with pytest.raises(ValueError, match='draft: its mesh is .* or other devices'):
    generator('', max_new_tokens=4, draft=generator_of(MODEL, data=2))
  with pytest.raises(NotImplementedError, match='lookup: nothing drafts for a session so far'):
    generator.session()('a', max_new_tokens=4, lookup=1)
