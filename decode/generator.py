"""How does a person generate? Load a run's directory once, then ask it for text, whole or as it
comes.
"""

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.chat import ChatTemplate, quoted
from decode import beam
from decode.defaults import model_defaults
from decode.delivery import deliver, pieces_of, run_out
from decode.drafting import Course, drafter_of
from decode.loaded import LoadedModel, Shared, bucket
from decode.options import TABLE, Options
from decode.report import CallTimer
from decode.request import INTERRUPTED, Completion, Prompt, Row, several
from decode.sampling import seed_of
from decode.session import Session
from model.logprobs import logprobs
from model.vocabulary import TOKENS, Law
from model.weights import of_rows
from parallel import axes as ax
from parallel.mesh import MeshConfig

PER_ROW = [name for name, row in TABLE.items() if row.per_row]


class Generator(LoadedModel):
  """A model with its tokenizer, on a mesh, that is asked for text.

  Attributes: those of decode.loaded.LoadedModel, of which `report` is of the last call that has
  ended.
  """

  @classmethod
  def load(
    cls,
    workdir: str | os.PathLike,
    checkpoint: str = 'last',
    mesh: MeshConfig = MeshConfig(data=1),
    weights: str = '',
    adapters: Mapping[str, str | os.PathLike] | None = None,
  ) -> 'Generator':
    """The model of a run's directory at its 'last' or 'best' checkpoint, or at a step's; see
    workdir.open.

    weights: see LoadedModel. adapters: runs that trained one on this checkpoint, by the names that
      calls have for them (Options.adapter).
    """
    # The one import that points up the house: a person who has a directory begins here.
    from workdir.open import open_run

    run = open_run(workdir, checkpoint, mesh, adapters or {}, weights)
    made = cls(run.model, run.tokenizer, run.mesh, weights, run.adapters)
    made.identity = run.identity
    return made

  @staticmethod
  def told(workdir: str | os.PathLike, checkpoint: str = 'last', weights: str = '') -> dict:
    """What results of the model of a run's directory say that they are of, JSON-able; see
    workdir.open.run_of.
    """
    from workdir.open import run_of

    return run_of(workdir, checkpoint, weights)

  @property
  def defaults(self) -> dict[str, Any]:
    """Options with which the model's authors generate, for `g(prompt, **g.defaults)`."""
    return model_defaults(self.tokenizer.generation)[0]

  def __call__(self, prompts: Prompt | Sequence[Prompt], **options) -> list[Completion]:
    """Completions of the prompts, generated side by side, `num_samples` of each after one another.

    options: see Options. Ctrl-C ends all rows, and what there is of them is returned.
    """
    rows, steps = self._run(several(prompts), Options.of(options))
    run_out(steps)
    return [row.completion() for row in rows]

  def in_batches(
    self, prompts: Sequence[Prompt], size: int, **options
  ) -> Iterator[list[Completion]]:
    """Completions as of `__call__`, in order, of so many prompts at a time, as they come. A batch
    in which every row fails ends nothing: its completions say so. Ctrl-C makes one the last.

    Raises ValueError, before anything is generated, for a size below 1 and for a prompt that leaves
    no room.
    """
    prompts = several(prompts)
    if size < 1:
      raise ValueError(f'batch_size={size} must be at least 1: prompts that go side by side')
    for name in filter(options.__contains__, PER_ROW):
      if _is_each(options[name]) and len(options[name]) != len(prompts):
        raise ValueError(
          f'{name} has {len(options[name])} values for {len(prompts)} prompts; give one of each, '
          'or one for all'
        )
    fronts = self.fronts_of(Options.of(options).adapter, len(prompts))
    for front, prompt in zip(fronts, prompts):
      ids = self.encoded(prompt)
      if front.encoder:
        front.whole(ids)
      else:
        front.check_room(len(ids))

    def batches():
      for first in range(0, len(prompts), size):
        part = slice(first, first + size)
        rows, steps = self._run(prompts[part], Options.of(_of_part(options, part)))
        try:
          run_out(steps)
        except (ValueError, FloatingPointError):
          if not all(row.error is not None for row in rows):
            raise
        yield [row.completion() for row in rows]
        if any(row.finish == INTERRUPTED for row in rows):
          return

    return batches()

  def stream(self, prompt: Prompt, **options) -> Iterator[str]:
    """Pieces of one completion's text as they come, whole characters each; options: see Options.

    Ctrl-C raises KeyboardInterrupt, after a last piece if text was held back.
    """
    options = _as_it_comes(options)
    if options.num_samples > 1:
      raise ValueError(
        f'num_samples={options.num_samples}: one text is streamed at a time; call the generator '
        'for several'
      )
    (row,), steps = self._run([prompt], options)
    return pieces_of(row, steps)  # not a generator itself: bad options raise here and now

  def chat(self, messages: Sequence[dict[str, str]], **options) -> Iterator[str]:
    """Pieces of the assistant's next turn, after messages of {'role': .., 'content': ..};
    options as for `stream`.

    Raises ValueError where the tokenizer has no chat template.
    The names of control tokens in a message are text, as in any prompt (but see `chat_ids`).
    """
    return self.stream(self.chat_ids(messages), **options)

  def chat_ids(self, messages: Sequence[dict[str, str]], named: bool = False) -> list[int]:
    """The prompt that asks for the assistant's next turn. Raises as `chat` says.

    named: take names of control tokens in a message for those tokens, as transformers does: only
      for messages that nobody else has written.
    """
    messages = messages if named else quoted(messages, self.tokenizer)
    text = ChatTemplate.of(self.tokenizer).render(messages, add_generation_prompt=True)
    return list(self.tokenizer.encode(text, special=True))

  def ids(self, prompts: Prompt | Sequence[Prompt], **options) -> Iterator[list[list[int]]]:
    """New ids of every row, a chunk at a time, until all rows have ended; options: see Options.

    Ctrl-C raises as in `stream`, and so does, behind the last ids, a row that has failed.
    """
    rows, steps = self._run(several(prompts), _as_it_comes(options))

    def chunks():
      with contextlib.closing(steps):
        heard = [0] * len(rows)
        for _ in steps:
          fresh = [row.ids[n:] for row, n in zip(rows, heard)]
          heard = [len(row.ids) for row in rows]
          if any(fresh):
            yield fresh
      if any(row.finish == INTERRUPTED for row in rows):
        raise KeyboardInterrupt
      for row in rows:
        if row.error is not None:
          raise row.error

    return chunks()

  def score(
    self, texts: Prompt | Sequence[Prompt], adapter: str | Sequence[str] = ''
  ) -> list[np.ndarray]:
    """Log-probabilities, f32, of every id of each text but its first one (a text begins as
    documents do), by the training forward pass.

    As in generation they are those among ids that the tokenizer has, where the table of embeddings
    is larger. adapter: as of Options, of each text.
    """
    config = self.model.config
    if config.encoder_layers or not config.causal:
      raise ValueError('scores of texts are those of a decoder; this model has an encoder')

    encoded = [self.encoded(text) for text in several(texts)]
    fronts = self.fronts_of(Options(adapter=adapter).adapter, len(encoded))
    unused = -len(encoded) % self.parts  # rows that fill the mesh up
    rows = [front.whole(ids) for front, ids in zip(fronts, encoded)]
    tokens, lengths = self.padded(rows + [encoded[-1][:1]] * unused)
    index = self.indices([*fronts, *[self.plain] * unused])
    with jax.set_mesh(self.mesh):
      index = None if index is None else self.put(index)
      logprobs = np.asarray(scored_tokens(self.model, self.put(tokens), index, self.vocabulary))
    return [
      row[len(front.soft) : length - 1]
      for front, row, length in zip(fronts, logprobs, lengths[: len(fronts)])
    ]

  def session(self, capacity: int = 0, cache_dtype: str = '', adapter: str = '') -> Session:
    """A text that grows, of at most `capacity` tokens; 0: as many as the model has positions for.
    cache_dtype, adapter: as of Options.

    Raises ValueError for a capacity beyond these, and where there is no end of them and no capacity
    is given.
    """
    if not capacity and not self.model.config.max_length:
      raise ValueError(
        'capacity=0, and the model has no model.max_length; say how many tokens the session may '
        'have'
      )
    return Session(self, capacity, cache_dtype, adapter)

  def _run(
    self, prompts: Sequence[Prompt], options: Options
  ) -> tuple[list[Row], Iterator[list[str]]]:
    """The rows of a call, and an iterator that fills them: each step gives the text that is new of
    each.
    """
    config, copies = self.model.config, options.rows
    if not config.causal:
      raise ValueError('model.causal=False: an encoder writes no text')

    encoded = [self.encoded(prompt) for prompt in prompts]
    shared = Shared.of(len(prompts), copies, self.parts)
    count = len(shared.read) if shared.rows is None else len(shared.rows)
    rules, places, texts, ends = self.rules(options, len(prompts), count)
    # Behind them one for rows that fill the mesh up, which read a token, and end before they begin.
    fronts = [*self.fronts_of(options.adapter, len(prompts)), self.plain]
    source, texts_read = None, [*encoded, encoded[-1][:1]]
    if config.encoder_layers:
      # The prompt is what the encoder reads; the decoder starts with padding, as T5's.
      whole = [front.whole(ids) for front, ids in zip(fronts, texts_read, strict=True)]
      source = self.padded([whole[i] for i in shared.read])
      texts_read = [[self.tokenizer.pad]] * len(texts_read)

    bounds = []
    for front, ids in zip(fronts[:-1], texts_read):
      front.check_room(len(ids))
      bounds.append(front.bound(len(ids), options.max_new_tokens))
    begun = [front.row(ids) for front, ids in zip(fronts, texts_read)]
    stop_at = np.zeros(count, np.int32)
    for row in range(shared.used):
      stop_at[row] = len(begun[row // copies]) + bounds[row // copies].most
    capacity = self.room(int(stop_at.max()))
    rows = [
      Row(
        prompts[i // copies],
        encoded[i // copies],
        int(rules.sampling.seed[i]),
        texts,
        self.tokenizer,
        ends,
        bounds[i // copies],
      )
      for i in range(shared.used)
      for _ in range(options.num_samples // copies)
    ]
    drafter = drafter_of(self, options, int(stop_at.max()), fronts)
    once = [begun[i] for i in shared.read]
    adapters = self.indices([fronts[i] for i in shared.read])

    def read(engine):
      """The state after the prompts: of this model, or of one that drafts."""
      return engine.read(
        once,
        min(capacity, engine.room(capacity)),
        stop_at,
        source=source,
        places=places,
        adapters=adapters if engine is self else None,  # what drafts has none
        spread=shared.rows,
        cache_dtype=options.cache_dtype,
      )

    row_prompts = [begun[i // copies] if i < shared.used else begun[-1] for i in range(count)]
    tokens = sum(len(texts_read[i]) for i in shared.read if i >= 0)
    return rows, self._steps(rows, row_prompts, tokens, rules, options, drafter, read)

  def _steps(self, rows, prompts, tokens, rules, options, drafter, read):
    """prompts: of each row, also of those that fill the mesh up. tokens: that are read."""
    timer = CallTimer(self.model)
    rules = self.placed(rules, options.beams)
    state = read(self)
    if options.beams > 1:
      room = bucket(max(row.most for row in rows))
      self.report = yield from beam.texts(self, timer, rows, state, rules, options, room)
      return
    timer.began(state.cache, tokens, sum(map(len, prompts[: len(rows)])))
    course = Course(self, options, drafter, rules, state, prompts, read)
    yield from deliver(self, rows, course, timer, options)


def _of_part(given: Mapping[str, Any], part: slice) -> dict[str, Any]:
  """Options of a part of the prompts: of each what it would have in a call for all."""
  options = dict(given)
  for name in filter(given.__contains__, PER_ROW):
    if _is_each(given[name]):
      options[name] = given[name][part]
  if not np.ndim(options.get('seed', 0)):
    options['seed'] = seed_of(options.get('seed', TABLE['seed'].default), part.start)
  return options


def _is_each(value: Any) -> bool:
  """Whether a value of an option is several, one of each prompt."""
  return isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value) > 0


def _as_it_comes(given: Mapping[str, Any]) -> Options:
  """Options of a call whose text is read before it ends."""
  options = Options.of(given)
  if options.beams > 1:
    raise ValueError(
      f'beams={options.beams}: no token of a search is certain before its end, and none is '
      'streamed; call the generator'
    )
  return options


@functools.partial(jax.jit, static_argnames=('vocabulary', 'score'))
def scored_tokens(model, tokens, adapters, vocabulary, score=logprobs):
  """What `score`(law, targets, weights) has of tokens [B, T] after those before them, [B, T - 1]:
  log-probabilities, or model.moments.
  """
  model = of_rows(model, adapters)
  targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
  weights = jnp.pad(jnp.ones_like(tokens[:, 1:], jnp.float32), ((0, 0), (0, 1)))
  # Rows that do not split are on all devices.
  with ax.whole_rows(tokens.shape[1] % ax.size('length') > 0):
    tokens, targets, weights = (ax.place(a, *TOKENS) for a in (tokens, targets, weights))
    x = ax.place(model(tokens).hidden, *TOKENS, 'width')
    law = Law(*model.scored(x), softcap=model.config.logit_softcap, vocabulary=vocabulary)
    scores = score(law, targets, weights)
    return jax.tree.map(lambda x: ax.place(x, 'batch', None)[:, :-1], scores)
