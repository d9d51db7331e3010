"""How is a plan printed? Tables for people; plan.py writes the same as JSON."""

import collections

from rich import box
from rich.console import Console
from rich.table import Table

from analysis import candidates, modes, published, roofline
from decode.options import CHUNK
from parallel import compiler
from workdir.report import amount

GB = 1e9


def _table(title: str, *columns: str) -> Table:
  """A table whose columns, after the first, are numbers."""
  made = Table(
    title=title, title_justify='left', title_style='bold', box=box.SIMPLE_HEAD, pad_edge=False
  )
  for n, column in enumerate(columns):
    made.add_column(column, justify='right' if n else 'left', overflow='fold')
  return made


def _console() -> Console:
  console = Console(highlight=False)
  return console if console.is_terminal else Console(highlight=False, width=140)


def seconds(value: float) -> str:
  if 0 < value < 1e-6:
    return f'{value:.3g} s'
  return f'{value:.3f} s' if value >= 1 else f'{1e3 * value:.3f} ms'


def error(chip) -> str:
  """What predictions for a chip are worth."""
  return published.band(chip) if chip.torus else roofline.GPU_ERROR


def shortage(plan) -> str:
  """Why a plan does not fit."""
  if plan.problem:
    return plan.problem
  return f'needs {plan.memory.peak / GB:.2f} GB of {plan.available / GB:.2f}'


def show(plan, cost: dict[str, float]) -> None:
  """Prints all of a plan."""
  console = _console()
  axes = {axis: size for axis, size in plan.config.mesh.sizes().items() if size > 1}
  run = {'train': 'a step', 'prefill': 'a prefill', 'read': 'a part of prompts'}.get(
    plan.mode, 'a chunk of tokens'
  )
  console.print(
    f'\n{plan.mode} on {plan.chips} x {plan.chip.name}, mesh {axes or "of one device"}, remat '
    f'{plan.config.model.execution.remat!r}, attention {plan.attention!r}, '
    f'{plan.config.train.accumulation} microbatch(es); {plan.tokens:,} tokens {run}; '
    f'compiled in {plan.compile_seconds:.1f} s'
  )
  if plan.mode == 'train':
    console.print(compiler.said(plan.compiled_with))
  _memory(console, plan)
  if plan.prediction is None:
    return

  _collectives(console, plan)
  _times(console, plan, run)
  for text in plan.prediction.assumptions:
    console.print(f'  assumed: {text}')
  console.print(f'  error: {error(plan.chip)}')
  if plan.mode == 'train' and plan.config.train.epochs:
    console.print(
      f'train.epochs={plan.config.train.epochs:g}: how many steps, the data says, which is not '
      'read here; for the cost give --config.train.epochs=0 --config.train.steps=1000'
    )
  if plan.mode == 'train' and modes.writes(plan.config.objective):
    console.print(
      f'objective.kind={plan.config.objective.kind!r} writes what it learns from, which is not in '
      'this time: plan that by --mode=rollout, and add both up'
    )
  if cost:
    work = f'{plan.config.train.steps:,} steps' if plan.mode == 'train' else 'a million tokens'
    units = {'hours': '{} hours', 'dollars': '${}', 'kWh': '{} kWh (chips only)'}
    digits = {'kWh': 1}
    costs = [units[name].format(amount(value, digits.get(name, 2))) for name, value in cost.items()]
    console.print(f'{work}: ' + ', '.join(costs))


def cost(
  plan, dollars_per_chip_hour: float | None, watts_per_chip: float | None, rate: float = 0.0
) -> dict[str, float]:
  """Hours, dollars and kWh of the whole training run, or of a million tokens;
  only what is known: how long train.epochs are, the data says, which is not read; and what a run
  writes itself is another program (--mode=rollout).

  rate: tokens a second of more programs than this one; 0: it runs alone.
  """
  config, training = plan.config, plan.mode == 'train'
  unknown = config.train.epochs or modes.writes(config.objective)
  if plan.prediction is None or (training and unknown):
    return {}
  runs = config.train.steps if training else 1e6 / plan.tokens
  hours = (1e6 / rate if rate else plan.seconds * runs) / 3600
  watts = plan.chip.watts if watts_per_chip is None else watts_per_chip
  costs = {'hours': hours}
  if dollars_per_chip_hour is not None:
    costs['dollars'] = hours * plan.chips * dollars_per_chip_hour
  if watts is not None:
    costs['kWh'] = hours * plan.chips * watts / 1000
  return costs


def _memory(console, plan):
  verdict = 'FITS' if plan.fits else 'DOES NOT FIT'
  needs = plan.problem
  if plan.memory:
    needs = f'{plan.memory.peak / GB:.2f} GB of {plan.available / GB:.2f} GB a device'
  console.print(f'\n[bold]{verdict}[/bold]: {needs}')
  if plan.memory and not plan.fits and (plan.memory.alive or plan.available) < plan.available:
    console.print(
      f'(The compiler took it: by its account no more than {plan.memory.alive / GB:.2f} GB are '
      'alive at once. It is close.)'
    )
  if plan.fits and not plan.chip.torus and plan.memory.share(plan.available) > 0.75:
    console.print('(jax reserves 75% of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION is raised.)')

  table = _table('memory of a device', 'what', 'GB', 'share')
  parts = plan.memory.parts if plan.memory else plan.held
  for name, size in parts.items():
    table.add_row(name, f'{size / GB:.3f}', f'{size / plan.available:.1%}')
  if plan.memory:
    table.add_section()
    table.add_row(
      'peak', f'{plan.memory.peak / GB:.3f}', f'{plan.memory.share(plan.available):.1%}'
    )
    if plan.memory.alive is not None:
      alive = plan.memory.alive
      table.add_row(
        "alive at once, by the compiler's account",
        f'{alive / GB:.3f}',
        f'{alive / plan.available:.1%}',
      )
    table.add_row("in the host's memory", f'{plan.memory.host / GB:.3f}', '')
    if plan.memory.disk:
      table.add_row('on disk', f'{plan.memory.disk / GB:.3f}', '')
  console.print(table)


