"""How does an evaluation run? A task with a number of examples is one file of lines, which an
interrupted one goes on with, and a summary when all lines are there. Other settings have no
business in the same place.

NAME-K.jsonl has a line for each question, NAME-K.json the settings and then the summary.
"""

import array
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import commands
import files
from decode.generator import Generator
from evaluation.differences import differences, settings_in
from evaluation.examples import (
  Item,
  Manner,
  PromptsDigest,
  Questions,
  chat_settings,
  digest_of,
  of_safety,
  ways,
)
from evaluation.measures import Measure, chance_at
from evaluation.scoring import Line, Scorer, scorer
from evaluation.task import Task

COUNTED = ('cut', 'nan', 'empty', 'endless', 'failed')
OF_ANSWERS = ('empty', 'endless', 'failed')  # of these, of each answer of a question
# What is said of each, where it is not 0.
SAID = {
  'cut': 'prompts were cut on the left to fit the context',
  'nan': 'questions have scores that are no finite numbers: a choice counts as wrong, a text not',
  'empty': 'answers, or texts, are empty',
  'endless': 'answers ended at max_new_tokens',
  'failed': 'answers ended where the scores were not finite',
}
CHANGED = 'the data, a template, or what counts as data, was changed since; give another --output'
SETTLED = 16  # questions after which it is said how long the others take
SECONDS = 20.0  # between lines of progress where nobody looks at a terminal


@dataclasses.dataclass(frozen=True)
class Summary:
  """What is said of a model by one task with k examples.

  Attributes:
    task: its name. settings: all that decides the lines, JSON-able. n: questions.
    prompts: digest of all questions. chance: the score of who knows nothing, by the first metric.
    metrics: {name: its value, low, high, n, method, lower_is_better}, the first first; None for
      what is no finite number.
    by: {value of Task.by: {the first metric's name: the same}}.
    counts: of COUNTED.
  """

  task: str
  settings: dict
  n: int
  prompts: str
  chance: float
  metrics: dict[str, dict]
  by: dict[str, dict]
  counts: dict[str, int]

  @property
  def shots(self) -> int:
    return self.settings['shots']

  @property
  def name(self) -> str:
    return f'{self.task}-{self.shots}'

  def chance_of(self, metric: str) -> float:
    """The score of who knows nothing, by a metric; 0 where it is not known."""
    return chance_at(metric, [*self.metrics], self.chance, self.settings.get('task', {}))

  def counted(self, what: str) -> int:
    """Of how many a count is: of questions, or, of OF_ANSWERS, of as many answers as were drawn."""
    samples = self.settings['task']['kind'].get('samples', 1) if what in OF_ANSWERS else 1
    return self.n * samples


