"""What does a model forget when it learns to summarise dialogues, and what keeps it? The exercise
that courses set: ask a model, tune it in several ways, ask it again, and report.

    python -m evaluation.flan_t5_exercise                  a small T5, which is made first
    python -m evaluation.flan_t5_exercise --model=DIR      Flan-T5, as transformers keeps it
    python -m evaluation.flan_t5_exercise --model=smollm2  a decoder, from its package

Every stage is a command of this project, is printed, and can be typed as well. One that is over is
not run again; one that was interrupted goes on where it was. docs/exercise.md has a report.
"""

import argparse
import ctypes
import dataclasses
import json
import pathlib
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import commands
import files
from evaluation import exercise_report, generated, task
from evaluation.exercise_report import BASE, Attempt
from evaluation.generated import Row

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY, DECODER = 'tiny', 'smollm2'
STAGES = 'stages.json'
# Rows that are made to learn from; so many texts of them are pretrained on, too.
GENERAL_ROWS = {
  'number_words': 6000,
  'docstring_questions': 5000,
  'templated_sentiment': 3000,
  'shuffled_words': 6000,
}
TARGET_ROWS, TEXTS = 1000, 4000


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a model is made or brought, tuned, and asked.

  Attributes:
    begin: (name, what for, command) of what makes or brings it, the last one as BASE.
    config: of train.py, by which it is tuned. format: of the records that this takes.
    high, low, lora: rates. shared: flags of every way. tasks: what is to be kept.
    limit: questions of each task; 0: all.
  """

  begin: tuple[tuple[str, str, tuple[str, ...]], ...]
  config: str
  format: str
  high: float
  low: float
  lora: float
  shared: tuple[str, ...]
  tasks: tuple[str, ...] = generated.GENERAL
  limit: int = 0

  @property
  def ways(self) -> list[Attempt]:
    """All that are compared."""
    adapter = ('--config.adapter.kind=lora', '--config.adapter.rank=8')
    return [
      Attempt('full', f'all weights, at {self.high:g}', self.high),
      Attempt('lower', f'all weights, at {self.low:g}', self.low),
      Attempt('lora', f'LoRA of rank 8, at {self.lora:g}', self.lora, adapter),
      Attempt(
        'replay', f'all weights, at {self.high:g}; half is replayed', self.high, replayed=True
      ),
    ]


def tiny(place: pathlib.Path) -> Recipe:
  """A T5 with rotary positions, of 1.3 M parameters: span corruption, then four tasks at once."""
  common = (f'--config.data.cache_dir={place}/cache', '--config.data.batch_size=8')
  fast = ('--config.optimizer.name=muon', '--config.optimizer.learning_rate=0.01')
  pretrain = (
    'train.py',
    '--config=configs/span_corruption.py',
    f'--workdir={place}/pretrained',
    '--config.data.sources[0].kind=jsonl',
    f'--config.data.sources[0].path={place}/data/corpus.jsonl',
    '--config.data.sources[0].text_field=text',
    '--config.data.clean.near_duplicates=0',
    '--config.data.clean.anonymise=()',
    '--config.data.tokenizer.vocabulary=1024',
    '--config.model.layers=2',
    '--config.model.encoder_layers=2',
    # T5's own positions, relative ones, take a model this small more steps than there are here.
    '--config.model.position=rope',
    '--config.model.attention_scale=0',
    '--config.train.steps=300',
    '--config.train.eval_every=0',
    *common,
    *fast,
  )
  teach = (
    'train.py',
    '--config=configs/tune_pairs.py',
    f'--config.init={place}/pretrained',
    f'--workdir={place}/{BASE}',
    f'--config.data.sources[0].path={place}/data/general.jsonl',
    '--config.objective.target_length=64',
    '--config.train.steps=900',
    '--config.train.eval_every=300',
    *common,
    *fast,
  )
  begin = (
    ('pretrained', 'span corruption, of docstrings and of rows that are learned', pretrain),
    (BASE, 'four tasks at once', teach),
  )
  shared = (
    '--config.objective.target_length=64',
    '--config.train.steps=200',
    '--config.train.eval_every=0',
    *common,
  )
  return Recipe(begin, 'configs/tune_pairs.py', 'pair', 3e-3, 1e-3, 1e-3, shared)


def flan_t5(place: pathlib.Path, directory: str) -> Recipe:
  """Flan-T5 or another T5 in transformers' form."""
  bring = ('convert.py', 'import', '--from', directory, '--workdir', f'{place}/{BASE}')
  shared = ('--config.data.batch_size=16', f'--config.data.cache_dir={place}/cache')
  begin = ((BASE, 'the model', bring),)
  return Recipe(begin, 'configs/tune_pairs.py', 'pair', 1e-3, 3e-5, 1e-3, shared)


