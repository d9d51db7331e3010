"""What is a call given, and what comes of it? Prompts, rows while they grow, completions."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.tokenizer import Tokenizer
from decode.loop import Chunk
from decode.text import TextStream

# Why a row ends.
STOPPED = 'stop'
LENGTH = 'length'
FULL = 'cache full'
INTERRUPTED = 'interrupted'
FAILED = 'failed'

Prompt = Any  # a text or ids; judged by Generator.encoded, whose errors say what to do


def several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
  """Prompts, also where one is given by itself.

  Raises ValueError for what is no prompt, and for none.
  """
  if isinstance(prompts, str):
    return [prompts]
  if isinstance(prompts, (bytes, Mapping)) or not np.iterable(prompts):
    raise ValueError(f'prompts={prompts!r} must be a text, ids, or a list of several of these')
  prompts = list(prompts)
  if not prompts:
    raise ValueError('there are no prompts; give at least one (it may be empty text)')
  return prompts if np.iterable(prompts[0]) else [prompts]


@dataclasses.dataclass(frozen=True)
class Bound:
  """How far a row goes.

  Attributes:
    most: new tokens. finish: why it ends there, if it has not ended itself.
    note: what else is said of that; '' where that is all that was asked for.
  """

  most: int
  finish: str = LENGTH
  note: str = ''


@dataclasses.dataclass(frozen=True)
class Completion:
  """One generated text.

  Attributes:
    prompt: as it was given.
    prompt_ids: as the model read it.
    text: without the prompt.
    ids: of the text, with the id that ended it, if one did.
    finish: 'stop' for end-of-text or a stop, 'length' for max_new_tokens or the end of the model's
      context, which `note` tells apart, 'cache full' for a session's capacity, 'interrupted', or
      'failed', where no token could be drawn: `error` says why.
    stopped_by: the text or id, where finish is 'stop'.
    logprobs: of each id by the model, natural logarithms.
    processed: by the law that it was drawn from (greedy: 0), or what a search sums up.
    alternatives: for each id what the model found likeliest, as (id, log-probability);
      empty unless asked for.
    drafted, accepted: tokens that a draft proposed, and those that were kept.
    seed: that reproduces this row alone.
    score: of a search, the sum of `processed` over the number of ids ** length_penalty; or None.
    error: why the row failed; '' where it did not.
    note: which limit ended the row before max_new_tokens; '' where none did.
  """

  prompt: Prompt
  prompt_ids: list[int]
  text: str
  ids: list[int]
  finish: str
  stopped_by: str | int | None
  logprobs: list[float]
  processed: list[float]
  alternatives: list[list[tuple[int, float]]]
  drafted: int
  accepted: int
  seed: int
  score: float | None = None
  error: str = ''
  note: str = ''

  @property
  def end(self) -> 'Completion':
    """Why it ended, without what grows with its length: of many, this can be kept."""
    return dataclasses.replace(
      self, prompt='', prompt_ids=[], text='', ids=[], logprobs=[], processed=[], alternatives=[]
    )


class Row:
  """What has come of one row so far.

  Attributes:
    ids, drafted, accepted, finish, stopped_by, score, note: as its Completion has them; finish is
      '' until the row ends.
    most: new tokens that it can have.
    error: what would be raised if the row were alone; None where it has not failed.
  """

  def __init__(
    self,
    prompt: Prompt,
    prompt_ids: list[int],
    seed: int,
    stops: Sequence[str],
    tokenizer: Tokenizer,
    ends: Sequence[int],
    bound: Bound,
    alternatives: int | None = None,
  ):
    """stops: texts that end the row, without being part of it. ends: ids that do, and are.
    alternatives: of each token, that are kept; None: all that there are in chunks.
    """
    self._prompt = prompt
    self._prompt_ids = prompt_ids
    self._seed = seed
    self._ends = ends
    self._bound = bound
    self._kept = alternatives
    self.most = bound.most
    self._stream = TextStream(tokenizer, stops)

    self.ids: list[int] = []
    self._text: list[str] = []
    self._raw: list[float] = []
    self._processed: list[float] = []
    self._alternatives: list[list[tuple[int, float]]] = []

    self.drafted = 0
    self.accepted = 0
    self.finish = ''
    self.stopped_by = None
    self.score = None
    self.note = ''
    self.error: Exception | None = None

  def add(self, index: int, chunk: Chunk) -> str:
    """Takes the row's tokens of a chunk (of NumPy arrays); the text that is certain by them."""
    if self.finish:
      return ''
    places = np.flatnonzero(chunk.real[index])
    ids = chunk.ids[index, places].tolist()
    piece = self._stream.add(ids)
    if self._stream.stopped is not None:
      # A chunk goes on behind a stop string, of which the device knows nothing.
      kept = self._stream.ids_used - len(self.ids)
      places, ids = places[:kept], ids[:kept]
      self.finish, self.stopped_by = STOPPED, self._stream.stopped

    self.ids += ids
    self._note(index, chunk, places)
    self._text.append(piece)
    if not self.finish and ids and ids[-1] in self._ends:
      self.finish, self.stopped_by = STOPPED, ids[-1]
    if not self.finish and chunk.broken[index]:
      self.fail(
        FloatingPointError(
          f'the scores after token {len(self._prompt_ids) + len(self.ids)} of the row that begins '
          f'with {self._prompt_ids[:8]} are not finite: no token can be drawn. Weights or an '
          'option (logit_bias, a constraint with penalties) made them so'
        )
      )
    if not self.finish and len(self.ids) >= self.most:
      self.finish, self.note = self._bound.finish, self._bound.note
    return piece

  def since(self, count: int) -> tuple[list, list, list, list]:
    """Ids behind the first ones, their log-probabilities by the model and by the law, and their
    alternatives, if every token has some.
    """
    every = self.ids, self._raw, self._processed, self._alternatives
    ids, raw, processed, alternatives = (each[count:] for each in every)
    return ids, raw, processed, alternatives

  def fail(self, error: Exception) -> None:
    """The row ends here, because of that; others go on."""
    self.finish, self.error = FAILED, error

  def _note(self, index: int, chunk: Chunk, places: np.ndarray) -> None:
    """Log-probabilities at these places of the chunk, and what became of its drafts."""
    self._raw += chunk.raw[index, places].tolist()
    self._processed += chunk.processed[index, places].tolist()
    if chunk.alternatives.shape[2] and self._kept != 0:
      likeliest = chunk.alternatives[index, places, : self._kept].tolist()
      values = chunk.alternatives_raw[index, places, : self._kept].tolist()
      self._alternatives += [list(zip(*pair)) for pair in zip(likeliest, values)]
    if chunk.drafted is not None:
      self.drafted += int(chunk.drafted[index])
      self.accepted += int(chunk.accepted[index])

  def end(self, finish: str) -> str:
    """The row ends here, if it has not before; the text that was held back."""
    before = self._stream.stopped
    rest = self._stream.end()
    self._text.append(rest)
    if before is None and self._stream.stopped is not None:
      # A stop string that ends in a character whose last bytes never came.
      self.finish, self.stopped_by = STOPPED, self._stream.stopped
      self.note = ''
    self.finish = self.finish or finish
    return rest

  def completion(self) -> Completion:
    """What has come of it."""
    return Completion(
      prompt=self._prompt,
      prompt_ids=self._prompt_ids,
      text=''.join(self._text),
      ids=self.ids,
      finish=self.finish,
      stopped_by=self.stopped_by,
      logprobs=self._raw,
      processed=self._processed,
      alternatives=self._alternatives,
      drafted=self.drafted,
      accepted=self.accepted,
      seed=self._seed,
      score=self.score,
      error='' if self.error is None else str(self.error),
      note=self.note,
    )


def raise_where_all_failed(rows: Sequence[Row]) -> None:
  """Raises the first row's error where no row has done without one."""
  if all(row.error is not None for row in rows):
    raise rows[0].error
