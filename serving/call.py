"""What is a server asked for, and what does it answer? The words between whoever speaks a protocol
and whoever schedules rows: values only.

    ticket = service.submit(Call(prompt, options))      # or QueueFull, NotReady, ValueError
    async for event in ticket: ...                      # ids, text, finish of each sample
    ticket.usage, ticket.times, ticket.cancel()
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from decode.options import Options
from decode.request import FAILED, LENGTH, STOPPED

# Why a sample ends, besides decode.request's: whoever asked has gone; it took longer than it was
# given; the server stops.
CANCELLED = 'cancelled'
DEADLINE = 'deadline'
DRAINED = 'drained'
OF_TEXTS = (STOPPED, LENGTH)
FINISHES = (*OF_TEXTS, CANCELLED, DEADLINE, DRAINED, FAILED)

# What a Failure is about: what was asked for (found out late, as of a constraint); scores that are
# not finite; the device; a reader that does not read.
INVALID, BROKEN, DEVICE, SLOW, GONE = 'invalid', 'broken', 'device', 'slow', 'gone'

# In which state a service is, in this order; `failed` may follow any.
STARTING, READY, DRAINING, CLOSED = 'starting', 'ready', 'draining', 'closed'
STATES = (STARTING, READY, DRAINING, CLOSED, FAILED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """What is asked for. What comes of it depends on it alone, but for key, priority and seconds:
  never on who else asks, nor when.

  Attributes:
    prompt: a text, which begins as documents do, or ids (of a chat, or with control tokens:
      tokenizer.encode(text, special=True)).
    options: of decode.options; those of a search, of drafts and of the cache are the server's
      matter, and refused. One value each: `seed` is a number, `adapter` a name.
    sample_index: of options.num_samples this one alone, bit for bit as among all; None: all.
    regex, schema: what texts keep to, at most one of them (decode.constrain.Constraint).
    ignore_end: whether only stops and max_new_tokens end a text.
    key: whose it is; of those that wait, keys take turns.
    priority: who goes first; a lower number does.
    seconds: after which it ends, with what there is; None: never.
    salt: prefixes are shared among calls of one salt only.
  """

  prompt: str | Sequence[int]
  options: Options = Options()
  sample_index: int | None = None
  regex: str | None = None
  schema: Mapping[str, Any] | str | None = None
  ignore_end: bool = False
  key: str = ''
  priority: int = 0
  seconds: float | None = None
  salt: str = ''

  def __post_init__(self):
    n, index, options = self.options.num_samples, self.sample_index, self.options
    if index is not None and not 0 <= index < n:
      raise ValueError(f'sample_index={index} must be in [0, num_samples={n})')
    if self.regex is not None and self.schema is not None:
      raise ValueError('regex and schema are both given: a text keeps to one of the two')
    if self.ignore_end and not (self.regex is None and self.schema is None):
      raise ValueError(
        'ignore_end: a text that keeps to something has nothing behind its end but that end again; '
        'leave out one'
      )
    if self.seconds is not None and not self.seconds > 0:
      raise ValueError(f'seconds={self.seconds} that a call may take must be positive')
    if options.beams > 1:
      raise ValueError(
        f'beams={options.beams}: a search is of no server, for no token of it is certain before '
        'its end; use generate.py, or draw with num_samples'
      )
    for name in ('draft', 'lookup', 'early_exit'):
      if getattr(options, name):
        raise ValueError(f'{name}: what drafts is a setting of the server, and of no call')
    if options.cache_dtype:
      raise ValueError(
        f'cache_dtype={options.cache_dtype!r} is a setting of the server, and of no call'
      )
    if options.constraint is not None:
      raise ValueError('constraint: give regex or schema, of which the server makes one')

  @property
  def samples(self) -> tuple[int, ...]:
    """Which samples are asked for."""
    n = self.options.num_samples
    return tuple(range(n)) if self.sample_index is None else (self.sample_index,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
  """Why a sample has failed. kind: INVALID, BROKEN, DEVICE, SLOW or GONE."""

  kind: str
  message: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
  """What is new of one sample. Of all events of a sample `text` together is its text, ids its ids.

  Attributes:
    sample: which of options.num_samples.
    ids: with the id that ended it, if one did; of a stop text those up to the one that completes
      it. text: what is certain by them, without the stop text.
    logprobs: of each id by the model, natural logarithms; processed: by the law that it was drawn
      from. alternatives: of each id the options.logprobs likeliest, as (id, log-probability).
    finish: '' or, in the sample's last event, one of FINISHES. stopped_by: the text or id, where it
      is 'stop'. note: which limit ended it before max_new_tokens. error: where it is 'failed'.
    at: when, by the service's clock.
  """

  sample: int = 0
  ids: tuple[int, ...] = ()
  text: str = ''
  logprobs: tuple[float, ...] = ()
  processed: tuple[float, ...] = ()
  alternatives: tuple[tuple[tuple[int, float], ...], ...] = ()
  finish: str = ''
  stopped_by: str | int | None = None
  note: str = ''
  error: Failure | None = None
  at: float = 0.0


@dataclasses.dataclass
class Usage:
  """Tokens. prompt: of the prompt, once. cached: those of them that were not read, because they
  had been before (of the first sample). completion: of all samples.
  """

  prompt: int = 0
  cached: int = 0
  completion: int = 0


@dataclasses.dataclass
class Times:
  """When, by the service's clock: it was asked for, its first row began, its first tokens came,
  and its last sample ended. None: not so far.
  """

  asked: float
  began: float | None = None
  first: float | None = None
  ended: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What a server shares is bounded, and each bound is said when it is met.

  Attributes:
    waiting: samples that wait for a row, at most; beyond them QueueFull. Of these, as of
      constraints, API keys have shares (serving.queue.check_places).
    samples: of one call. stops: texts and ids of one call. stop_length: characters of a stop text.
    constraint: characters of a regex or schema. constraints: that are being made at a time, and
      waiting to be, at most. kept, kept_bytes: constraints that are kept for others.
    unread: tokens of a call, and alternatives of them, that its reader leaves unread, at most;
      beyond them it has failed.
    patience: seconds after which whoever waits goes before all priorities.
    gap_ms: how long a row that writes waits for its next tokens, about, at most.
  """

  waiting: int = 256
  samples: int = 16
  stops: int = 16
  stop_length: int = 256
  constraint: int = 65536
  constraints: int = 16
  kept: int = 64
  kept_bytes: int = 2**28
  unread: int = 65536
  patience: float = 30.0
  gap_ms: float = 200.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if not getattr(self, field.name) > 0:
        raise ValueError(f'{field.name}={getattr(self, field.name)} of a server must be positive')


