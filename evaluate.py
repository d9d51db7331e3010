"""Says how good a model is:

  python evaluate.py --workdir=runs/smollm2 --tasks=docstrings,stdlib --limit=50
  python evaluate.py --workdir=runs/smollm2 --tasks=arc_easy,squad --shots=0,3 --data=DIRECTORY
  python evaluate.py --workdir=runs/smollm2 --lm_eval=our_task --lm_eval_path=DIRECTORY
  python evaluate.py compare runs/base/evaluation runs/tuned/evaluation

  python evaluate.py --workdir=runs/smollm2 --config=configs/classify.py --shots=0,4 \\
    --calibration=none,contextual '--config.data.sources[0].path=sentiment.csv'

  python evaluate.py --workdir=runs/reward
  python evaluate.py rate runs/base/evaluation runs/tuned/evaluation
  python evaluate.py memorisation --workdir=runs/tiny
  python evaluate.py card runs/tiny

What is asked is in tasks (configs/tasks, --tasks=list; docs/evaluate.md), or, without --tasks, in
the config (of a run that was tuned to classify, or to give rewards, its own). Every number comes
with a 95% interval and a digest of the prompts that it is of.
"""

from parallel import hosts

if __name__ == '__main__':
  hosts.use_huge_pages()
  hosts.leave_at_signals()

import json
import pathlib
import re
import sys
import time

from absl import app, flags, logging

import commands
import files
import names
from data import labelled
from data.template import Template
from decode import opening
from decode.generator import Generator
from evaluation import (
  classify,
  harness,
  harness_page,
  harness_results,
  heads,
  page,
  rewards,
  running,
  task,
)
from evaluation.attacks import named
from evaluation.examples import Manner, of_safety
from evaluation.prompts import Shots
from evaluation.sandbox import Sandbox
from parallel.flag import mesh_of
from training import config as configs, overrides
from workdir import reward
from workdir.head import WORDS, head_of, labels_by
from workdir.open import config_of, run_of

CONFIG = overrides.define_flag()
WORKDIR, CHECKPOINT, MESH, WEIGHTS = opening.define(required=False)
TASKS = flags.DEFINE_list(
  'tasks',
  [],
  "What is asked: names of configs/tasks, or paths of one's own files; several by commas. 'list' "
  'lists them.',
)
LM_EVAL = flags.DEFINE_list(
  'lm_eval', [], "What is asked: tasks of EleutherAI's lm-evaluation-harness; several by commas."
)
LM_EVAL_PATH = flags.DEFINE_string(
  'lm_eval_path', '', "Directory of more of its tasks, one's own YAML files."
)
DATA = flags.DEFINE_string('data', '.', "Directory of the tasks' files.")
SYSTEM = flags.DEFINE_string(
  'system', '', "Text before each prompt of a task; with --chat the system's message."
)
CHAT = flags.DEFINE_bool(
  'chat', False, "Prompts of tasks are a user's turns, by the chat template of the run."
)
ATTACKS = flags.DEFINE_list(
  'attacks',
  [],
  'In which ways prompts of tasks of safety are asked besides: role_play, prefix, base64, '
  'many_shot, or a file with a suffix in each line; several by commas.',
)
RUN_PROGRAMS = flags.DEFINE_string(
  'run_programs',
  '',
  'Where programs run that the model wrote, of tasks that judge answers by running them: '
  "'confined', without network and with an empty directory; 'trusted', with your own rights; by "
  'default nowhere.',
)
SHOTS = flags.DEFINE_list(
  'shots', ['0'], 'How many training examples stand before each question; several by commas.'
)
SEED = flags.DEFINE_integer(
  'seed', 0, 'Decides which examples are shown, and of the bootstrap.', lower_bound=0
)
CALIBRATION = flags.DEFINE_list(
  'calibration',
  ['none'],
  "What scores of labels are set against: 'none', 'contextual' (texts without content), 'pmi' (no "
  'text); several by commas.',
)
LIMIT = flags.DEFINE_integer(
  'limit', 0, 'Only so many of the questions or records, the first ones; 0: all.', lower_bound=0
)
OUTPUT = flags.DEFINE_string(
  'output', None, 'Directory of the results; default: evaluation, in that of the run.'
)

