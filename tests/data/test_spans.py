"""Is noise in spans what T5's is: as long, laid out alike, any of the ways as likely, and the text
again when it is put together?
"""

import collections
import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from data.batch import SourceBatch
from data.chunks import ChunkTokens, uniform
from data.spans import Lengths, Spans, collapsed, places, segmented

EOS, START = 1, 0
SENTINELS = tuple(range(32_099, 31_999, -1))


def random_spans_helper(inputs_length, noise_density, mean_noise_span_length):
  """T5's, from t5/data/preprocessors.py, with a sentinel a span on either side."""

  def lengths(tokens_length):
    num_noise_tokens = int(round(tokens_length * noise_density))
    num_nonnoise_tokens = tokens_length - num_noise_tokens
    num_noise_spans = int(round(num_noise_tokens / mean_noise_span_length))
    return num_nonnoise_tokens + num_noise_spans + 1, num_noise_tokens + num_noise_spans + 1

  tokens_length = inputs_length
  while lengths(tokens_length + 1)[0] <= inputs_length:
    tokens_length += 1
  inputs_length, targets_length = lengths(tokens_length)
  if noise_density == 0.5 and targets_length > inputs_length:
    tokens_length -= 1
    targets_length -= 1
  return tokens_length, targets_length


def test_lengths_are_those_of_t5():
  lengths = Lengths.of_source(512, 0.15, 3.0)
  assert lengths == Lengths(text=568, source=512, target=114, noise=85, spans=28)
  # UL2's denoisers (arXiv:2205.05131, table 1) and odd ones.
  for density, mean in ((0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.5, 8.0), (0.5, 64.0), (0.3, 2.5)):
    for source in (*range(140, 160), 511, 512, 513, 1024, 4096):
      lengths = Lengths.of_source(source, density, mean)
      theirs = random_spans_helper(source, density, mean)
      # At 0.5 T5 takes one off a target that its text does not always have.
      assert (lengths.text, lengths.target) == theirs or density == 0.5
      assert lengths.text == theirs[0]
      assert lengths.source == source or density == 0.5


@given(
  source=st.integers(1, 3000),
  density=st.floats(0.01, 0.5),
  mean=st.floats(1, 50),
)
def test_lengths_add_up_or_are_refused(source, density, mean):
  try:
    lengths = Lengths.of_source(source, density, mean)
  except ValueError as error:
    assert f'data.sequence_length={source} has no span of noise' in str(error)
    return
  assert lengths.source == lengths.text - lengths.noise + lengths.spans + 1 <= source
  assert lengths.target == lengths.noise + lengths.spans + 1 <= lengths.source
  assert 1 <= lengths.spans <= lengths.noise <= lengths.text - lengths.noise
  assert lengths.source == source or density == 0.5
  assert lengths.noise == round(lengths.text * density)


def test_too_little_room_says_what_to_raise():
  with pytest.raises(ValueError, match='sequence_length=4 has no span .*0.15 .*3.0: raise one'):
    Lengths.of_source(4, 0.15, 3.0)


def spans(source=64, density=0.15, mean=3.0):
  return Spans(Lengths.of_source(source, density, mean), '', SENTINELS, EOS, START)


def example(noise, tokens, seed=0, index=0):
  """A row of a batch, as numpy arrays by name."""
  chunk = ChunkTokens(tokens, np.arange(len(tokens)), np.ones(len(tokens), np.int32))
  batch = noise.empty(2)
  noise.fill(chunk, functools.partial(uniform, 0, seed, index), batch, 1)
  assert not any(field[0].any() for field in vars(batch).values())
  return {name: field[1] for name, field in vars(batch).items()}


def restored(source, target):
  """The text of which these are the source and the target."""
  assert source[-1] == target[-1] == EOS
  pieces = collections.defaultdict(list)
  for token in target[:-1].tolist():
    if token in SENTINELS:
      sentinel = token
      assert sentinel not in pieces
      pieces[sentinel]
    else:
      pieces[sentinel].append(token)
  text = []
  for token in source[:-1].tolist():
    text += pieces.pop(token) if token in SENTINELS else [token]
  assert not pieces
  return text


