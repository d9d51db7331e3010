"""Is what an interruption leaves of results valid, and does a bar stand on terminals alone?"""

import io
import json

import jax
import numpy as np
import pytest

from decode.generator import Generator
from decode.results import GrowingFile, progress_bar
from tests.decode.small import config_of, generator_of
from tests.evaluation import test_label_scores as label_scores

PROMPTS = ['abc', 'd', 'ef', 'g']


@pytest.fixture(scope='module')
def generator():
  return generator_of(config_of(32, layers=1, heads=1))


def plain(completion):
  return completion.prompt, completion.ids, completion.seed


@pytest.mark.slow
@pytest.mark.parametrize(
  'options', [dict(seed=2**32 - 2), dict(seed=[5, 2, 9, 1], temperature=[0.0, 0.5, 1, 2])]
)
def test_batches_are_parts_of_one_call(generator, options):
  options |= dict(max_new_tokens=5)
  whole = generator(PROMPTS, **options)
  batches = list(generator.in_batches(PROMPTS, 2, **options))
  assert [len(batch) for batch in batches] == [2, 2]
  assert [plain(each) for batch in batches for each in batch] == [plain(each) for each in whole]


def test_a_batch_that_fails_as_a_whole_ends_no_other(generator):
  broken = Generator(
    jax.tree.map(lambda x: x * np.nan if x.ndim == 1 else x, generator.model),
    generator.tokenizer,
    generator.mesh,
  )
  batches = list(broken.in_batches(PROMPTS, 2))
  assert [each.finish for batch in batches for each in batch] == ['failed'] * 4
  assert 'are not finite' in batches[0][0].end.error and batches[1][0].prompt == 'ef'
  with pytest.raises(FloatingPointError, match='are not finite'):
    broken(PROMPTS[:2])


def test_batches_that_cannot_be_are_refused_before_the_first(generator):
  with pytest.raises(ValueError, match='batch_size=0 must be at least 1'):
    generator.in_batches(PROMPTS, 0)
  with pytest.raises(ValueError, match=f'temperature has 7 values for {len(PROMPTS)} prompts'):
    generator.in_batches(PROMPTS, 2, temperature=[0.5] * 7)
  with pytest.raises(ValueError, match='a prompt of 41 tokens leaves no room'):
    generator.in_batches(['a', 'a' * 40], 1)
  reader = label_scores.generator('t5')
  limit = reader.model.config.max_length
  with pytest.raises(ValueError, match=f'a prompt of {limit + 2} tokens passes model.max_length'):
    reader.in_batches(['a', 'a' * (limit + 1)], 1)
  with pytest.raises(ValueError, match="option='topk' is unknown"):
    generator.in_batches(PROMPTS, 2, topk=3)


class Full(io.FileIO):
  """A disk that takes 30 bytes, and 7 at a time."""

  def write(self, data):
    if self.tell() + 7 > 30:
      raise OSError(28, 'No space left on device')
    return super().write(data[:7])


def test_lines_are_there_at_once_and_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'out.jsonl'
  path.write_text('of an earlier run\n')
  file = GrowingFile(path)
  assert path.read_text() == 'of an earlier run\n'
  file.add([{'text': 'é\n'}])
  assert [json.loads(line) for line in path.read_text().splitlines()] == [{'text': 'é\n'}]

  def interrupted():
    yield {'text': 'b'}
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    file.add(interrupted())
  file.close()
  assert path.read_text() == '{"text": "é\\n"}\n{"text": "b"}\n'

  file = GrowingFile(path)
  file._file = Full(path, 'w')
  file.add([{'text': 'c'}])
  with pytest.raises(OSError, match='No space'):
    file.add([{'text': 'd' * 30}])
  file.close()
  assert path.read_text() == '{"text": "c"}\n'


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_bar_is_for_terminals():
  for stream, shows in ((io.StringIO(), False), (Terminal(), True)):
    with progress_bar(5, stream) as moved:
      moved(3, '7 tok/s [x]')
      moved(3, '9 tok/s')
    assert ('5/5' in stream.getvalue() and '9 tok/s' in stream.getvalue()) is shows, stream
    assert shows or stream.getvalue() == ''