class TaskFiles:
  """Where one task with k examples is written.

  Raises ValueError where other settings were there before, by what differs.
  """

  def __init__(self, output: pathlib.Path, name: str, settings: Mapping[str, Any]):
    self.lines_file, self.file = output / f'{name}.jsonl', output / f'{name}.json'
    self.settings = json.loads(json.dumps(settings))
    self._kept = files.json_object(self.file.read_bytes(), self.file) if self.file.exists() else {}
    was = self._kept.get('settings', self.settings)
    lines = differences(was, self.settings)
    if lines:
      raise ValueError(
        f'{self.file} is of another evaluation ({"; ".join(lines)}); give another --output, or '
        'remove it'
      )

  def ended(self, asked: Questions | Sequence[Item]) -> Summary | None:
    """What was made of all lines; None where they are not all there. Raises ValueError where they
    are of other questions, or of some of them.
    """
    if 'metrics' not in self._kept:
      return None
    summary = Summary(**self._kept)
    if summary.prompts != (now := digest_of(asked)):
      raise ValueError(
        f'{self.file} is of other questions, {summary.n} with digest {summary.prompts}, and there '
        f'are {len(asked)} with digest {now}: {CHANGED}'
      )
    if summary.n != len(asked):
      raise ValueError(
        f'{self.file} is of {summary.n} of {len(asked)} questions: it was interrupted, and answers '
        f'may be cut short; remove it and {self.lines_file}'
      )
    return summary

  def begin(self, asked: Questions | Sequence[Item], block: int) -> int:
    """How many lines are there, in whole blocks. Raises ValueError where they are of other
    questions.
    """
    if not self._kept:
      self.lines_file.unlink(missing_ok=True)
      files.replace(self.file, json.dumps({'settings': self.settings}, indent=1) + '\n')
    if not self.lines_file.exists():
      return 0
    kept = kept_bytes = at = 0
    questions = iter(asked)
    with open(self.lines_file, 'rb') as file:
      for number, line in enumerate(file, 1):
        if not line.endswith(b'\n'):
          break  # a last line that was cut short is none
        self._check_of(
          files.json_object(line, f'{self.lines_file}:{number}'), next(questions, None)
        )
        at += len(line)
        if not number % block or number == len(asked):
          kept, kept_bytes = number, at
    if kept_bytes < self.lines_file.stat().st_size:
      os.truncate(self.lines_file, kept_bytes)
    return kept

  def _check_of(self, line: Line, asked: Item | None) -> None:
    """Raises ValueError where a line is not of a question."""
    if asked is None:
      raise ValueError(f'{self.lines_file} has more lines than questions; give another --output')
    if line.get('digest') != asked.digest:
      raise ValueError(
        f'{self.lines_file}: line {line.get("i")} is of another question than {asked.place}: '
        f'{CHANGED}'
      )

  def answered(self, asked: Questions | Sequence[Item]) -> Iterator[tuple[Line, Item]]:
    """Each line with its question. Raises ValueError where they are not of one another."""
    lines = read_lines(self.lines_file)
    for number, (line, each) in enumerate(itertools.zip_longest(lines, asked)):
      if line is None:
        raise ValueError(f'{number} of {len(asked)} questions were answered; ask again')
      self._check_of(line, each)
      yield line, each

  def add(self, lines: Sequence[Line]) -> None:
    """Writes lines behind those that are there."""
    with open(self.lines_file, 'a', encoding='utf-8') as file:
      file.write(''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines))
      file.flush()
      os.fsync(file.fileno())

  def end(self, summary: Summary) -> None:
    files.replace(self.file, json.dumps(finite(dataclasses.asdict(summary)), indent=1) + '\n')


def _check_alone(output: pathlib.Path, common: Mapping[str, Any]) -> None:
  """Raises ValueError where tasks of a directory were asked otherwise, or of another model."""
  now = json.loads(json.dumps(common))
  for path, content in settings_in(output):
    was = {name: value for name, value in content['settings'].items() if name in now}
    if lines := differences(was, now):
      raise ValueError(
        f'{path} is of another evaluation ({"; ".join(lines)}); give another --output, or remove it'
      )


@contextlib.contextmanager
def alone_in(output: pathlib.Path) -> Iterator[None]:
  """A block that alone evaluates, or reports on what was evaluated, in a directory. Raises
  files.InUse, a ValueError, where another process does.
  """
  with files.locked(output / 'lock', str(output), 'wait until it ends, or give another directory'):
    yield


def check_own(path: pathlib.Path, now: Mapping[str, Any]) -> None:
  """Raises ValueError where a file has results of other settings than these."""
  if not path.exists():
    return
  content, now = files.json_object(path.read_bytes(), path), json.loads(json.dumps(now))
  if lines := differences({name: content.get(name) for name in now}, now):
    raise ValueError(
      f'{path} is of another evaluation ({"; ".join(lines)}); give another --output, or remove it'
    )


