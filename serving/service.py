"""What does a protocol (HTTP, or another) see of the engine?

`serving.running.Running` is the one with a model; `serving.fake` has one for tests, whose clock
stands still.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol, runtime_checkable

from data.tokenizer import Tokenizer
from serving.call import Call, Limits, Stats
from serving.ticket import Ticket


@runtime_checkable
class Service(Protocol):
  """Answers calls. All of it may be called from any thread, and nothing of it waits for the device,
  but `close`.

  Attributes:
    tokenizer: whose ids are read and written.
    vocabulary: ids are below it. adapters: names that Options.adapter may have.
    alternatives: Options.logprobs at most. width: numbers of a text's vector.
    limits: see there.
    clock: gives seconds, of Event.at and Times; never back.
    state: one of serving.call.STATES. progress: programs that are compiled, and that will be.
    error: why state is 'failed'; ''.
    writes, scores, embeds: whether texts are written, prompts scored, texts embedded.
  """

  tokenizer: Tokenizer
  vocabulary: int
  adapters: Sequence[str]
  alternatives: int
  width: int
  limits: Limits
  clock: Callable[[], float]
  state: str
  progress: tuple[int, int]
  error: str
  writes: bool
  scores: bool
  embeds: bool

  def encoded(self, prompt: str | Sequence[int]) -> list[int]:
    """The ids that the model reads. Raises ValueError for none, and for what is no id."""

  def room(self, tokens: int, adapter: str = '') -> int:
    """New tokens for which there is room behind a prompt of so many, at most."""

  def longest(self, adapter: str = '') -> int:
    """Tokens of a text, at most: of a prompt and what is written behind it, or of what an encoder
    reads.
    """

  def submit(self, call: Call) -> Ticket:
    """Takes a call. What is wrong with it in itself is said now: ValueError, with the value, the
    limit and the remedy. A constraint is made meanwhile; what is wrong with that is a Failure of
    kind 'invalid', the only event of each sample.

    Raises QueueFull where as many wait as may, and NotReady in a state other than 'ready'.
    """

  def score(self, call: Call, alternatives: int) -> Future:
    """The decode.scorer.PromptScores of a call's prompt, when they are there, or
    serving.jobs.JobFailed. Raises as `submit`, and ValueError where prompts are not scored.
    """

  def embed(self, texts: Sequence[Sequence[int]], adapter: str, key: str = '') -> Future:
    """Vectors of texts of these ids, [texts, D] f32, or JobFailed. Raises as `score`."""

  def ready(self, timeout: float | None = None) -> bool:
    """Waits until it does not start any more, for so many seconds; whether it is 'ready'."""

  def stats(self) -> Stats:
    """What it is doing now."""

  def drain(self, seconds: float) -> None:
    """Takes no more calls, from now on; those that are there go on, and what has not ended after so
    many seconds ends with 'drained'. Then the state is 'closed'.
    """

  def closed(self, timeout: float | None = None) -> bool:
    """Waits until the state is 'closed' or 'failed', for so many seconds; whether it is."""

  def close(self) -> None:
    """Ends all that there is, now, and waits for that."""
