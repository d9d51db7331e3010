"""Do several samples of a prompt read it once, and write what each would have written alone?"""

import dataclasses

import jax
import numpy as np
import pytest

from decode import loop
from decode.constrain import Constraint
from decode.loaded import Shared
from decode.options import Options
from decode.sampling import make_sampling, sample_seed, sampling_of
from tests.decode.small import config_of, generator_of

MODEL = config_of(96, vocabulary=264)
PROMPTS = ['def main(', 'naïve, and longer than the other', 'x']
KINDS = {
  'plain': MODEL,
  'window': dataclasses.replace(MODEL, window=7, global_every=2),
  'encoder-decoder': dataclasses.replace(MODEL, encoder_layers=1, position='relative'),
}


@pytest.fixture(scope='module')
def generator():
  return generator_of(MODEL)


def assert_as_alone(generator, several, found, **options):
  """Each sample is what its prompt writes with its seed, as a row of a batch that reads it anew."""
  seeds = [completion.seed for completion in found]
  prompts = [completion.prompt for completion in found]
  apart = generator(prompts, seed=seeds, **options)
  for sample, row in zip(found, apart, strict=True):
    assert (sample.ids, sample.text, sample.finish) == (row.ids, row.text, row.finish)
    np.testing.assert_allclose(sample.logprobs, row.logprobs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sample.processed, row.processed, rtol=1e-4, atol=1e-5)
  # The first sample of each prompt is the request itself.
  assert seeds[::several] == [5 + i for i in range(len(seeds) // several)]
  assert len(set(map(tuple, (c.ids for c in found)))) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
  'options',
  [
    dict(),
    dict(chunk=3, stop=['e'], repetition_penalty=1.3, presence_penalty=0.4, top_k=40),
    dict(lookup=1),
    dict(early_exit=1, draft_tokens=2, cache_dtype='int8'),
  ],
  ids=str,
)
def test_samples_of_several_prompts_are_rows_alone(generator, options):
  options = dict(max_new_tokens=10) | options
  found = generator(PROMPTS, num_samples=3, seed=5, **options)
  assert_as_alone(generator, 3, found, **options)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('kind', ['window', 'encoder-decoder'])
def test_samples_of_other_models_are_rows_alone(kind):
  generator = generator_of(KINDS[kind])
  found = generator(PROMPTS, num_samples=3, seed=5, max_new_tokens=9)
  assert_as_alone(generator, 3, found, max_new_tokens=9)


@pytest.mark.slow
@pytest.mark.long
def test_samples_with_a_draft_and_with_constraints_are_rows_alone(generator):
  options = dict(max_new_tokens=8, draft=generator_of(MODEL, seed=1))
  assert_as_alone(generator, 3, generator(PROMPTS, num_samples=3, seed=5, **options), **options)
  digits = Constraint(generator.tokenizer, regex='[0-9]{2,6}')
  found = generator(
    PROMPTS, num_samples=3, seed=5, max_new_tokens=8, constraint=[digits, None, None]
  )
  each = [digits] * 3 + [None] * 6
  assert_as_alone(generator, 3, found, max_new_tokens=8, constraint=each)
  assert all(completion.text.isdigit() for completion in found[:3])


@pytest.mark.slow
def test_a_long_prompt_is_read_once_and_in_pieces(generator, monkeypatch):
  options = dict(max_new_tokens=8, num_samples=3, seed=5)
  prompts = ['abc' * 17, 'x']
  expected = generator(prompts, **options)
  monkeypatch.setattr('decode.loaded.AT_ONCE', 16)
  found = generator(prompts, **options)
  assert [c.ids for c in found] == [c.ids for c in expected]


def counted(monkeypatch):
  """Rows and real tokens of each call that reads prompts."""
  calls = []

  def counting(program, place):
    def run(*given, **how):
      calls.append((given[place].shape[0], int(np.asarray(given[place + 1]).sum())))
      return program(*given, **how)

    return run

  monkeypatch.setattr(loop, 'prefill', counting(loop.prefill, 1))
  monkeypatch.setattr(loop, 'append', counting(loop.append, 2))
  return calls


@pytest.mark.slow
@pytest.mark.parametrize('samples', [1, 8])
def test_a_prompt_is_read_once_however_many_samples_there_are(generator, monkeypatch, samples):
  calls = counted(monkeypatch)
  found = generator(PROMPTS, num_samples=samples, max_new_tokens=4)
  lengths = [len(generator.encoded(prompt)) for prompt in PROMPTS]
  assert calls == [(3, sum(lengths))]
  report = generator.report
  assert (report.rows, report.prompt_tokens) == (3 * samples, sum(lengths))
  # What a step reads of the cache is that of every row.
  weights = report.read_bytes - (samples * sum(lengths) + report.new_tokens / 2) * 2 * 2 * 16 * 4
  assert 0 < weights < sum(x.nbytes for x in jax.tree.leaves(generator.model))
  assert len(found) == 3 * samples


@pytest.mark.slow
def test_a_search_reads_its_prompt_once_and_says_so(generator, monkeypatch):
  calls = counted(monkeypatch)
  generator('abc', beams=4, num_samples=2, max_new_tokens=4)
  assert calls == [(1, 4)] and generator.report.prompt_tokens == 4


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
  'sizes',
  [
    {'data': 4},
    {'data': 2, 'tensor': 2, 'fsdp': 2},
    {'data': 2, 'context': 2},
  ],
  ids=str,
)
def test_on_a_mesh_each_part_reads_what_its_samples_need(generator, monkeypatch, sizes):
  several, parts = generator_of(MODEL, **sizes), sizes['data'] * sizes.get('fsdp', 1)
  expected = generator(PROMPTS, num_samples=3, seed=5, max_new_tokens=9)
  calls = counted(monkeypatch)
  found = several(PROMPTS, num_samples=3, seed=5, max_new_tokens=9)
  assert [c.ids for c in found] == [c.ids for c in expected]
  shared = Shared.of(3, 3, parts)
  assert calls[0][0] == len(shared.read) < 9
  several('abc', num_samples=8, max_new_tokens=2)
  assert calls[1] == (parts, 4 * parts), 'one row of each part, and no more'


