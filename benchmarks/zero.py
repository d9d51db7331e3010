"""How many bytes does training hold on each chip, for each size of model
and each way to split or shrink its state?

    python -m benchmarks.zero [--chips 64] [--json FILE]

Nothing here is computed: every figure is read off the shapes, dtypes and shardings of the real
model, optimizer and gradients, traced on an abstract mesh of that many chips (mesh.fsdp). Beside it
stands what the formula says (`formula`).

Between steps parameters and optimizer state are split in every stage of ZeRO
(parallel.mesh.MeshConfig.zero). While a step computes, there are gradients; with stages 1 and 2 the
weights that layers compute with, whole in the compute dtype, and with 1 their whole gradients in it
besides. Activations are what the forward pass keeps for the backward pass (the residuals of its
vector-Jacobian product), of one sequence a chip; what a single block works with while it is gone
through is not in them.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

import commands
from analysis.memory import shard_bytes
from configs.models import gpt2, llama3_70b
from data.batch import Batch
from data.config import DataConfig
from model import params, transformer, weights
from model.config import ModelConfig
from model.execution import ExecutionConfig
from objectives.next_token import summed_loss
from parallel import axes as ax
from parallel.mesh import AXES, MeshConfig
from training import state as states
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig, make_optimizer


def _gpt(width: int, layers: int, heads: int, length: int) -> ModelConfig:
  return dataclasses.replace(
    gpt2.get_config().model,
    width=width,
    layers=layers,
    heads=heads,
    feed_forward=4 * width,
    max_length=length,
  )


# GPT-2 XL: Radford et al. 2019, table 2. Llama 2 7B: arXiv:2307.09288 and its config.json.
# GPT-3: arXiv:2005.14165, table 2.1.
MODELS = {
  '125M (GPT-2)': gpt2.get_config().model,
  '1.5B (GPT-2 XL)': _gpt(1600, 48, 25, 1024),
  '7B (Llama 2)': ModelConfig(
    vocabulary=32_000,
    width=4096,
    layers=32,
    heads=32,
    feed_forward=11_008,
    max_length=4096,
    execution=ExecutionConfig(dtype='bfloat16'),
  ),
  '70B (Llama 3)': llama3_70b.get_config().model,
  '175B (GPT-3)': _gpt(12_288, 96, 96, 2048),
}
WAYS = {
  'ZeRO-1': dict(zero=1),
  'ZeRO-2': dict(zero=2),
  'ZeRO-3': dict(zero=3),
  'ZeRO-3, offload': dict(zero=3, offload=True),
  'ZeRO-3, 8-bit Adam': dict(zero=3, optimizer='adam8bit'),
}
PARTS = ('parameters', 'optimizer', 'gradients', 'whole weights', 'whole gradients', 'activations')


@dataclasses.dataclass(frozen=True)
class State:
  """Bytes on each chip while a step computes: `parts` by PARTS;
  `host`: in the host's memory, for each chip; `count`: parameters.
  """

  parts: dict[str, int]
  host: int
  count: int

  @property
  def chip(self) -> int:
    return sum(self.parts.values())


def setting(
  model: ModelConfig, chips: int, *, zero: int = 3, offload: bool = False, optimizer: str = 'adamw'
) -> Config:
  """The run of one cell of the table: one sequence a chip, remat='full'."""
  return Config(
    model=model.with_execution(remat='full', attention='blocked'),
    data=DataConfig(sequence_length=model.max_length, batch_size=chips),
    mesh=MeshConfig(data=1, fsdp=chips, zero=zero),
    optimizer=OptimizerConfig(name=optimizer),
    train=TrainConfig(offload_optimizer='host' if offload else ''),
  )


def measure(config: Config, chips: int) -> State:
  """What training holds. Raises ValueError where the model does not split over so many chips."""
  sizes = config.mesh.resolve(chips)
  config.check_mesh(sizes)
  mesh = AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
  with jax.sharding.use_abstract_mesh(mesh):
    init = functools.partial(transformer.init, config.model, config.train.seed)
    model = jax.eval_shape(init)
    optimizer = make_optimizer(
      config.optimizer, config.train.steps, params.specs({'policy': model})
    )
    state = params.abstract(functools.partial(states.init, config, optimizer), mesh)
    gathered = params.abstract(lambda: weights.gathered(init(), config.model.execution.dtype), mesh)
    gradients = params.abstract(
      lambda: jax.grad(lambda model: _loss(config, model)[0])(init()), mesh
    )
    kept = _residuals(config, state.models['policy'], mesh)
  whole = shard_bytes(gathered)
  parts = {
    'parameters': shard_bytes(state.models),
    'optimizer': shard_bytes(state.optimizer),
    'gradients': shard_bytes(gradients),
    'whole weights': whole if config.mesh.zero < 3 else 0,
    'whole gradients': whole if config.mesh.zero == 1 else 0,
    'activations': kept,
  }
  return State(parts, shard_bytes(state.optimizer, 'host'), params.count(model))


def formula(config: Config, chips: int, parameters: int) -> dict[str, float]:
  """Bytes on each chip as counted by hand: of P parameters, n chips, L layers,
  T tokens, D width, V rows of the vocabulary.

  f32 parameters and gradients 4 P / n each; AdamW's two moments 8 P / n (adam8bit: 2 P / n and 8 /
  256 P / n for scales, and 8 for tables; in the host's memory 0); weights but for tables whole in
  the compute dtype (c bytes), with stage 1 their gradients besides; activations with remat='full' c
  (L + 1) T D, every block's input and the gradient of the loss towards the last one's output, and
  12 T D of the last norm in f32; the loss computes the gradient of the head forward, c V D / n.
  Short of the truth where scales of adam8bit do not divide over the chips,
  which then hold them whole.
  """
  model, zero = config.model, config.mesh.zero
  P, n, c = parameters, chips, jnp.dtype(model.execution.dtype).itemsize
  tables = model.V * model.D * (1 if model.tie_embeddings else 2) + (
    model.max_length * model.D if model.position == 'learned' else 0
  )
  quantized = ((2 + 8 / 256) * (P - tables) + 8 * tables) / P
  moments = (
    0 if config.train.offload_optimizer else quantized if config.optimizer.name == 'adam8bit' else 8
  )
  whole = c * (P - tables)
  activations = (c * (model.L + 1) + 12) * model.max_length * model.D + c * model.V * model.D / n
  return {
    'parameters': 4 * P / n,
    'optimizer': moments * P / n,
    'gradients': 4 * P / n,
    'whole weights': whole if zero < 3 else 0,
    'whole gradients': whole if zero == 1 else 0,
    'activations': activations,
  }


def _loss(config, model, batch=None):
  if batch is None:
    shapes = Batch.abstract(config.data.batch_size, config.data.sequence_length)
    batch = jax.tree.map(lambda x: ax.place(jnp.zeros(x.shape, x.dtype), 'batch', 'length'), shapes)
  return summed_loss(model, batch, config.objective.z_loss)


def _residuals(config, model, mesh) -> int:
  """Bytes on each chip of what the forward pass leaves for the backward pass
  and is neither parameter nor token.
  """
  rows = jax.NamedSharding(mesh, ax.spec('batch', 'length'))
  batch = Batch.abstract(config.data.batch_size, config.data.sequence_length, rows)

  def forward(model, batch):
    return jax.vjp(lambda model: _loss(config, model, batch)[0], model)[1]

  program = jax.make_jaxpr(forward)(model, batch).jaxpr
  given, total = {*program.invars}, 0
  for out in {*program.outvars} - given:
    kept = jax.ShapeDtypeStruct(
      out.aval.shape, out.aval.dtype, sharding=jax.NamedSharding(mesh, out.aval.sharding.spec)
    )
    total += shard_bytes(kept)
  return total


def main(arguments: Sequence[str] | None = None) -> dict:
  """The command; returns model -> way -> State as dictionaries."""
  parser = commands.parser(__doc__.splitlines()[0])
  parser.add_argument('--chips', type=int, default=64, help='over which fsdp splits')
  options = parser.parse_args(arguments)
  found = {}
  for name, model in MODELS.items():
    found[name], rows = {}, []
    for way, choices in WAYS.items():
      try:
        config = setting(model, options.chips, **choices)
        state = measure(config, options.chips)
      except ValueError as error:
        parser.error(f'--chips={options.chips}: {name}: {error}')
      by_hand = sum(formula(config, options.chips, state.count).values())
      found[name][way] = dict(
        parts=state.parts, host=state.host, chip=state.chip, formula=by_hand, parameters=state.count
      )
      rows.append(
        [
          way,
          *(state.parts[part] / 1e9 for part in PARTS),
          state.chip / 1e9,
          by_hand / 1e9,
          state.host / 1e9,
        ]
      )
    commands.table(
      f'{name}, {state.count:,} parameters, T={model.max_length}, '
      f'{options.chips} chips: GB on each',
      ['', *PARTS, 'sum', 'by formula', 'host'],
      rows,
    )
  commands.write_json(options.json, 'zero', found)
  return found


if __name__ == '__main__':
  main()
