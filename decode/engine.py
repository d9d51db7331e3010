"""Who reads and writes for many requests at once, with the same bits for each whatever the others
do? One state of B rows, which requests join and leave one by one, and four programs of fixed shape.

What a program of another shape computes differs in its last bits: 1e-5 of keys in f32, 0.1 in
bfloat16, enough to write another token. So prompts are read by one program only, [J, C] tokens
straight into the rows that they belong to, and all rows are decoded by one, [B, 1]. Neither
depends on who else is there: with one build, hardware, mesh and Sizes a request's bytes are a
function of the request.

Arrays and ids come and go here; of texts and directories it knows nothing. Weights are an argument
of every call: others of the same shapes compile nothing.

B rows · J rows that are read together · C tokens of each · V vocabulary
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decode import loop
from decode.constrain import Automaton, Constraint, Tables
from decode.loop import Chunk, DecodeState, Rules
from decode.options import CHUNK
from decode.sampling import History, Sampling
from model.cache import APPEND, init_cache
from model.config import ModelConfig
from model.transformer import Decoder
from model.weights import adapters
from parallel import axes as ax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What an engine has room for; each is part of the shape of its programs.

  Attributes:
    rows: B, requests that are in it at a time.
    capacity: tokens that a row holds at most, prompt and new ones.
    read_rows: J, rows that are read together; 0: one of each part of the mesh.
    read_tokens: C, tokens of each of them that are read together.
    steps: tokens of each row that a call of `decode` makes at most.
    bias: ids that a request may have a bias for. ends: ids that may end it.
    states, classes: of the automaton that the constraints of all rows share (decode.constrain).
    alternatives: likeliest ids that a call of `decode` gives where it is asked for any.
    cache_dtype: of keys and values; default: as the model computes.
    adapters: on the weights (model.weights.adapters), of which each row may have one.

  Raises ValueError where one of them is no size.
  """

  rows: int = 8
  capacity: int = 2048
  read_rows: int = 0
  read_tokens: int = APPEND
  steps: int = CHUNK
  bias: int = 300
  ends: int = 8
  states: int = 4096
  classes: int = 256
  alternatives: int = 0
  cache_dtype: str = ''
  adapters: int = 0

  def __post_init__(self):
    may_be_none = ('read_rows', 'bias', 'alternatives', 'adapters')
    for field in dataclasses.fields(self):
      value, least = getattr(self, field.name), 0 if field.name in may_be_none else 1
      if field.type is int and value < least:
        raise ValueError(f'{field.name}={value} of an engine must be at least {least}')


@dataclasses.dataclass(frozen=True)
class Request:
  """What one row is asked for.

  Attributes:
    prompt: ids, at least one.
    max_new_tokens: how many to write at most.
    sampling: of one row, as decode.sampling.make_sampling(1, ..) gives it.
    ends: ids that end the row, and belong to it.
    constraint: what it keeps to, or None.
    adapter: 0 for the model itself, or i for its i-th adapter (model.weights.bank.Bank.index).
  """

  prompt: Sequence[int]
  max_new_tokens: int
  sampling: Sampling
  ends: Sequence[int] = ()
  constraint: Constraint | None = None
  adapter: int = 0


