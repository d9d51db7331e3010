"""What does a call ask for, and what comes of it? Options, rows while they grow, completions."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import names
from data.tokenizer import Tokenizer
from decode import beam
from decode.loop import Chunk
from decode.sampling import make_sampling, seed_of
from decode.text import TextStream
from model.cache import APPEND

CHUNK = 16  # tokens a call to the device: the first ones come soon, and dispatch costs little
STOPPED, LENGTH, FULL, INTERRUPTED = 'stop', 'length', 'cache full', 'interrupted'  # why a row ends
LAW = (
  'temperature',
  'top_k',
  'top_p',
  'min_p',
  'repetition_penalty',
  'presence_penalty',
  'frequency_penalty',
  'logit_bias',
  'seed',
)

Prompt = Any  # a text or ids; judged by Generator.encoded, whose errors say what to do
Whole = int | np.integer


def several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
  """Prompts, also where one is given by itself. Raises ValueError for what is no prompt,
  and for none.
  """
  if isinstance(prompts, str):
    return [prompts]
  if isinstance(prompts, (bytes, Mapping)) or not np.iterable(prompts):
    raise ValueError(f'prompts={prompts!r} must be a text, ids, or a list of several of these')
  prompts = list(prompts)
  if not prompts:
    raise ValueError('there are no prompts; give at least one (it may be empty text)')
  return prompts if np.iterable(prompts[0]) else [prompts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What one call asks for. Those of decode.sampling (LAW) may be sequences,
  of one value for each prompt.

  Attributes:
    max_new_tokens: a row ends there if it has not ended itself.
    temperature .. logit_bias: see decode.sampling.Sampling; logit_bias is a dict of id -> value.
    seed: row i draws with seed + i (behind 2**32 - 1 comes 0);
      what it draws depends on that and on positions only.
    num_samples: completions of each prompt, rows of their own; of a search the best ones,
      the best first, and fewer where a constraint or logit_bias leaves fewer.
    beams, length_penalty, early_stopping: 2 or more beams search for the likeliest texts
      (decode.beam) and draw nothing: temperature is 1.0 (the default) or 0.0 then, without top-k,
      top-p and min-p.
    stop: texts and ids at which a row ends, or one; None is none.
      Such a text is not part of the completion, such an id is. A search takes ids only.
    logprobs: how many alternatives are reported for every token; -1: nothing is.
    constraint: decode.constrain.Constraint that texts keep to,
      one for all prompts or a sequence of one (or None) for each.
    chunk: steps a call to the device, each a token, or more where drafts are kept;
      texts do not depend on it. cache_dtype: see model.cache.init_cache.
    draft, lookup, early_exit: what drafts tokens (decode.speculative), one of: a Generator with the
      same tokenizer; the length of what is looked up in the row's own past; how many of the model's
      layers. draft_tokens: how many are drafted at a time. Greedy texts are those without; others
      have the same law, and are other draws.
  Raises ValueError for values that make no sense.
  """

  max_new_tokens: Whole = 128
  temperature: Any = 1.0
  top_k: Any = 0
  top_p: Any = 1.0
  min_p: Any = 0.0
  repetition_penalty: Any = 1.0
  presence_penalty: Any = 0.0
  frequency_penalty: Any = 0.0
  logit_bias: Any = None
  seed: Any = 0
  num_samples: Whole = 1
  beams: Whole = 1
  length_penalty: float = 1.0
  early_stopping: bool | str = False
  stop: Any = ()
  logprobs: Whole = -1
  constraint: Any = None
  chunk: Whole = CHUNK
  cache_dtype: str = ''
  draft: Any = None
  lookup: Whole = 0
  early_exit: Whole = 0
  draft_tokens: Whole = 4

  def __post_init__(self):
    for name, least in (
      ('max_new_tokens', 1),
      ('num_samples', 1),
      ('beams', 1),
      ('chunk', 1),
      ('logprobs', -1),
      ('lookup', 0),
      ('early_exit', 0),
      ('draft_tokens', 1),
    ):
      value = getattr(self, name)
      if not isinstance(value, Whole) or isinstance(value, bool) or value < least:
        raise ValueError(f'{name}={value!r} must be at least {least}, and whole')
      object.__setattr__(self, name, int(value))  # programs and JSON know no integers of NumPy
    object.__setattr__(self, 'stop', _stops(self.stop))
    for bias in (
      self.logit_bias if isinstance(self.logit_bias, (list, tuple)) else [self.logit_bias]
    ):
      if bias is not None and not isinstance(bias, Mapping):
        raise ValueError(
          f'logit_bias={self.logit_bias!r} must map ids to what is added to their logits, as '
          f'{{13: -1.5}} does, or be a list of such, one for each prompt'
        )
    if self.draft_tokens >= APPEND:
      raise ValueError(
        f'draft_tokens={self.draft_tokens} must be below {APPEND}, which is what a cache takes at '
        'once'
      )
    drafters = [name for name in ('draft', 'lookup', 'early_exit') if getattr(self, name)]
    if len(drafters) > 1:
      raise ValueError(f'{" and ".join(drafters)} are given: one of them can draft')
    if not drafters and self.draft_tokens != Options.draft_tokens:
      raise ValueError(
        f'draft_tokens={self.draft_tokens}, but nothing drafts; give draft, lookup or early_exit, '
        'or leave it out'
      )
    beam.check(self)

  @classmethod
  def of(cls, given: Mapping[str, Any]) -> 'Options':
    """Options by name; an unknown one raises with the nearest that there is."""
    for name in given:
      names.check('option', name, [field.name for field in dataclasses.fields(cls)])
    return cls(**given)

  @property
  def rows(self) -> int:
    """How often each prompt is read: a search's beams share it."""
    return 1 if self.beams > 1 else self.num_samples

  def stops(self, vocabulary: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Texts and ids that end a row."""
    for stop in self.stop:
      if (
        not isinstance(stop, (str, int))
        or isinstance(stop, bool)
        or stop == ''
        or (isinstance(stop, int) and not 0 <= stop < vocabulary)
      ):
        raise ValueError(
          f'stop={stop!r} must be a text that is not empty, or an id in [0, {vocabulary})'
        )
    return tuple(s for s in self.stop if isinstance(s, str)), tuple(
      s for s in self.stop if isinstance(s, int)
    )

  def law(self, prompts: int, vocabulary: int):
    """The sampling of all rows, those of a prompt side by side."""
    rows, n = prompts * self.rows, self.rows

    def spread(name, value):
      if value is None or np.ndim(value) == 0:
        return value
      if len(value) != prompts:
        raise ValueError(
          f'{name} has {len(value)} values for {prompts} prompts; give one for all, or one for each'
        )
      return [seed_of(one, i) if name == 'seed' else one for one in value for i in range(n)]

    return make_sampling(
      rows, vocabulary=vocabulary, **{name: spread(name, getattr(self, name)) for name in LAW}
    )


def _stops(given):
  """Options.stop as a tuple, of integers of Python."""
  given = () if given is None else (given,) if isinstance(given, str | Whole) else given
  if isinstance(given, bytes) or not np.iterable(given):
    raise ValueError(f'stop={given!r} must be a text, an id, or several of these')
  return tuple(int(stop) if isinstance(stop, np.integer) else stop for stop in given)


@dataclasses.dataclass(frozen=True)
class Completion:
  """One generated text.

  Attributes:
    prompt; prompt_ids: as the model read it. text: without the prompt. ids: of the text,
    with the id that ended it, if one did.
    finish: 'stop' for end-of-text or a stop, 'length' for max_new_tokens, 'cache full',
      or 'interrupted'.
    stopped_by: the text or id, where finish is 'stop'.
    logprobs: of each id by the model; processed: by the law that it was drawn from (greedy: 0),
      or what a search sums up. Natural logarithms.
    alternatives: for each id what the model found likeliest, as (id, log-probability);
      empty unless asked for.
    drafted, accepted: tokens that a draft proposed, and those that were kept.
    seed: that reproduces this row alone. score: of a search,
      the sum of `processed` over the number of ids ** length_penalty; or None.
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


class Row:
  """What has come of one row so far."""

  def __init__(
    self,
    prompt: Prompt,
    prompt_ids: list[int],
    seed: int,
    stops: Sequence[str],
    tokenizer: Tokenizer,
    ends: Sequence[int],
  ):
    self._prompt, self._prompt_ids, self._seed, self._ends = prompt, prompt_ids, seed, ends
    self._stream = TextStream(tokenizer, stops)
    self.ids, self._text, self._raw, self._processed, self._alternatives = [], [], [], [], []
    self.drafted, self.accepted, self.score = 0, 0, None
    self.finish, self.stopped_by = '', None

  def add(self, index: int, chunk: Chunk) -> str:
    """Takes the row's tokens of a chunk (of NumPy arrays); the text that is certain by them."""
    if self.finish:
      return ''
    if chunk.broken[index]:
      raise FloatingPointError(
        f'the scores after token {len(self._prompt_ids) + len(self.ids)} of the row that begins '
        f'with {self._prompt_ids[:8]} are not finite: no token can be drawn. Weights or an option '
        '(logit_bias, a constraint with penalties) made them so'
      )
    own = np.flatnonzero(chunk.real[index])
    ids = chunk.ids[index, own].tolist()
    piece = self._stream.add(ids)
    if self._stream.stopped is not None:
      kept = self._stream.ids_used - len(self.ids)
      own, ids = own[:kept], ids[:kept]
      self.finish, self.stopped_by = STOPPED, self._stream.stopped
    self.ids += ids
    self._raw += chunk.raw[index, own].tolist()
    self._processed += chunk.processed[index, own].tolist()
    if chunk.alternatives.shape[2]:
      self._alternatives += [
        list(zip(which.tolist(), likely.tolist()))
        for which, likely in zip(chunk.alternatives[index, own], chunk.alternatives_raw[index, own])
      ]
    if chunk.drafted is not None:
      self.drafted += int(chunk.drafted[index])
      self.accepted += int(chunk.accepted[index])
    self._text.append(piece)
    if not self.finish and ids and ids[-1] in self._ends:
      self.finish, self.stopped_by = STOPPED, ids[-1]
    return piece

  def end(self, finish: str) -> str:
    """The row ends here, if it has not before; the text that was held back."""
    self.finish = self.finish or finish
    rest = self._stream.end()
    self._text.append(rest)
    return rest

  def completion(self) -> Completion:
    return Completion(
      self._prompt,
      self._prompt_ids,
      ''.join(self._text),
      self.ids,
      self.finish,
      self.stopped_by,
      self._raw,
      self._processed,
      self._alternatives,
      self.drafted,
      self.accepted,
      self._seed,
      self.score,
    )
