"""What is to be told of a run to whoever uses its model? RUN/MODEL_CARD.md: what the run's
directory holds, in blocks that are written anew each time, and what only a person knows, which
stays.

    python evaluate.py card RUN
    python evaluate.py card RUN --watts=350 --co2=0.38 --pue=1.2
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import jax

import commands
import files
from data import cache
from evaluation import card, harness_results, page
from model import params, transformer
from parallel.mesh import MeshConfig, make_mesh
from training.config import Config
from training.costs import ReportConfig
from workdir import report
from workdir.checkpoint import Checkpoints
from workdir.metrics import FILE as METRICS, read_metrics
from workdir.open import config_of
from workdir.seals import FACTS, ORIGIN

GIVEN = 'card.json'  # in the run's directory: rates that a person gave once
# Flags and the fields of ReportConfig that they are.
RATES = {'watts': 'watts_per_chip', 'co2': 'kilograms_co2_per_kwh', 'pue': 'pue'}
WHOLE = ('classify.json', 'reward.json')  # of evaluate.py without tasks
RESULTS = ('*-*.json', 'bias.json', 'safety.json', harness_results.FILE, *WHOLE)
RESULTS += ('memorisation.json', 'exposure.json', 'contamination.json', 'knowledge.json')


def parser() -> argparse.ArgumentParser:
  """What the command takes."""
  made = argparse.ArgumentParser(
    prog='evaluate.py card',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = made.add_argument
  add('run', metavar='RUN', help='directory of a run')
  add('--evaluation', action='append', default=[], help='a directory of results elsewhere; several')
  add('--watts', type=float, help='mean draw of a chip with its share of the host')
  add('--co2', type=float, help='kilograms for each kWh, of the grid')
  add('--pue', type=float, help="the data centre's draw for each watt of its machines")
  add('--output', default='', help=f'the file; default: RUN/{card.FILE}')
  return made


def main(arguments: Sequence[str]) -> None:
  """The command."""
  options = parser().parse_args(arguments)
  with commands.mendable():
    workdir = pathlib.Path(options.run)
    path = pathlib.Path(options.output or workdir / card.FILE)
    blocks = blocks_of(workdir, options.evaluation, _rates(workdir, options))
    gone: list[str] = []
    if path.exists():
      text, gone = card.rewritten(path.read_text(encoding='utf-8'), blocks, str(path))
    else:
      text = card.written(workdir.resolve().name, blocks)
    files.replace(path, text)
    for name in gone:
      print(f'NOTE: {path} has no block {name!r} any more; it is not put back')
    left = text.count(card.FILL)
    print(f'wrote {path}' + (f'; {left} places are to be filled by you' if left else ''))


def _rates(workdir: pathlib.Path, options) -> dict[str, float]:
  """Those that were given, now or before, which are kept."""
  path = workdir / GIVEN
  kept = files.json_object(path.read_bytes(), path) if path.exists() else {}
  now = {field: getattr(options, flag) for flag, field in RATES.items()}
  now = {field: value for field, value in now.items() if value is not None}
  rates = {field: kept[field] for field in RATES.values() if field in kept} | now
  dataclasses.replace(ReportConfig(), **rates)  # checks them
  if now:
    files.replace(path, json.dumps(rates) + '\n')
  return rates


def blocks_of(
  workdir: pathlib.Path, elsewhere: Sequence[str] = (), rates: Mapping[str, float] | None = None
) -> dict[str, str]:
  """All that a run's directory tells, by block."""
  config, checkpoints = config_of(workdir), Checkpoints(workdir)
  step = checkpoints.latest()
  record = {} if step is None else checkpoints.record(step)
  digest = '' if step is None else checkpoints.reference(step)['digest']
  places = _places(workdir, elsewhere)
  found = [(place, summary) for place in places for summary in page.read(place)]
  # Hugging Face shows them as this model's: none of a base, or of smaller weights.
  own = [each for each in found if card.is_of(each[1].settings['run'], digest)]
  facts, lines = _facts(workdir), read_metrics(workdir / METRICS)
  lines = lines if any('loss' in line for line in lines) else []
  blocks = {
    card.FRONT: card.front(
      workdir.resolve().name, own, _emissions(config, facts, lines, rates or {})
    ),
    'model': _model(workdir, config),
    'data': _data(config, record),
    'training': _training(config, facts, lines, checkpoints, step),
    'scores': card.scores(found, _others(places, step, digest), step, digest),
    'energy': _energy(config, facts, lines, rates or {}),
  }
  return blocks | {
    name: card.of_results(name, places, step, digest) for name in card.BLOCKS if name not in blocks
  }