@given(
  source=st.integers(40, 400),
  density=st.floats(0.15, 0.5),
  mean=st.floats(1, 6),
  index=st.integers(0, 2**63),
)
def test_a_source_and_its_target_are_the_text(source, density, mean, index):
  lengths = Lengths.of_source(source, density, mean)
  if lengths.spans > len(SENTINELS):
    return
  noise = Spans(lengths, '', SENTINELS, EOS, START)
  tokens = np.random.default_rng(index).integers(2, 32_000, noise.length, np.int32)
  row = example(noise, tokens, index=index)
  assert restored(row['source'], row['targets']) == tokens.tolist()
  assert len(row['source']) == lengths.source and len(row['targets']) == lengths.target
  hidden = np.isin(row['targets'], SENTINELS) | (row['targets'] == EOS)
  assert (~hidden).sum() == lengths.noise and hidden.sum() == lengths.spans + 1
  used = row['source'][np.isin(row['source'], SENTINELS)].tolist()
  assert used == [*SENTINELS[: lengths.spans]]


def test_the_layout_is_t5s():
  """From the top of the vocabulary down; a start before what the decoder reads, an eos behind."""
  text = np.arange(10, 19)
  hidden = np.array([0, 0, 1, 1, 0, 0, 1, 0, 0], bool)
  assert collapsed(text, hidden, SENTINELS).tolist() == [10, 11, 32099, 14, 15, 32098, 17, 18]
  assert collapsed(text, ~hidden, SENTINELS).tolist() == [32099, 12, 13, 32098, 16, 32097]
  row = example(noise := spans(), np.arange(100, 100 + spans().length, dtype=np.int32))
  assert row['tokens'][0] == START and row['tokens'][1:].tolist() == row['targets'][:-1].tolist()
  assert row['targets'][0] == 32099 and row['targets'][-1] == row['source'][-1] == EOS
  assert row['source'][0] == 100 and row['source'][-2] == 32099 - noise.lengths.spans + 1
  for name, length in (('', noise.lengths.target), ('source_', noise.lengths.source)):
    assert row[f'{name}positions'].tolist() == [*range(length)]
    assert (row[f'{name}segments'] == 1).all()
  assert (row['weights'] == 1).all()


def test_an_example_is_a_function_of_seed_and_place():
  tokens = np.arange(2, 2 + spans().length, dtype=np.int32)

  def drawn(seed, index):
    return example(spans(), tokens, seed, index)['source'].tolist()

  assert drawn(3, 5) == drawn(3, 5)
  different = [drawn(seed, index) for seed in (0, 3) for index in (0, 5, 2**40)]
  assert len(set(map(tuple, different))) == len(different)
  # On any machine and with any numpy.
  assert uniform(0, 3, 5, 2).tolist() == GOLDEN
  assert uniform(1, 3, 5, 2).tolist() != uniform(0, 3, 5, 2).tolist()


GOLDEN = [0.08910064623458391, 0.33189185276481004]


def test_every_way_of_cutting_is_as_likely():
  n, pieces, draws = 6, 3, 20_000
  count = collections.Counter(
    tuple(segmented(uniform(0, 0, i, n - 1), pieces).tolist()) for i in range(draws)
  )
  ways = [way for way in itertools.product(range(1, n), repeat=pieces) if sum(way) == n]
  assert count.keys() == set(ways) and len(ways) == math.comb(n - 1, pieces - 1)
  expected = draws / len(ways)
  assert all(abs(seen - expected) < 5 * expected**0.5 for seen in count.values()), count


def test_what_is_kept_and_what_is_noise_come_by_turns():
  lengths = spans().lengths
  for index in range(50):
    hidden = places(lengths, functools.partial(uniform, 0, 0, index))
    assert len(hidden) == lengths.text and hidden.sum() == lengths.noise
    assert (
      not hidden[0] and hidden[-1] and np.count_nonzero(np.diff(hidden)) == 2 * lengths.spans - 1
    )


def test_a_batch_for_programs_is_like_one_that_is_filled():
  empty, abstract = SourceBatch.empty(2, 3, 5), SourceBatch.abstract(2, 3, 5)
  assert vars(empty).keys() == vars(abstract).keys()
  for name, field in vars(empty).items():
    like = getattr(abstract, name)
    assert (field.shape, field.dtype) == (like.shape, like.dtype), name
    assert field.shape == ((2, 5) if name.startswith('source') else (2, 3))
