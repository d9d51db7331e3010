"""Who reads and writes for many requests at once, with the same bits for each whatever the others
do? One state of B rows, which requests join and leave one by one, and few programs of fixed shape.

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
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from decode import loop
from decode.calling import Leaves, Splits, flattened
from decode.constrain import Automaton, Tables
from decode.idle import idle_state
from decode.loop import Chunk, Rules
from decode.prefixes import Prefixes
from decode.reads import Reads, Shape
from decode.sizes import Request, Sizes, Use, check, check_request, check_weights, idle_request
from model.config import ModelConfig
from model.transformer import Decoder
from parallel import axes as ax
from parallel.compiler import GENERATION


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
    sizes = sizes.within(config.max_length)
    self.sizes, self.mesh = sizes, mesh
    self._config, self._pad = config, pad
    self._vocabulary = vocabulary or config.V
    self._virtual = range(config.table_rows, config.table_rows + virtual)
    self._windows = tuple(kind.window for kind, _ in config.places)
    with jax.set_mesh(mesh):
      check(config, sizes)
      config.check_parameters(dict(mesh.shape))
      self._parts = ax.size('batch')
    self._read_rows = sizes.read_rows or self._parts
    self._reads = Reads(sizes, self._read_rows, pad)
    self._programs: dict[str, Any] = {}
    self._splits = Splits(mesh)
    self._begin = functools.partial(idle_state, config, sizes)
    self._begun = self._compiled(jax.jit(self._begin))
    self.reset()
    self._programs['join'] = self._compiled(
      loop.join, self.state, self.rules, *self._joining(0, idle_request(sizes.bias), 0)
    )
    self._programs['release'] = self._compiled(
      loop.release, self.state, self.rules, self._put(np.zeros(sizes.rows, bool))
    )

  def rest(self) -> None:
    """Neither caches nor weights stay on the devices for its sake, until `reset`."""
    self.state = self.rules = None
    self._weights: Decoder | None = None  # by which prefixes were read
    self._leaves = Leaves()

  def reset(self) -> None:
    """All rows are free, whatever they had: also after a call that has failed half-way."""
    self._requests: dict[int, Request] = {}
    self._unread: dict[int, list[int]] = {}
    self._sharing: dict[int, int] = {}  # rows whose prompt another one reads, and which
    self._fresh: set[int] = set()  # rows that have read nothing
    self._cached: dict[int, int] = {}
    self._tables = Tables(self._config.table_rows, self.sizes.states, self.sizes.classes)
    self._automaton = self._uploaded()
    self.rest()  # before there is room for others
    self.state, self.rules = self._begun()
    windows = zip(self._windows, self.state.cache.held, strict=True)
    rings = [held.slots - window + 1 for window, held in windows if held.ring]
    self._prefixes = Prefixes(self.sizes.rows, self.sizes.block, min(rings, default=None))

  def compile(
    self, weights: Decoder, came: Callable[[int, int], None] = lambda done, total: None
  ) -> None:
    """Compiles all programs for weights of these shapes, types and shardings (also abstract ones):
    none is compiled later. Without this call, the first calls compile.

    came: hears how many there are so far, of how many.
    """
    steps = self._compiling(weights)
    total = len(self._programs) + len(steps)
    for left, step in zip(range(len(steps), 0, -1), steps):
      came(total - left, total)
      step()
    came(total, total)

  def _compiling(self, weights: Decoder) -> list[Callable]:
    """What makes the programs that are not there from the beginning."""
    decoders = sorted({0, self.sizes.alternatives})
    steps = [lambda shape=shape: self._reader(weights, shape) for shape in self._reads.shapes]
    resumes = self.sizes.block and not self.sizes.source
    steps += [self._sharer, self._resumer] if resumes else [self._sharer]
    return steps + [lambda k=k: self._decoder(weights, k) for k in decoders]

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

  @property
  def writing(self) -> list[int]:
    """Rows whose prompts are read to the end."""
    return [row for row in self._requests if row not in self._unread and row not in self._sharing]

  @property
  def unread(self) -> int:
    """Tokens of prompts that are still to be read."""
    return sum(map(len, self._unread.values()))

  def open(self, request: Request) -> list[int]:
    """The free rows that can take a request now."""
    return self.free

  def seat(self) -> list[int]:
    """The rows that write in a chunk which is decoded next."""
    return self.writing

  def use(self) -> Use:
    """Of memory, now; from any thread."""
    rows = set(list(self._requests)) - self._fresh - self._sharing.keys()
    tokens = sum(map(self._prefixes.written, rows))
    return Use(tokens, self.sizes.rows * self.sizes.capacity)

  def join(self, row: int, request: Request) -> None:
    """A free row begins with a request, `fitted` to it.

    Raises ValueError for a row that is not free, and for a request that does not fit.
    """
    if row not in self.free:
      raise ValueError(f'row {row} is not free; these are: {self.free}; release others first')
    self.check(request)
    prompt, source = ([int(i) for i in ids] for ids in (request.prompt, request.source))
    request = dataclasses.replace(self.fitted(request), prompt=prompt, source=source)
    before = self._tables.automaton
    place = self._tables.add(request.constraint)
    if self._tables.automaton is not before:
      self._automaton = self._uploaded()
    self._requests[row] = request
    if alike := [other for other in self._unread if self._alike(row, other)]:
      self._sharing[row] = alike[0]
    else:
      self._begin_unread(row)
    arguments = self._joining(row, request, place)
    self.state, self.rules = self._run('join', self.state, self.rules, *arguments)

  def choose(self, request: Request) -> int:
    """Which of the free rows is to take a request, so that others find what they have read."""
    parts = list(map(self._beside, range(self._parts)))
    return self._prefixes.choose(request, self.open(request), parts)

  def cached(self, row: int) -> int:
    """Tokens of the prompt of a row that it has from others, and needed not to read."""
    return self._cached.get(row, 0)

  def forget(self, row: int) -> None:
    """Nobody goes on from what this row has read, as where its scores are not finite."""
    self._prefixes.forget(row)

  def read(self, weights: Decoder, rows: Iterable[int] | None = None) -> list[int]:
    """Reads the next C tokens of these rows' prompts, in one call; which of them, and of those that
    share them, have come to their end.

    rows: at most J of `reading`, at most J / parts on each part of the mesh (`part_of`), whose
    sources are read by one program; default: as many as go together. Raises ValueError for others.
    """
    chosen = self._together() if rows is None else list(rows)
    if weights is not self._weights:
      self._forget_all()
      self._weights = weights
    for row in chosen:
      if row in self._fresh:
        self._resume(row)
    self._fresh -= set(chosen)
    if rows is None:  # what others had read may have left a last part only
      chosen = self._reads.alike({row: self._shape(row) for row in chosen})
    chosen = self._seated(chosen)
    if not chosen:
      return []
    arguments, ended, shape = self._reading(chosen)
    name = self._reader(weights, shape)
    self.state = self._run(name, self._leaves(weights), self.state, *arguments)
    for row in chosen:
      self._prefixes.read(row, len(self._unread[row][: shape.tokens]))
      del self._unread[row][: shape.tokens]
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
    name, rows = self._decoder(weights, k), self.seat()
    rules = dataclasses.replace(self.rules, automaton=self._automaton)
    chunk = self._write(name, weights, rules, np.int32(count))
    for row in rows:
      request = self._requests[row]
      self._prefixes.wrote(row, self._most(count), len(request.prompt) + request.max_new_tokens)
    return chunk

  def _write(self, name: str, weights: Decoder, rules: Rules, count: np.int32) -> Chunk:
    self.state, chunk = self._run(name, self._leaves(weights), self.state, rules, count)
    return chunk

  def _most(self, count: int) -> int:
    """Slots of a row that a chunk of so many steps may write."""
    return count

  def release(self, rows: Iterable[int]) -> None:
    """Frees these rows, whatever they are doing. Raises ValueError for one that is free already."""
    leaving = np.zeros(self.sizes.rows, bool)
    for row in list(rows):
      if row not in self._requests:
        raise ValueError(f'row {row} has no request; these have: {sorted(self._requests)}')
      self._tables.remove(self._requests.pop(row).constraint)
      self._pass_on(row)
      self._fresh.discard(row)
      self._cached.pop(row, None)
      self._prefixes.use(row)
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

  def _beside(self, part: int) -> range:
    """The rows of a part of the mesh, which can take what others of them have read."""
    here = self.sizes.rows // self._parts
    return range(part * here, (part + 1) * here)

  def _seated(self, rows: list[int]) -> list[int]:
    """Those of the rows that have room for the next part of their prompts."""
    return rows

  def _found(self, row: int, request: Request) -> tuple[int, int]:
    """How much of the prompt need not be read in this row, and whose it is; see Prefixes.find."""
    return self._prefixes.find(request, self._beside(self.part_of(row)))

  def _forget_all(self) -> None:
    self._prefixes.forget_all()

  def _begin_unread(self, row: int) -> None:
    """A row is to read its prompt, of which it has nothing."""
    self._unread[row] = list(self._requests[row].prompt)
    self._fresh.add(row)

  def _resume(self, row: int) -> None:
    """A row that is about to read takes the beginning of its prompt from a row that holds it."""
    request, part = self._requests[row], self.part_of(row)
    tokens, source = self._found(row, request)
    self._prefixes.begin(row, request, tokens)
    if not tokens:
      return
    self._prefixes.use(source)
    prompt = np.zeros((self._parts, self._config.table_rows), bool)
    # Soft tokens are no ids that a penalty could be about.
    prompt[part, [i for i in request.prompt[:tokens] if i not in self._virtual]] = True
    counts = np.full(self._parts, tokens, np.int32)
    places = [self._named({i: part}, self._parts) for i in (source, row)]
    self._resumer()
    arguments = self._puts((*places, counts, prompt))
    self.state = self._run('resume', self.state, *arguments)
    del self._unread[row][:tokens]
    self._cached[row] = tokens

  def _alike(self, row: int, other: int) -> bool:
    """Whether one of the two can read the prompt for both."""
    requests = [self._requests[i] for i in (row, other)]
    asked = [(each.source, each.prompt, each.adapter, each.salt) for each in requests]
    return self.part_of(row) == self.part_of(other) and asked[0] == asked[1]

  def _share(self, reader: int) -> list[int]:
    """The rows that go on, from now on, from the prompt that this one has just read."""
    rows = [row for row, other in self._sharing.items() if other == reader]
    for row in rows:
      del self._sharing[row]
      part = self.part_of(row)
      places = self._puts([self._named({i: part}, self._parts) for i in (reader, row)])
      self._sharer()
      self.state = self._run('share', self.state, *places)
      self._cached[row] = self._requests[row].tokens
      self._prefixes.begin(row, self._requests[row], len(self._requests[row].prompt), like=reader)
    return rows

  def _pass_on(self, row: int) -> None:
    """A row leaves: what it reads for others, the first of them reads anew."""
    self._sharing.pop(row, None)
    left = [other for other, reader in self._sharing.items() if reader == row]
    if self._unread.pop(row, None) and left:
      heir, *others = left
      self._begin_unread(heir)
      del self._sharing[heir]
      self._sharing |= dict.fromkeys(others, heir)

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
    leaves, structure = jax.tree.flatten(values)
    rows, *leaves = self._puts([rows, *(np.repeat(x, self._parts, 0) for x in leaves)])
    return rows, *structure.unflatten(leaves)

  def _reading(self, chosen: Sequence[int], shape: Shape | None = None):
    """What loop.read takes of these rows besides model and state; whose prompts end with it; of
    which program, for nobody that of this shape.
    """
    for row in chosen:
      if row not in self._unread or chosen.count(row) > 1:
        raise ValueError(f'row {row} has nothing to read; these have, each once: {self.reading}')
    shape = shape or self._reads.common(map(self._shape, chosen))
    J, C = self._read_rows, shape.tokens
    tokens = np.full((J, C), self._pad, np.int32)
    counts, ends = np.zeros(J, np.int32), np.zeros(J, bool)
    places: dict[int, int] = {}
    taken = [0] * self._parts
    for row in chosen:
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
    requests = {index: self._requests[row] for row, index in places.items()}
    sources = self._reads.sources(requests, shape.source)
    arguments = self._puts((self._named(places, J), tokens, counts, ends))
    arguments.append(sources and tuple(self._puts(sources)))
    return tuple(arguments), [row for row in chosen if ends[places[row]]], shape

  def _together(self) -> list[int]:
    """Of the rows that are being read the first ones that one call can read."""
    chosen: list[int] = []
    taken = [0] * self._parts
    for row in self._reads.alike({row: self._shape(row) for row in self.reading}):
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

  def check(self, request: Request) -> None:
    """Raises ValueError for a request that no row could take."""
    check_request(request, self.sizes, self._vocabulary, self._virtual)

  def _shape(self, row: int) -> Shape:
    """Of the program that reads the next part of a row's prompt."""
    return self._reads.shape(self._requests[row], len(self._unread[row]))

  def _reader(self, weights, shape: Shape) -> str:
    """The name of the program, compiled."""
    name = f'read {shape}'
    if name not in self._programs:
      check_weights(weights, self.sizes)
      arguments, *_ = self._reading((), shape)
      program = flattened(loop.read, weights, 1, vocabulary=self._vocabulary)
      self._programs[name] = self._compiled(program, self._leaves(weights), self.state, *arguments)
    return name

  def _sharer(self) -> None:
    if 'share' not in self._programs:
      none = self._named({}, self._parts)
      self._programs['share'] = self._compiled(
        loop.share, self.state, self._put(none), self._put(none.copy())
      )

  def _resumer(self) -> None:
    if 'resume' not in self._programs:
      none = self._named({}, self._parts)
      prompt = np.zeros((self._parts, self._config.table_rows), bool)
      arguments = self._puts((none, none.copy(), np.zeros_like(none), prompt))
      self._programs['resume'] = self._compiled(
        loop.resume, self.state, *arguments, windows=self._windows
      )

  def _decoder(self, weights, alternatives: int) -> str:
    """The name of the program, compiled."""
    name = f'decode with {alternatives} alternatives'
    if name not in self._programs:
      check_weights(weights, self.sizes)
      static = dict(steps=self.sizes.steps, pad=self._pad, vocabulary=self._vocabulary)
      static |= dict(alternatives=alternatives)
      program = flattened(loop.decode_chunk, weights, 1, GENERATION, **static)
      rules = dataclasses.replace(self.rules, automaton=self._automaton)
      arguments = self._leaves(weights), self.state, rules, np.int32(0)
      self._programs[name] = self._compiled(program, *arguments)
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
    return self._puts([x])[0]

  def _puts(self, xs: Sequence[np.ndarray]) -> list[jax.Array]:
    """On the mesh, split along their rows."""
    return self._splits.put(xs)

  def _uploaded(self) -> Automaton:
    return jax.device_put(self._tables.automaton, jax.NamedSharding(self.mesh, jax.P()))
