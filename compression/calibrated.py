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
from compression.awq import Scaling, searched, smoothed
from compression.gptq import Gptq
from compression.kept import Kept
from compression.quantise import METHODS, nearest
from compression.walk import LayerChange, by_matrix, estimate, layers_of, walk
from data.batch import Batch
from model.config import ModelConfig
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


@dataclasses.dataclass(frozen=True)
class By:
  """What is done to a layer by a method; `rules` of model.weights.scheme.parsed."""

  method: Method
  rules: Any
  config: ModelConfig

  def gptq(self) -> LayerChange:
    """Each matrix by its own X^T X, with scales that clip where that is nearer."""
    run = Gptq(METHODS['mse'], self.method.act_order)

    def coded(name, p, statistics):
      x = read(p).numbers('float32')
      return run(self._scheme(name, p), x, summed_of(p), p.axes, name, statistics)

    return LayerChange(by_matrix(coded), self.wanted)

  def awq(self) -> LayerChange:
    """Scales by the error of what comes out, then clipping where that is nearer."""
    return self._scaled(Scaling(searched, False, self.config), METHODS['mse'], products=True)

  def smoothquant(self) -> LayerChange:
    """Scales by the largest of both sides, then rounding."""
    return self._scaled(Scaling(smoothed, True, self.config), nearest, products=False)

  def wanted(self, name: str, p) -> bool:
    """Whether rules put a parameter in codes."""
    rule = rule_of(name, p, self.rules)
    return rule is not None and rule[1].grid != 'keep' and not read(p).coded

  def left(self, model) -> list[str]:
    """Names of matrices for whose scales there is no place."""
    if self.method.name == 'gptq':
      return []
    scaling = Scaling(None, self.method.name == 'smoothquant', self.config)
    return [
      name
      for layer in dict.fromkeys(
        layer._replace(repeat=0, number=0) for layer in layers_of(self.config)
      )
      for name in scaling.without(
        getattr(model, layer.side).blocks[layer.place], layer.prefix, self.wanted
      )
    ]

  def _scheme(self, name: str, p):
    return rule_of(name, p, self.rules)[1]

  def _scaled(self, scaling: Scaling, method, products: bool) -> LayerChange:
    def rounds(name, p, x):
      return nearest(self._scheme(name, p), x, summed_of(p), p.axes, name).numbers('float32')

    def coded(name, p, statistics):
      x = read(p).numbers('float32')
      return method(self._scheme(name, p), x, summed_of(p), p.axes, name)

    def make(prefix, layer, statistics):
      layer = scaling(prefix, layer, statistics, rounds)
      return by_matrix(coded)(prefix, layer, statistics)

    return LayerChange(make, self.wanted, products)


CALIBRATED = {'gptq': By.gptq, 'awq': By.awq, 'smoothquant': By.smoothquant}


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
  by = By(method, parsed(entries), model.config)
  change = CALIBRATED[method.name](by)
  if left := by.left(model):
    log(f'no place for scales, rounded as they are: {", ".join(left)}')
  for line in expected(model, batches, change):
    log(line)
  model = walk(model, batches, change, log, kept)
  return jax.jit(functools.partial(stored, entries=entries, make=nearest))(model)


def expected(model, batches, change) -> list[str]:
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
