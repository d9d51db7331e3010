"""How do rows of an engine share one pool of pages? As decode.engine, and with the same bits: only
where keys and values lie is another matter, and whose turn it is where they are too many.

A row has pages for the tokens that it has, instead of room for all that it may have; beginnings of
prompts are shared by naming their pages; who does not fit waits (decode.pool), and what it has is
on the host where its room is needed. Rings stay a row's own.

B rows · J pages that are moved together, as many of every part of the mesh
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from decode import loop
from decode.engine import Engine
from decode.pool import BACK, COPY, OUT, Move, Pool, table_of
from decode.sizes import Request, Use
from model import paging
from parallel import axes as ax
from parallel.gathering import everywhere

MOVED = 4  # pages of a part of the mesh that a call moves

_contents = jax.jit(paging.contents)
_with_contents = jax.jit(paging.with_contents, donate_argnums=0)
_with_copies = jax.jit(paging.with_copies, donate_argnums=0)


class PagedEngine(Engine):
  """An engine whose rows have pages: Sizes.pages, and Sizes.host_pages.

  A request joins where all that are there can reach their ends, one after another at worst.
  Without room on the host none ever waits once it has joined.
  """

  def reset(self) -> None:
    super().reset()
    sizes, parts = self.sizes, self._parts
    if not any(held.paged for held in self.state.cache.held):
      raise ValueError(
        f'pages={sizes.pages} for a model whose layers all have a window: rings are small already, '
        "and a row's own; use pages=0"
      )
    self._pools = [
      Pool(sizes.pages // parts, sizes.host_pages // parts, sizes.block) for _ in range(parts)
    ]
    self._rings = any(held.ring for held in self.state.cache.held)
    self._table = table_of(self._pools, sizes.rows, self.state.cache.table.shape[1])
    self._waiting: set[int] = set()
    self._preempted = 0
    none = np.zeros(sizes.rows, bool), np.zeros(sizes.rows, np.int32)
    self._kept = tuple(map(self._put, none))

  def open(self, request: Request) -> list[int]:
    most = _most(self.fitted(request))
    room = [pool.has_room(most) for pool in self._pools]
    return [row for row in self.free if room[self.part_of(row)]]

  def join(self, row: int, request: Request) -> None:
    super().join(row, request)
    self._pool(row).add(row, _most(self._requests[row]))

  def forget(self, row: int) -> None:
    super().forget(row)
    self._pool(row).forget(row)

  def read(self, weights, rows: Iterable[int] | None = None) -> list[int]:
    before = self.reading
    ended = super().read(weights, rows)
    for row in before:
      if row not in self._fresh:
        marks = self._prefixes.marks(self._requests[row])
        self._pool(row).mark(row, marks[: self._prefixes.written(row) // self.sizes.block])
    return ended

  def seat(self) -> list[int]:
    wants = {
      row: min(
        self._prefixes.written(row) + self._most(self.sizes.steps), _most(self._requests[row])
      )
      for row in self.writing
    }
    seated = self._make_room(wants)
    return [row for row in wants if row in seated]

  def release(self, rows: Iterable[int]) -> None:
    rows = list(rows)
    super().release(rows)
    for row in rows:
      self._pool(row).remove(row)
      self._waiting.discard(row)

  def use(self) -> Use:
    sizes = self.sizes
    used = sum(pool.used for pool in self._pools)
    return Use(used * sizes.block, sizes.pages * sizes.block, self._preempted)

  def _pool(self, row: int) -> Pool:
    return self._pools[self.part_of(row)]

  def _found(self, row: int, request: Request) -> tuple[int, int]:
    """Of what is in pages any row of the part can go on; rings have to be some row's yet."""
    tokens = self._pool(row).find(self._prefixes.marks(request)) * self.sizes.block
    if not self._rings:
      return tokens, row
    held, source = super()._found(row, request)
    return (held, source) if held <= tokens else (0, -1)

  def _resume(self, row: int) -> None:
    super()._resume(row)
    marks = self._prefixes.marks(self._requests[row])
    self._pool(row).take(row, marks[: self.cached(row) // self.sizes.block])

  def _share(self, reader: int) -> list[int]:
    rows = super()._share(reader)
    for row in rows:
      self._pool(row).share(reader, row)
    return rows

  def _forget_all(self) -> None:
    super()._forget_all()
    for pool in self._pools:
      pool.forget()

  def _seated(self, rows: list[int]) -> list[int]:
    parts = {row: len(self._unread[row][: self.sizes.read_tokens]) for row in rows}
    seated = self._make_room({row: self._prefixes.written(row) + n for row, n in parts.items()})
    return [row for row in rows if row in seated]

  def _make_room(self, wants: dict[int, int]) -> set[int]:
    """Rows that have all that they have and want on the device now; the others wait."""
    seated: set[int] = set()
    for part, pool in enumerate(self._pools):
      here, moves = pool.seat({row: n for row, n in wants.items() if self.part_of(row) == part})
      seated |= here
      for kind, same in itertools.groupby(moves, lambda move: move.kind):
        for batch in _batches(same):
          self._move(kind, part, batch)

    table = table_of(self._pools, self.sizes.rows, self._table.shape[1])
    if (table != self._table).any():
      self._table = table
      cache = replace(self.state.cache, table=self._put(table.copy()))
      self.state = replace(self.state, cache=cache)
    self._hold({row for row in self._requests if self._pool(row).tokens(row)} - seated)
    return seated

  def _hold(self, waiting: set[int]) -> None:
    """These rows wait, and no others."""
    leaving, returning = waiting - self._waiting, self._waiting - waiting
    if not (leaving or returning):
      return
    self._preempted += len(leaving)
    self._waiting = waiting
    rows = np.arange(self.sizes.rows)
    self._holder()
    self._wait(*(self._put(np.isin(rows, list(some))) for some in (leaving, returning)))

  def _wait(self, leaving: jax.Array, returning: jax.Array) -> None:
    """What these rows [B] are on the device besides their pages."""
    self.state, self._kept = self._run('hold', self.state, self._kept, leaving, returning)

  def _move(self, kind: str, part: int, moves: Sequence[Move]) -> None:
    """Contents of pages of a part of the mesh."""
    self._mover(kind)
    if kind == OUT:
      places = self._placed(part, [move.source for move in moves])
      contents = everywhere(self._run(OUT, self.state.cache, places))
      for index, move in enumerate(moves, part * MOVED):
        move.page.content = jax.tree.map(lambda x: x[:, index].copy(), contents)
      return
    places = self._placed(part, [move.place for move in moves])
    if kind == COPY:
      new = self._placed(part, [move.source for move in moves])
    else:
      new = self._contents(part, [move.page.content for move in moves])
    cache = self._run(kind, self.state.cache, *((new, places) if kind == COPY else (places, new)))
    self.state = replace(self.state, cache=cache)
    for move in moves:
      if kind == BACK and move.page.place == move.place:
        move.page.content = None

  def _placed(self, part: int, places: Sequence[int]) -> jax.Array:
    """[J], these pages of a part of the mesh, and none of others."""
    all_places = np.full(self._parts * MOVED, self._pools[0].places, np.int32)
    all_places[part * MOVED :][: len(places)] = places
    return self._put(all_places)

  def _contents(self, part: int, contents: Sequence[Any]) -> Any:
    """Arrays of J pages, with these contents for a part of the mesh."""

    def joined(x, axes, *pages):
      all_pages = np.zeros((x.shape[0], self._parts * MOVED, *x.shape[2:]), x.dtype)
      for index, page in enumerate(pages, part * MOVED):
        all_pages[:, index] = page
      with jax.set_mesh(self.mesh):
        return jax.device_put(all_pages, jax.NamedSharding(self.mesh, ax.spec(*axes)))

    held = [each for each in self.state.cache.held if each.paged]
    return jax.tree.map(joined, held, [each.axes() for each in held], *contents)

  def _compiling(self, weights) -> list[Callable]:
    steps = [*super()._compiling(weights), lambda: self._mover(COPY)]
    if self.sizes.host_pages:
      steps += [self._holder, lambda: self._mover(OUT), lambda: self._mover(BACK)]
    return steps

  def _holder(self) -> None:
    if 'hold' not in self._programs:
      masks = [self._put(np.zeros(self.sizes.rows, bool)) for _ in range(2)]
      self._programs['hold'] = self._compiled(loop.hold, self.state, self._kept, *masks)

  def _mover(self, kind: str) -> None:
    if kind not in self._programs:
      cache, places = self.state.cache, self._placed(0, [])
      if kind == OUT:
        program = self._compiled(_contents, cache, places)
      elif kind == COPY:
        program = self._compiled(_with_copies, cache, places, self._placed(0, []))
      else:
        program = self._compiled(_with_contents, cache, places, self._contents(0, []))
      self._programs[kind] = program


def _most(request: Request) -> int:
  return len(request.prompt) + request.max_new_tokens


def _batches(moves: Iterable[Move]) -> Iterable[list[Move]]:
  moves = list(moves)
  return (moves[at : at + MOVED] for at in range(0, len(moves), MOVED))