def decoder(place: pathlib.Path) -> Recipe:
  """SmolLM2-135M-Instruct."""
  bring = ('convert.py', 'import', '--from', DECODER, '--workdir', f'{place}/{BASE}')
  shared = (
    '--config.data.sequence_length=192',
    '--config.data.batch_size=2',
    '--config.train.epochs=0',
    '--config.train.steps=24',
    '--config.train.save_every=24',
    '--config.train.keep_last=1',
    '--config.train.eval_batches=4',
    f'--config.data.cache_dir={place}/cache',
  )
  tasks = ('number_words', 'docstring_questions', 'templated_sentiment', 'shuffled_pairs')
  begin = ((BASE, 'the model', bring),)
  return Recipe(begin, 'configs/sft.py', 'completion', 1e-3, 2e-5, 1e-3, shared, tasks, 40)


def parser() -> argparse.ArgumentParser:
  made = argparse.ArgumentParser(
    prog='python -m evaluation.flan_t5_exercise',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = made.add_argument
  add('--model', default=TINY, help=f'{TINY}, {DECODER}, or the directory of a T5')
  add('--workdir', default='', help='of all that comes out; default: runs/exercise_MODEL')
  add('--tasks', default='', help='what is to be kept: names or files, by commas (evaluate.py)')
  add('--target', default='', help='what it is tuned for: a name or file; needs --train')
  add('--train', default='', help='rows to tune on, a file, instead of those that are made')
  add('--replay', default='', help='rows of --tasks, for the way that replays; else it is left out')
  add('--columns', default='', help='of these files, as in source=dialogue,target=summary')
  add('--data', default='.', help="directory of the tasks' files")
  add('--steps', type=int, default=0, help='of every way')
  add('--limit', type=int, default=0, help='questions of each task, the first ones')
  return made


def main(arguments: Sequence[str] | None = None) -> None:
  """The command line; what its user can mend ends it with a message."""
  options = parser().parse_args(arguments)
  with commands.mendable(ImportError):
    run(options)


def run(options: argparse.Namespace) -> None:
  """All stages, and the report."""
  check(options)
  name = options.model if options.model in (TINY, DECODER) else 'flan_t5'
  place = pathlib.Path(options.workdir or f'runs/exercise_{name}')
  recipes = {TINY: lambda: tiny(place), DECODER: lambda: decoder(place)}
  recipe = recipes.get(options.model, lambda: flan_t5(place, options.model))()
  place.mkdir(parents=True, exist_ok=True)
  remedy = 'wait until it ends, end it, or give another --workdir'
  with files.locked(place / 'lock', str(place), remedy):
    stages = Stages(place)
    write_rows(place, recipe)
    for stage in recipe.begin:
      stages.run(*stage)
    target = options.target or generated.TARGET
    tasks = options.tasks.split(',') if options.tasks else [*recipe.tasks]
    asking = (f'--tasks={",".join([*tasks, target])}', f'--data={options.data}')
    if limit := options.limit or recipe.limit:
      asking += (f'--limit={limit}',)
    stages.run(f'ask-{BASE}', 'before', ('evaluate.py', f'--workdir={place}/{BASE}', *asking))
    ways = [way for way in recipe.ways if not way.replayed or options.replay or not options.tasks]
    if len(ways) < len(recipe.ways):
      print('NOTE: no way replays --tasks without rows of them; give some by --replay')
    for way in ways:
      stages.run(way.name, way.about, tuning_of(place, recipe, way, options))
      asked = ('evaluate.py', f'--workdir={place}/{way.name}', *asking)
      stages.run(f'ask-{way.name}', f'after: {way.about}', asked)
    exercise_report.write(place, ways, task.read(target)[0], stages.done)
  print(f'\nwrote {place}/{exercise_report.PAGE}, {exercise_report.PICTURE} and its values')


def check(options: argparse.Namespace) -> None:
  """Raises ValueError for flags that mean nothing together, before anything is run."""
  if options.model not in (TINY, DECODER) and not pathlib.Path(options.model).is_dir():
    raise ValueError(
      f'--model={options.model} is no directory; give one with config.json, a tokenizer and '
      f'safetensors of a T5, or {TINY} or {DECODER}'
    )
  if options.target and not options.train:
    raise ValueError(f'--target={options.target} needs rows to tune on; give a file by --train')
  if options.columns and not options.train:
    raise ValueError(f'--columns={options.columns} is of --train and --replay; give one')
  for name in filter(None, options.tasks.split(',')):
    task.read(name)
  name, target = task.read(options.target or generated.TARGET)
  if target.metrics and not any(isinstance(metric, str) for metric in target.metrics):
    raise ValueError(
      f'--target={options.target}: how metrics of its own add up is not known where two models are '
      f'compared; give {name} one of evaluation.text_metrics.METRICS, too'
    )
  for path in filter(None, (options.train, options.replay)):
    task.kind_of(path)
    if not pathlib.Path(path).is_file():
      raise FileNotFoundError(f'{path} is not there; give a file of rows')


def tuning_of(
  place: pathlib.Path, recipe: Recipe, way: Attempt, options: argparse.Namespace
) -> tuple[str, ...]:
  """The command that tunes by a way."""
  sources = [options.train or f'{place}/data/target.jsonl']
  if way.replayed:
    sources.append(options.replay or f'{place}/data/general.jsonl')
  flags = []
  for i, path in enumerate(sources):
    source = {'kind': task.kind_of(path), 'path': path, 'format': recipe.format}
    if options.columns:
      source['columns'] = options.columns
    flags += [f'--config.data.sources[{i}].{name}={value}' for name, value in source.items()]
  if options.steps:
    flags += ['--config.train.epochs=0', f'--config.train.steps={options.steps}']
  return (
    'train.py',
    f'--config={recipe.config}',
    f'--config.init={place}/{BASE}',
    f'--workdir={place}/{way.name}',
    *recipe.shared,
    *flags,
    f'--config.optimizer.learning_rate={way.rate:g}',
    *way.flags,
  )


def write_rows(place: pathlib.Path, recipe: Recipe) -> None:
  """Files of rows to learn from; always the same ones."""
  general = [row for name in generated.GENERAL for row in generated.rows(name, GENERAL_ROWS[name])]
  random.Random(0).shuffle(general)
  target = generated.rows(generated.TARGET, TARGET_ROWS)
  corpus = generated.corpus([*general[:TEXTS], *target])
  (place / 'data').mkdir(exist_ok=True)
  made = {
    'general': [record(row, recipe.format) for row in general],
    'target': [record(row, recipe.format) for row in target],
    'corpus': [{'text': text} for text in corpus],
  }
  for name, rows in made.items():
    lines = (json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    files.replace(place / 'data' / f'{name}.jsonl', ''.join(lines))


def record(row: Row, form: str) -> Row:
  """A row in a format of data/records.py; a decoder's answer stands behind a space."""
  if form == 'pair':
    return {'source': row['source'], 'target': row['target']}
  return {'prompt': row['source'], 'completion': f' {row["target"]}'}


class Stages:
  """Commands of which each is run to its end once; a file says which were.

  Attributes:
    done: {name: {'command', 'typed', 'seconds'}}; seconds are None of one that was interrupted.
  """

  def __init__(self, place: pathlib.Path):
    self._file = place / STAGES
    kept = self._file.read_bytes() if self._file.exists() else b'{}'
    self._begun = files.json_object(kept, self._file)

  @property
  def done(self) -> dict[str, dict]:
    return {name: stage for name, stage in self._begun.items() if stage['over']}

  def run(self, name: str, about: str, command: Sequence[str]) -> None:
    """Runs a command of this project, unless it was run before. Ends this process where it fails.

    Raises ValueError where another command was run by this name.
    """
    typed = f'python {shlex.join(command)}'
    was = self._begun.get(name)
    if was and was['typed'] != typed:
      before, now = ({*shlex.split(command)} for command in (was['typed'], typed))
      old, new = (' '.join(sorted(a - b)) for a, b in ((before, now), (now, before)))
      raise ValueError(
        f'{self._file}: {name} was run with {old or "less"}, and is now with {new or "less"}; give '
        'another --workdir'
      )
    if was and was['over']:
      print(f'== {name}: is there already')
      return
    print(f'\n== {name}: {about}\n$ {typed}', flush=True)
    self._keep(name, {'typed': typed, 'over': False, 'seconds': None})
    began = time.monotonic()
    program, *flags = command
    # -9 of this process leaves none behind that holds the directory.
    ended = subprocess.run([sys.executable, ROOT / program, *flags], preexec_fn=_ended_with_us)
    if ended.returncode:
      sys.exit(f'error: {name} failed, by its command above; run the exercise again to go on')
    seconds = None if was else time.monotonic() - began
    self._keep(name, {'typed': typed, 'over': True, 'seconds': seconds})

  def _keep(self, name: str, stage: dict) -> None:
    self._begun[name] = stage
    files.replace(self._file, json.dumps(self._begun, indent=1) + '\n')


def _ended_with_us() -> None:
  """In a process that begins: Linux ends it with the one that began it."""
  if sys.platform == 'linux':
    set_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_signal, signal.SIGKILL)


if __name__ == '__main__':
  commands.end(main)
