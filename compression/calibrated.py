"""Which codes stand for matrices whose inputs are known? The methods that look at rows of
calibration, layer by layer; what is in no layer is rounded.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import names
from compression.gptq import Gptq
from compression.kept import Kept
from compression.quantise import METHODS, nearest
from compression.walk import Change, by_matrix, estimate, walk
from data.batch import Batch
from model.transformer import Decoder
from model.weights import read
from model.weights.scheme import parsed, rule_of, stored, summed_of

Log = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class Method:
  """A method that calibrates.

  Attributes:
    name: of CALIBRATED. act_order: of GPTQ, see compression.gptq.

  Raises ValueError for an unknown name, and for an order where there is none.
  """

  name: str
  act_order: bool = False

  def __post_init__(self):
    names.check('--method', self.name, CALIBRATED)
    if self.act_order and self.name != 'gptq':
      raise ValueError(f'--act_order is of gptq, and --method is {self.name}; leave it out')


def gptq(method: Method, rules) -> Change:
  """Each matrix by its own X^T X, with scales that clip where that is nearer."""
  run = Gptq(METHODS['mse'], method.act_order)

  def coded(name, p, statistics):
    _, scheme = rule_of(name, p, rules)
    return run(scheme, read(p).numbers('float32'), summed_of(p), p.axes, name, statistics)

  return Change(by_matrix(coded), functools.partial(coded_by, rules=rules))


def coded_by(name: str, p, rules) -> bool:
  """Whether rules put a parameter in codes."""
  rule = rule_of(name, p, rules)
  return rule is not None and rule[1].grid != 'keep' and not read(p).coded


CALIBRATED = {'gptq': gptq}


def calibrated(
  model: Decoder,
  batches: Sequence[Batch],
  entries: Sequence[str],
  method: Method,
  log: Log,
  kept: Kept | None = None,
) -> Decoder:
  """The model in codes, on the mesh in context, of one device; the memory and time that it takes
  are said before.

  entries: of model.execution.stored. batches, kept: see compression.walk.
  Raises ValueError and NotImplementedError as walk and stored do.
  """
  jax.eval_shape(functools.partial(stored, entries=entries), model)  # what does not fit is said
  change = CALIBRATED[method.name](method, parsed(entries))
  for line in _expected(model, batches, change):
    log(line)
  model = walk(model, batches, change, log, kept)
  return jax.jit(functools.partial(stored, entries=entries, make=nearest))(model)


def _expected(model, batches, change) -> list[str]:
  of = estimate(model, batches, change)
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model))
  mib = {name: f'{count / 2**20:,.0f} MiB' for name, count in (of | {'model': size}).items()}
  minutes = of['flops'] / _rate() / 60
  return [
    f'memory: the model {mib["model"]}, hidden states of all rows {mib["states"]}; of one layer '
    f'{mib["layer"]} and its statistics {mib["statistics"]}',
    f'time: {of["flops"] / 1e12:,.2f} TFLOP, at least {minutes:.1f} minutes as products run here',
  ]


def _rate() -> float:
  """FLOP a second of a product in f32."""
  x = jnp.ones((1024, 1024), jnp.float32)
  run = jax.jit(lambda x: x @ x)
  run(x).block_until_ready()
  began = time.perf_counter()
  run(x).block_until_ready()
  return 2 * 1024**3 / (time.perf_counter() - began)