# What is not of one run: by what a command line begins with, and who takes what comes behind it.
SUBCOMMANDS = {
  'bias': 'evaluation.bias.main',
  'canaries': 'evaluation.canaries.main',
  'card': 'workdir.card.main',
  'compare': 'evaluation.compare.main',
  'contamination': 'evaluation.contamination.main',
  'knowledge': 'evaluation.knowledge.main',
  'memorisation': 'workdir.memorised.main',
  'rate': 'evaluation.rate.main',
  'safety': 'workdir.safety.main',
}
TASK = 'classify'  # the beginning of every file's name
REWARDS = 'reward'  # the objective, and the beginning of its files' names


def check_flags() -> list[int]:
  """How many shots are asked for. Raises ValueError for values that mean nothing."""
  files.check_local('--workdir', WORKDIR.value, buckets=True)
  files.check_local('--output', OUTPUT.value or '', buckets=True)
  for name in CALIBRATION.value:
    names.check('--calibration', name, classify.CALIBRATIONS)
  if not CALIBRATION.value:
    raise ValueError(f'--calibration= names none of {", ".join(classify.CALIBRATIONS)}')
  if not SHOTS.value or not all(text.isdecimal() for text in SHOTS.value):
    raise ValueError(f'--shots={",".join(SHOTS.value)} must be whole numbers, as in --shots=0,4')
  return [int(text) for text in SHOTS.value]


def check_objective(config: configs.Config, ways: list[int]) -> None:
  """Raises ValueError for a config that says nothing of classification or rewards, or not in these
  ways.
  """
  told = labels_by(config)
  if not told and config.objective.kind != REWARDS:
    raise ValueError(
      f'objective.kind={config.objective.kind!r} names no template to classify by; give '
      "--config=configs/classify.py, and --config.objective.template for one's own"
    )
  if config.objective.kind == REWARDS:
    for flag in (SHOTS, CALIBRATION, WEIGHTS):
      if flag.value != flag.default:
        raise ValueError(
          f'--{flag.name}={flag.value}: a reward model (objective.kind={REWARDS!r}) reads answers '
          'as they are, with the weights that it was trained with; leave it out'
        )
    return
  if told != WORDS and any(ways):
    raise ValueError(
      f'--shots={",".join(map(str, ways))}: a head reads texts as they are, without examples; use '
      '--shots=0'
    )


def scorer(config: configs.Config, generator: Generator, template: Template):
  """(records, shots) -> their scores, by the words of the template or by the head of the run."""
  told = labels_by(config)
  if told == WORDS:
    asking = classify.asking_of(generator, template)
    return lambda records, shots: classify.scored(generator, asking, records, shots)
  place = WORKDIR.value, told, CHECKPOINT.value, generator.mesh
  head = head_of(*place, config.objective)
  # What training would leave out is judged all the same, as everybody is.
  side = 'left' if config.objective.too_long == 'left' else 'right'
  return lambda records, _: heads.scored(generator, head, template, records, side)


