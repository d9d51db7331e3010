"""Does text that a model was trained on hold the questions that it is asked? By runs of words that
both have (Brown et al. 2020, arXiv:2005.14165, appendix C), whatever their case and punctuation.

    python evaluate.py contamination --tasks=arc_easy,squad --data=DIRECTORY \\
      --training='corpus/*.jsonl' --results=RUN/evaluation

The text is streamed: what takes memory is the words of the questions alone. With --results, scores
are told of the questions that were found and of the others apart: what contamination may be worth.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterable, Sequence

import numpy as np

import commands
import files
from data import compressed
from data.config import SourceConfig
from data.sources import Problems, documents
from evaluation import page, placed, task as tasks
from evaluation.examples import Item, Manner, digest_of, examples
from evaluation.findings_page import contamination_page
from evaluation.intervals import Estimate, wilson
from evaluation.measures import known
from evaluation.running import alone_in, check_own, finite
from evaluation.words import split_words

WORDS = 13  # of a run that is no chance
LEAST = 8  # a text of fewer words is found everywhere: nothing is said of it
FIRST = 3  # words of a run by which it is looked up
FILE, PAGE = 'contamination.json', 'contamination.md'
KINDS = {'.txt': 'text', '.jsonl': 'jsonl', '.csv': 'csv', '.parquet': 'parquet'}


def words_of(text: str) -> list[str]:
  """In lower case, without what is between them."""
  return split_words(text.lower())


class Runs:
  """Runs of words that are looked for in texts.

  Args:
    size: words of a run; a shorter text, of LEAST words and more, is one run.
  """

  def __init__(self, size: int = WORDS):
    if size < LEAST:
      raise ValueError(f'--words={size} are found by chance; give at least {LEAST}, as {WORDS} is')
    self._size = size
    self._by_first: dict[tuple[str, ...], dict[tuple[str, ...], set]] = collections.defaultdict(
      dict
    )

  def add(self, text: str, of) -> bool:
    """Looks for the text from now on; `of` is what is told of it. Whether it is long enough."""
    words = words_of(text)
    if len(words) < LEAST:
      return False
    size = min(self._size, len(words))
    for i in range(len(words) - size + 1):
      run = tuple(words[i : i + size])
      self._by_first[run[:FIRST]].setdefault(run, set()).add(of)
    return True

  def within(self, text: str) -> dict:
    """{of: the first run of its that stands in this text}."""
    words, seen = words_of(text), {}
    for i in range(len(words) - LEAST + 1):
      for run, of in self._by_first.get(tuple(words[i : i + FIRST]), {}).items():
        if tuple(words[i : i + len(run)]) == run:
          for each in of:
            seen.setdefault(each, ' '.join(run))
    return seen


@dataclasses.dataclass(frozen=True)
class Contaminated:
  """What was found of a task.

  Attributes:
    task: its name. looked_for: the questions that are long enough for that. share: of these.
    short: how many the others are.
    shown: {number of a question that was found: the words that were}.
    scores: {'found': an estimate, 'others': ..} of the first metric, named by `metric`, and of what
      was looked for.
  """

  task: str
  looked_for: frozenset[int]
  share: Estimate
  short: int
  shown: dict[int, str]
  metric: str = ''
  scores: dict[str, Estimate] = dataclasses.field(default_factory=dict)

  def values(self) -> dict:
    """JSON-able."""
    scores = {name: estimate.values() for name, estimate in self.scores.items()}
    fields = {'task': self.task, 'share': self.share.values(), 'short': self.short}
    return fields | {'found': self.shown, 'metric': self.metric, 'scores': scores}


def texts_of(item: Item) -> list[str]:
  """All that would give a question away: what is asked, and with it what would be right."""
  # That what is wrong is read somewhere gives nothing away.
  answers = item.references or item.choices[item.truth : item.truth + 1]
  return [item.prompt, *(f'{item.prompt} {answer}' for answer in answers), *answers]


def contaminated(
  asked: dict[str, Sequence[Item]], training: Iterable[str], size: int = WORDS
) -> list[Contaminated]:
  """Of the questions of tasks, by name, those that stand in texts, which are streamed.

  Raises ValueError for a task none of whose questions is long enough to be told from chance.
  """
  runs, looked_for = Runs(size), {}
  for name, items in asked.items():
    looked_for[name] = {
      i
      for i, item in enumerate(items)
      if any([runs.add(text, (name, i)) for text in texts_of(item)])
    }
    if not looked_for[name]:
      raise ValueError(
        f'{name}: no question has {LEAST} words, and shorter ones are found by chance; leave it out'
      )
  seen: dict[str, dict[int, str]] = {name: {} for name in asked}
  for text in training:
    for (name, i), run in runs.within(text).items():
      seen[name].setdefault(i, run)
  return [
    Contaminated(
      name,
      frozenset(looked_for[name]),
      wilson(len(seen[name]), len(looked_for[name])),
      len(items) - len(looked_for[name]),
      dict(sorted(seen[name].items())),
    )
    for name, items in asked.items()
  ]


def scored(of_task: Contaminated, items: Sequence[Item], results: pathlib.Path, seed: int):
  """With scores of an evaluation of the task, without examples, of the same questions."""
  (summary,) = [s for s in page.read(results) if s.name == f'{of_task.task}-0'] or [None]
  if summary is None:
    print(f'NOTE: {results} has no evaluation of {of_task.task} without examples')
    return of_task
  # Text may be searched for more questions than were asked.
  asked = items[: summary.n]
  lines = [line for line, _ in placed.beside(results / f'{summary.name}.jsonl', asked)]
  metric, scores = next(iter(summary.metrics)), {}
  measure = known(metric, summary.settings['task'], summary.name)
  if measure is None:
    return of_task
  for which, wanted in (('found', True), ('others', False)):
    of = [
      line['stats'][metric]
      for line in lines
      if line['stats'] is not None
      and line['i'] in of_task.looked_for
      and (line['i'] in of_task.shown) is wanted
    ]
    if of:
      scores[which] = measure.estimate(np.array(of, np.float64), seed)
  return dataclasses.replace(of_task, metric=metric, scores=scores)


def parser() -> argparse.ArgumentParser:
  made = argparse.ArgumentParser(
    prog='evaluate.py contamination',
    description='Looks for the questions of tasks in the text that a model was trained on: runs of '
    'words, whatever their case and punctuation.',
  )
  made.add_argument('--tasks', required=True, help='names of configs/tasks, or paths; by commas')
  made.add_argument('--data', default='.', help="directory of the tasks' files")
  made.add_argument(
    '--training', required=True, action='append', help='a glob of .txt, .jsonl, .csv or .parquet'
  )
  made.add_argument('--field', default='text', help='that holds the text; default: text')
  made.add_argument('--words', type=int, default=WORDS, help=f'of a run; default: {WORDS}')
  made.add_argument('--limit', type=int, default=0, help='the first questions of each task; 0: all')
  made.add_argument('--results', default='', help='directory of an evaluation of these tasks')
  made.add_argument('--output', default='', help=f'directory of {FILE}; default: that, or .')
  made.add_argument('--system', default='', help='as the evaluation had it')
  made.add_argument('--seed', type=int, default=0, help='of the bootstrap')
  return made


def main(arguments: Sequence[str]) -> None:
  """The command; its exit status is 0 also where something is found: that is a finding."""
  given = parser().parse_args(arguments)
  path = pathlib.Path(given.output or given.results or '.') / FILE
  with commands.mendable(ImportError), alone_in(path.parent):
    asked = {}
    for name in given.tasks.split(','):
      name, task = tasks.read(name)
      asked[name] = examples(task, 0, Manner(given.data, given.limit, given.seed, given.system))
    sources = [source_of(pattern, given.field) for pattern in given.training]
    own = {'words': given.words, 'training': given.training, 'asked': _settings(given)}
    check_own(path, own)
    done = contaminated(asked, texts(sources), given.words)
    if given.results:
      place = pathlib.Path(given.results)
      done = [scored(each, asked[each.task], place, given.seed) for each in done]
    rows = [
      [each.task, str(each.share.n), str(each.share), str(each.short), *_apart(each)]
      for each in done
    ]
    headings = ['task', 'questions', 'share found', 'too short', 'metric', 'of found', 'of others']
    commands.table(f'runs of {given.words} words, with 95% intervals', headings, rows)
    for each in done:
      for i, run in [*each.shown.items()][:2]:
        print(f'{each.task}: {asked[each.task][i].place}: "{run}"')
    prompts = {name: digest_of(items) for name, items in asked.items()}
    tasks_said = [each.values() | {'prompts': prompts[each.task]} for each in done]
    content = own | {'tasks': tasks_said}
    files.replace(path, json.dumps(finite(content), indent=1) + '\n')
    files.replace(path.with_name(PAGE), contamination_page(content))
    print(f'seed {given.seed}: of intervals')
    print(f'\nwrote {path} and {PAGE}')


def _settings(given) -> dict:
  """What was looked for."""
  fields = 'tasks', 'data', 'limit', 'seed', 'system', 'field'
  return {name: getattr(given, name) for name in fields}


def source_of(path: str, field: str) -> SourceConfig:
  """Of files by their name. Raises ValueError for another kind."""
  name = pathlib.PurePath(path)
  while name.suffix in compressed.SUFFIXES:
    name = name.with_suffix('')
  if name.suffix not in KINDS:
    raise ValueError(f'--training={path} must end in one of {", ".join(KINDS)}, perhaps compressed')
  kind = KINDS[name.suffix]
  return SourceConfig(kind=kind, path=path, text_field='' if kind == 'text' else field)


def texts(sources: Sequence[SourceConfig]) -> Iterable[str]:
  """Texts of the sources, and at the end what of them could not be read."""
  problems, count, began = Problems(), 0, time.monotonic()
  for source in sources:
    for text in documents(source, problems):
      count += 1
      yield text
  print(f'{count} documents in {time.monotonic() - began:.0f} s')
  for kind, number in problems.items():
    print(f'WARNING: {kind}: {number}, the first at {problems.first[kind]}')


def _apart(each: Contaminated) -> list[str]:
  if not each.scores:
    return ['', '', '']
  return [each.metric, *(str(each.scores.get(which, '')) for which in ('found', 'others'))]
