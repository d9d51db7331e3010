"""What is trained on, to look at: examples as text, what is learned of them in colour."""

import itertools
from collections.abc import Iterator

import numpy as np

from data.batch import Batch
from data.prepared import Prepared
from data.tokenizer import Tokenizer

LEARNED, PLAIN = '\x1b[32m', '\x1b[0m'


def examples(prepared: Prepared, length: int, count: int) -> str:
  """The first `count` examples of each source's rows of `length`, control tokens by their names or
  ids; green is what is learned.
  """
  shown = []
  for source in prepared.train:
    for number, (ids, learned) in enumerate(itertools.islice(_examples(source, length), count), 1):
      head = f'{source.name}, example {number}: {len(ids)} tokens, {int(learned.sum())} learned'
      shown += [f'--- {head}', _coloured(prepared.tokenizer, ids, learned)]
  return '\n'.join(shown)


def _examples(source, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """(ids, which are learned) of every piece of the rows."""
  for row in range(len(source)):
    batch = Batch.empty(1, length)
    source.fill(row, batch, 0)
    for segment in range(1, int(batch.segments.max()) + 1):
      inside = batch.segments[0] == segment
      ids = np.append(batch.tokens[0, inside][:1], batch.targets[0, inside])
      yield ids, np.append(False, batch.weights[0, inside] > 0)


def _coloured(tokenizer: Tokenizer, ids: np.ndarray, learned: np.ndarray) -> str:
  """Runs of tokens that are learned, or not, each decoded together."""
  text = ''
  for is_learned, run in itertools.groupby(zip(ids.tolist(), learned.tolist()), lambda x: x[1]):
    piece = _spelled(tokenizer, [i for i, _ in run])
    text += f'{LEARNED}{piece}{PLAIN}' if is_learned else piece
  return text


def _spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
  named = {i: name for name, i in tokenizer.control_ids().items()}
  parts = []
  for special, run in itertools.groupby(ids, lambda i: not tokenizer.token_bytes[i]):
    run = list(run)
    parts.append(''.join(named.get(i, f'<{i}>') for i in run) if special else tokenizer.decode(run))
  return ''.join(parts)
