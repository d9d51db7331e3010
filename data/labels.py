"""What do a person's labels say about text? Trains the classifier of data/content.py.

python -m data.labels --labelled=labelled.jsonl --output=filter.npz
"""

import argparse
import io
from collections.abc import Iterator, Sequence

import numpy as np

import commands
import files
from data.content import BUCKETS, features_of, sigmoid, text_of

STEPS, RATE, DECAY = 200, 20.0, 1e-5  # of gradient descent on all lines, with L2 decay
HELD_OUT = 5  # every fifth labelled line is for measuring only


def train(labelled: Sequence[tuple[str, bool]]) -> tuple[bytes, dict]:
  """A logistic regression on hashed words and pairs of words.

  Args:
    labelled: texts, and whether each is of the kind to drop.

  Returns:
    The file's bytes, and a report: 'held_out', the numbers (from 1) of the texts that were not
    trained on, with 'precision' and 'recall' on them at a probability of 0.5 (None where there is
    nothing to divide by).

  Raises:
    ValueError: one of the two labels is missing on either side.
  """
  from scipy.sparse import csr_array

  features = [features_of(text) for text, _ in labelled]
  labels = np.array([label for _, label in labelled], np.float64)
  held = np.arange(1, len(labelled) + 1) % HELD_OUT == 0
  for side, name in ((labels[~held], 'to train on'), (labels[held], 'held out')):
    if not 0 < side.sum() < len(side):
      raise ValueError(
        f'of {len(side)} labelled lines {name}, {int(side.sum())} are true; both labels are needed '
        f'(every {HELD_OUT}th line is held out): shuffle the lines, or label more'
      )

  # Each text is the mean of its features; the labels weigh the same, however many have each.
  sizes = np.array([len(each) for each in features])
  rows = csr_array(
    (np.repeat(1 / sizes, sizes), np.concatenate(features), np.append(0, np.cumsum(sizes))),
    shape=(len(labelled), BUCKETS),
  )
  training, truth = rows[~held], labels[~held]
  share = np.where(truth == 1, 0.5 / truth.sum(), 0.5 / (len(truth) - truth.sum()))
  weights, bias = np.zeros(BUCKETS), 0.0
  for _ in range(STEPS):
    slope = share * (sigmoid(training @ weights + bias) - truth)
    weights -= RATE * (len(truth) ** 0.5 * (training.T @ slope) + DECAY * weights)
    bias -= slope.sum()

  said = sigmoid(rows[held] @ weights + bias) >= 0.5
  right = float((said & (labels[held] == 1)).sum())
  report = {
    'held_out': (np.flatnonzero(held) + 1).tolist(),
    'precision': right / float(said.sum()) if said.any() else None,
    'recall': right / float(labels[held].sum()),
  }
  file = io.BytesIO()
  np.savez_compressed(file, weights=weights.astype(np.float32), bias=bias)
  return file.getvalue(), report


def read_labelled(path: str) -> Iterator[tuple[str, bool]]:
  """Lines of {"text": .., "label": true or false}. Raises ValueError that names the line."""
  for number, line in enumerate(text_of(path).split('\n'), 1):
    if not line.strip():
      continue
    record = files.parsed(line, f'{path}:{number}')
    if not (
      isinstance(record, dict)
      and isinstance(record.get('text'), str)
      and record.get('label') in (0, 1)
    ):
      raise ValueError(f'{path}:{number}: give {{"text": "...", "label": true or false}}')
    yield record['text'], bool(record['label'])


def main() -> None:
  parser = argparse.ArgumentParser(description='Makes a file for clean.classifier.')
  parser.add_argument('--labelled', required=True, help='JSONL of {"text": .., "label": true}')
  parser.add_argument('--output', required=True, help='the file to write')
  arguments = parser.parse_args()
  with commands.mendable():
    labelled = list(read_labelled(arguments.labelled))
    files.check_writable(arguments.output)
    content, report = train(labelled)
    files.replace(arguments.output, content)
  precision = 'nothing said' if report['precision'] is None else f'{report["precision"]:.3f}'
  print(
    f'{arguments.output}: precision {precision}, recall {report["recall"]:.3f} on '
    f'{len(report["held_out"])} lines held out of {len(labelled)}: every {HELD_OUT}th, from '
    f'{report["held_out"][0]} to {report["held_out"][-1]}'
  )


if __name__ == '__main__':
  main()
