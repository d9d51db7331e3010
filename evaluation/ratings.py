"""What do people say of answers, and is every word of it kept? A study is one SQLite file: what is
shown, and each rating, committed before the next is asked for.
"""

import collections
import csv
import dataclasses
import datetime
import hashlib
import io
import json
import os
import pathlib
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence

import files
from evaluation.differences import settings_in
from evaluation.strengths import FIRST, SECOND, TIE, Comparison

PAIRS, SCALES = MODES = ('pairs', 'scales')
CRITERIA = ('relevance', 'fluency', 'coherence', 'harmlessness')
POINTS = range(1, 6)
PREFERENCE = 'preference'  # the one criterion of pairs
NAME = 64  # characters of a rater's name, at most
BUSY = 10.0  # seconds to wait for another process with the same file
OF_FILE = ':'  # in a key, behind the file of a directory
VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS study (what TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS item (
  number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, prompt TEXT NOT NULL, answers TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS rating (
  rater TEXT NOT NULL, item INTEGER NOT NULL REFERENCES item, system INTEGER NOT NULL,
  criterion TEXT NOT NULL, value INTEGER NOT NULL, left_system INTEGER NOT NULL, at TEXT NOT NULL,
  PRIMARY KEY (rater, item, system, criterion)
);
"""
EXPORTED = ('rater', 'key', 'system', 'criterion', 'value', 'left', 'at', 'prompt', 'answer')


@dataclasses.dataclass(frozen=True)
class RatedItem:
  """A prompt, and the answer of each system."""

  key: str
  prompt: str
  answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Unit:
  """What is shown at once: an item, and of scales whose answer (of pairs -1: both)."""

  item: int
  system: int = -1


@dataclasses.dataclass(frozen=True)
class Rating:
  """One judgement. system: -1 for a pair, whose value is FIRST, SECOND or TIE; left: the system
  whose answer was shown on the left.
  """

  rater: str
  item: int
  system: int
  criterion: str
  value: int
  left: int
  at: str


def read_answers(place: str | os.PathLike) -> dict[str, tuple[str, str]]:
  """{key: (prompt, answer)} of a directory of results of tasks, those that are complete, or of one
  file of JSON lines.

  A line has a `prompt`, and an `answer` or `answers`, of which the first counts; others are left
  out. What is the same on both sides is known by its `id` or its prompt, how often that came
  before, and in a directory by its file. Raises ValueError where there is none.
  """
  place = pathlib.Path(place)
  names = [place]
  if place.is_dir():
    complete = (file for file, content in settings_in(place) if 'metrics' in content)
    names = [path for file in complete if (path := file.with_suffix('.jsonl')).is_file()]
  found: dict[str, tuple[str, str]] = {}
  times: collections.Counter = collections.Counter()
  for path in names:
    with open(path, 'rb') as file:
      for number, line in enumerate(file, 1):
        if not line.strip():
          continue
        row = files.json_object(line, f'{path}:{number}')
        several = row.get('answers')
        first = several[0] if isinstance(several, list) and several else None
        answer = row.get('answer', first)
        if not isinstance(answer, str) or not isinstance(row.get('prompt'), str):
          continue
        # Not by a digest of all that was asked: what stands before a prompt is a way to answer it.
        known = row.get('id', row['prompt'])
        key = hashlib.blake2b(json.dumps(known).encode(), digest_size=8).hexdigest()
        key = f'{path.stem}{OF_FILE}{key}' if place.is_dir() else key
        times[key] += 1
        key += f'.{times[key]}' if times[key] > 1 else ''
        found[key] = (row['prompt'], answer)
  if not found:
    raise ValueError(
      f'{place} has no answers: give a directory of results of tasks that generate, or a file of '
      'JSON lines, each with a prompt and an answer'
    )
  return found


def items_of(
  sides: Sequence[Mapping[str, tuple[str, str]]],
) -> tuple[list[RatedItem], dict[str, int]]:
  """(What all sides answer, how many questions were left out and why).

  A directory beside a file is matched whatever its files are called. Raises ValueError where sides
  have different prompts by one key, or nothing in common, and for a question of a directory beside
  a file that is in several of its files.
  """
  sides = _matched(sides)
  first = sides[0]
  shared = [key for key in first if all(key in side for side in sides)]
  items, equal = [], 0
  for key in shared:
    prompts = {side[key][0] for side in sides}
    if len(prompts) > 1:
      raise ValueError(
        f'a question is the same by its id, and has different prompts: {sorted(prompts)[0][:60]!r} '
        f'and {sorted(prompts)[1][:60]!r}; give results of the same tasks'
      )
    answers = tuple(side[key][1] for side in sides)
    if len(sides) > 1 and len(set(answers)) == 1:
      equal += 1
      continue
    items.append(RatedItem(key, first[key][0], answers))
  if not items:
    reason = f'{equal} answers are the same on both sides' if equal else 'no question is on all'
    raise ValueError(f'there is nothing to rate: {reason}; give other results')
  alone = sum(len(side) for side in sides) - len(shared) * len(sides)
  return items, {'of one side alone': alone, 'with equal answers': equal}


def _matched(
  sides: Sequence[Mapping[str, tuple[str, str]]],
) -> list[Mapping[str, tuple[str, str]]]:
  """The sides, with keys of directories without their files where another side is a file."""
  of_files = [{key.rpartition(OF_FILE)[0] for key in side} for side in sides]
  if all('' in names for names in of_files) or not any('' in names for names in of_files):
    return [*sides]
  every = {key for side in sides for key in side if OF_FILE not in key}
  matched = []
  for side in sides:
    plain: dict[str, tuple[str, str]] = {}
    places: dict[str, str] = {}
    for key, said in side.items():
      name, _, own = key.rpartition(OF_FILE)
      if own in plain and own in every:
        raise ValueError(
          f'{said[0][:60]!r} is a question of {places[own]} and of {name}, and one of a file that '
          'is rated beside them; give the file of one of them'
        )
      plain[own], places[own] = said, name
    matched.append(plain)
  return matched


def rater_of(name: object) -> str:
  """A rater's name. Raises ValueError for what is none."""
  text = ' '.join(name.split()) if isinstance(name, str) else ''
  if not 0 < len(text) <= NAME or not text.isprintable():
    raise ValueError(f'a name has 1 to {NAME} printable characters')
  return text


class Study:
  """A file of ratings, made if it is not there.

  Args:
    systems: names of the sides, which raters never see.
    seed: of the order of items, and of sides, which differ from rater to rater.

  Raises ValueError for a file of another study. Safe to use from several threads, and with other
  processes on the same file.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    systems: Sequence[str],
    items: Sequence[RatedItem],
    mode: str,
    criteria: Sequence[str],
    seed: int,
  ):
    criteria = [PREFERENCE] if mode == PAIRS else [*criteria]
    if mode == PAIRS and len(systems) != 2:
      raise ValueError(f'{len(systems)} places are no pair: give two, or --mode={SCALES}')
    self.path, self._lock = pathlib.Path(path), threading.Lock()
    self._connect()
    contents = [[item.key, item.prompt, item.answers] for item in items]
    asked = {
      'version': VERSION,
      'mode': mode,
      'systems': [*systems],
      'criteria': criteria,
      'seed': seed,
      'items': files.digest(contents),
    }
    with self._lock, self._db:
      self._db.execute('BEGIN IMMEDIATE')
      was = self._settings()
      if not was:
        rows = [(i, x.key, x.prompt, json.dumps(x.answers)) for i, x in enumerate(items)]
        self._db.executemany('INSERT INTO item VALUES (?, ?, ?, ?)', rows)
        pairs = [(what, json.dumps(value)) for what, value in asked.items()]
        self._db.executemany('INSERT INTO study VALUES (?, ?)', pairs)
    differing = [what for what, value in asked.items() if was and was.get(what) != value]
    if differing:
      raise ValueError(
        f'{path} is a study with other {", ".join(differing)}; give another --ratings, or go on '
        'with the same arguments'
      )
    self._read()

  @classmethod
  def open(cls, path: str | os.PathLike) -> 'Study':
    """One that is there. Raises ValueError where it is not."""
    if not os.path.exists(path):
      raise ValueError(f'{path} is not there: nothing was rated yet; rate some answers first')
    study = cls.__new__(cls)
    study.path, study._lock = pathlib.Path(path), threading.Lock()
    study._connect()
    study._read()
    return study

  def _connect(self) -> None:
    try:
      # Durable when it says so: with sqlite's own journal and its default, synchronous=FULL.
      self._db = sqlite3.connect(
        self.path, timeout=BUSY, check_same_thread=False, isolation_level=None
      )
      self._db.executescript(SCHEMA)
    except sqlite3.DatabaseError as error:
      raise ValueError(f'{self.path} is no file of ratings: {error}') from error

  def _settings(self) -> dict:
    rows = self._db.execute('SELECT what, value FROM study')
    return {what: json.loads(value) for what, value in rows}

  def _read(self) -> None:
    settings = self._settings()
    if settings.get('version') != VERSION:
      raise ValueError(f'{self.path} is no study of version {VERSION}: {settings or "it is empty"}')
    self.mode: str = settings['mode']
    self.systems: list[str] = settings['systems']
    self.digest: str = settings['items']
    self.criteria: list[str] = settings['criteria']
    self.seed: int = settings['seed']
    rows = self._db.execute('SELECT key, prompt, answers FROM item ORDER BY number')
    self.items = [
      RatedItem(key, prompt, tuple(json.loads(answers))) for key, prompt, answers in rows
    ]
    sides = [-1] if self.mode == PAIRS else range(len(self.systems))
    self._units = [Unit(i, system) for i in range(len(self.items)) for system in sides]

  def name_of(self, rater: str, unit: Unit) -> str:
    """A unit's name for a rater, which tells nothing of whose answer it is."""
    return self._hash('name', rater, unit).hex()[:16]

  def left_of(self, rater: str, unit: Unit) -> int:
    """The system whose answer is on the left."""
    return unit.system if unit.system >= 0 else self._hash('left', rater, unit)[0] % 2

  def _hash(self, what: str, rater: str, unit: Unit) -> bytes:
    content = json.dumps([what, self.seed, rater, unit.item, unit.system]).encode()
    return hashlib.blake2b(content, digest_size=16).digest()

  def order(self, rater: str) -> list[Unit]:
    """All units, as this rater is to see them."""
    return sorted(self._units, key=lambda unit: self._hash('order', rater, unit))

  def done(self, rater: str) -> list[Unit]:
    """Units that a rater has rated, in the order in which they did."""
    query = (
      'SELECT item, system FROM rating WHERE rater = ? GROUP BY item, system ORDER BY max(rowid)'
    )
    with self._lock:
      return [Unit(*row) for row in self._db.execute(query, [rater])]

  def save(self, rater: str, unit: Unit, values: Mapping[str, object]) -> None:
    """Writes a value of every criterion, for good; one that is there is replaced.

    Raises ValueError for other criteria, and values that are none.
    """
    known = (FIRST, SECOND, TIE) if self.mode == PAIRS else POINTS
    if unit not in self._units or [*values] != self.criteria:
      raise ValueError(f'{unit} with {[*values]}: this study asks for {self.criteria}')
    if not all(type(value) is int and value in known for value in values.values()):
      raise ValueError(f'{dict(values)}: values are {min(known)} to {max(known)}')
    at = datetime.datetime.now().astimezone().isoformat(' ', 'milliseconds')
    left = self.left_of(rater, unit)
    rows = [
      (rater, unit.item, unit.system, name, value, left, at) for name, value in values.items()
    ]
    with self._lock, self._db:
      self._db.execute('BEGIN IMMEDIATE')
      # Its row is a new one: `done` is in the order of rows.
      self._db.executemany('INSERT OR REPLACE INTO rating VALUES (?, ?, ?, ?, ?, ?, ?)', rows)

  def values(self, rater: str, unit: Unit) -> dict[str, int]:
    """What a rater said; {} where they have not."""
    query = 'SELECT criterion, value FROM rating WHERE rater = ? AND item = ? AND system = ?'
    with self._lock:
      return dict(self._db.execute(query, [rater, unit.item, unit.system]).fetchall())

  def ratings(self) -> list[Rating]:
    """All of them, in the order in which they came."""
    with self._lock:
      return [Rating(*row) for row in self._db.execute('SELECT * FROM rating ORDER BY rowid')]

  def comparisons(self) -> list[Comparison]:
    """Of pairs."""
    first, second = self.systems
    return [
      Comparison(self.items[each.item].key, first, second, each.value) for each in self.ratings()
    ]

  def exported(self) -> Iterator[str]:
    """Lines of CSV, texts included."""
    for row in [EXPORTED, *map(self._row, self.ratings())]:
      line = io.StringIO()
      csv.writer(line, lineterminator='\n').writerow(row)
      yield line.getvalue()

  def _row(self, each: Rating) -> list:
    item = self.items[each.item]
    if each.system < 0:
      value = [*self.systems, 'tie'][each.value]
      system, answer = '', json.dumps(dict(zip(self.systems, item.answers)), ensure_ascii=False)
    else:
      value, system, answer = each.value, self.systems[each.system], item.answers[each.system]
    left = self.systems[each.left]
    row = [each.rater, item.key, system, each.criterion, value, left, each.at, item.prompt, answer]
    return [_plain(cell) for cell in row]

  def close(self) -> None:
    with self._lock:
      self._db.close()


def _plain(cell):
  """What a spreadsheet would take for a formula, as a text."""
  return f"'{cell}" if isinstance(cell, str) and cell[:1] in ('=', '+', '-', '@', '\t') else cell
