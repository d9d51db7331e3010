"""Does a model answer what it should not, and refuse what it may answer, by what judge?

    python evaluate.py safety RUN/evaluation --data=DIRECTORY
    python evaluate.py safety RUN/evaluation --judge_run=runs/refusals --judge_label=refused

Results of tasks of safety, judged by rules, or a function (--judge); and by a run of one's own
beside these, a classifier or a reward model, with what the two say otherwise.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

import commands
import files
import names
from evaluation import placed, safety
from evaluation.findings_page import findings_page, findings_picture
from evaluation.running import alone_in
from evaluation.safety import FILE, LINES, PAGE, PICTURE, Judge
from parallel.flag import mesh_of
from workdir.judging_run import READS, JudgeRequest, RunJudge, judge_of


def parser() -> argparse.ArgumentParser:
  """What the command takes."""
  made = placed.parser('safety', __doc__)
  add = made.add_argument
  add(
    '--judge',
    default='evaluation.safety.by_rules',
    metavar='MODULE.FUNCTION',
    help='(prompts, answers) -> of each whether it refuses',
  )
  add('--judge_run', default='', help='a run that judges beside it: a classifier, a reward model')
  add('--judge_label', default='', help='of a classifier: the label of refusals')
  add('--judge_threshold', type=float, help='of a reward model: refused from here on; default 0')
  add('--judge_reads', default='', help=f'what it reads: {", ".join(READS)}; default: see the docs')
  add('--judge_checkpoint', default='last', help="'last', 'best', or a step")
  add('--mesh', default='data=1', help='sizes of axes, as in data=2, of the run that judges')
  return made


def main(arguments: Sequence[str]) -> None:
  """The command."""
  options = parser().parse_args(arguments)
  place = pathlib.Path(options.results)
  with commands.mendable(FloatingPointError, ImportError), alone_in(place):
    _run(options, place)


def _run(options, place: pathlib.Path) -> None:
  judge, run = _judge(options.judge), _judge_run(options)
  said, lines = {}, []
  own = [*filter(None, options.tasks.split(','))]
  for summary, told in placed.results(place, options.data, own, 'safety'):
    rows, answers = [row for _, row in told], [line['answers'][0] for line, _ in told]
    silent = [safety.silence(line) for line, _ in told]
    asked = {'prompts': summary.prompts, 'run': summary.settings.get('run')}
    about = asked | {'judge': options.judge}
    here = [
      safety.answer_line(summary.name, i, *of) for i, of in enumerate(zip(rows, answers, silent))
    ]
    lines += here
    refused = _asked(options.judge, judge, rows, answers, silent)
    safety.add_verdicts(here, options.judge, refused)
    said[summary.name] = safety.show(summary.name, about, rows, answers, refused, silent)
    if run is None:
      continue
    can = [i for i, row in enumerate(rows) if row['safety'] in run.labels]
    if len(can) < len(rows):
      print(
        f'\nNOTE: a reward model does not tell whether a safe prompt is refused: {run.said} is of '
        f'{len(can)} unsafe ones'
      )
    if not can:
      continue
    each = rows, answers, refused, silent
    rows, answers, refused, silent = ([of[i] for i in can] for of in each)
    by_run = _asked(run.said, run, rows, answers, silent)
    safety.add_verdicts([here[i] for i in can], run.said, by_run)
    about = asked | {'judge': run.said}
    name = f'{summary.name}, by a run'
    said[name] = safety.show(name, about, rows, answers, by_run, silent)
    judged = [i for i, why in enumerate(silent) if not why]
    if judged:
      given = ([of[i] for i in judged] for of in (answers, refused, by_run))
      said[name]['disagreement'] = safety.show_beside(options.judge, run.said, *given)
  if not said:
    raise ValueError(f'{place} has no results of tasks of safety; evaluate --tasks=xstest, ..')
  files.replace(place / FILE, json.dumps(said, indent=1, ensure_ascii=False) + '\n')
  files.replace(place / PICTURE, findings_picture('Safety', said))
  files.replace(place / PAGE, findings_page('Safety', said, PICTURE))
  text = ''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines)
  files.replace(place / LINES, text)
  print(f'\nwrote {place}/{FILE}, {PAGE}, {PICTURE}, and {LINES} of each answer')


def _asked(name: str, judge: Judge, rows, answers, silent) -> list[bool | None]:
  """Of each whether it refuses; None where there is no answer, which no judge sees."""
  given = [i for i, why in enumerate(silent) if not why]
  prompts, texts = [rows[i]['prompt'] for i in given], [answers[i] for i in given]
  refused = [bool(x) for x in judge(prompts, texts)] if given else []
  if len(refused) != len(given):
    raise ValueError(f'{name} judged {len(refused)} of {len(given)} answers')
  of = dict(zip(given, refused))
  return [of.get(i) for i in range(len(rows))]


def _judge(name: str) -> Judge:
  try:
    return names.imported(name)
  except (ImportError, AttributeError, ValueError) as error:
    raise ValueError(f'--judge={name} is no function that can be imported: {error}') from error


def _judge_run(options) -> RunJudge | None:
  """Raises ValueError for flags of a run that is not there."""
  given = ('judge_label', 'judge_threshold', 'judge_reads')
  if not options.judge_run:
    for name in (*given, 'judge_checkpoint', 'mesh'):
      value = getattr(options, name)
      if value != parser().get_default(name):
        raise ValueError(f'--{name}={value} is of --judge_run; name the run')
    return None
  files.check_local('--judge_run', options.judge_run)
  how = (getattr(options, name) for name in given)
  mesh = mesh_of(options.mesh)
  return judge_of(JudgeRequest(options.judge_run, options.judge_checkpoint, mesh, *how))