def evaluate(
  model: Generator,
  tasks: Mapping[str, Task],
  shots: Sequence[int],
  manner: Manner,
  run: Mapping[str, Any],
  output: pathlib.Path,
  log: Callable[[str], Any] = print,
) -> tuple[list[Summary], dict[str, str]]:
  """(summaries, {task that failed, or, of several ways, TASK-SHOTS: why}), which are written into a
  directory.

  tasks: by name. shots: how many examples stand before each question; several. run: what is
    evaluated, JSON-able.
  A task that raises is named and the others go on. Raises ValueError, before anything is scored,
  where the directory has another evaluation of one of them.
  """
  common = {**_of_manner(manner), 'run': dict(run)}
  if manner.chat:
    common |= chat_settings(model.tokenizer)
  _check_alone(output, common)
  failed: dict[str, str] = {}
  asked: list[tuple[str, Task, TaskFiles]] = []
  for name, task in tasks.items():
    try:
      fit, left_out = ways(task, shots)
    except ValueError as error:
      failed[name] = str(error)
      continue
    if left_out:
      log(f'NOTE: {name} shows no examples; --shots={",".join(map(str, left_out))} is left out')
    for k in fit:
      settings = {'shots': k, 'task': task.values(), **common}
      if manner.attacks and of_safety(task):
        settings['attacks'] = manner.attacks
      asked.append((name, task, TaskFiles(output, f'{name}-{k}', settings)))

  summaries = []
  for name, task, place in asked:
    try:
      summaries.append(_one(model, name, task, manner, place, log))
    except Exception as error:  # the file of a task can fail in any way that a program can
      # What cannot be asked with so many examples may be asked with fewer.
      several = sum(other == name for other, _, _ in asked) > 1
      each = f'{name}-{place.settings["shots"]}' if several else name
      failed[each] = why(error)
      log(f'ERROR: task {each}: {failed[each]}')
  return summaries, failed


def why(error: Exception) -> str:
  """What an error says, in a line; of one that is no check's, where it was raised, too."""
  if isinstance(error, ValueError | OSError | ImportError | FloatingPointError):
    return commands.said(error).split('\n')[0]
  frame = traceback.extract_tb(error.__traceback__)[-1]
  said = str(error).split('\n')[0]
  return f'{frame.filename}:{frame.lineno}: {type(error).__name__}: {said}'


def _of_manner(manner: Manner) -> dict:
  """What of it decides the lines of all tasks: where the data lies does not."""
  values = dataclasses.asdict(manner)
  del values['data'], values['attacks']
  return values


def _one(model, name: str, task: Task, manner: Manner, place: TaskFiles, log) -> Summary:
  k = place.settings['shots']
  asked = Questions(task, k, manner)
  if done := place.ended(asked):
    log(f'{done.name}: is there already')
    return done
  scored = scorer(model, task, manner, asked)
  done = place.begin(asked, scored.block)
  if done:
    log(f'{name}-{k}: {done} of {len(asked)} are there already')
  progress = ProgressLine(f'{name}, {k} shots', len(asked), done, log)
  if done < len(asked):
    for more in scored.lines(done):
      place.add(more)
      done += len(more)
      progress.at(done)
  progress.end()
  summary = summarised(name, place.settings, scored, place.answered(asked))
  place.end(summary)
  return summary