def _collectives(console, plan):
  table = _table(
    'collectives of a device',
    'kind',
    'mesh axes',
    'of',
    'times',
    'started',
    'MB',
    'on the links',
    'start to done',
    'exposed',
  )
  rows = collections.defaultdict(list)
  for c in plan.collectives:
    rows[c.kind, c.axes].append(c)
  for key, alike in sorted(rows.items(), key=lambda row: -sum(c.total for c in row[1])):
    kind, axes = key
    times, sent = sum(c.count for c in alike), sum(c.total for c in alike)
    table.add_row(
      kind,
      ' x '.join(axes),
      str(alike[0].size),
      f'{times:,}',
      _started(alike),
      f'{sent / 1e6:,.2f}',
      seconds(plan.prediction.links.get(key, 0.0)),
      _distance(plan.prediction.between.get(key, 0.0), alike),
      seconds(plan.prediction.exposed.get(key, 0.0)),
    )
  console.print(table if rows else '\nno collectives')
  if rows:
    p = plan.prediction
    console.print(
      f'collectives take {seconds(sum(p.links.values()))} on the links, of which '
      f'{seconds(sum(p.exposed.values()))} ({p.exposed_share:.0%}) beside no work'
    )


def _started(alike) -> str:
  """How many of them are asynchronous, and by whom."""
  started = sum(c.count for c in alike if c.started)
  offloaded = sum(c.count for c in alike if c.rings)
  return f'{started:,}' + (f' ({offloaded:,} on the SparseCore)' if offloaded else '')


def _distance(between: float, alike) -> str:
  """From a start to what waits for it, in the mean."""
  started = sum(c.count for c in alike if c.started)
  return seconds(between / started) if started else '-'


def _times(console, plan, run):
  p, model = plan.prediction, plan.model_flops / plan.devices
  table = _table(f'time of {run}', 'what', 'time')
  for name, value in sorted(p.roofline.items(), key=lambda row: -row[1]):
    table.add_row(f'roofline: {name}' + (' (bounds)' if name == p.bound else ''), seconds(value))
  table.add_section()
  for name, value in (
    ('XLA operations', p.operations),
    ('Pallas kernels', p.kernels),
    ('exposed copies', p.copies),
    ('exposed collectives', sum(p.exposed.values())),
  ):
    table.add_row(name, seconds(value))
  table.add_section()
  table.add_row('predicted', seconds(p.seconds))
  console.print(table)
  mfu = 'MFU unknown' if plan.mfu is None else f'MFU {plan.mfu:.1%}'
  each = (
    f', {seconds(p.seconds / CHUNK)} a token of every row'
    if plan.mode in ('decode', 'rollout', 'serve')
    else ''
  )
  console.print(
    f'[bold]{seconds(p.seconds)} {run}{each}, {mfu}, {plan.tokens / p.seconds:,.0f} '
    f'tokens/s[/bold]; FLOPs of a device: model {model:.4g}, hardware {p.flops:.4g} '
    f'({p.flops / model:.2f} x)'
  )


def served(found) -> None:
  """Prints what a server holds, and how long people wait for it (analysis.served.PlannedServer)."""
  console, (prompt, answer) = _console(), found.request
  pool, tokens = found.write.held['cache'], found.rows * found.context
  table = _table(
    f'a server of {found.rows} rows of {found.context:,} tokens, prompts of {prompt:,} and answers '
    f'of {answer:,}, caches full',
    'what',
    'predicted',
  )
  table.add_row('cache of a device', f'{pool / GB:.2f} GB for {tokens:,} tokens')
  peak = found.read.memory and f'{found.read.memory.peak / GB:.2f} GB'
  table.add_row('peak of a device, as it reads', peak or 'more than there is: DOES NOT FIT')
  for name, value in found.times().items():
    table.add_row(name, f'{value:,.0f}' if name.startswith('tokens/s') else seconds(value))
  console.print(table)


def ranking(config, plans) -> None:
  """Prints what a search found, in the order given."""
  table = _table(
    'candidates, fastest first', 'flags', 'step', 'MFU', 'GB', 'bound by', 'compiled with'
  )
  compiled_with = set()
  for plan in plans:
    name = candidates.flags(config, plan.config) or '(as given)'
    if plan.fits:
      table.add_row(
        name,
        seconds(plan.seconds),
        '?' if plan.mfu is None else f'{plan.mfu:.1%}',
        f'{plan.memory.peak / GB:.2f}',
        plan.prediction.bound,
        plan.compiled_with.table,
      )
      compiled_with.add(plan.compiled_with.table)
    else:
      table.add_row(
        name,
        '-',
        '-',
        f'{plan.memory.peak / GB:.2f}' if plan.memory else '-',
        'cannot be planned' if plan.refused else 'does not fit',
        '-',
      )
  console = _console()
  console.print(table)
  if len(compiled_with) > 1:
    console.print(
      'Not all are compiled with the same options: train.compiler=auto has some for meshes that '
      "were tried (docs/plans.md), and other tables were tried on the best alone. One with 'none' "
      'may stand too low; --config.train.compiler=none compares all as the compiler comes.'
    )


def json_able(values):
  """Nested values with tuples as keys written as text."""
  if isinstance(values, dict):

    def name(key):
      return key if isinstance(key, str) else f'{key[0]} over {" x ".join(key[1]) or "one device"}'

    return {name(key): json_able(value) for key, value in values.items()}
  return values
