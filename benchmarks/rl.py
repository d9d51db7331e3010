"""Does learning from preferences and from rewards waste less than TRL does? Pairs a second of DPO,
and whole steps of GRPO: writing, judging, learning.

    python -m benchmarks.rl [--json FILE] [--quick] [--kinds dpo,grpo]
    python -m benchmarks.rl --model=bench_1b --length=2048 --prompts=8 --new=512

Needs torch, transformers and trl: make .venv/installed-oracle. The second is for a GPU.

bench-30M (benchmarks.train_cpu) in f32; bench_1b and those of configs/models have f32 weights and
compute in bfloat16. Both sides begin with the same weights, with AdamW and clipping; TRL without
the checkpointing that is its default, which is slower. Each runs in a process of its own, in turn,
and the better run counts. First steps, which compile, are left out. Beside seconds by the clock
stand those of processors, which other programs on a machine disturb less.

DPO: the same pairs in as many steps, of lengths as chats have them (log-normal), the reference a
second model. Ours are packed, theirs padded to the longest of a batch. Before what is timed both
take two steps with the same pairs, so that it can be seen that the chosen answers are as likely
before the first, and the loss is the same after it.

GRPO: the same prompts, and answers that are all of `--new` tokens (the id that would end one is
none of the model's); beta 0, one pass over a rollout, a reward of a line. Ours learns from a
group's prompt once (objective.shared_prompts), TRL in a row with each answer. Of generation it is
said how near it is to where every token reads all weights and what is cached at the memory's
bandwidth (decode/report.py); with many rows it is the products that take the time.
"""

import argparse
import dataclasses
import importlib
import json
import statistics
import tempfile

import numpy as np

import commands
from benchmarks import decode, train_step

BOS, EOS, FIRST = 1, 2, 3  # what texts of pairs begin and end with; the first id that is a word
BETA = 0.1  # of DPO
OPTIMIZER = {
  'learning_rate': 1e-4,
  'b1': 0.9,
  'b2': 0.95,
  'epsilon': 1e-8,
  'clip_norm': 1.0,
  'weight_decay': 0.0,
}
SIDES = {'tandem': 'Tandem', 'trl': 'TRL'}
KINDS = ('dpo', 'grpo')
# Of a step of GRPO; TRL's is known to be of 'generate' and 'other'.
PHASES = ('generate', 'judge', 'score', 'step', 'other')
AGREE = 1e-3  # by which what both sides say of the same pairs may differ, relatively


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """What both sides are to do.

  Attributes:
    model: one that benchmarks.decode knows, or 'toy'.
    runs: of each side. steps: of a run that are timed.
    pairs: of a step of DPO. length: tokens of a pair, its prompt twice, at most. rows: of ours in
      a step, as long as its pairs need.
    prompts: of a rollout. answers: to each. prompt, new: tokens of each.
  """

  model: str = 'bench_30m'
  runs: int = 2
  steps: int = 3
  pairs: int = 8
  length: int = 1024
  rows: int = 3
  prompts: int = 4
  answers: int = 8
  prompt: int = 64
  new: int = 128

  @property
  def batch(self) -> int:
    """Answers of a rollout, all of which a step learns from."""
    return self.prompts * self.answers

  def network(self):
    """The ModelConfig that is trained."""
    if self.model == 'toy':
      from model.config import ModelConfig

      return ModelConfig(vocabulary=256, width=32, layers=2, heads=2, kv_heads=1, feed_forward=64)
    made = decode.model_config(self.model)
    return made.with_execution(parameter_dtype='float32', remat='dots')


QUICK = {
  'runs': 1,
  'steps': 2,
  'pairs': 4,
  'length': 512,
  'rows': 2,
  'prompts': 2,
  'answers': 4,
  'prompt': 32,
  'new': 48,
}


@dataclasses.dataclass(frozen=True)
class Compared:
  """Ids of a prompt and of two answers to it."""

  prompt: list[int]
  chosen: list[int]
  rejected: list[int]

  @property
  def halves(self) -> list[list[int]]:
    return [self.prompt + self.chosen, self.prompt + self.rejected]