def _places(workdir: pathlib.Path, elsewhere: Sequence[str]) -> list[pathlib.Path]:
  """Directories that have results, of the run's own and of those that are named."""
  for place in elsewhere:
    if not pathlib.Path(place).is_dir():
      raise ValueError(f'--evaluation={place} is no directory')
  own = [workdir, *sorted(place for place in workdir.iterdir() if place.is_dir())]
  return [
    place
    for place in dict.fromkeys([*own, *map(pathlib.Path, elsewhere)])
    if any(any(place.glob(pattern)) for pattern in RESULTS)
  ]


def _facts(workdir: pathlib.Path) -> dict:
  path = workdir / FACTS
  if not path.exists():
    return {}
  return files.unsealed(files.json_object(path.read_bytes(), path), path, 'the run writes it anew')


def _model(workdir: pathlib.Path, config: Config) -> str:
  model = config.model
  with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.local_devices()[:1])):
    abstract = jax.eval_shape(lambda: transformer.init(model, 0))
  total = params.count(abstract)
  tables = params.count(abstract.embedding)
  origin = workdir / ORIGIN
  family = files.json_object(origin.read_bytes(), origin).get('family') if origin.exists() else ''
  kind = 'encoder-decoder' if model.encoder_layers else 'decoder' if model.causal else 'encoder'
  rows = [
    ('Kind', kind + (f', of the family {family}' if family else '')),
    ('Parameters', f'{total:,}, of which {tables:,} in embeddings'),
    ('Width, layers', f'{model.width}, {model.layers}'),
    ('Heads (of keys and values)', f'{model.heads} ({model.kv_heads or model.heads})'),
    ('Vocabulary', f'{model.vocabulary:,}'),
    ('Context', f'{model.max_length:,} tokens' if model.max_length else 'no end of positions'),
    ('Parameters in', ', '.join([model.execution.parameter_dtype, *model.execution.stored])),
  ]
  if config.adapter.kind:
    rows.append(('Adapter', f'{config.adapter.kind}, on {config.init}'))
  elif config.init:
    rows.append(('Begun with', config.init))
  return page.table(['', ''], rows)


def _data(config: Config, record: Mapping) -> str:
  """Sources and what cleaning dropped and masked, by the cache that the run read."""
  key = record.get('data', {}).get('key', '')
  if not key:
    return (
      'This run was imported: what its model was trained on is not known here; say it below this '
      'block.'
    )
  place = pathlib.Path(config.data.cache_dir) / key.partition('-')[0]
  if not (place / cache.INDEX).is_file():
    return f'The counts are not there: {place}, which train.py prepares anew from the sources.'
  read = cache.read_index(place)['report']
  parts = []
  for of in (*read['sources'], *read.get('validation_sources', ())):
    source = of['source']
    counts = of.get('read', 0)
    counts = counts.get('documents', 0) if isinstance(counts, Mapping) else counts
    train = of.get('train', {})
    rows = [
      ('Read', f'{counts:,} documents'),
      ('Could not be read', _listed(of.get('problems', {}))),
      ('Dropped', _listed(of.get('dropped', {}))),
      ('Masked', _listed(of.get('anonymised', {}))),
      ('Trained on', _listed({name: train.get(name) for name in ('documents', 'bytes', 'tokens')})),
    ]
    parts.append(page.table([f'{source["kind"]} {source["path"]}'.strip(), ''], rows))
  held = read.get('validation', {})
  held = {name: held.get(name) for name in ('documents', 'bytes', 'tokens')}
  clean = dataclasses.asdict(config.data.clean)
  parts.append(f'Held out: {_listed(held)}. Digest of the data: `{key}`.')
  parts.append('Cleaning: ' + ', '.join(f'{name}={value!r}' for name, value in clean.items()) + '.')
  return '\n\n'.join(parts)


