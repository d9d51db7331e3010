"""What is a model asked, and what counts as an answer? A task is a small file of Python, whose
get_task() says where its rows are, how one becomes a prompt, and what is measured.
"""

import ast
import dataclasses
import functools
import importlib.util
import pathlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import files
import names
from data import compressed
from data.records import READERS, rows as rows_of_file
from data.template import NORMALISATIONS as OF_WORDS, compiled
from evaluation import code
from evaluation.classify import CALIBRATIONS
from evaluation.text_metrics import METRICS, Metric, made

ROOT = pathlib.Path(__file__).resolve().parents[1]
TASKS = ROOT / 'configs' / 'tasks'
NORMALISATIONS = (*OF_WORDS, 'byte')
TEXT = 'txt'

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class MultipleChoice:
  """Which of a row's own choices does the model find likeliest behind the prompt? With an empty
  prompt, which of several texts: minimal pairs, of which neither is said where both are as likely.

  Attributes:
    choices: the field that has a list of them, or Jinja texts of the row, one of each.
    answer: which is right: the field that has its number, from 0, or its text; or the number.
    normalise: what a choice's log-probability is divided by: 'sum' by nothing, the number of
      'token's, 'character's or 'byte's of the choice. Accuracy is told by this and by 'sum'.
    calibration: 'pmi' takes off how likely each choice is behind `empty` alone (Holtzman et al.
      2021, arXiv:2104.08315); 'none'.
    empty: a prompt without content, as in 'Answer:'.
  """

  choices: str | tuple[str, ...]
  answer: str | int
  normalise: str = 'character'
  calibration: str = 'none'
  empty: str = ''

  def __post_init__(self):
    names.check('normalise', self.normalise, NORMALISATIONS)
    names.check('calibration', self.calibration, ('none', 'pmi'))
    if not isinstance(self.choices, str):
      object.__setattr__(self, 'choices', tuple(self.choices))
      if len(self.choices) < 2:
        raise ValueError(
          f'choices={self.choices} are {len(self.choices)}; a choice is of 2 or more'
        )
      if isinstance(self.answer, int) and not 0 <= self.answer < len(self.choices):
        raise ValueError(
          f'answer={self.answer} is the number of a choice, from 0, of {len(self.choices)}'
        )


@dataclasses.dataclass(frozen=True)
class Generate:
  """What does the model write behind the prompt?

  Attributes:
    references: the field that has an answer that would be right, or a list of such; '': the task's
      `target` is the only one.
    stops: texts at which an answer ends, without them; so does the end of text.
    max_new_tokens: of an answer. temperature: 0 takes the likeliest tokens.
    samples: answers to a prompt, for pass@k; other metrics read the first.
    extract: what of an answer is judged, by its text; default: all but white space around it.
    passed: (answer, row) -> whether it is right, for pass@k.
    program: the same by a program of Python: (answer, row) -> one that ends without an error where
      it is right. It runs where evaluate.py --run_programs says, and gets a chat's answers whole,
      which no stops end.
  """

  references: str = ''
  stops: tuple[str, ...] = ()
  max_new_tokens: int = 64
  temperature: float = 0.0
  samples: int = 1
  extract: Callable[[str], str] | None = None
  passed: Callable[[str, Row], bool] | None = None
  program: Callable[[str, Row], str] | None = None

  def __post_init__(self):
    if isinstance(self.stops, str) or not all(isinstance(x, str) and x for x in self.stops):
      raise ValueError(f'stops={self.stops!r} must be texts, none of them empty, as in ("\\n",)')
    object.__setattr__(self, 'stops', tuple(self.stops))
    for name in ('max_new_tokens', 'samples'):
      if not isinstance(value := getattr(self, name), int) or value < 1:
        raise ValueError(f'{name}={value!r} must be a whole number, at least 1')
    if not 0 <= self.temperature < float('inf'):
      raise ValueError(f'temperature={self.temperature} must be 0 (greedy) or positive, and finite')
    if self.samples > 1 and not self.temperature:
      raise ValueError(
        f'samples={self.samples} with temperature=0 are all the same; give a temperature'
      )
    if self.passed and self.program:
      raise ValueError('passed and program both say what is right; leave one out')


@dataclasses.dataclass(frozen=True)
class Perplexity:
  """How well does the model foretell a text (the task's `prompt`)? Every token is scored once.

  Attributes:
    window: tokens that the model reads at a time; 0: as many as it has positions for, 2048 at most.
    stride: of these, new ones at most, behind the others as context; 0: all of them.
  """

  window: int = 0
  stride: int = 0

  def __post_init__(self):
    if self.window < 0 or self.stride < 0 or 0 < self.window < self.stride:
      raise ValueError(
        f'window={self.window} and stride={self.stride} tokens: of a window, stride are new, at '
        'least 0 (all) and at most the window'
      )


