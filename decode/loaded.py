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
from decode.front import Front
from decode.generating import generating_model
from decode.loop import Chunk, DecodeState, Rules
from decode.options import Options
from decode.report import GenerationReport
from decode.request import Prompt
from decode.sampling import sampling_of
from model import transformer
from model.cache import APPEND, init_cache
from model.weights import read
from model.weights.scheme import check_asked
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
    plain: what stands before rows of the model by itself.
    adapters: the same of each adapter that rows can have, by name.
    report: of the last call that has ended, or None.
    identity: of its weights, where they are those of a run (workdir.open.Run).
  """

  identity = ''

  def __init__(
    self,
    model: transformer.Decoder,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    weights: str = '',
    adapters: Mapping[str, Any] | None = None,
  ):
    """weights: a scheme (model.weights.scheme) by which matrices are held; default: in the compute
    dtype, or as the run has them. adapters: that rows can have, by name: pairs of a
    model.adapters.Adapter and its config.

    Raises ValueError for weights as model.weights.scheme.check_asked, and it or NotImplementedError
    for adapters as decode.beside.with_adapters.
    """
    check_asked(model.config, weights)
    model.config.check_parameters(dict(mesh.shape))
    self.tokenizer = tokenizer
    self.mesh = mesh
    self.report: GenerationReport | None = None
    virtual = tuple(read(model.embedding.tokens).virtual)
    config = model.config
    self.plain = Front('', 0, virtual, config.max_length, config.encoder_layers > 0)
    self.adapters: dict[str, Front] = {}
    with jax.set_mesh(mesh):
      if adapters:
        put = names.imported('decode.beside.with_adapters')
        self.model, self.adapters = put(model, adapters, self.plain, weights)
      else:
        self.model = jax.jit(generating_model, static_argnames='weights')(model, weights=weights)
      self.parts = ax.size('batch')
    # A table of embeddings may have more rows than there are tokens.
    self.vocabulary = min(tokenizer.vocabulary, self.model.config.V)

  def encoded(self, prompt: Prompt) -> list[int]:
    """The ids that the model reads.

    Raises ValueError for none, and for what is no id or out of range.
    """
    if isinstance(prompt, str):
      return self.plain.ids(prompt, self.tokenizer)
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
  def context(self) -> int:
    """Tokens that a text can have which the model by itself writes (decode.front.Front)."""
    return self.plain.context

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

  def fronts_of(self, adapter: str | Sequence[str], prompts: int) -> list[Front]:
    """What stands before each of so many prompts, by Options.adapter.

    Raises ValueError for a name that no adapter has, and for another number of names.
    """
    each = list(adapter) if isinstance(adapter, (list, tuple)) else [adapter] * prompts
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
    return [self.adapters[name] if name else self.plain for name in each]

  def indices(self, fronts: Sequence[Front]) -> np.ndarray | None:
    """[B] int32, which low-rank adapter each row has (model.weights.bank.Bank.index); None for a
    model without.
    """
    if not any(front.index for front in self.adapters.values()):
      return None
    return np.array([front.index for front in fronts], np.int32)

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
    rows: Sequence[Sequence[int]],
    capacity: int,
    stop_at: np.ndarray,
    *,
    source: tuple[np.ndarray, np.ndarray] | None = None,
    places: np.ndarray | None = None,
    adapters: np.ndarray | None = None,
    spread: np.ndarray | None = None,
    cache_dtype: str = '',
    append: int = APPEND,
  ) -> DecodeState:
    """The state after prompts, read in pieces where they are long.

    rows: ids of each, soft tokens and all (decode.front.Front.row), for which capacity and stop_at
      have room, too. stop_at, places: [B], see DecodeState. adapters: of what is read (`indices`).
    source: what the encoder of an encoder-decoder reads: ids [B, S], and how many of them [B].
    spread: [B], where rows share what is read (`Shared`): from which each of them goes on.
    """
    if spread is not None:
      never = np.full(len(rows), np.iinfo(np.int32).max, np.int32)
      state = self.read(
        rows,
        capacity,
        never,
        source=source,
        adapters=adapters,
        cache_dtype=cache_dtype,
        append=append,
      )
      with jax.set_mesh(self.mesh):
        places = None if places is None else self.put(places)
        return loop.spread(state, self.put(spread), self.put(stop_at), places)

    tokens, lengths = self.padded(rows)
    with jax.set_mesh(self.mesh):
      cache = _empty(self.model.config, len(tokens), capacity, cache_dtype, append)
      if source is not None:
        source = tuple(map(self.put, source))
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

  def room(self, tokens: int) -> int:
    """A bucket for so many tokens of a row, but no more than the model has positions for."""
    return min(self.model.config.max_length or sys.maxsize, bucket(tokens))

  def padded(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids, for which the model has positions (Front.whole looks), as one array [B, room],
    and their lengths [B].
    """
    lengths = np.array([len(ids) for ids in rows], np.int32)
    tokens = np.full((len(rows), self.room(int(lengths.max()))), self.tokenizer.pad, np.int32)
    for row, ids in zip(tokens, rows, strict=True):
      row[: len(ids)] = ids
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
