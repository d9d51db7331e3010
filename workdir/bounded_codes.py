"""Which matrices of a run can lie in 4 bits within a bound, where the others have 8? Those whose
codes cost least for what they save, as many of their kinds as it lets.
"""

import functools
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from compression import bounded
from compression.bounded import QualityBound
from compression.quantise import METHODS, quantised
from data import tokenizers
from evaluation import library
from model import params, transformer
from model.weights.scheme import parsed, rule_of, stored as in_codes
from parallel.mesh import MeshConfig, make_mesh
from workdir.calibrated import Calibration, rows as rows_of
from workdir.checkpoint import Checkpoints
from workdir.open import config_of, step_of

HELD_OUT = 16  # texts that what was found is judged by
LOW, HIGH = 'int4:group=64', 'int8'
Log = Callable[[str], Any]


def entries(
  workdir: str | os.PathLike,
  name: str,
  method: str,
  bound: QualityBound,
  calibration: Calibration | None,
  log: Log,
) -> list[str]:
  """Of model.execution.stored, for a run: LOW of some kinds of matrices, HIGH of the others.

  name: of the checkpoint. method: of compression.quantise.
  Raises ValueError where HIGH of all costs more than the bound lets, and NotImplementedError as
  compression.bounded.check.
  """
  workdir, config = pathlib.Path(workdir), config_of(workdir)
  if method not in METHODS:
    raise ValueError(
      f'--method={method}: a bound is searched by {" or ".join(METHODS)}, which take seconds a '
      'try; use one of them'
    )
  if config.adapter.kind or config.model.execution.stored:
    raise ValueError(
      f'{workdir} holds an adapter, or is in codes already: quantise the run that it was made of'
    )
  bounded.check(config.model)
  checkpoints, tokenizer = Checkpoints(workdir), tokenizers.load(workdir / 'tokenizer')
  mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
  with jax.set_mesh(mesh):
    target = params.abstract(lambda: transformer.init(config.model, 0), mesh)
    kinds, every = _in_low(target, log), len(_kinds(target))
    model = checkpoints.model(target, step_of(checkpoints, name))
    given = calibration or Calibration()
    batches, _ = rows_of(workdir, config, name, tokenizer, given, log)
    costs = costs_of(model, batches, tokenizer, bound)

    def stored(low):
      rest = [f'*={HIGH}'] if len(low) < every else []  # an entry of no matrix is refused
      return [*(f'*.{kind}={LOW}' for kind in low), *rest]

    def make(low):
      return jax.jit(functools.partial(quantised, entries=stored(low), method=method))(model)

    alone = {}
    for kind, size in kinds.items():
      cost = costs[0](make([kind]))
      log(f'{LOW} of {kind} alone, of {size:,} numbers: {bound.said(cost)}, on calibration')
      alone[kind] = math.inf if math.isnan(cost) else cost / size  # NaN has no place in an order
    order = sorted(alone, key=alone.get)

    def said(number):
      return f'{LOW} of {", ".join(order[: number - 1]) or "nothing"}, {HIGH} of the rest'

    found, _ = bounded.search(
      lambda number: make(order[: number - 1]), costs, bound, len(order) + 1, said, log
    )
  log(f'within the bound: {said(found)}')
  return stored(order[: found - 1])


def costs_of(model, batches, tokenizer, bound: QualityBound) -> list[Callable[[Any], float]]:
  """Of a smaller model: what it costs on rows of calibration, and on texts that training on the
  interpreter's library holds out.
  """
  rows, length = batches[0].tokens.shape
  texts = [tokenizer.encode(text) for text in library.held_out()[:HELD_OUT]]
  held_out = bounded.rows_of([ids for ids in texts if len(ids) > 1], rows, length)
  vocabulary = min(tokenizer.vocabulary, model.config.V)
  return [bounded.cost_on(model, each, bound, vocabulary) for each in (batches, held_out)]


def _in_low(model, log: Log) -> dict[str, int]:
  """Numbers of each kind of matrix in layers that LOW fits, and a line about each other one.

  model: may be abstract.
  """
  kinds = {}
  for kind, size in _kinds(model).items():
    try:
      jax.eval_shape(functools.partial(in_codes, entries=[f'*.{kind}={LOW}']), model)
    except ValueError as error:
      log(f'{kind} stays {HIGH}: {error}')
    else:
      kinds[kind] = size
  return kinds


def _kinds(model) -> dict[str, int]:
  """Numbers of each kind of matrix in layers, as attention.q."""
  kinds, rules = {}, parsed([f'*.blocks.*={HIGH}'])
  for name, p in params.by_name(model).items():
    if rule_of(name, p, rules):
      kind = '.'.join(name.split('.')[3:])
      kinds[kind] = kinds.get(kind, 0) + math.prod(p.shape)
  return kinds