def evaluate(
  config: configs.Config, generator: Generator, of: dict, ways: list[int], output: pathlib.Path
) -> list[classify.Result]:
  """Results of every way to ask, which are printed and written; of: what they say of the model."""
  template = Template.read(config.objective.template)
  train, held_out = labelled.split(config.data)
  held_out = held_out[: LIMIT.value or None]
  for place, record in train:
    template.number(place, record)
  score = scorer(config, generator, template)
  print(
    f'{len(held_out)} held-out records of {len(template.labels)} labels; examples from '
    f'{len(train)} others'
  )

  results, lines = [], [{'place': place, **vars(record)} for place, record in held_out]
  for k in ways:
    began = time.perf_counter()
    shots = Shots([record for _, record in train], template.labels, k, SEED.value)
    scores = score(held_out, shots)
    seconds = time.perf_counter() - began
    print(f'{k} shots: {seconds:.1f} s; prompts {scores.prompts}')
    if scores.cut:
      print(f'NOTE: {scores.cut} prompts were cut, to fit the context')
    settings = {
      **of,
      'objective': config.objective.kind,
      'template': config.objective.template,
      'shots': k,
    }
    for calibration in CALIBRATION.value:
      result = classify.Result.of(scores, template, calibration, SEED.value, settings)
      results.append(result)
      p = classify.probabilities(scores.labels, scores.free, calibration)
      for line, row in zip(lines, p.tolist(), strict=True):
        line[f'{k} {calibration}'] = dict(zip(template.labels, row))
      write(output, result, f'{k}-{calibration}')
  files.replace(output / f'{TASK}.jsonl', ''.join(json.dumps(line) + '\n' for line in lines))
  content = {'run': of, 'results': [result.values() for result in results]}
  files.replace(output / f'{TASK}.json', json.dumps(content, indent=1) + '\n')
  return results


def write(output: pathlib.Path, result: classify.Result, way: str) -> None:
  """Prints a way's confusion matrix, and draws it."""
  print(f'\n{way}\n{classify.confusion_text(result.labels, result.confusion)}')
  title = f'{WORKDIR.value}\n{way}: accuracy {result.metrics["accuracy"]}'
  path = output / f'{TASK}-{way}.png'
  files.replace(path, classify.confusion_picture(result.labels, result.confusion, title))


def evaluate_rewards(config: configs.Config, of: dict, output: pathlib.Path) -> None:
  """Judges a reward model, prints and writes what is said of it, and keeps its scale, unless it is
  of the first pairs alone; of: what results say of the model.
  """
  place = WORKDIR.value, mesh_of(MESH.value), CHECKPOINT.value
  judged = reward.judge(config, *place, LIMIT.value, SEED.value, print)
  n = len(judged.differences)
  rows = [[str(estimate) for estimate in judged.metrics.values()]]
  commands.table(f'{n} held-out pairs, with 95% intervals', [*judged.metrics], rows)
  title = f'{WORKDIR.value}\n{n} pairs: accuracy {judged.metrics["accuracy"]}'
  picture = rewards.calibration_picture(judged.differences, title)
  files.replace(output / f'{REWARDS}-calibration.png', picture)
  lines = ''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in judged.lines)
  files.replace(output / f'{REWARDS}.jsonl', lines)
  content = {
    'task': REWARDS,
    'run': of,
    'n': n,
    'metrics': {name: estimate.values() for name, estimate in judged.metrics.items()},
    'prompts': judged.prompts,
    'scale': judged.scale,
  }
  files.replace(output / f'{REWARDS}.json', json.dumps(content, indent=1) + '\n')
  print(f'\nwrote {output}/{REWARDS}.json, .jsonl of each pair, and the calibration')
  kept = f'{WORKDIR.value}/{reward.FILE}'
  if LIMIT.value:
    # Policies that learn from this model would learn from other rewards by a quick look.
    print(
      f'NOTE: {kept} is left as it is: a scale is of all pairs; leave out --limit={LIMIT.value}'
    )
    return
  reward.normalise(WORKDIR.value, judged)
  print(
    f'wrote {kept}: reward = {judged.scale["gain"]:.4g} x head + {judged.scale["bias"]:.4g}, of '
    f'{judged.scale["texts"]} answers'
  )


