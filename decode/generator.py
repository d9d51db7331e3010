"""How does a person generate? Load a run's directory once, then ask it for text, whole or as it comes."""

import contextlib
import dataclasses
import functools
import operator
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import names
from data import tokenizers
from data.chat import ChatTemplate
from decode import beam, loop
from decode.constrain import Automaton, Constraint
from decode.drafting import Course, drafter_of
from decode.loop import Chunk, Rules
from decode.report import Watch
from decode.request import INTERRUPTED, LENGTH, Completion, Options, Prompt, Row, several
from kernels.blocks import Blocks
from model import params, quantised, transformer
from model.cache import APPEND, init_cache
from model.config import ModelConfig
from model.logprobs import logprobs
from model.vocabulary import TOKENS, Law
from parallel import axes as ax
from parallel.mesh import MeshConfig

SMALLEST_BUCKET = 32  # prompt lengths and capacities are rounded up to powers of two from here, so that few programs compile
AT_ONCE = 8192  # tokens of a prompt that are read in one call; the others follow, APPEND at a time


class Generator:
  """A model with its tokenizer, on a mesh.

  Attributes: model, tokenizer, mesh; parts: into how many the mesh splits rows; vocabulary: ids that can be generated; report: of the
    last call that has ended, or None.
  """

  def __init__(
    self,
    model: transformer.Decoder,
    tokenizer: tokenizers.Tokenizer,
    mesh: jax.sharding.Mesh,
    weights: str = '',
  ):
    """weights: 'int8' holds matrices in bytes (model.quantised); default: in the compute dtype."""
    names.check('weights', weights, ('', 'int8'))
    self.tokenizer, self.mesh, self.report = tokenizer, mesh, None
    with jax.set_mesh(mesh):
      self.model = jax.jit(generating_model, static_argnames='weights')(model, weights=weights)
      self.parts = ax.size('batch')
    # A table of embeddings may have more rows than there are tokens.
    self.vocabulary = min(tokenizer.vocabulary, self.model.config.V)

  @classmethod
  def load(
    cls,
    workdir: str | os.PathLike,
    checkpoint: str = 'last',
    mesh: MeshConfig = MeshConfig(data=1),
    weights: str = '',
  ) -> 'Generator':
    """The model of a run's directory at its 'last' or 'best' checkpoint, or at a step's; see workdir.open.

    weights: see Generator.
    """
    # The one import that points up the house: a person who has a directory begins here.
    from workdir.open import open_run

    run = open_run(workdir, checkpoint, mesh)
    return cls(run.model, run.tokenizer, run.mesh, weights)

  def __call__(self, prompts: Prompt | Sequence[Prompt], **options) -> list[Completion]:
    """Completions of the prompts, generated side by side, `num_samples` of each after one another; options: see Options.

    Ctrl-C ends all rows, and what there is of them is returned.
    """
    rows, steps = self._run(several(prompts), Options.of(options))
    run_out(steps)
    return [row.completion() for row in rows]

  def stream(self, prompt: Prompt, **options) -> Iterator[str]:
    """Pieces of one completion's text as they come, whole characters each; options: see Options.

    Ctrl-C raises KeyboardInterrupt, after a last piece if text was held back.
    """
    options = _as_it_comes(options)
    if options.num_samples > 1:
      raise ValueError(
        f'num_samples={options.num_samples}: one text is streamed at a time; call the generator for several'
      )
    (row,), steps = self._run([prompt], options)
    return pieces_of(row, steps)  # not a generator itself: bad options raise here and now

  def chat(self, messages: Sequence[dict[str, str]], **options) -> Iterator[str]:
    """Pieces of the assistant's next turn, after messages of {'role': .., 'content': ..}; options as for `stream`.

    Raises ValueError where the tokenizer has no chat template. The names of control tokens in a message become those tokens.
    """
    return self.stream(self.chat_ids(messages), **options)

  def chat_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
    """The prompt that asks for the assistant's next turn. Raises as `chat` says."""
    text = ChatTemplate.of(self.tokenizer).render(messages, add_generation_prompt=True)
    return list(self.tokenizer.encode(text, special=True))

  def ids(self, prompts: Prompt | Sequence[Prompt], **options) -> Iterator[list[list[int]]]:
    """New ids of every row, a chunk at a time, until all rows have ended; options: see Options. Ctrl-C raises as in `stream`."""
    rows, steps = self._run(several(prompts), _as_it_comes(options))

    def chunks():
      with contextlib.closing(steps):
        seen = [0] * len(rows)
        for _ in steps:
          new = [row.ids[n:] for row, n in zip(rows, seen)]
          seen = [len(row.ids) for row in rows]
          if any(new):
            yield new
      if any(row.finish == INTERRUPTED for row in rows):
        raise KeyboardInterrupt

    return chunks()

  def score(self, texts: Prompt | Sequence[Prompt]) -> list[np.ndarray]:
    """Log-probabilities, f32, of every id of each text but its first one (a text begins as documents do), by the training forward pass.

    As in generation they are those among ids that the tokenizer has, where the table of embeddings is larger.
    """
    config = self.model.config
    if config.encoder_layers or not config.causal:
      raise ValueError('scores of texts are those of a decoder; this model has an encoder')
    encoded = [self.encoded(text) for text in several(texts)]
    tokens, lengths = self._padded(
      encoded + [encoded[-1][:1]] * (-len(encoded) % self.parts)
    )  # rows that fill the mesh up
    with jax.set_mesh(self.mesh):
      found = np.asarray(_scored(self.model, self.put(tokens), self.vocabulary))
    return [row[: length - 1] for row, length in zip(found[: len(encoded)], lengths)]

  def session(self, capacity: int = 0, cache_dtype: str = ''):
    """A text that grows (decode.session.Session), of at most `capacity` tokens; 0: as many as the model has positions for.

    Raises ValueError for a capacity beyond these, and where there is no end of them and no capacity is given.
    """
    from decode.session import Session

    limit = self.model.config.max_length
    if not capacity and not limit:
      raise ValueError(
        'capacity=0, and the model has no model.max_length; say how many tokens the session may have'
      )
    return Session(self, capacity or limit, cache_dtype)

  def encoded(self, prompt: Prompt) -> list[int]:
    """The ids that the model reads. Raises ValueError for none, and for what is no id or out of range."""
    if isinstance(prompt, str):
      start, end = (
        ([], [self.tokenizer.eos])
        if self.model.config.encoder_layers
        else ([self.tokenizer.bos], [])
      )
      return [*start, *self.tokenizer.encode(prompt), *end]
    try:
      ids = [operator.index(i) for i in ([prompt] if isinstance(prompt, bytes) else prompt)]
    except TypeError as error:
      raise ValueError(
        f'the prompt {str(prompt)[:60]} is neither a text nor ids, whole numbers in [0, {self.vocabulary}): '
        f'{error}'
      ) from error
    if not ids:
      raise ValueError('a prompt has no ids; give at least one')
    if not all(0 <= i < self.vocabulary for i in ids):
      wrong = next(i for i in ids if not 0 <= i < self.vocabulary)
      raise ValueError(f'a prompt has the id {wrong}; this model has ids in [0, {self.vocabulary})')
    return ids

  def put(self, x) -> jax.Array:
    """An array on the mesh, split along its rows."""
    with jax.set_mesh(self.mesh):
      return jax.device_put(
        x, jax.NamedSharding(self.mesh, ax.spec('batch', *(None,) * (np.ndim(x) - 1)))
      )

  def limits(self, longest: int, new: int) -> int:
    """The room that a cache needs. Raises ValueError for more tokens than the model has positions for."""
    limit = self.model.config.max_length or sys.maxsize
    if longest + new > limit:
      raise ValueError(
        f'a prompt of {longest} tokens and max_new_tokens={new} pass model.max_length={limit}; '
        'shorten the prompt or ask for fewer'
      )
    return min(limit, bucket(longest + new))

  def rules(
    self, options: Options, prompts: int, rows: int
  ) -> tuple[Rules, np.ndarray | None, tuple[str, ...], list[int]]:
    """Rules of so many rows, the last ones unused; places in the automaton; texts that end a row, and ids."""
    texts, ids = options.stops(self.vocabulary)
    if options.logprobs > self.vocabulary:
      raise ValueError(
        f'logprobs={options.logprobs} must be at most {self.vocabulary}, as many ids as there are'
      )
    used = prompts * options.rows

    def fill(x):
      return np.concatenate([x, np.repeat(x[-1:], rows - used, 0)])

    sampling = jax.tree.map(fill, options.law(prompts, self.vocabulary))
    if sampling.bias is not None:
      sampling = dataclasses.replace(
        sampling, bias=np.pad(sampling.bias, ((0, 0), (0, self.model.config.V - self.vocabulary)))
      )
    ends = [self.tokenizer.eos, *ids]
    table = np.full((rows, bucket(len(ends), 4)), -1, np.int32)
    table[:, : len(ends)] = ends
    automaton = places = None
    if options.constraint is not None:
      each = (
        list(options.constraint)
        if isinstance(options.constraint, (list, tuple))
        else [options.constraint] * prompts
      )
      if not all(c is None or isinstance(c, Constraint) for c in each):
        raise ValueError(
          f'constraint={options.constraint!r} must be a decode.constrain.Constraint, such as '
          'Constraint(g.tokenizer, regex=..), or a list of one, or None, for each prompt'
        )
      if len(each) != prompts:
        raise ValueError(
          f'constraint has {len(each)} values for {prompts} prompts; give one for all, or one for each'
        )
      automaton, places = Automaton.of(
        [c for c in each for _ in range(options.rows)], self.model.config.V
      )
      places = fill(places)
    return Rules(sampling, table, automaton), places, texts, ends

  def placed(self, rules: Rules, beams: int = 1) -> Rules:
    """Rules on the mesh, those of a row for each of its beams."""
    with jax.set_mesh(self.mesh):
      return Rules(
        *jax.tree.map(lambda x: self.put(np.repeat(x, beams, 0)), (rules.sampling, rules.ends)),
        jax.device_put(rules.automaton, jax.NamedSharding(self.mesh, jax.P())),
      )

  def read(
    self,
    encoded: Sequence[Sequence[int]],
    capacity: int,
    stop_at: np.ndarray,
    *,
    source=None,
    places=None,
    cache_dtype='',
    append: int = APPEND,
  ) -> loop.DecodeState:
    """The state after prompts, read in pieces where they are long."""
    tokens, lengths = self._padded(encoded)
    with jax.set_mesh(self.mesh):
      cache = _empty(self.model.config, len(tokens), capacity, cache_dtype, append)
      if source is not None:
        ids, counts = source
        source = (
          self.put(ids),
          self.put((np.arange(ids.shape[1])[None] < counts[:, None]).astype(np.int32)),
        )
      state = loop.prefill(
        self.model,
        self.put(tokens[:, :AT_ONCE]),
        self.put(np.minimum(lengths, AT_ONCE)),
        cache,
        self.put(stop_at),
        source,
        None if places is None else self.put(places),
        vocabulary=self.vocabulary,
      )
      for first in range(AT_ONCE, int(lengths.max()), append):
        state = self.append(
          state, tokens[:, first : first + append], np.clip(lengths - first, 0, append)
        )
    return state

  def append(
    self, state: loop.DecodeState, tokens: np.ndarray, counts: np.ndarray
  ) -> loop.DecodeState:
    """The state after more tokens of rows [B, T], the first counts [B] of them."""
    with jax.set_mesh(self.mesh):
      return loop.append(
        self.model,
        state,
        self.put(tokens),
        self.put(counts.astype(np.int32)),
        vocabulary=self.vocabulary,
      )

  def advance(
    self, state: loop.DecodeState, rules: Rules, options: Options, count: int
  ) -> tuple[loop.DecodeState, Chunk]:
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

  def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as one array [B, bucket], and their lengths. Raises ValueError for a row that the model has no positions for."""
    lengths, limit = (
      np.array([len(ids) for ids in rows], np.int32),
      self.model.config.max_length or sys.maxsize,
    )
    if lengths.max() > limit:
      raise ValueError(
        f'a prompt of {lengths.max()} tokens passes model.max_length={limit}; shorten it'
      )
    tokens = np.full(
      (len(rows), min(limit, bucket(int(lengths.max())))), self.tokenizer.pad, np.int32
    )
    for row, ids in zip(tokens, rows, strict=True):
      row[: len(ids)] = ids
    return tokens, lengths

  def _run(
    self, prompts: Sequence[Prompt], options: Options
  ) -> tuple[list[Row], Iterator[list[str]]]:
    """The rows of a call, and an iterator that fills them: each step gives the text that is new of each."""
    config, n = self.model.config, options.rows
    if not config.causal:
      raise ValueError('model.causal=False: an encoder writes no text')
    encoded = [self.encoded(prompt) for prompt in prompts for _ in range(n)]
    used = len(encoded)
    rows = -(-used // self.parts) * self.parts  # rows that fill the mesh up end before they begin
    encoded += [encoded[-1][:1]] * (rows - used)
    rules, places, texts, ends = self.rules(options, len(prompts), rows)
    source, begun = None, encoded
    if (
      config.encoder_layers
    ):  # the prompt is what the encoder reads; the decoder starts with padding, as T5's
      source, begun = self._padded(encoded), [[self.tokenizer.pad]] * rows
    lengths = np.array([len(ids) for ids in begun], np.int32)
    capacity = self.limits(int(lengths.max()), options.max_new_tokens)
    stop_at = np.where(np.arange(rows) < used, lengths + options.max_new_tokens, 0).astype(np.int32)
    held = [
      Row(prompts[i // n], encoded[i], int(rules.sampling.seed[i]), texts, self.tokenizer, ends)
      for i in range(used)
      for _ in range(options.num_samples // n)
    ]
    drafter = drafter_of(self, options, int(stop_at.max()))
    return held, self._steps(
      held, begun, source, capacity, stop_at, rules, places, options, drafter
    )

  def _steps(self, rows, encoded, source, capacity, stop_at, rules, places, options, drafter):
    watch = Watch(self.model)
    rules = self.placed(rules, options.beams)

    def read(who):
      return who.read(
        encoded,
        min(capacity, who.model.config.max_length or capacity),
        stop_at,
        source=source,
        places=places,
        cache_dtype=options.cache_dtype,
      )

    state = read(self)
    if options.beams > 1:
      self.report = yield from beam.texts(
        self, watch, rows, state, rules, options, bucket(options.max_new_tokens)
      )
      return
    watch.began(state.cache, sum(map(len, encoded[: len(rows)])))
    course = Course(self, options, drafter, rules, state, encoded, read)
    yield from self.go_on(rows, course, watch, options, options.max_new_tokens, LENGTH)

  def go_on(
    self,
    rows: Sequence[Row],
    course: Course,
    watch: Watch,
    options: Options,
    most: int,
    finish: str,
  ) -> Iterator[list[str]]:
    """Fills the rows with at most so many tokens each, and leaves a report; each step gives the text that is new of each row.

    finish: why a row ends that has not ended itself.
    """
    # Chunk k + 1 runs while chunk k is read; the first token comes alone, and soon.
    count = 1
    ahead = watch.first(course.advance(count))
    try:
      while True:
        chunk, done = (
          ahead,
          min(len(row.ids) for row in rows if not row.finish) + count,
        )  # the least that a row has, then
        count = min(most - done, course.most)
        if count > 0:
          ahead = course.advance(count)
        chunk = jax.tree.map(np.asarray, chunk)
        pieces = [row.add(index, chunk) for index, row in enumerate(rows)]
        course.came(rows)
        watch.came([len(row.ids) for row in rows])
        if count <= 0 or all(row.finish for row in rows):
          break
        yield pieces
    except KeyboardInterrupt:
      if not any(row.ids for row in rows):
        raise
      finish, pieces = INTERRUPTED, [''] * len(rows)
      watch.came([len(row.ids) for row in rows])
    pieces = [piece + row.end(finish) for piece, row in zip(pieces, rows)]
    self.report = watch.report(options.seed, rows, course.fell_back)
    yield pieces


def run_out(steps: Iterator[list[str]]) -> None:
  """Runs the steps of a call to their end. Ctrl-C that comes between two of them counts as if it came in one."""
  with contextlib.closing(steps):
    try:
      for _ in steps:
        pass
    except KeyboardInterrupt:
      if not steps.gi_suspended:  # it has ended them: nothing was made so far
        raise
      steps.throw(KeyboardInterrupt)


def pieces_of(row: Row, steps: Iterator[list[str]]) -> Iterator[str]:
  """The text of the only row of a call, as it comes. Raises KeyboardInterrupt at the end where Ctrl-C was that."""
  with contextlib.closing(steps):
    for (piece,) in steps:
      if piece:
        yield piece
  if row.finish == INTERRUPTED:
    raise KeyboardInterrupt


def _as_it_comes(given: Mapping[str, Any]) -> Options:
  """Options of a call whose text is read before it ends."""
  options = Options.of(given)
  if options.beams > 1:
    raise ValueError(
      f'beams={options.beams}: no token of a search is certain before its end, and none is streamed; call the generator'
    )
  return options


def bucket(tokens: int, smallest: int = SMALLEST_BUCKET) -> int:
  """The next power of two from `smallest` on."""
  return max(smallest, 1 << (tokens - 1).bit_length())


_empty = jax.jit(
  init_cache, static_argnums=range(5)
)  # one call to the device, and not one for every layer


@functools.partial(jax.jit, static_argnames='vocabulary')
def _scored(model, tokens, vocabulary):
  """[B, T - 1] log-probabilities of tokens [B, T] after those before them."""
  targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
  weights = jnp.pad(jnp.ones_like(tokens[:, 1:], jnp.float32), ((0, 0), (0, 1)))
  # Rows that do not split are on all devices.
  with ax.whole_rows(tokens.shape[1] % ax.size('length') > 0):
    tokens, targets, weights = (ax.place(a, *TOKENS) for a in (tokens, targets, weights))
    x = ax.place(model(tokens).hidden, *TOKENS, 'width')
    law = Law(*_head(model, x), softcap=model.config.logit_softcap, vocabulary=vocabulary)
    return ax.place(logprobs(law, targets, weights), 'batch', None)[:, :-1]


def _head(model, x):
  """Decoder.scored, of a head in bytes, too."""
  stored = None if model.head.tokens is None else model.head.tokens.get_value()
  if isinstance(stored, quantised.Bytes):
    return model.head(x), stored.whole(model.config.dtype)
  return model.scored(x)


def generating(config: ModelConfig) -> ModelConfig:
  """The config with which a trained model generates."""
  # Which backend trained, in which blocks, is indifferent to the parameters, and not every one of them can attend to a cache. What an
  # expert has no room for would depend on a row's neighbours.
  moe = (
    dataclasses.replace(config.moe, dispatch='dropless')
    if config.moe.dispatch == 'capacity'
    else config.moe
  )
  return dataclasses.replace(
    config,
    attention='auto',
    attention_blocks=Blocks(),
    moe=moe,
    remat='none',
    remat_save=(),
    remat_offload=(),
  )


def generating_model(model: transformer.Decoder, weights: str = '') -> transformer.Decoder:
  """The model as generation holds it: every layer by itself, but over pipeline stages, and in the compute dtype or in bytes."""
  model = in_compute_dtype(model if ax.size('layers') > 1 else transformer.unstacked(model))
  return quantised.in_bytes(model) if weights else model


def in_compute_dtype(model: transformer.Decoder) -> transformer.Decoder:
  """The model, cast once, as `params.use` would at every token; norms and biases keep their own precision."""

  def cast(p):
    return p.replace(p[...].astype(model.config.dtype)) if p.kind != 'vector' else p

  return jax.tree.map(cast, model, is_leaf=lambda x: isinstance(x, params.nnx.Param))
