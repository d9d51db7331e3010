"""What did it cost to make this run smaller? Both read the same texts; a table, a page with
pictures and a file of figures, each with its n and a 95% interval over documents.

What some texts, or the matrices of a layer, cost is kept in the smaller run's directory until the
page is there: a process that is killed goes on behind it, with the same bits.
"""

import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import commands
import files
import names
from compression import sensitivity
from compression.judge import Costs, costs
from compression.kept import Kept
from data import generation
from decode.generator import Generator
from decode.report import weight_bytes
from evaluation import library
from evaluation.intervals import Estimate, bootstrap
from evaluation.running import ProgressLine
from model.weights.scheme import dequantised
from workdir import judged_page
from workdir.checkpoint import Checkpoints
from workdir.compressed import model_bytes
from workdir.open import config_of, step_of

FILE = 'judged.json'
PARTS = '.judged'  # of what was judged before its process was killed
ROWS, LENGTH = 4, 512  # texts side by side, and tokens of each, or as many as the models have
PLANNED = 1024  # positions of a cache, at most, by which the time of a token is predicted
WRITTEN, ROUNDS = 64, 3  # tokens by which speed is measured, and how often, of each side in turn


def judge(
  original: str | os.PathLike,
  smaller: str | os.PathLike,
  texts: Sequence[str],
  limit: int,
  by_layer: int,
  topologies: Sequence[str],
  log: Callable[[str], Any],
) -> dict:
  """Figures of two runs, which it prints and writes into the smaller one's directory.

  texts: files of text; none: modules of the interpreter's library that training on it holds out.
  limit: so many texts at most. by_layer: of so many tokens, what each matrix alone costs; 0: not
  asked. topologies: where the time of a token is predicted (analysis.predicted).
  Raises, before a text is read, ValueError for runs that do not read alike, for numbers and
    topologies that are impossible, and where another process judges the smaller one, ImportError
    without a topology's compiler.
  """
  if limit < 0:
    raise ValueError(f'--limit={limit} must be at least 0, which is all texts')
  if by_layer == 1 or by_layer < 0:
    raise ValueError(
      f'--by_layer={by_layer} must be 0, which does not ask, or at least 2: a token is judged by '
      'what is said before it'
    )
  documents = [pathlib.Path(path).read_text() for path in texts] or list(library.held_out())
  documents = documents[:limit] if limit else documents
  if not documents:
    raise ValueError('there is no text to judge by; give some by --text')
  directories = original, smaller
  models = [Generator.load(directory) for directory in directories]
  encoded, length = _encoded(models, directories, documents)
  predicted = _predicted(directories, topologies)  # first: what it refuses costs no judgement
  work = {
    'models': [model.identity for model in models],
    'texts': files.digest(encoded),
    'length': length,
    'by_layer': by_layer,
  }
  parts = pathlib.Path(smaller) / PARTS
  with files.locked(f'{parts}.lock', str(smaller), 'wait until it is judged'):
    kept = Kept(parts, work, anew=log)
    sums = _sums(models, encoded, length, kept, log)
    figures = _figures(models[0], encoded, sums)
    values = {
      'original': str(original),
      'smaller': str(smaller),
      'stored': list(config_of(smaller).model.execution.stored),
      'n': {'tokens': len(sums['each']), 'documents': len(documents)},
      'figures': {name: estimate.values() for name, estimate in figures.items()},
      'KL, 99% of tokens below': float(np.quantile(sums['each'], 0.99)),
      'bytes on disk': [_on_disk(directory) for directory in directories],
      'bytes in memory': [model_bytes(model.model) for model in models],
      'bytes a token reads': [weight_bytes(model.model) for model in models],
      'tokens a second here': _speeds(models, encoded[0][: length // 4], length),
      'predicted ms a token': predicted,
    }
    grids, notes = _grids(models, encoded, by_layer, length, kept, log)
    values |= {'by layer': {name: _listed(grid) for name, grid in grids.items()}}
    _write(pathlib.Path(smaller), values, figures, sums['each'], grids, notes, log)
    kept.remove()
  return values


def _encoded(
  models: Sequence[Generator], directories: Sequence, documents: Sequence[str]
) -> tuple[list[list[int]], int]:
  """Ids of what both read of each text, and how many these are at most."""
  length = min(LENGTH, *(model.model.config.max_length or LENGTH for model in models))
  encoded = [models[0].encoded(text)[:length] for text in documents]
  if any(len(ids) < 2 for ids in encoded):
    raise ValueError('a text has no tokens to be judged by; leave empty ones out')
  if encoded != [models[1].encoded(text)[:length] for text in documents]:
    raise ValueError(
      f'{directories[0]} and {directories[1]} have different tokenizers; no token is the same'
    )
  if models[0].model.config.encoder_layers or not models[0].model.config.causal:
    raise NotImplementedError(
      'judge reads texts from left to right, as a decoder; evaluate.py asks all'
    )
  return encoded, length


def _figures(
  model: Generator, encoded: Sequence[Sequence[int]], sums: Mapping[str, np.ndarray]
) -> dict[str, Estimate]:
  tokens = np.array([len(ids) - 1 for ids in encoded], np.float64)
  written = np.array([_bytes(model, ids) for ids in encoded], np.float64)
  return {
    'KL, nats a token': _ratio(sums['kl'], tokens),
    'same likeliest token': _ratio(sums['agrees'], tokens),
    'bits per byte before': _ratio(sums['before'] / math.log(2), written),
    'bits per byte after': _ratio(sums['after'] / math.log(2), written),
    'perplexity, after / before': _ratio(sums['after'] - sums['before'], tokens, np.exp),
  }


def _predicted(runs: Sequence, topologies: Sequence[str]) -> dict[str, list[float | None]]:
  """Milliseconds a token of one row of each run, by topology; None of one that does not fit."""
  if not topologies:
    return {}
  ms_per_token = names.imported('analysis.predicted.ms_per_token')

  def of(run, topology):
    config = config_of(run).model
    context = min(config.max_length or PLANNED, PLANNED)
    try:
      return ms_per_token(config, topology, context=context)
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      return None

  return {topology: [of(run, topology) for run in runs] for topology in topologies}


def _grids(
  models: Sequence[Generator],
  encoded: Sequence[Sequence[int]],
  tokens: int,
  length: int,
  kept: Kept,
  log: Callable[[str], Any],
) -> tuple[dict[str, dict[sensitivity.MatrixPlace, float]], list[str]]:
  """How far each matrix is from what it was, and what it costs alone; and what is to be said."""
  original, smaller = (model.model for model in models)
  if [model.mesh.size for model in models] != [1, 1]:
    return {}, ['by layer only models on one device are compared']
  try:
    errors = jax.device_get(jax.jit(sensitivity.distances)(original, smaller))
    places = sensitivity.places(original, errors)
  except ValueError as error:
    return {}, [str(error)]
  grids = {'|W - W\'| / |W|': {place: float(errors[place.name][place.index]) for place in places}}
  if not tokens:
    return grids, ['what each matrix costs alone was not asked (--by_layer=256)']

  ids = [i for text in encoded for i in text][:tokens]
  row = np.array([ids[: min(length, len(ids))]], np.int32)
  lengths = np.array([row.shape[1]], np.int32)
  vocabulary = min(model.vocabulary for model in models)

  @jax.jit
  def alone(original, smaller, chosen):
    made = sensitivity.exchanged(original, smaller, chosen)
    return costs(original, made, row, lengths, vocabulary).kl.sum() / (row.shape[1] - 1)

  progress, costs_of = ProgressLine('matrices, one by one', len(places), 0, log), {}
  with jax.set_mesh(models[0].mesh):
    # Codes become numbers once, and not for each of the matrices.
    original, smaller = map(jax.jit(dequantised), (original, smaller))
    for layer, group in itertools.groupby(places, lambda place: place.layer):
      here, name = list(group), f'layer {layer} alone' if layer >= 0 else 'the rest alone'
      made = kept.read(name, jax.ShapeDtypeStruct((len(here),), np.float32), log)
      if made is None:
        made = np.zeros(len(here), np.float32)
        for i, place in enumerate(here):
          chosen = {name: np.zeros(len(each), bool) for name, each in errors.items()}
          chosen[place.name][place.index] = True
          made[i] = alone(original, smaller, chosen)
          progress.at(len(costs_of) + i + 1)
        kept.write(name, made)
      costs_of |= zip(here, made.tolist())
  progress.end()
  return grids | {f'KL of it alone, {row.shape[1]} tokens': costs_of}, []


def _listed(grid: Mapping[sensitivity.MatrixPlace, float]) -> list[dict]:
  return [
    {'layer': place.layer, 'kind': place.kind, 'value': value} for place, value in grid.items()
  ]


def _sums(
  models: Sequence[Generator],
  encoded: Sequence[Sequence[int]],
  length: int,
  kept: Kept,
  log: Callable[[str], Any],
) -> dict[str, np.ndarray]:
  """By document; 'each': KL of every token."""
  vocabulary = min(model.vocabulary for model in models)
  run = jax.jit(costs, static_argnums=4)
  sums: dict[str, list] = {name: [] for name in ('kl', 'agrees', 'before', 'after')}
  each = []
  floats = jax.ShapeDtypeStruct((ROWS, length), np.float32)
  shapes = Costs(floats, jax.ShapeDtypeStruct((ROWS, length), bool), (floats, floats))
  for first in range(0, len(encoded), ROWS):
    here = list(encoded[first : first + ROWS])
    name = f'texts from {first + 1} to {first + len(here)}'
    made = kept.read(name, shapes, log)
    if made is None:
      lengths = np.array([len(ids) for ids in here] + [1] * (ROWS - len(here)), np.int32)
      tokens = np.zeros((ROWS, length), np.int32)
      for row, ids in enumerate(here):
        tokens[row, : len(ids)] = ids
      with jax.set_mesh(models[0].mesh):
        made = run(*(m.model for m in models), *map(models[0].put, (tokens, lengths)), vocabulary)
      made = jax.device_get(made)
      kept.write(name, made)
    for name, part in zip(sums, (made.kl, made.agrees, *made.nats)):
      sums[name] += part.sum(1, dtype=np.float64)[: len(here)].tolist()
    each += [made.kl[row, : len(ids) - 1] for row, ids in enumerate(here)]
  return {name: np.array(values) for name, values in sums.items()} | {'each': np.concatenate(each)}


def _ratio(above: np.ndarray, below: np.ndarray, shown=float) -> Estimate:
  return bootstrap(lambda i: float(shown(above[i].sum() / below[i].sum())), len(above), 0)


def _bytes(model: Generator, ids: Sequence[int]) -> int:
  """That tokens behind the first one stand for."""
  return max(1, len(model.tokenizer.decode(ids[1:]).encode()))


def _on_disk(directory) -> int:
  """Bytes of a run's last checkpoint."""
  checkpoints = Checkpoints(directory)
  step = step_of(checkpoints, 'last')
  place = checkpoints.directory / f'{step:08d}'
  return sum(path.stat().st_size for path in place.rglob('*') if path.is_file())


def _speeds(models: Sequence[Generator], prompt: Sequence[int], length: int) -> list[float]:
  """Tokens a second of one row of each model, greedily, behind the first one: the best of rounds in
  which they take turns. No token ends a row: who ends sooner would be timed by less.
  """
  count = min(WRITTEN, length - len(prompt))
  speeds: list[list[float]] = [[] for _ in models]
  for _ in range(1 + ROUNDS):
    for model, of_model in zip(models, speeds):
      ends = dict.fromkeys(generation.ends(model.tokenizer), -math.inf)
      model([list(prompt)], max_new_tokens=count, temperature=0.0, logit_bias=ends)
      of_model.append(model.report.tokens_per_second)
  return [max(of_model[1:]) for of_model in speeds]  # the first round compiled


def _write(directory, values, figures: Mapping[str, Estimate], each, grids, notes, log) -> None:
  rows = [[name, str(estimate)] for name, estimate in figures.items()]
  rows.append(['KL, 99% of tokens below', f'{values["KL, 99% of tokens below"]:.3f}'])
  for name in ('bytes on disk', 'bytes in memory', 'bytes a token reads', 'tokens a second here'):
    before, after = values[name]
    rows.append([name, f'{before:,.0f} -> {after:,.0f} ({after / before:.0%})'])
  for name, sides in values['predicted ms a token'].items():
    said = ['does not fit' if ms is None else f'{ms:.3f}' for ms in sides]
    rows.append([f'predicted ms a token, {name}', ' -> '.join(said)])
  n = values['n']
  title = f'{n["tokens"]:,} tokens of {n["documents"]} documents, with 95% intervals over documents'
  commands.table(title, ['', ''], rows)

  kl = figures['KL, nats a token']
  notes = [*judged_page.notes(values, (kl.high - kl.low) / kl.value if kl.value else 0.0), *notes]
  for note in notes:
    log(note)
  image = judged_page.picture(
    each, list(grids.items()), f'{values["original"]} -> {values["smaller"]}'
  )
  files.replace(directory / judged_page.PICTURE, image)
  files.replace(directory / judged_page.PAGE, judged_page.page(values, rows, notes))
  files.replace(directory / FILE, json.dumps(values, indent=1) + '\n')
  log(f'\nwrote {FILE}, {judged_page.PAGE} and {judged_page.PICTURE} in {directory}')
