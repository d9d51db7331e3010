"""What does the device do for a call? A model on a mesh with its tokenizer, and the programs that
read prompts into a cache of the call's own and go on from there.

Arrays come and go here; of texts it knows what their ids are, and of a call its rules. Where rows
join and leave a cache that stays, that is decode.engine.
"""

import dataclasses
import operator
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import names
from data import generation
from data.tokenizer import Tokenizer
from decode import loop
from decode.constrain import Automaton, Constraint
from decode.generating import generating_model
from decode.loop import Chunk, DecodeState, Rules
from decode.options import Options
from decode.report import GenerationReport
from decode.request import Bound, Prompt
from decode.sampling import sampling_of
from model import transformer
from model.cache import APPEND, init_cache
from model.weights import read
from parallel import axes as ax

# Prompt lengths and capacities are rounded up to powers of two from here, so that few programs
# compile.
SMALLEST_BUCKET = 32
# Tokens of a prompt that are read in one call; the others follow, APPEND at a time.
AT_ONCE = 8192


class LoadedModel:
  """A model with its tokenizer, on a mesh: what a Generator, its sessions, searches and drafts
  share.

  Attributes:
    model: as generation holds it (see `generating_model`).
    tokenizer, mesh: as they were given.
    parts: into how many the mesh splits rows.
    vocabulary: ids that can be generated are below it.
    adapters: numbers of those that rows can have, by name.
    prompt: virtual ids that stand before all that the model reads (model.soft): those that its
      table has. Nobody who asks sees them, or counts them.
    report: of the last call that has ended, or None.
  """

  def __init__(
    self,
    model: transformer.Decoder,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    weights: str = '',
    adapters: Mapping[str, Any] | None = None,
  ):
    """weights: 'int8' holds matrices in bytes (model.weights.int8); default: in the compute
    dtype. adapters: that rows can have, by name: pairs of a model.adapters.Adapter and its config.

    Raises ValueError and NotImplementedError for adapters as model.banks.banked, and for numbers in
    them that are none.
    """
    names.check('weights', weights, ('', 'int8'))
    model.config.check_parameters(dict(mesh.shape))
    self.tokenizer = tokenizer
    self.mesh = mesh
    self.report: GenerationReport | None = None
    adapters = adapters or {}
    self.adapters = {name: 1 + i for i, name in enumerate(adapters)}
    with jax.set_mesh(mesh):
      self.model = jax.jit(generating_model, static_argnames='weights')(model, weights=weights)
      if adapters:
        put = names.imported('model.banks.with_adapters')
        self.model = put(self.model, model.config, adapters)
      self.parts = ax.size('batch')
    self.prompt = tuple(read(self.model.embedding.tokens).virtual)
    # A table of embeddings may have more rows than there are tokens.
    self.vocabulary = min(tokenizer.vocabulary, self.model.config.V)

  def encoded(self, prompt: Prompt) -> list[int]:
    """The ids that the model reads.

    Raises ValueError for none, and for what is no id or out of range.
    """
    if isinstance(prompt, str):
      ids = self.tokenizer.encode(prompt)
      if self.model.config.encoder_layers:
        return [*ids, self.tokenizer.eos]
      return [self.tokenizer.bos, *ids]
    try:
      ids = [operator.index(i) for i in ([prompt] if isinstance(prompt, bytes) else prompt)]
    except TypeError as error:
      raise ValueError(
        f'the prompt {str(prompt)[:60]} is neither a text nor ids, whole numbers in '
        f'[0, {self.vocabulary}): {error}'
      ) from error
    if not ids:
      raise ValueError('a prompt has no ids; give at least one')
    wrong = [i for i in ids if not 0 <= i < self.vocabulary]
    if wrong:
      raise ValueError(
        f'a prompt has the id {wrong[0]}; this model has ids in [0, {self.vocabulary})'
      )
    return ids

  def put(self, x) -> jax.Array:
    """An array on the mesh, split along its rows."""
    with jax.set_mesh(self.mesh):
      spec = ax.spec('batch', *(None,) * (np.ndim(x) - 1))
      return jax.device_put(x, jax.NamedSharding(self.mesh, spec))

  @property
  def before(self) -> tuple[int, ...]:
    """What of `prompt` begins the rows of a cache: all of it, but where an encoder reads it."""
    return () if self.model.config.encoder_layers else self.prompt

  @property
  def context(self) -> int:
    """Tokens that the model has positions for, behind its soft ones."""
    limit = self.model.config.max_length
    return limit - len(self.before) if limit else sys.maxsize

  @property
  def limit(self) -> str:
    """The context, as messages have it."""
    return self._limit_behind(len(self.before))

  def _limit_behind(self, soft: int) -> str:
    return f'model.max_length={self.model.config.max_length}' + (
      f' less {soft} soft tokens (adapter.tokens)' if soft else ''
    )

  def bound(self, length: int, new: int) -> Bound:
    """How far a row goes whose prompt has so many tokens: to `new` ones, or the end of the
    context.
    """
    limit = self.context
    if length + new <= limit:
      return Bound(new)
    most = max(limit - length, 0)
    return Bound(
      most,
      note=f'the context ended it: {length} tokens before it and {most} new ones fill '
      f'{self.limit}, before max_new_tokens={new}',
    )

  def check_room(self, length: int) -> None:
    """Raises ValueError where the context has no room behind a prompt of so many tokens."""
    if length >= self.context:
      raise ValueError(
        f'a prompt of {length} tokens leaves no room for new ones in {self.limit}; shorten the '
        'prompt'
      )

  def rules(
    self, options: Options, prompts: int, rows: int
  ) -> tuple[Rules, np.ndarray | None, tuple[str, ...], list[int]]:
    """Rules of so many rows, the last ones unused; places in the automaton;
    texts that end a row, and ids.
    """
    texts, ids = options.stops(self.vocabulary)
    if options.logprobs > self.vocabulary:
      raise ValueError(
        f'logprobs={options.logprobs} must be at most {self.vocabulary}, as many ids as there are'
      )
    unused = rows - prompts * options.rows

    def fill(x):
      return np.concatenate([x, np.repeat(x[-1:], unused, 0)])

    sampling = jax.tree.map(fill, sampling_of(options, prompts, self.vocabulary))
    ends = [*generation.ends(self.tokenizer), *ids]
    table = np.full((rows, bucket(len(ends), 4)), -1, np.int32)
    table[:, : len(ends)] = ends

    automaton = places = None
    if options.constraint is not None:
      each = [c for c in _constraints(options, prompts) for _ in range(options.rows)]
      automaton, places = Automaton.of(each, self.model.config.table_rows)
      places = fill(places)
    return Rules(sampling, table, automaton), places, texts, ends

  def adapters_of(self, options: Options, prompts: int) -> np.ndarray | None:
    """[prompts] int32, which adapter each has (model.weights.bank.Bank.index); None where there are
    none.

    Raises ValueError for a name that none has, and for another number of them.
    """
    given = options.adapter
    each = list(given) if isinstance(given, (list, tuple)) else [given] * prompts
    if len(each) != prompts:
      raise ValueError(
        f'adapter has {len(each)} values for {prompts} prompts; give one for all, or one for each'
      )
    for name in filter(None, each):
      if not self.adapters:
        raise ValueError(
          f'adapter={name!r}, and no adapters were loaded: give their runs to Generator.load('
          "workdir, adapters={'name': 'runs/adapter'}), or to --adapters"
        )
      names.check('adapter', name, self.adapters)
    if not self.adapters:
      return None
    return np.array([self.adapters[name] if name else 0 for name in each], np.int32)

  def placed(self, rules: Rules, beams: int = 1) -> Rules:
    """Rules on the mesh, those of a row for each of its beams."""

    def spread(x):
      return self.put(np.repeat(x, beams, 0))

    with jax.set_mesh(self.mesh):
      return Rules(
        sampling=jax.tree.map(spread, rules.sampling),
        ends=spread(rules.ends),
        automaton=jax.device_put(rules.automaton, jax.NamedSharding(self.mesh, jax.P())),
      )

  def read(
    self,
    encoded: Sequence[Sequence[int]],
    capacity: int,
    stop_at: np.ndarray,
    *,
    source: tuple[np.ndarray, np.ndarray] | None = None,
    places: np.ndarray | None = None,
    adapters: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    cache_dtype: str = '',
    append: int = APPEND,
  ) -> DecodeState:
    """The state after prompts, read in pieces where they are long.

    encoded: ids of each row. stop_at, places: [B], see DecodeState. adapters: of what is read.
    source: what the encoder of an encoder-decoder reads: ids [B, S], and how many of them [B].
    rows: [B], where rows share what is read (`Shared`): from which each of them goes on.

    Soft tokens come before each row, and are not counted in ids, capacity and stop_at.
    """
    if rows is not None:
      never = np.full(len(encoded), np.iinfo(np.int32).max, np.int32)
      state = self.read(
        encoded,
        capacity,
        never,
        source=source,
        adapters=adapters,
        cache_dtype=cache_dtype,
        append=append,
      )
      with jax.set_mesh(self.mesh):
        places = None if places is None else self.put(places)
        return loop.spread(state, self.put(rows), self.put(self.behind(stop_at)), places)

    tokens, lengths = self.padded(encoded, self.before)
    capacity, stop_at = capacity + len(self.before), self.behind(stop_at)
    with jax.set_mesh(self.mesh):
      cache = _empty(self.model.config, len(tokens), capacity, cache_dtype, append)
      if source is not None:
        ids, counts = source
        real = np.arange(ids.shape[1])[None] < counts[:, None]
        source = self.put(ids), self.put(real.astype(np.int32))
      state = loop.prefill(
        self.model,
        self.put(tokens[:, :AT_ONCE]),
        self.put(np.minimum(lengths, AT_ONCE)),
        cache,
        self.put(stop_at),
        source,
        None if places is None else self.put(places),
        None if adapters is None else self.put(adapters),
        vocabulary=self.vocabulary,
      )
      for first in range(AT_ONCE, int(lengths.max()), append):
        part = tokens[:, first : first + append]
        state = self.append(state, part, np.clip(lengths - first, 0, append))
    return state

  def behind(self, lengths: np.ndarray) -> np.ndarray:
    """Lengths, int32, of rows with the soft tokens before them."""
    return np.minimum(lengths, np.iinfo(np.int32).max - len(self.before)) + len(self.before)

  def append(self, state: DecodeState, tokens: np.ndarray, counts: np.ndarray) -> DecodeState:
    """The state after more tokens of rows [B, T], the first counts [B] of them."""
    counts = counts.astype(np.int32)
    with jax.set_mesh(self.mesh):
      return loop.append(
        self.model, state, self.put(tokens), self.put(counts), vocabulary=self.vocabulary
      )

  def advance(
    self, state: DecodeState, rules: Rules, options: Options, count: int
  ) -> tuple[DecodeState, Chunk]:
    """The state after `count` more tokens, at most a chunk, and these."""
    with jax.set_mesh(self.mesh):
      return loop.decode_chunk(
        self.model,
        state,
        rules,
        jnp.int32(count),
        steps=options.chunk,
        pad=self.tokenizer.pad,
        vocabulary=self.vocabulary,
        alternatives=max(options.logprobs, 0),
      )

  def padded(
    self, rows: Sequence[Sequence[int]], before: Sequence[int] = ()
  ) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as one array [B, bucket], and their lengths [B]; before: ids of all rows, which
    they then begin with.

    Raises ValueError for a row that the model has no positions for.
    """
    lengths = np.array([len(before) + len(ids) for ids in rows], np.int32)
    longest, limit = int(lengths.max()), self.model.config.max_length or sys.maxsize
    if longest > limit:
      raise ValueError(
        f'a prompt of {longest - len(before)} tokens passes {self._limit_behind(len(before))}; '
        'shorten it'
      )
    tokens = np.full((len(rows), min(limit, bucket(longest))), self.tokenizer.pad, np.int32)
    for row, ids in zip(tokens, rows, strict=True):
      row[: len(before) + len(ids)] = [*before, *ids]
    return tokens, lengths


@dataclasses.dataclass(frozen=True)
class Shared:
  """How the samples of prompts share what is read: each prompt is, once on every part of the mesh
  that has samples of it, for parts send each other nothing.

  Attributes:
    read: [R], of which prompt each row is that is read; -1: of none, there to fill the mesh up.
    rows: [B], from which of its part's rows that are read a row of the call goes on; None: from
      its own.
    used: how many of the B rows are asked for; the others fill the mesh up, too.
  """

  read: np.ndarray
  rows: np.ndarray | None
  used: int

  @classmethod
  def of(cls, prompts: int, samples: int, parts: int) -> 'Shared':
    """For so many samples of each prompt, side by side, on so many parts."""
    used = prompts * samples
    prompt = np.full(-(-used // parts) * parts, -1)
    prompt[:used] = np.arange(used) // samples
    if samples == 1:
      return cls(prompt, None, used)

    by_part = prompt.reshape(parts, -1)
    here = [np.unique(rows[rows >= 0]) for rows in by_part]
    read = np.full((parts, max(map(len, here))), -1)
    for row, known in zip(read, here):
      row[: len(known)] = known
    # Rows of no prompt end before they begin, behind whichever.
    rows = [np.searchsorted(known, rows) for known, rows in zip(here, by_part)]
    return cls(read.ravel(), np.concatenate(rows).astype(np.int32), used)


def bucket(tokens: int, smallest: int = SMALLEST_BUCKET) -> int:
  """The next power of two from `smallest` on."""
  return max(smallest, 1 << (tokens - 1).bit_length())


# One call to the device, and not one for every layer.
_empty = jax.jit(init_cache, static_argnums=range(5))


def _constraints(options: Options, prompts: int) -> list[Constraint | None]:
  """Of each prompt. Raises ValueError for what is no constraint, and for another number of them."""
  given = options.constraint
  each = list(given) if isinstance(given, (list, tuple)) else [given] * prompts
  if not all(c is None or isinstance(c, Constraint) for c in each):
    raise ValueError(
      f'constraint={given!r} must be a decode.constrain.Constraint, such as '
      'Constraint(g.tokenizer, regex=..), or a list of one, or None, for each prompt'
    )
  if len(each) != prompts:
    raise ValueError(
      f'constraint has {len(each)} values for {prompts} prompts; give one for all, or one for each'
    )
  return each