def summarised(
  name: str, settings: dict, scored: Scorer, answered: Iterable[tuple[Line, Item]]
) -> Summary:
  """What lines of all questions say together, which are gone through once: what is kept of each is
  the numbers that estimates are made of.
  """
  task, seed, first = scored.task, scored.manner.seed, scored.measures[0]
  packed = {measure.name: _Packed(measure) for measure in scored.measures}
  by: dict[str, _Packed] = {}
  counts, prompts, guessed = dict.fromkeys(COUNTED, 0), PromptsDigest(), array.array('l')
  for line, each in answered:
    prompts.add(each)
    guessed.append(scored.guessed(each))
    for what in COUNTED:
      counts[what] += line.get(what, 0)
    if line['stats'] is not None:
      for measure, of in packed.items():
        of.add(line['stats'][measure])
      if task.by:
        value = str(each.row.get(task.by))
        by.setdefault(value, _Packed(first)).add(line['stats'][first.name])
  if not packed[first.name].n:
    raise ValueError(f'none of {len(guessed)} texts has a finite score; the model is broken')
  metrics = {}
  for measure in scored.measures:
    metrics[measure.name] = packed[measure.name].estimate(seed)
    metrics[measure.name]['lower_is_better'] = measure.lower_is_better
    if signature := measure.signature():
      metrics[measure.name]['signature'] = signature
  values = {value: {first.name: of.estimate(seed)} for value, of in sorted(by.items())}
  chance = scored.chance_among(guessed)
  return Summary(name, settings, len(guessed), prompts.value, chance, metrics, values, counts)


class _Packed:
  """Statistics of documents, n of them, that a measure is an estimate of."""

  def __init__(self, measure: Measure):
    self.n, self._measure, self._numbers = 0, measure, array.array('d')

  def add(self, statistics: Sequence[float]) -> None:
    self.n += 1
    self._numbers.extend(statistics)

  def estimate(self, seed: int) -> dict:
    """JSON-able."""
    statistics = np.array(self._numbers).reshape(self.n, -1)
    return finite(self._measure.estimate(statistics, seed).values())


def shown(metric: Mapping[str, Any]) -> str:
  """A metric of a summary with its interval."""
  few = ' (few)' if metric['small'] else ''
  value, low, high = (_digits(metric[name]) for name in ('value', 'low', 'high'))
  return f'{value} [{low}, {high}]{few}'


def _digits(value: float | None) -> str:
  if value is None or not math.isfinite(value):
    return 'no number'
  return f'{value:.3f}' if abs(value) < 10 else f'{value:,.2f}'


def finite(values: Any) -> Any:
  """As JSON has it: None for what is no number."""
  if isinstance(values, Mapping):
    return {name: finite(value) for name, value in values.items()}
  if isinstance(values, list | tuple):
    return [finite(value) for value in values]
  return None if isinstance(values, float) and not math.isfinite(values) else values


def read_lines(path: pathlib.Path) -> Iterator[Line]:
  """Of a file that is complete."""
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      yield files.json_object(line, f'{path}:{number}')


class ProgressLine:
  """Says how far it is, and how long the rest will take: on a terminal in one line, elsewhere now
  and then.
  """

  def __init__(self, what: str, total: int, done: int, log: Callable[[str], Any]):
    self._what, self._total, self._first, self._log = what, total, done, log
    self._began = self._said = time.monotonic()
    self._terminal = sys.stdout.isatty()

  def at(self, done: int) -> None:
    """So many are done."""
    now = time.monotonic()
    if now - self._said < (0.2 if self._terminal else SECONDS) or done == self._total:
      return
    self._said = now
    text = f'{self._what}: {done} of {self._total}, {done / self._total:.0%}'
    here = done - self._first
    # The first ones waited for programs to be compiled, and for those that are beside them.
    if here >= min(SETTLED, self._total / 5):
      rate = here / max(now - self._began, 1e-9)
      left = duration((self._total - done) / rate)
      text += f', {rate:.3g} a second, {left} left'
    if self._terminal:
      print(f'\r\033[K{text}', end='', flush=True)
    else:
      self._log(text)

  def end(self) -> None:
    if self._terminal:
      print('\r\033[K', end='', flush=True)
    self._log(f'{self._what}: {self._total} in {duration(time.monotonic() - self._began)}')


def duration(seconds: float) -> str:
  """As people say it."""
  if seconds < 100:
    return f'{seconds:.0f} s'
  minutes = round(seconds / 60)
  return f'{minutes} min' if minutes < 100 else f'{minutes // 60} h {minutes % 60} min'