def table(results: list[classify.Result]) -> None:
  """Prints all metrics of all ways, with their intervals."""
  metrics = [*results[0].metrics]
  rows = [
    [
      f'{result.settings["shots"]} shots, {result.settings["calibration"]}',
      *(str(result.metrics[name]) for name in metrics),
    ]
    for result in results
  ]
  n = results[0].metrics['accuracy'].n
  commands.table(f'{n} records, with 95% intervals', ['', *metrics], rows)


def check_tasks() -> None:
  """Raises ValueError for flags that mean nothing beside --tasks or --lm_eval, or without them."""
  if TASKS.value and LM_EVAL.value:
    raise ValueError(
      '--tasks and --lm_eval: tasks of ours and of the harness; ask for them one after the other'
    )
  if LM_EVAL_PATH.value and not LM_EVAL.value:
    raise ValueError(f'--lm_eval_path={LM_EVAL_PATH.value} is of --lm_eval; name tasks by that')
  if LM_EVAL.value and (DATA.value, CALIBRATION.value) != (DATA.default, CALIBRATION.default):
    raise ValueError('--data and --calibration are not of --lm_eval, whose files say both')
  typed = [word for word in sys.argv[1:] if re.match(r'--?config([.=]|$)', word)]
  if (TASKS.value or LM_EVAL.value) and typed:
    raise ValueError(
      f'{typed[0]} is of classification and rewards: tasks, and the run, say how they are asked'
    )
  if not TASKS.value:
    beside = (
      (RUN_PROGRAMS, ATTACKS) if LM_EVAL.value else (DATA, SYSTEM, CHAT, RUN_PROGRAMS, ATTACKS)
    )
    for flag in beside:
      if flag.value != flag.default:
        raise ValueError(f'--{flag.name}={flag.value} is of tasks; name some by --tasks')
  elif CALIBRATION.value != CALIBRATION.default:
    raise ValueError(
      f'--calibration={",".join(CALIBRATION.value)} beside --tasks: a task says how it is '
      'calibrated; leave it out, or change the task'
    )


def opened() -> tuple[Generator, dict]:
  """The model of the flags, and what results say of it."""
  of = run_of(WORKDIR.value, CHECKPOINT.value, WEIGHTS.value)
  return Generator.load(WORKDIR.value, CHECKPOINT.value, mesh_of(MESH.value), WEIGHTS.value), of


def evaluate_tasks(ways: list[int], output: pathlib.Path) -> None:
  """Asks tasks, and writes and prints what comes of it; ends the process with an error where one of
  them failed.
  """
  tasks, failed = {}, {}
  for name in dict.fromkeys(TASKS.value):
    try:
      own, read = task.read(name)
      if own in tasks:
        raise ValueError(f'two tasks are called {own!r}; rename the file of one')
      tasks[own] = read
    except ValueError as error:
      failed[name] = str(error)
      print(f'ERROR: task {name}: {error}')
  attacks = named(ATTACKS.value)
  if attacks and not any(map(of_safety, tasks.values())):
    raise ValueError(
      f'--attacks={",".join(ATTACKS.value)} is of tasks of safety, as xstest, and there is none of '
      'these; leave it out'
    )
  programs = Sandbox(RUN_PROGRAMS.value) if RUN_PROGRAMS.value else None
  given = DATA.value, LIMIT.value, SEED.value, SYSTEM.value, CHAT.value
  manner = Manner(*given, programs, attacks)
  model, of = opened()
  done, more = running.evaluate(model, tasks, ways, manner, of, output)
  failed |= more
  page.write(output, of, failed)
  rows = []
  for each in done:
    for name, metric in each.metrics.items():
      chance = f'{each.chance_of(name):.3g}' if each.chance_of(name) else ''
      rows.append([f'{each.name} ({each.n})', name, running.shown(metric), chance])
  commands.table('scores, with 95% intervals', ['task-shots (n)', '', 'score', 'chance'], rows)
  for note in page.notes(done):
    print(f'NOTE: {note}')
  print(f'\nwrote {output}/{page.PAGE}, {page.PICTURE}, {page.VALUES} and a .jsonl of each')
  if failed:
    asked = len(done) + len(failed)
    sys.exit(f'error: {len(failed)} of {asked} tasks failed: {", ".join(failed)}')


