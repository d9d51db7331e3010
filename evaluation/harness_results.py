"""How sure is what the lm-evaluation-harness says? Of each task its numbers with their intervals,
and what was counted; of a group what its tasks come to together; and all of it as rows and notes.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.intervals import Estimate, bootstrap, percentiles, resampled_sums, wilson

FILE = 'lm_eval.json'
RESAMPLES = 200  # of documents, whose metric may take long
# What is counted, of what, and what is said of it, where it is not 0.
COUNTED = {
  'cut': ('requests', 'contexts, or questions, were cut on the left to fit the model'),
  'nan': ('pairs', 'scores are no finite numbers; lm_eval takes the first of these for the best'),
  'empty': ('answers', 'answers are empty'),
  'endless': ('answers', 'answers ended at max_gen_toks'),
  'failed': ('answers', 'answers ended where the scores were not finite, and count as they are'),
}


def rows(said: Mapping[str, Any]) -> list[list[str]]:
  """Of a table of lm_eval.json: task or group, metric, score with its interval, documents."""
  return [
    [name, key, shown(metric), str(metric['n'])]
    for kind in ('groups', 'tasks')
    for name, of in said.get(kind, {}).items()
    for key, metric in of['metrics'].items()
  ]


def notes(said: Mapping[str, Any]) -> list[str]:
  """What was counted, a line each."""
  lines = []
  for name, of in said['tasks'].items():
    counts = of.get('counts', {})
    for kind, (whole, text) in COUNTED.items():
      if counts.get(kind):
        lines.append(f'{name}: {counts[kind]} of {counts[whole]} {text}')
  return lines


def shown(metric: Mapping[str, Any]) -> str:
  """A score with its interval."""
  if metric['value'] is None:
    return 'no number'
  if metric['low'] is None or metric['high'] is None:
    return f'{metric["value"]:.4g}'
  few = ' (few)' if metric.get('small') else ''
  return f'{metric["value"]:.4g} [{metric["low"]:.4g}, {metric["high"]:.4g}]{few}'


def digest_of(instances: Iterable) -> str:
  """Of all that a task asks, by the harness's requests."""
  documents: dict[Any, list] = {}
  for each in sorted(instances, key=lambda each: each.idx):
    documents.setdefault(each.doc_id, []).append(each.args)
  asked = sorted({json.dumps(arguments, default=str) for arguments in documents.values()})
  return hashlib.blake2b(''.join(asked).encode(), digest_size=16).hexdigest()


def scalars(results: Mapping[str, Any]) -> Iterable[tuple[str, str, str, float]]:
  """(key, metric, filter, value) of what the harness says of a task or a group."""
  for key, value in results.items():
    metric, _, way = key.partition(',')
    if way and not metric.endswith('_stderr') and isinstance(value, int | float):
      yield key, metric, way, value


def of_task(results: Mapping[str, Any], samples: Sequence[Mapping], seed: int) -> dict[str, dict]:
  """{metric,filter: its value with a 95% interval} of a task."""
  return {
    key: estimated(value, metric, way, samples, seed)
    for key, metric, way, value in scalars(results)
  }


def estimated(value: float, metric: str, way: str, samples: Sequence[Mapping], seed: int) -> dict:
  """The harness's value with a 95% interval: Wilson's of rates; the bootstrap's, over documents, of
  means, and of what the harness's own function for that metric makes of them (BLEU, perplexity).
  Of a task's own function there is none: method 'none'.
  """
  each = per_document(metric, way, samples)
  x = numbers(each)
  if x is not None and np.isclose(x.mean(), value, rtol=1e-9, atol=1e-12):
    rate = np.isin(x, (0, 1)).all()
    of_mean = wilson(int(x.sum()), len(x)) if rate else None
    return (of_mean or bootstrap(lambda i: float(x[i].mean()), len(x), seed)).values()
  of_all = registered(metric)
  if each and of_all is not None and np.isclose(of_all(each), value, rtol=1e-9, atol=1e-12):
    of = bootstrap(lambda i: of_all([each[j] for j in i]), len(each), seed, RESAMPLES)
    return of.values()
  return none(value, len(each))


def none(value: float, n: int) -> dict:
  """A value without an interval."""
  return {'value': value, 'low': None, 'high': None, 'n': n, 'method': 'none'}


def per_document(metric: str, way: str, samples: Iterable[Mapping]) -> list:
  """What documents have of a metric, behind a filter."""
  return [
    sample[metric] for sample in samples if sample.get('filter', way) == way and metric in sample
  ]


def numbers(each: Sequence) -> np.ndarray | None:
  """f64 [n] of what documents have, where it is numbers."""
  if not each or not all(isinstance(x, int | float | np.number) for x in each):
    return None
  return np.array(each, np.float64)


def registered(metric: str) -> Callable[[Sequence], float] | None:
  """What the harness makes of a metric of all documents, where it knows one."""
  from lm_eval.api import registry

  return registry.get_metric_aggregation(metric)


def of_group(
  group, tasks: Mapping[str, Mapping], samples_of: Callable[[str], Sequence[Mapping]], seed: int
) -> dict[str, Any]:
  """What the harness makes of a group's tasks, with 95% intervals, as of a task.

  group: the harness's. tasks: what is said of each task. samples_of: (task) -> its documents.
  """
  names = [task.task_name for task in group.get_all_tasks()]
  told = {
    name: {'sample_len': tasks[name]['n']}
    | {
      key: math.nan if of['value'] is None else of['value']
      for key, of in tasks[name]['metrics'].items()
    }
    for name in names
  }
  by_size = {each.metric: each.weight_by_size for each in group.aggregate_metric_list}
  samples, metrics = {name: samples_of(name) for name in names}, {}
  for key, metric, way, value in scalars(group.aggregate(told)):
    each = [per_document(metric, way, samples[name]) for name in names if key in told[name]]
    metrics[key] = stratified(value, [*map(numbers, each)], by_size[metric], seed)
    metrics[key]['n'] = sum(map(len, each))
  n = sum(tasks[name]['n'] for name in names)
  return {'n': n, 'metrics': metrics, 'tasks': names, 'version': group.version}


def stratified(
  value: float, tasks: Sequence[np.ndarray | None], by_size: bool, seed: int
) -> dict[str, Any]:
  """A mean of several tasks' means with a 95% interval: Wilson's, of documents together, where
  these are right or wrong and each counts the same; else the bootstrap's, which draws each task's
  documents apart. There is none where a task is no mean, or has one document, or all are alike.
  """
  if any(x is None or len(x) < 2 for x in tasks):
    return none(value, 0)
  n = sum(map(len, tasks))
  weights = [len(x) / n if by_size else 1 / len(tasks) for x in tasks]
  if not np.isclose(sum(w * x.mean() for w, x in zip(weights, tasks)), value, rtol=1e-9):
    return none(value, 0)
  if by_size and all(np.isin(x, (0, 1)).all() for x in tasks):
    return wilson(sum(int(x.sum()) for x in tasks), n).values()
  # Of tasks of as many documents the same ones would be drawn by the same seed.
  drawn = sum(
    w * resampled_sums(x[:, None], seed + i)[:, 0] / len(x)
    for i, (w, x) in enumerate(zip(weights, tasks))
  )
  # As sure as of one task of the mean size: within each, a resample varies by less.
  low, high = percentiles(drawn, n // len(tasks))
  if low == high:
    return none(value, 0)
  return Estimate(value, low, high, n, 'bootstrap').values()
