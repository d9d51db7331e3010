"""What is trained on, to look at: examples as text, what is learned of them in colour."""

import itertools
from collections.abc import Iterator

import numpy as np

from data.prompts import Prompts
from data.tokenizer import Tokenizer

LEARNED, PLAIN = '\x1b[32m', '\x1b[0m'


def examples(config, prepared, count: int) -> str:
  """The first `count` examples that a run of this config trains on, or prompts that it answers,
  control tokens by their names or ids; green is what is learned.
  """
  if isinstance(prepared, Prompts):  # the rest of an example is written while it trains
    first = [prepared.order(config.train.seed, i) for i in range(count)]
    return '\n'.join(
      f'--- prompt {number}: {len(prompt.ids)} tokens\n'
      + _spelled(prepared.tokenizer, list(prompt.ids))
      for number, prompt in enumerate(first, 1)
    )
  batches = config.objective.batches(prepared, config.data, range(config.data.batch_size))
  shown, every = [], _examples(batches, config.model.causal)
  # Of a head, what is learned is the number of a label.
  labels = getattr(config.objective, 'labels', ())
  for number, (source, ids, learned) in enumerate(itertools.islice(every, count), 1):
    read = '' if source is None else f'reading {len(source)} tokens, '
    head = f'--- example {number}: {read}{len(ids)} tokens, {int(learned.sum())} learned'
    shown.append(head)
    if source is not None:
      shown.append(_spelled(prepared.tokenizer, source.tolist()) + '\n->')
    if labels:
      (number,) = ids[learned].tolist()
      text = _spelled(prepared.tokenizer, ids[~learned].tolist()) if source is None else ''
      shown.append(f'{text} {LEARNED}{labels[number]}{PLAIN}'.lstrip())
      continue
    shown.append(_coloured(prepared.tokenizer, ids, learned))
  return '\n'.join(shown)


def _examples(batches, causal: bool) -> Iterator[tuple[np.ndarray | None, np.ndarray, np.ndarray]]:
  """(what an encoder reads, or None; ids; which are learned) of every segment of the rows.

  causal: whether a target is the token that comes next, and not the one in its place.
  """
  while True:
    batch = batches.take(None)
    for row in range(len(batch.tokens)):
      for segment in range(1, int(batch.segments[row].max()) + 1):
        inside = batch.segments[row] == segment
        learned = batch.weights[row, inside] > 0
        tokens, targets = batch.tokens[row, inside], batch.targets[row, inside]
        if not causal:
          yield tokens, targets, learned
          continue
        source = None
        if hasattr(batch, 'source'):
          source = batch.source[row][batch.source_segments[row] == segment]
        yield source, np.append(tokens[:1], targets), np.append(False, learned)


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

  def no_text(i):
    return i >= len(tokenizer.token_bytes) or not tokenizer.token_bytes[i]

  for special, run in itertools.groupby(ids, no_text):
    run = list(run)
    parts.append(''.join(named.get(i, f'<{i}>') for i in run) if special else tokenizer.decode(run))
  return ''.join(parts)
