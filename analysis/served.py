"""What does a server of so many rows read and write with, how many rows fit, and how long does a
person wait for it?

The programs are those that its engine would compile (decode.engine), for devices that are not
here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from analysis import memory
from decode.engine import Engine
from decode.generating import generating, generating_model
from decode.loop import DecodeState
from decode.options import CHUNK
from decode.sizes import Sizes
from model import params, transformer
from model.config import ModelConfig
from parallel import axes as ax
from serving.rows import row_sizes

MOST_ROWS = 256  # beyond which more rows hardly write faster, where nothing else is said
PROMPT, ANSWER = 1024, 256  # tokens of a request, of which throughput and waiting are said
SPARE = 0.03  # of the memory, that a first guess of rows leaves


class _Lowering(Engine):
  """An engine of shapes, whose programs are lowered, and none is run."""

  def _compiled(self, function, *arguments, **static):
    if function.__wrapped__ == self._begin:
      return self._shapes
    if isinstance(arguments[-1], np.int32):  # of how many steps
      arguments = arguments[:-1]  # all of them: the compiler's account wants a number
    with jax.set_mesh(self.mesh):
      return function.lower(*arguments, **static)

  def _shapes(self):
    with jax.set_mesh(self.mesh):
      return params.abstract(self._begin, self.mesh)

  def _put(self, x):
    return _abstract(x, self._splits.of(x.ndim))

  def _puts(self, xs):
    return list(map(self._put, xs))

  def _uploaded(self):
    everywhere = jax.NamedSharding(self.mesh, jax.P())
    return jax.tree.map(lambda x: _abstract(x, everywhere), self._tables.automaton)


def _abstract(x, sharding):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def lowered(
  config: ModelConfig, mesh: jax.sharding.Mesh, rows: int, context: int, weights: str, reads: bool
) -> tuple[jax.stages.Lowered, dict[str, Any], Sizes]:
  """The program that reads a part of prompts, or else the one that writes CHUNK tokens of every
  row, of a server with so many rows of `context` tokens; what it is passed, by name; its sizes.

  Raises as decode.engine.Engine.
  """
  with jax.set_mesh(mesh):
    model = params.abstract(lambda: generating_model(transformer.init(config, 0), weights), mesh)
    sizes = row_sizes(config, ax.size('batch'), config.V, rows=rows, capacity=context)
  made = _Lowering(model.config, mesh, sizes)
  name = made._reader(model, made._reads.shapes[0]) if reads else made._decoder(model, 0)
  program = made._programs[name]
  state = made.state
  arrays = {'parameters': model, 'cache': state.cache, "rows' state": without_cache(state)}
  return program, arrays, made.sizes


def without_cache(state: DecodeState) -> DecodeState:
  return dataclasses.replace(state, cache=None)


def parts_of(mesh: jax.sharding.Mesh) -> int:
  """Of the mesh, that have rows of their own."""
  with jax.set_mesh(mesh):
    return ax.size('batch')


def bytes_of(config: ModelConfig, mesh: jax.sharding.Mesh, context: int, weights: str):
  """Of a device: weights; and what it holds for a row of each part of the mesh."""
  parts = parts_of(mesh)
  _, one, _ = lowered(config, mesh, parts, context, weights, True)
  _, two, _ = lowered(config, mesh, 2 * parts, context, weights, True)
  held = [memory.shard_bytes((arrays['cache'], arrays["rows' state"])) for arrays in (one, two)]
  return memory.shard_bytes(one['parameters']), held[1] - held[0]


@dataclasses.dataclass(frozen=True)
class PlannedServer:
  """A server, by the plans (plan.Plan) of what it writes and reads with.

  Attributes:
    write: of CHUNK tokens of every row. read: of a part of prompts.
    rows, context: of the server. parts: of the mesh, each of which reads one prompt at a time.
  """

  write: Any
  read: Any
  rows: int
  context: int
  parts: int

  @property
  def request(self) -> tuple[int, int]:
    """Tokens of a prompt and of its answer, of which times are said."""
    answer = min(ANSWER, self.context // 4)
    return min(PROMPT, self.context - answer), answer

  def times(self) -> dict[str, float]:
    """Seconds as the compiler has them, caches full; and tokens of answers a second."""
    prompt, answer = self.request
    token, read = self.write.seconds / CHUNK, self.read.seconds
    reads = -(-prompt * self.parts // self.read.tokens)
    # Between two reads a row writes a quarter of a chunk (serving.scheduler).
    between = CHUNK // 4
    return {
      'a token of every row': token,
      'a part of prompts': read,
      'first token, alone': reads * read + token,
      'first token, among rows that write': reads * (read + between * token) + token,
      'between tokens, while others are read': token + read / between,
      'tokens/s': self.rows * answer / (answer * token + self.rows / self.parts * reads * read),
      'tokens/s, nothing to read': self.rows / token,
    }


def serve(
  config: ModelConfig,
  mesh: jax.sharding.Mesh,
  plan: Callable[[str, int], Any],
  available: float,
  rows: int,
  context: int,
  weights: str,
) -> PlannedServer:
  """A server of so many rows; 0: of as many as fit, and at most MOST_ROWS.

  plan: a plan.Plan of a mode, 'serve' or 'read', of so many rows. available: bytes of a device.
  Raises ValueError where not even one row of each part of the mesh fits.
  """
  parts = parts_of(mesh)
  if rows:
    return PlannedServer(plan('serve', rows), plan('read', rows), rows, context, parts)
  held, row = bytes_of(generating(config), mesh, context, weights)
  rows = min(MOST_ROWS // parts, int((available * (1 - SPARE) - held) // row)) * parts
  while rows > 0:
    write = tried = plan('serve', rows)
    if write.fits:
      tried = plan('read', rows)
      if tried.fits:
        return PlannedServer(write, tried, rows, context, parts)
    short = tried.memory.peak - available if tried.memory else row
    rows -= max(1, -int(-short // row)) * parts
  raise ValueError(
    f'of {available / 1e9:.2f} GB a device weights take {held / 1e9:.2f}, and a row of '
    f'{context:,} tokens {row / 1e9:.2f}: no server fits; use more devices over mesh.tensor, '
    '--weights=int8, or a shorter --context'
  )
