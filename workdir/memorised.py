"""What has a run kept of the text that it was trained on?

    python evaluate.py memorisation --workdir=RUN
    python evaluate.py memorisation --workdir=RUN --training='read/*.txt' --control='other/*.txt'

Passages of the rows that the run was trained on, cut into a prompt and what truly follows, beside
as many of what it held out: what the model writes behind the prompts (extraction), how well its
scores tell which it has read (membership), and what of its own text stands in the training text
(overlap).
Of a model that was imported, name text that it has read, and text of the same kind that it has not.
"""

import argparse
import pathlib
from collections.abc import Iterator, Sequence

import commands
import files
import names
from data.config import SourceConfig
from data.sources import paths
from decode.generator import Generator
from evaluation import contamination, memorisation
from evaluation.journal import Journal
from evaluation.memorisation import OVERLAP, PAGE, PARTS, MemoryQuestions
from evaluation.passages import Cut, Passages, drawn
from evaluation.running import alone_in, check_own
from parallel import hosts
from parallel.flag import mesh_of
from workdir.open import config_of, run_of
from workdir.trained import Trained, trained


def parser() -> argparse.ArgumentParser:
  """What the command takes."""
  made = argparse.ArgumentParser(
    prog='evaluate.py memorisation',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  cut, add = Cut(), made.add_argument
  add('--workdir', required=True, help='directory of the run')
  add('--checkpoint', default='last', help="'last', 'best', or a step")
  add('--mesh', default='data=1', help='sizes of axes, as in data=2')
  add('--weights', default='', help='holds matrices in codes, as generate.py: int8, nf4:group=64')
  kinds = ', '.join(contamination.KINDS)
  add('--training', action='append', default=[], help=f'text that was read ({kinds}); several')
  add('--control', action='append', default=[], help='text that was not; default: held-out rows')
  add('--field', default='text', help='of JSON, CSV and Parquet: what holds the text')
  add('--parts', default=','.join(PARTS), help='of these, by commas')
  add('--prompt', type=int, default=cut.prompt, help='tokens of a prompt')
  add('--new', type=int, default=cut.new, help='tokens behind it')
  add('--limit', type=int, default=cut.limit, help='passages of each side, at most')
  add('--seed', type=int, default=0, help='of what is drawn, and of the bootstrap')
  add(
    '--share', type=float, default=MemoryQuestions.share, help='K of Min-K%%, in per cent of tokens'
  )
  add('--words', type=int, default=MemoryQuestions.words, help='of a run that is no chance')
  add(
    '--temperature',
    type=float,
    default=MemoryQuestions.temperature,
    help='of what is written by itself',
  )
  add('--output', default='', help='directory of the results; default: evaluation, in the run')
  return made


def main(arguments: Sequence[str]) -> None:
  """The command; its exit status is 0 also where something was kept: that is a finding."""
  options = parser().parse_args(arguments)
  with commands.mendable(FloatingPointError, ImportError):
    run(options)


def run(options) -> None:
  """What the options ask for."""
  parts = [names.check('--parts', part, PARTS) for part in options.parts.split(',')]
  files.check_local('--workdir', options.workdir)
  cut = Cut(options.prompt, options.new, options.limit, options.seed)
  if options.training and not options.control:
    raise ValueError(
      f'--training={options.training[0]} and no --control: how much of it a model writes says '
      'nothing without how much it writes of text that it has not read; name some of the same kind'
    )
  config = config_of(options.workdir)
  of = run_of(options.workdir, options.checkpoint, options.weights)
  hosts.cache_compilations(pathlib.Path(config.data.cache_dir) / 'xla')
  read = None if options.training else trained(options.workdir, options.checkpoint)
  model = Generator.load(
    options.workdir, options.checkpoint, mesh_of(options.mesh), options.weights
  )
  cut.check_context(model.context, model.plain.limit)
  members = read.members(cut) if read else _of_files(options, options.training, model, cut)
  control = (
    _of_files(options, options.control, model, cut) if options.control else read.control(cut)
  )
  output = pathlib.Path(options.output or pathlib.Path(options.workdir) / 'evaluation')
  output.mkdir(parents=True, exist_ok=True)
  by_chance = not options.control and config.data.split == 'hash' and not config.data.validation
  given = options.share, options.words, options.temperature, by_chance
  asked = MemoryQuestions(cut, members, control, _training(options, read, parts), *given)
  with alone_in(output):
    check_own(output / memorisation.FILE, {'run': of})
    path = output / memorisation.JOURNAL
    journal = Journal(path, memorisation.settings_of(of, asked))
    if len(journal):
      print(f'{path}: {len(journal)} lines of an interrupted measurement are there already')
    memory = memorisation.measured(model, asked, parts, journal=journal)
    values = memorisation.write(output, of, asked, memory)
    journal.end()
  print('\n'.join(['', *memorisation.text_of(values)[1:]]))
  print(f'\nwrote {output}/{PAGE}, {memorisation.FILE} and {memorisation.LINES}')


def _training(options, read: Trained | None, parts: Sequence[str]) -> Iterator[str] | None:
  if OVERLAP not in parts:
    return None
  return read.texts() if read else contamination.texts(_sources(options, options.training))


def _sources(options, given: Sequence[str]) -> list[SourceConfig]:
  return [contamination.source_of(path, options.field) for path in given]


def _of_files(options, given: Sequence[str], model: Generator, cut: Cut) -> Passages:
  sources = _sources(options, given)
  same = {path for source in sources for path in paths(source)}
  others = {
    path
    for other in (options.training, options.control)
    if other is not given
    for source in _sources(options, other)
    for path in paths(source)
  }
  if both := sorted(same & others):
    raise ValueError(f'{both[0]} is in --training and in --control; a control was not read')
  return drawn(contamination.texts(sources), ', '.join(given), model.tokenizer, cut)