@dataclasses.dataclass
class JobCounts:
  """Of jobs of a kind. done, failed: how many have ended so. tokens: of those that are done.
  seconds: that these took together, from when each was asked for.
  """

  done: int = 0
  failed: int = 0
  tokens: int = 0
  seconds: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
  """What a service is doing, and has done since it began.

  Attributes:
    rows, free, reading, writing: rows there are, and what they do. waiting: samples that have none.
    tokens, room: for which memory is in use, and for which there is some.
    prompt_tokens: that were read. generated_tokens: that reached who asked.
    prefix_queries, prefix_hits: tokens of prompts that were looked up, and those that were there.
    drafted, accepted: of samples that have ended, tokens that were drafted, and those kept.
    finished: samples by `finish`. errors: failures by kind. refused: calls by QueueFull.
    preempted: how often a row had to wait for others' sake; never where rows have no pages.
    jobs_waiting: texts to be embedded and prompts to be scored that wait. jobs: those that have
      ended, by kind (serving.jobs.KINDS).
    compiled: programs. steps: calls of the program that decodes; step_seconds: about how long
      each of its tokens took.
  """

  rows: int = 0
  free: int = 0
  reading: int = 0
  writing: int = 0
  waiting: int = 0
  tokens: int = 0
  room: int = 0
  prompt_tokens: int = 0
  generated_tokens: int = 0
  prefix_queries: int = 0
  prefix_hits: int = 0
  drafted: int = 0
  accepted: int = 0
  finished: Mapping[str, int] = dataclasses.field(default_factory=dict)
  errors: Mapping[str, int] = dataclasses.field(default_factory=dict)
  refused: int = 0
  preempted: int = 0
  jobs_waiting: int = 0
  jobs: Mapping[str, JobCounts] = dataclasses.field(default_factory=dict)
  compiled: int = 0
  steps: int = 0
  step_seconds: float = 0.0


class QueueFull(Exception):
  """As many wait as may. retry_after: seconds after which there is room, as far as is known."""

  def __init__(self, message: str, retry_after: float):
    super().__init__(message)
    self.retry_after = retry_after


class EngineLost(ConnectionError):
  """An engine that cannot begin anew: the server ends."""


class NotReady(Exception):
  """The service takes no calls. state: in which it is."""

  def __init__(self, state: str):
    super().__init__(f'the server is {state}, and takes no calls')
    self.state = state
