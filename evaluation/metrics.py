"""How good are answers? Numbers of what was true and what was said.

B records · L labels
"""

import numpy as np
from jaxtyping import Float, Int

from evaluation.intervals import Estimate, bootstrap, wilson

BINS = 15  # of confidence, for the calibration error


def confusion(truth: Int[np.ndarray, 'B'], said: Int[np.ndarray, 'B'], labels: int) -> np.ndarray:
  """How often which was said, int64 [L true, L said]."""
  counts = np.zeros((labels, labels), np.int64)
  np.add.at(counts, (truth, said), 1)
  return counts


def macro_f1(truth: Int[np.ndarray, 'B'], said: Int[np.ndarray, 'B'], labels: int) -> float:
  """The mean over labels of F1 = 2 TP / (2 TP + FP + FN); a label that is neither true nor said
  anywhere is left out.
  """
  counts = confusion(truth, said, labels)
  return f1_of_counts(np.diag(counts), counts.sum(0) + counts.sum(1))


def f1_of_counts(hits: np.ndarray, both: np.ndarray) -> float:
  """The same of how often each label was rightly said [L], and true or said, counted twice where it
  was both [L].
  """
  seen = both > 0
  return float(np.mean(2 * hits[seen] / both[seen])) if seen.any() else 0.0


def calibration_error(confidence: Float[np.ndarray, 'B'], right: np.ndarray) -> float:
  """Expected calibration error (Guo et al., arXiv:1706.04599, equation 3): over BINS bins of equal
  width, of confidences in (low, high], the mean of |share that is right - mean confidence|,
  weighted by how many fall into each. That of few records is too large, and that of a resample of
  them more so: its interval lies rather above it.
  """
  bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
  gaps = np.bincount(bins, right - confidence, BINS)
  return float(np.abs(gaps).sum() / len(confidence))


def classified(
  truth: Int[np.ndarray, 'B'], probabilities: Float[np.ndarray, 'B L'], seed: int = 0
) -> dict[str, Estimate]:
  """Accuracy, macro_f1, calibration_error of probabilities, and majority, what saying the most
  frequent label always would get.
  """
  labels = probabilities.shape[1]
  said, confidence = probabilities.argmax(1), probabilities.max(1)
  right = (said == truth).astype(np.float64)
  n = len(truth)
  return {
    'accuracy': wilson(int(right.sum()), n),
    'macro_f1': bootstrap(lambda i: macro_f1(truth[i], said[i], labels), n, seed),
    'calibration_error': bootstrap(lambda i: calibration_error(confidence[i], right[i]), n, seed),
    'majority': wilson(int(np.bincount(truth).max()), n),
  }