def evaluate_harness(ways: list[int], output: pathlib.Path) -> None:
  """Runs tasks of the lm-evaluation-harness, and prints and writes what comes of it."""
  if len(ways) > 1:
    raise ValueError(
      f'--shots={",".join(SHOTS.value)} beside --lm_eval: its tasks are run once; give one number, '
      'or none for what each task says'
    )
  # --shots=0 is asked for, and the default is not: what a task says may be another number.
  shots = ways[0] if SHOTS.present else None
  given = LIMIT.value, SEED.value, CHAT.value, SYSTEM.value
  settings = harness.HarnessSettings(tuple(LM_EVAL.value), LM_EVAL_PATH.value, shots, *given)
  model, of = opened()
  said = harness.evaluate(model, settings, of, output)
  harness_page.write(output, said)
  if rows := harness_results.rows(said):
    commands.table('lm_eval, with 95% intervals', ['task', 'metric', 'score', 'n'], rows)
  for note in harness_results.notes(said):
    print(f'NOTE: {note}')
  print(f'\nwrote {output}/{harness_page.PAGE}, lm_eval.json, and lm_eval-TASK.jsonl of each')
  if said['failed']:
    sys.exit(f'error: of --lm_eval failed: {", ".join(said["failed"])}')


def run() -> None:
  """What the flags ask for."""
  ways = check_flags()
  check_tasks()
  if TASKS.value == ['list']:
    print(task.listing())
    return
  if not WORKDIR.value:
    raise ValueError('give the directory of a run by --workdir')
  with files.worked_on(OUTPUT.value or files.place(WORKDIR.value) / 'evaluation') as output:
    judge(ways, output)


def judge(ways, output: pathlib.Path) -> None:
  """What the flags ask for of a run; what is found out is written into `output`."""
  print(f'seed {SEED.value}: of examples that are shown, of draws and of intervals')
  if TASKS.value or LM_EVAL.value:
    cache = pathlib.Path(config_of(WORKDIR.value).data.cache_dir) / 'xla'
    hosts.cache_compilations(cache)
    output.mkdir(parents=True, exist_ok=True)
    with running.alone_in(output):
      (evaluate_tasks if TASKS.value else evaluate_harness)(ways, output)
    return
  if CONFIG.value is None:
    raise ValueError('give --config=configs/classify.py: this directory has no config of its own')
  config = overrides.from_flag(CONFIG.value)
  check_objective(config, ways)
  hosts.cache_compilations(pathlib.Path(config.data.cache_dir) / 'xla')
  output.mkdir(parents=True, exist_ok=True)
  with running.alone_in(output):
    of = run_of(WORKDIR.value, CHECKPOINT.value, WEIGHTS.value)
    is_reward = config.objective.kind == REWARDS
    running.check_own(output / f'{REWARDS if is_reward else TASK}.json', {'run': of})
    if is_reward:
      evaluate_rewards(config, of, output)
      return
    generator, _ = opened()
    results = evaluate(config, generator, of, ways, output)
    table(results)
    print(f'\nwrote {output}/{TASK}.json, .jsonl and a .png of each')


def main(arguments):
  names.only_flags(arguments, '--shots=0,4')
  logging.set_verbosity(logging.WARNING)
  with commands.mendable(FloatingPointError, ImportError):
    run()


if __name__ == '__main__':
  hosts.heed_interrupts()
  if sys.argv[1:2] and sys.argv[1] in SUBCOMMANDS:
    commands.end(lambda: names.imported(SUBCOMMANDS[sys.argv[1]])(sys.argv[2:]))
  else:
    commands.end(lambda: app.run(main, flags_parser=overrides.parsed))