def _listed(of: Mapping) -> str:
  listed = [
    f'{count:,} {name.replace("_", " ")}'
    for name, count in of.items()
    if isinstance(count, int) and count
  ]
  return ', '.join(listed) or 'none'


def _training(
  config: Config,
  facts: Mapping,
  lines: Sequence[Mapping],
  checkpoints: Checkpoints,
  step: int | None,
) -> str:
  if not lines or not facts:
    return f'Nothing was trained here; the model is that of checkpoint {step}.'
  best = report.kept_best(checkpoints, lines)
  rows = report.achieved(lines, config.objective.loss_unit, best, **facts)
  parts = [page.table(['', ''], rows), 'Settings other than the defaults:']
  return '\n\n'.join([*parts, report.described(config)])


def _others(places: Sequence[pathlib.Path], step: int | None, digest: str) -> list[str]:
  """What else was asked than tasks; step, digest: of the last checkpoint."""
  said = []
  for place in places:
    for name in WHOLE:
      path = place / name
      if not path.is_file():
        continue
      content = files.json_object(path.read_bytes(), path)
      of = card.said_of(content.get('run', {}), step, digest)
      for each in content.get('results', [content]):
        ways = [f'{k}={each[k]!r}' for k in ('shots', 'calibration') if k in each]
        about = ', '.join([*ways, of, f'prompts `{each["prompts"]}`'])
        said.append(card.estimates(name, each['metrics'], about))
    path = place / harness_results.FILE
    if path.is_file():
      content = files.json_object(path.read_bytes(), path)
      about = card.said_of(content, step, digest)
      said.append(card.harness(content, f'{place.name}/{path.name}', about))
  return said


def _emissions(
  config: Config, facts: Mapping, lines: Sequence[Mapping], rates: Mapping[str, float]
) -> dict | None:
  """In grams, as Hugging Face has them; None where hours or a rate are not known."""
  given = dataclasses.replace(config.report, **rates)
  if not lines or not facts or not given.watts_per_chip or not given.kilograms_co2_per_kwh:
    return None
  grams = 1000 * report.spent(lines, given, facts['chips']).kilograms_co2
  hardware = f'{facts["chips"]} x {facts["hardware"]}'
  source = 'hours measured; watts, PUE and grid as given'
  return {'emissions': grams, 'source': source, 'hardware_used': hardware}


def _energy(
  config: Config, facts: Mapping, lines: Sequence[Mapping], rates: Mapping[str, float]
) -> str:
  """What the run took, by hours that it measured and rates that a person gives."""
  formula = 'kWh = chip-hours x watts x PUE / 1000; kg CO2 = kWh x kg/kWh.'
  if not lines or not facts:
    return f'No hours are recorded here; say below this block what is known. {formula}'
  given = dataclasses.replace(config.report, **rates)
  rows = report.cost(lines, given, facts['chips'])
  parts = [page.table(['', ''], [('Hardware', f'{facts["chips"]} x {facts["hardware"]}'), *rows])]
  told = []
  for flag, field, unit in (
    ('watts', 'watts_per_chip', 'W a chip'),
    ('co2', 'kilograms_co2_per_kwh', 'kg CO2 per kWh'),
  ):
    value = getattr(given, field)
    told.append(f'{value:g} {unit}' if value else f'{unit} not given (`--{flag}`)')
  parts.append(f'{formula} {"; ".join(told)}; PUE {given.pue:g}. Rates are given, not measured.')
  parts.append(
    'Of this run alone: no runs before it, no evaluation, nothing of making the hardware.'
  )
  return '\n\n'.join(parts)