@pytest.mark.parametrize('prompts', [1, 2, 5])
@pytest.mark.parametrize('samples', [1, 2, 3, 8])
@pytest.mark.parametrize('parts', [1, 2, 4])
def test_every_row_goes_on_from_its_own_prompt(prompts, samples, parts):
  shared = Shared.of(prompts, samples, parts)
  assert shared.used == prompts * samples
  read = shared.read.reshape(parts, -1)
  rows = np.arange(read.size) % read.shape[1] if shared.rows is None else shared.rows
  part = np.arange(len(rows)) // (len(rows) // parts)
  for row in range(shared.used):
    assert read[part[row], rows[row]] == row // samples
  for here in read:
    real = here[here >= 0]
    assert len(set(real)) == len(real), 'no part reads a prompt twice'


def test_neighbouring_seeds_share_no_text(generator):
  """Nor noise: all four of a seed are others than those of the next ones."""
  texts = [
    tuple(completion.ids)
    for seed in range(3, 9)
    for completion in generator('a', num_samples=4, seed=seed, max_new_tokens=12)
  ]
  assert len(set(texts)) == len(texts)


@pytest.mark.slow
def test_the_first_sample_is_the_request_and_the_others_can_be_asked_for(generator):
  four = generator('abc', num_samples=4, seed=9, max_new_tokens=8)
  assert [c.seed for c in four] == [sample_seed(9, i) for i in range(4)]
  assert four[0].seed == 9
  for completion in four:
    (alone,) = generator('abc', seed=completion.seed, max_new_tokens=8)
    assert alone.ids == completion.ids
  two = generator('abc', num_samples=2, seed=9, max_new_tokens=8)
  assert [c.ids for c in two] == [c.ids for c in four[:2]], 'however many samples there are'


def test_sampling_of_one_sample_is_that_of_the_requests():
  options = dict(temperature=[0.3, 0.0], logit_bias=[{3: 1.0}, None], top_k=4, seed=7)
  one = sampling_of(Options(**options), 2, 10)
  for a, b in zip(
    jax.tree.leaves(one), jax.tree.leaves(make_sampling(2, vocabulary=10, **options))
  ):
    np.testing.assert_array_equal(a, b)
  three = sampling_of(Options(**options | {'num_samples': 3}), 2, 10)
  np.testing.assert_array_equal(three.seed[::3], one.seed)
  np.testing.assert_array_equal(three.bias.ids[:3], np.repeat(one.bias.ids[:1], 3, 0))
  np.testing.assert_array_equal(three.temperature, np.repeat(one.temperature, 3))