@dataclasses.dataclass(frozen=True)
class Classification:
  """Which label does a text have, by a template's pattern and words (data/template.py)?

  Attributes:
    template: a file, TOML or JSON. text, label: the fields that have them.
    calibration: see evaluation.classify.probabilities.
  """

  template: str
  text: str = 'text'
  label: str = 'label'
  calibration: str = 'none'

  def __post_init__(self):
    names.check('calibration', self.calibration, CALIBRATIONS)


Kind = MultipleChoice | Generate | Perplexity | Classification


@dataclasses.dataclass(frozen=True)
class Task:
  """A task.

  Attributes:
    kind: a MultipleChoice, Generate, Perplexity or Classification.
    data: a file of rows, .jsonl, .csv or .parquet, or of one row with a `text`, .txt (also
      compressed), below --data where it is no absolute path; or a function that gives rows.
    about: what it is, in a line.
    prompt: Jinja text of a row's fields. target: the same of the answer as it is shown in examples;
      default: the right choice, the first reference.
    space: between a prompt and its answer, where both are text.
    between: text between examples, and before the question. instruction: before all of them.
    shots: a file that examples are drawn from, as `data`; '': the same rows, less the one asked.
    balanced: the field by whose values examples are as many of each; '': they are not.
    metrics: of a Generate, names in evaluation.text_metrics.METRICS, or such metrics.
    by: the field by whose values scores are told apart, too; '': none.
    chance: the score of who knows nothing, for what is left after tuning; None: of a
      MultipleChoice and a Classification that of guessing, else 0.
    rows: what is made of a row before all else: rows, perhaps none.
    directed: whether one direction of its scores is the better one; False, as of a share of
      stereotypes, or of refusals where some should be: no model has forgotten it.

  Raises ValueError for what makes no sense.
  """

  kind: Kind
  data: str | Callable[[], Iterable[Row]]
  about: str = ''
  prompt: str = ''
  target: str = ''
  space: str = ' '
  between: str = '\n\n'
  instruction: str = ''
  shots: str | Callable[[], Iterable[Row]] = ''
  balanced: str = ''
  metrics: tuple = ()
  by: str = ''
  chance: float | None = None
  rows: Callable[[Row], Iterable[Row]] | None = None
  directed: bool = True

  def __post_init__(self):
    if not isinstance(self.kind, Kind):
      raise ValueError(
        f'kind={self.kind!r} must be a MultipleChoice, Generate, Perplexity or Classification'
      )
    if not self.data:
      raise ValueError("data='' must be a file of rows, or a function that gives rows")
    for source in (self.data, self.shots):
      if isinstance(source, str) and source:
        kind_of(source)
    self._check_prompt()
    if isinstance(self.metrics, str):
      raise ValueError(f"metrics={self.metrics!r} must be several, as in ('{self.metrics}',)")
    object.__setattr__(self, 'metrics', tuple(self.metrics))
    if self.metrics and not isinstance(self.kind, Generate):
      raise ValueError(
        f'metrics={self.metrics} are of a Generate; a {type(self.kind).__name__} has its own'
      )
    if isinstance(self.kind, Generate) and not self.metrics:
      raise ValueError(f'metrics=() of a Generate: give some of {", ".join(METRICS)}')
    for metric in self.metrics:
      if not isinstance(metric, Metric):
        names.check('metric', metric, METRICS)

  def _check_prompt(self):
    kind = self.kind
    for name in ('prompt', 'target'):
      compiled(getattr(self, name), name)
    for i, choice in enumerate(getattr(kind, 'choices', ())):
      if not isinstance(kind.choices, str):
        compiled(choice, f'choices[{i}]')
    if isinstance(kind, Generate | Perplexity) and not self.prompt:
      raise ValueError(
        f"prompt='' of a {type(kind).__name__}: give Jinja text, as in '{{{{ text }}}}'"
      )
    judged = isinstance(kind, Generate) and (kind.references or kind.passed or kind.program)
    if isinstance(kind, Generate) and not judged and not self.target:
      raise ValueError('a Generate needs references (a field) or a target (Jinja text) to judge by')
    if isinstance(kind, Classification) and (self.prompt or self.target):
      raise ValueError('a Classification is asked by its template; leave prompt and target out')

  @property
  def measured(self) -> list[Metric]:
    """The metrics of a Generate. Raises ImportError where a library is not there."""
    return [metric if isinstance(metric, Metric) else made(metric) for metric in self.metrics]

  @property
  def _own(self) -> dict[str, Any]:
    """By name, functions and metrics of its own that judge an answer."""
    if not isinstance(self.kind, Generate):
      return {}
    own = {name: getattr(self.kind, name) for name in ('extract', 'passed', 'program')}
    own |= {metric.name: metric for metric in self.metrics if isinstance(metric, Metric)}
    return {name: judge for name, judge in own.items() if judge is not None}

  @property
  def judges_rows(self) -> bool:
    """Whether some of these read more of a row than what is asked and would be right."""
    return bool(self._own.keys() - {'extract'})

  def values(self) -> dict:
    """All that decides what it asks and how it judges, JSON-able; of functions their names, and of
    those that judge digests.
    """

    def plain(value):
      if isinstance(value, Metric):
        return value.name
      if callable(value):
        return f'{getattr(value, "__name__", type(value).__name__)}()'
      return [*map(plain, value)] if isinstance(value, tuple) else value

    def fields(of):
      return {f.name: plain(getattr(of, f.name)) for f in dataclasses.fields(of)}

    given = fields(self) | {'kind': {'name': type(self.kind).__name__, **fields(self.kind)}}
    given.pop('about')
    return given | {'code': {name: code.digest(judge) for name, judge in self._own.items()}}