def pairs_of(setting: Setting) -> tuple[list[Compared], list[Compared]]:
  """Those of the steps that are not timed, which are half as long, and those of the others."""
  draw, V = np.random.default_rng(0), setting.network().V

  def ids(median: float, most: int) -> list[int]:
    n = np.clip(draw.lognormal(np.log(median), 0.7), 4, most)
    return draw.integers(FIRST, V, int(n)).tolist()

  def pair(T: int) -> Compared:
    answers = [[*ids(T / 10, 3 * T // 8 - 2), EOS] for _ in range(2)]
    return Compared([BOS, *ids(T / 20, T // 8)], *answers)

  first = [pair(setting.length // 2) for _ in range(setting.pairs)]
  return first, [pair(setting.length) for _ in range(setting.pairs * setting.steps)]


def prompts_of(setting: Setting) -> list[list[int]]:
  """Ids of the prompts of all steps, the first, which is not timed, included."""
  shape = setting.prompts * (1 + setting.steps), setting.prompt
  return np.random.default_rng(1).integers(FIRST, setting.network().V, shape).tolist()


# 1. What is said of it.


def best_of(runs: dict[str, list[dict]]) -> dict[str, dict]:
  """Of each side the run that took least."""
  return {side: min(of, key=lambda run: sum(run['steps'])) for side, of in runs.items()}


def memory(run: dict) -> float:
  return (run['device_peak_bytes'] or run['peak_bytes']) / 2**30


def ratios(ours: dict, theirs: dict) -> dict:
  """Of what a step of each takes."""
  return {
    'processors': sum(theirs['processors']) / sum(ours['processors']),
    'memory': memory(ours) / memory(theirs),
  }


def show_dpo(setting: Setting, runs: dict[str, list[dict]]) -> dict:
  """Prints and returns what was measured.

  Raises RuntimeError where the sides did not train the same.
  """
  best, rows = best_of(runs), []
  ours, theirs = best.values()
  for name in ('logp_chosen', 'losses'):
    if not np.allclose(ours[name], theirs[name], rtol=AGREE, atol=0):
      raise RuntimeError(f'not the same was trained: {name} is {ours[name]} and {theirs[name]}')
  for side, run in best.items():
    run['pairs_per_second'] = setting.pairs * setting.steps / sum(run['steps'])
    filled = run['tokens'] / run['positions']
    each = [sum(run[name]) / setting.steps for name in ('steps', 'processors')]
    rows.append([SIDES[side], run['pairs_per_second'], f'{filled:.0%}', *each, memory(run)])
  a, b = rows
  ratio = ratios(ours, theirs) | {'pairs_per_second': a[1] / b[1]}
  rows.append(['ratio', ratio['pairs_per_second'], '', *(x / y for x, y in zip(a[3:], b[3:]))])
  commands.table(
    f'DPO, {setting.model}, {ours["parameters"]:,} parameters, {setting.pairs} pairs a step, '
    f'{ours["device"]}',
    ['', 'pairs/s', 'of positions', 's a step', 'of processors', 'peak GiB'],
    rows,
  )
  return {'best': best, 'runs': runs, 'ratio': ratio}


def show_grpo(setting: Setting, runs: dict[str, list[dict]]) -> dict:
  """Prints and returns what was measured."""
  best, rows = best_of(runs), []
  written = setting.batch * setting.new
  for side, run in best.items():
    whole = sum(run['steps'])
    run['tokens_per_second'] = written * setting.steps / whole
    run['shares'] = {name: s and s / whole for name, s in run['phases'].items()}
    shares = ['' if share is None else f'{share:.1%}' for share in run['shares'].values()]
    each = [sum(run[name]) / setting.steps for name in ('steps', 'processors')]
    rows.append([SIDES[side], run['tokens_per_second'], *each, *shares, memory(run)])
  a, b = rows
  ours, theirs = best.values()
  generate = [run['phases']['generate'] for run in (theirs, ours)]
  others = [sum(run['steps']) - run['phases']['generate'] for run in (theirs, ours)]
  ratio = ratios(ours, theirs) | {
    'tokens_per_second': a[1] / b[1],
    'generate': generate[0] / generate[1],
    'else': others[0] / others[1],
  }
  times = [x / y for x, y in zip(a[2:4], b[2:4])]
  rows.append(['ratio', ratio['tokens_per_second'], *times, *[''] * 5, ratio['memory']])
  commands.table(
    f'GRPO, {setting.model}, {ours["parameters"]:,} parameters, {setting.prompts} prompts of '
    f'{setting.prompt} tokens, {setting.answers} answers of {setting.new} to each, '
    f'{ours["device"]}',
    ['', 'written tokens/s', 's a step', 'of processors', *PHASES, 'peak GiB'],
    rows,
  )
  bandwidth = statistics.median(run['bandwidth'] for run in runs['tandem'])
  share = ours['read_bytes'] / bandwidth / ours['phases']['generate']
  print(
    f'generation is {ratio["generate"]:.2f}x as fast as TRL\'s, all else {ratio["else"]:.2f}x; it '
    f'uses {share:.0%} of the measured {bandwidth / 1e9:.1f} GB/s'
  )
  return {
    'best': best,
    'runs': runs,
    'ratio': ratio,
    'bandwidth': bandwidth,
    'share_of_bandwidth': share,
  }


# 2. Measuring.


def setting_of(options: argparse.Namespace) -> Setting:
  """What was asked for, over --quick, over what is so by itself."""
  names_ = [field.name for field in dataclasses.fields(Setting)]
  given = {name: getattr(options, name) for name in names_ if getattr(options, name) is not None}
  return Setting(**(QUICK if options.quick else {}) | given)


def measure(kind: str, side: str, setting: Setting, directory: str) -> dict:
  """What a side found, in a process of its own."""
  flags = [f'--{name}={value}' for name, value in vars(setting).items()]
  return train_step.in_process(
    'benchmarks.rl',
    *flags,
    f'--run={side},{kind}',
    f'--directory={directory}',
    environment={'JAX_DEFAULT_MATMUL_PRECISION': 'highest', 'HF_HUB_OFFLINE': '1'},
  )


def main():
  arguments = commands.parser(__doc__)
  for field in dataclasses.fields(Setting):
    arguments.add_argument(f'--{field.name}', type=field.type, help=f'default {field.default}')
  arguments.add_argument('--quick', action='store_true', help='of small sizes, in a minute or two')
  arguments.add_argument('--kinds', default=','.join(KINDS), help='with commas between')
  arguments.add_argument('--run', help='run one side in this process: side,kind')
  arguments.add_argument('--directory', default='', help='with the weights that it begins with')
  options = arguments.parse_args()
  setting = setting_of(options)
  if options.run:
    side, kind = options.run.split(',')
    run = getattr(importlib.import_module(f'benchmarks.rl_{side}'), kind)
    print(json.dumps(run(setting, options.directory)))
    return

  results = {'setting': vars(setting)}
  with tempfile.TemporaryDirectory() as directory:
    measure('weights', 'trl', setting, directory)
    for kind in options.kinds.split(','):
      runs = {side: [] for side in SIDES}
      for _ in range(setting.runs):
        for side in runs:
          runs[side].append(measure(kind, side, setting, directory))
      results[kind] = {'dpo': show_dpo, 'grpo': show_grpo}[kind](setting, runs)
  commands.write_json(options.json, 'rl', results)


if __name__ == '__main__':
  main()