class Engine:
  """B rows of a model, with the programs that read into them and write on.

  A row is free, or has a request: `join` gives it one, `read` reads the request's prompt part by
  part, from whose end on every `decode` writes tokens, until `release` frees it. A row that has
  ended stays as it is, and costs what it holds, until then. A prompt that another row of the same
  part of the mesh is reading when its request joins, as for samples, is read there, for both, where
  they have the same adapter. Not for several threads at a time.

  Attributes:
    sizes, mesh: as they were given, but for read_tokens beyond model.max_length.
    state, rules: of all rows, on the device.
  """

  def __init__(
    self,
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    sizes: Sizes = Sizes(),
    *,
    vocabulary: int = 0,
    pad: int = 0,
    virtual: int = 0,
  ):
    """An engine for weights of this config (decode.generating.generating_model's), all rows free.

    Args:
      vocabulary: ids from here on are never generated; 0: all may be.
      pad: what a chunk has behind a row's end.
      virtual: soft tokens of the weights (model.soft), whose ids may stand in prompts besides.
    Raises ValueError for sizes that the mesh does not split, that the model has no positions for,
    and for experts that drop tokens; NotImplementedError for what has no engine.
    """
    # A model of few positions reads no more tokens at once than it has of them.
    read_tokens = min(sizes.read_tokens, config.max_length or sizes.read_tokens)
    sizes = dataclasses.replace(sizes, read_tokens=read_tokens)
    self.sizes, self.mesh = sizes, mesh
    self._config, self._pad = config, pad
    self._vocabulary = vocabulary or config.V
    self._virtual = range(config.table_rows, config.table_rows + virtual)
    with jax.set_mesh(mesh):
      _check(config, sizes)
      config.check_parameters(dict(mesh.shape))
      self._parts = ax.size('batch')
    self._read_rows = sizes.read_rows or self._parts
    self._programs: dict[str, Any] = {}
    self._begun = self._compiled(jax.jit(self._begin))
    self.reset()
    self._programs['join'] = self._compiled(
      loop.join, self.state, self.rules, *self._joining(0, idle_request(sizes.bias), 0)
    )
    self._programs['release'] = self._compiled(
      loop.release, self.state, self.rules, self._put(np.zeros(sizes.rows, bool))
    )

  def reset(self) -> None:
    """All rows are free, whatever they had: also after a call that has failed half-way."""
    self._requests: dict[int, Request] = {}
    self._unread: dict[int, list[int]] = {}
    self._sharing: dict[int, int] = {}  # rows whose prompt another one reads, and which
    self._tables = Tables(self._config.table_rows, self.sizes.states, self.sizes.classes)
    self._automaton = self._uploaded()
    self.state, self.rules = self._begun()

  def compile(self, weights: Decoder) -> None:
    """Compiles all programs for weights of these shapes, types and shardings (also abstract ones):
    none is compiled later. Without this call, the first calls compile.
    """
    self._reader(weights)
    self._sharer()
    for alternatives in {0, self.sizes.alternatives}:
      self._decoder(weights, alternatives)

  @property
  def free(self) -> list[int]:
    """Rows that have no request."""
    return [row for row in range(self.sizes.rows) if row not in self._requests]

  @property
  def reading(self) -> list[int]:
    """Rows whose prompts are not read to the end, but for those whose prompt another one of these
    reads; who joined first is first.
    """
    return list(self._unread)

  def join(self, row: int, request: Request) -> None:
    """A free row begins with a request, `fitted` to it.

    Raises ValueError for a row that is not free, and for a request that does not fit.
    """
    if row not in self.free:
      raise ValueError(f'row {row} is not free; these are: {self.free}; release others first')
    self._check_request(request)
    prompt = [int(i) for i in request.prompt]
    request = dataclasses.replace(self.fitted(request), prompt=prompt)
    before = self._tables.automaton
    place = self._tables.add(request.constraint)
    if self._tables.automaton is not before:
      self._automaton = self._uploaded()
    self._requests[row] = request
    if alike := [other for other in self._unread if self._alike(row, other)]:
      self._sharing[row] = alike[0]
    else:
      self._unread[row] = prompt.copy()
    arguments = self._joining(row, request, place)
    self.state, self.rules = self._run('join', self.state, self.rules, *arguments)

  def read(self, weights: Decoder, rows: Iterable[int] | None = None) -> list[int]:
    """Reads the next C tokens of these rows' prompts, in one call; which of them, and of those that
    share them, have come to their end.

    rows: at most J of `reading`, at most J / parts on each part of the mesh (`part_of`); default:
    as many as go together. Raises ValueError for others.
    """
    chosen = self._together() if rows is None else list(rows)
    arguments, ended = self._reading(chosen)
    self._reader(weights)
    self.state = self._run('read', weights, self.state, *arguments)
    for row in chosen:
      del self._unread[row][: self.sizes.read_tokens]
    for row in ended:
      del self._unread[row]
    return ended + [row for reader in ended for row in self._share(reader)]

  def decode(self, weights: Decoder, count: int = 0, alternatives: bool = False) -> Chunk:
    """Up to `count` more tokens of every row whose prompt was read (0: as many as a call makes),
    as arrays on the device, [B, steps].

    alternatives: with the likeliest ids, too; they change no bit of anything else.
    """
    count = count or self.sizes.steps
    if not 0 < count <= self.sizes.steps:
      raise ValueError(f'count={count} of a chunk must be in [1, {self.sizes.steps}] (Sizes.steps)')
    k = self.sizes.alternatives if alternatives else 0
    if alternatives and not k:
      raise ValueError('this engine gives no alternatives: make it with Sizes(alternatives=..)')
    name = self._decoder(weights, k)
    rules = dataclasses.replace(self.rules, automaton=self._automaton)
    self.state, chunk = self._run(name, weights, self.state, rules, np.int32(count))
    return chunk

  def release(self, rows: Iterable[int]) -> None:
    """Frees these rows, whatever they are doing. Raises ValueError for one that is free already."""
    leaving = np.zeros(self.sizes.rows, bool)
    for row in list(rows):
      if row not in self._requests:
        raise ValueError(f'row {row} has no request; these have: {sorted(self._requests)}')
      self._tables.remove(self._requests.pop(row).constraint)
      self._pass_on(row)
      leaving[row] = True
    if leaving.any():
      leaving = self._put(leaving)
      self.state, self.rules = self._run('release', self.state, self.rules, leaving)

  def fitted(self, request: Request) -> Request:
    """The request with no more new tokens than a row has room for behind its prompt."""
    room = self.sizes.capacity - len(request.prompt)
    return dataclasses.replace(request, max_new_tokens=min(request.max_new_tokens, room))

  def part_of(self, row: int) -> int:
    """On which part of the mesh a row lives: it is read and written there only."""
    return row // (self.sizes.rows // self._parts)

  def _alike(self, row: int, other: int) -> bool:
    """Whether one of the two can read the prompt for both."""
    requests = [self._requests[i] for i in (row, other)]
    asked = [(request.prompt, request.adapter) for request in requests]
    return self.part_of(row) == self.part_of(other) and asked[0] == asked[1]

  def _share(self, reader: int) -> list[int]:
    """The rows that go on, from now on, from the prompt that this one has just read."""
    rows = [row for row, other in self._sharing.items() if other == reader]
    for row in rows:
      del self._sharing[row]
      part = self.part_of(row)
      places = [self._put(self._named({i: part}, self._parts)) for i in (reader, row)]
      self._sharer()
      self.state = self._run('share', self.state, *places)
    return rows

  def _pass_on(self, row: int) -> None:
    """A row leaves: what it reads for others, the first of them reads anew."""
    self._sharing.pop(row, None)
    left = [other for other, reader in self._sharing.items() if reader == row]
    if self._unread.pop(row, None) and left:
      heir, *others = left
      self._unread[heir] = list(self._requests[heir].prompt)
      del self._sharing[heir]
      self._sharing |= dict.fromkeys(others, heir)

  def _begin(self) -> tuple[DecodeState, Rules]:
    """The state of rows that are all free, and their rules without an automaton."""
    sizes, B, V = self.sizes, self.sizes.rows, self._config.table_rows

    def zeros(dtype, *more):
      axes = 'batch', *(None,) * len(more)
      return ax.place(jnp.zeros((B, *more), dtype, out_sharding=ax.out(*axes)), *axes)

    def split(x):
      return ax.place(jnp.asarray(x), 'batch', *(None,) * (x.ndim - 1))

    state = DecodeState(
      cache=init_cache(self._config, B, sizes.capacity, sizes.cache_dtype, sizes.read_tokens),
      logits=zeros(jnp.float32, V),
      done=~zeros(bool),
      stop_at=zeros(jnp.int32),
      history=History(zeros(jnp.int32, V), zeros(bool, V)),
      places=zeros(jnp.int32),
      adapters=zeros(jnp.int32) if sizes.adapters else None,
    )
    sampling = jax.tree.map(split, loop.idle_sampling(B, sizes.bias))
    return state, Rules(sampling, zeros(jnp.int32, sizes.ends) - 1)

  def _joining(self, row: int, request: Request, place: int):
    """What loop.join takes of a request besides the state: a row of each part of the mesh, of
    which this one only is there.
    """
    rows = self._named({row: self.part_of(row)}, self._parts)
    sampling = dataclasses.replace(
      request.sampling, bias=request.sampling.bias.padded(self.sizes.bias)
    )
    ends = np.full((1, self.sizes.ends), -1, np.int32)
    ends[0, : len(request.ends)] = request.ends
    stop_at = np.array([len(request.prompt) + request.max_new_tokens], np.int32)
    values = [Rules(sampling, ends), stop_at, np.array([place], np.int32)]
    if self.sizes.adapters:
      values.append(np.array([request.adapter], np.int32))
    everywhere = jax.tree.map(lambda x: self._put(np.repeat(x, self._parts, 0)), values)
    return self._put(rows), *everywhere

  def _reading(self, chosen: Sequence[int]):
    """What loop.read takes of these rows besides model and state; whose prompts end with it."""
    J, C = self._read_rows, self.sizes.read_tokens
    tokens = np.full((J, C), self._pad, np.int32)
    counts, ends = np.zeros(J, np.int32), np.zeros(J, bool)
    places: dict[int, int] = {}
    taken = [0] * self._parts
    for row in chosen:
      if row not in self._unread or row in places:
        raise ValueError(f'row {row} has nothing to read; these have, each once: {self.reading}')
      part = self.part_of(row)
      if taken[part] == J // self._parts:
        raise ValueError(
          f'rows {list(chosen)} do not go together: {J // self._parts} at a time are read on each '
          f'of {self._parts} parts of the mesh (Engine.part_of)'
        )
      index = part * (J // self._parts) + taken[part]
      taken[part] += 1
      places[row] = index
      ids = self._unread[row][:C]
      tokens[index, : len(ids)] = ids
      counts[index] = len(ids)
      ends[index] = len(self._unread[row]) <= C
    rows = self._named(places, J)
    arguments = tuple(map(self._put, (rows, tokens, counts, ends)))
    return arguments, [row for row, index in places.items() if ends[index]]

  def _together(self) -> list[int]:
    """Of the rows that are being read the first ones that one call can read."""
    chosen: list[int] = []
    taken = [0] * self._parts
    for row in self.reading:
      part = self.part_of(row)
      if taken[part] < self._read_rows // self._parts:
        taken[part] += 1
        chosen.append(row)
    return chosen

  def _named(self, places: dict[int, int], J: int) -> np.ndarray:
    """[J], as which of its own a device finds these rows, each at its place in the call, which is
    on the row's part of the mesh; no row elsewhere. See model.cache.Slots.
    """
    here = self.sizes.rows // self._parts
    rows = np.full(J, here, np.int32)
    for row, index in places.items():
      rows[index] = row % here
    return rows

  def _check_request(self, request: Request) -> None:
    prompt, new, sizes = request.prompt, request.max_new_tokens, self.sizes
    if len(prompt) < 1 or new < 1:
      raise ValueError(
        f'a prompt of {len(prompt)} tokens and max_new_tokens={new}: both must be at least 1'
      )
    if len(prompt) >= sizes.capacity:
      raise ValueError(
        f'a prompt of {len(prompt)} tokens leaves no room for new ones in '
        f'capacity={sizes.capacity} of a row; shorten the prompt'
      )
    wrong = [i for i in prompt if not 0 <= i < self._vocabulary and i not in self._virtual]
    if wrong:
      soft = self._virtual and f' and, of soft tokens, [{self._virtual[0]}, {self._virtual.stop})'
      raise ValueError(
        f'a prompt has the id {wrong[0]}; ids are in [0, {self._vocabulary}){soft or ""}'
      )
    if len(request.ends) > sizes.ends:
      raise ValueError(f'{len(request.ends)} ids end a row, of at most {sizes.ends}; give fewer')
    if request.sampling.seed.shape != (1,):
      raise ValueError(
        f'a request is one row, and its sampling is of {request.sampling.seed.shape}; make it with '
        'make_sampling(1, ..)'
      )
    if not 0 <= request.adapter <= sizes.adapters:
      raise ValueError(
        f'adapter={request.adapter} of a request must be in [0, {sizes.adapters}] '
        '(Sizes.adapters); 0 is none'
      )
    request.sampling.bias.padded(sizes.bias)  # raises for more

  def _check_weights(self, weights) -> None:
    if adapters(weights) != self.sizes.adapters:
      raise ValueError(
        f'weights with {adapters(weights)} adapters in an engine for {self.sizes.adapters} '
        '(Sizes.adapters): make both for as many'
      )

  def _reader(self, weights) -> None:
    if 'read' not in self._programs:
      self._check_weights(weights)
      arguments, _ = self._reading(())
      self._programs['read'] = self._compiled(
        loop.read, weights, self.state, *arguments, vocabulary=self._vocabulary
      )

  def _sharer(self) -> None:
    if 'share' not in self._programs:
      none = self._named({}, self._parts)
      self._programs['share'] = self._compiled(
        loop.share, self.state, self._put(none), self._put(none.copy())
      )

  def _decoder(self, weights, alternatives: int) -> str:
    """The name of the program, compiled."""
    name = f'decode with {alternatives} alternatives'
    if name not in self._programs:
      self._check_weights(weights)
      self._programs[name] = self._compiled(
        loop.decode_chunk,
        weights,
        self.state,
        dataclasses.replace(self.rules, automaton=self._automaton),
        np.int32(0),
        steps=self.sizes.steps,
        pad=self._pad,
        vocabulary=self._vocabulary,
        alternatives=alternatives,
      )
    return name

  def _compiled(self, function, *arguments, **static) -> jax.stages.Compiled:
    """A program of these shapes, which takes no others: where one comes that it was not compiled
    for, it raises and compiles nothing.
    """
    with jax.set_mesh(self.mesh):
      return function.lower(*arguments, **static).compile()

  def _run(self, name: str, *arguments):
    with jax.set_mesh(self.mesh):
      return self._programs[name](*arguments)

  def _put(self, x: np.ndarray) -> jax.Array:
    """On the mesh, split along its rows. Of a new array each time: on a CPU the device may go on
    using the memory of what it is given.
    """
    with jax.set_mesh(self.mesh):
      spec = ax.spec('batch', *(None,) * (x.ndim - 1))
    return jax.device_put(x, jax.NamedSharding(self.mesh, spec))

  def _uploaded(self) -> Automaton:
    return jax.device_put(self._tables.automaton, jax.NamedSharding(self.mesh, jax.P()))


def idle_request(bias: int) -> Request:
  """What asks for nothing, in the shapes of what does."""
  return Request([0], 1, loop.idle_sampling(1, bias))


def _check(config: ModelConfig, sizes: Sizes) -> None:
  """Raises as Engine says; with the mesh in context."""
  parts = ax.size('batch')
  for name in ('rows', 'read_rows'):
    value = getattr(sizes, name)
    if value % parts:
      raise ValueError(
        f'{name}={value} do not split over the {parts} parts of the mesh (data x fsdp x expert); '
        'make it a multiple'
      )
  if sizes.read_rows > sizes.rows:
    raise ValueError(f'read_rows={sizes.read_rows} of rows={sizes.rows}: read at most all of them')
  if config.encoder_layers:
    raise NotImplementedError(
      f'an engine for model.encoder_layers={config.encoder_layers}: what an encoder reads joins no '
      'running batch so far; use decode.generator.Generator'
    )
  if ax.size('layers') > 1:
    raise NotImplementedError(
      f'an engine over mesh.stage={ax.size("layers")}: stages write all rows of a cache at once; '
      'use a mesh without stages, or decode.generator.Generator'
    )
  if config.moe.experts and config.moe.dispatch == 'capacity':
    raise ValueError(
      "model.moe.dispatch='capacity' drops tokens for want of room, which depends on who else is "
      "there; use 'dropless', as decode.generating.generating does"
    )