def kind_of(path: str) -> str:
  """How a file of rows is read, by its name. Raises ValueError for another."""
  name = pathlib.PurePath(path)
  while name.suffix in compressed.SUFFIXES:
    name = name.with_suffix('')
  return names.check(f'the kind of {path}', name.suffix.removeprefix('.'), [*READERS, TEXT])


def rows_of(task: Task, source: str | Callable, data: str) -> Iterator[tuple[str, Row]]:
  """(place, row) of a source of a task, below the directory `data`.

  Raises FileNotFoundError naming --data where there is no such file.
  """
  if callable(source):
    placed = ((f'{source.__name__}():{i}', row) for i, row in enumerate(source(), 1))
  else:
    path = pathlib.Path(data).expanduser() / pathlib.Path(source).expanduser()
    if not path.is_file():
      raise FileNotFoundError(
        f'{path} is not there; give the directory that has {source} by --data=DIRECTORY'
      )
    # Where the data lies is of no account, and a line of results names none.
    kind = kind_of(source)
    read = _one_text(str(path)) if kind == TEXT else rows_of_file(kind, str(path))
    placed = ((f'{source}{place.removeprefix(str(path))}', row) for place, row in read)
  for place, row in placed:
    made_of = [row] if task.rows is None else task.rows(row)
    for each in made_of:
      if not isinstance(each, Mapping):
        raise ValueError(f'{place}: a row is a mapping of fields, and this is {each!r:.60}')
      yield place, dict(each)


def _one_text(path: str) -> Iterator[tuple[str, Row]]:
  with compressed.opened(path) as file:
    try:
      yield f'{path}:1', {'text': file.read().decode('utf-8-sig')}
    except UnicodeDecodeError as error:
      raise ValueError(f'{path}: not UTF-8 ({error.reason}); save it as UTF-8') from error


# Which tasks there are.


def read(name: str) -> tuple[str, Task]:
  """A task by its name in configs/tasks, or by a path to its file, with its name.

  Raises ValueError for an unknown name, and for a file that is none, with its line.
  """
  if name.endswith('.py') or '/' in name:
    path = pathlib.Path(name).expanduser()
    if not path.is_file():
      raise ValueError(f'--tasks={name} is no file; give its path, or a name (--tasks=list)')
  else:
    files.check_local('--tasks', name)
    path = TASKS / f'{names.check("--tasks", name, known())}.py'
  return path.stem, loaded(path)


@functools.cache
def loaded(path: pathlib.Path) -> Task:
  """What a file's get_task() returns. Raises ValueError, naming it and its line."""
  spec = importlib.util.spec_from_file_location(f'task_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    task = module.get_task()
  except Exception as error:  # a file can fail in any way that a program can
    raise ValueError(at_fault(path, error)) from error
  if not isinstance(task, Task):
    raise ValueError(
      f'get_task() of {path} returned {type(task).__name__}, no evaluation.task.Task'
    )
  return task


def at_fault(path: pathlib.Path, error: Exception) -> str:
  """What an error says, behind the line of a file that it came from, where it did."""
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename == str(path)
  ]
  kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
  return f'{":".join([str(path), *map(str, lines[-1:])])}: {kind}{error}'


def known() -> list[str]:
  """Names of the tasks of configs/tasks."""
  return sorted(path.stem for path in TASKS.glob('*.py') if path.stem != '__init__')


def listing() -> str:
  """These, with the first line of what they say of themselves."""
  lines = []
  for name in known():
    says = ast.get_docstring(ast.parse((TASKS / f'{name}.py').read_text())) or ''
    lines.append(f'{name:24} {says.split(chr(10))[0]}')
  return '\n'.join(lines)


# How a row becomes text.


_compiled = functools.cache(compiled)


def rendered(source: str, name: str, place: str, row: Row) -> str:
  """A text of a row. Raises ValueError naming the row's place and its fields."""
  try:
    return _compiled(source, name).render(row)
  except Exception as error:  # a template can fail in any way that a program can
    raise ValueError(
      f'{place}: {name} failed: {type(error).__name__}: {error}; the row has {", ".join(row)}'
    ) from error


def field_of(field: str, place: str, row: Row) -> Any:
  """A field that a row must have. Raises ValueError naming the place."""
  if field not in row:
    raise ValueError(
      f'{place}: there is no field {field!r}; the row has {", ".join(map(str, row))}'
    )
  return row[field]
