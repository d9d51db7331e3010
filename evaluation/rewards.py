"""How well does a reward model tell better answers from worse ones? Of the difference d of two
rewards it says that the first is preferred with probability sigmoid(d) (Bradley and Terry).

P pairs
"""

import hashlib
import io
import json
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from evaluation.intervals import Estimate, bootstrap, wilson
from evaluation.metrics import BINS, calibration_error


def compared(differences: Float[np.ndarray, 'P'], seed: int = 0) -> dict[str, Estimate]:
  """Of rewards of chosen less those of rejected answers: accuracy (equal ones are wrong),
  calibration_error of the surer side's probability, log_loss in nats, and the mean difference.
  """
  d, n = np.asarray(differences, np.float64), len(differences)
  right, confidence = (d > 0).astype(np.float64), _sigmoid(np.abs(d))
  nats = np.logaddexp(0, -d)
  return {
    'accuracy': wilson(int(right.sum()), n),
    'calibration_error': bootstrap(lambda i: calibration_error(confidence[i], right[i]), n, seed),
    'log_loss': bootstrap(lambda i: float(nats[i].mean()), n, seed),
    'difference': bootstrap(lambda i: float(d[i].mean()), n, seed),
  }


def lines(
  pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
  rewards: Float[np.ndarray, 'P 2'],
  text_of: Callable[[Sequence[int]], str],
) -> list[dict]:
  """What is told of each pair, JSON-able: its answers as texts, each behind its prompt, and their
  rewards; it is right where the chosen one has more.

  pairs: ids of both, the chosen one first.
  """
  made = []
  for i, (pair, of_pair) in enumerate(zip(pairs, rewards.tolist(), strict=True)):
    digest = hashlib.blake2b(json.dumps(pair).encode(), digest_size=8).hexdigest()
    line = {'i': i, 'digest': digest, 'chosen': text_of(pair[0]), 'rejected': text_of(pair[1])}
    line |= {'tokens': [*map(len, pair)], 'rewards': of_pair}
    made.append(line | {'right': of_pair[0] > of_pair[1]})
  return made


def calibration_picture(differences: Float[np.ndarray, 'P'], title: str) -> bytes:
  """Shares that are right over the confidence that they were given, a PNG; dots are as large as
  they have pairs.
  """
  from matplotlib.figure import Figure

  d = np.asarray(differences, np.float64)
  confidence, right = _sigmoid(np.abs(d)), d > 0
  bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
  counts = np.bincount(bins, minlength=BINS)
  seen = counts > 0
  mean, share = (
    np.bincount(bins, value, BINS)[seen] / counts[seen] for value in (confidence, right)
  )
  figure = Figure(figsize=(4.5, 4), layout='constrained')
  axes = figure.subplots()
  axes.plot([0.5, 1], [0.5, 1], color='0.6', linewidth=1)
  axes.scatter(mean, share, s=10 + 200 * counts[seen] / counts.max())
  axes.set(xlim=(0.48, 1.02), ylim=(-0.02, 1.02))
  axes.set(xlabel='confidence in the preferred answer', ylabel='share that is right')
  axes.set_title(title, fontsize=9)
  file = io.BytesIO()
  figure.savefig(file, dpi=120, format='png')
  return file.getvalue()


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))
