"""What does a benchmark of servers ask for, and what does it see? Requests, the same for all
sides; a closed loop and Poisson arrivals; what came of them.
"""

import asyncio
import dataclasses
import itertools
import json
import os
import pathlib
import time
from collections.abc import Awaitable, Callable, Sequence

from launch.serve import wire

LOOP = 16  # clients of the closed loop that the others are compared by


@dataclasses.dataclass(frozen=True)
class Work:
  """What is asked for. prompt, answer: least and most tokens. shared: of a system prompt.
  clients: of closed loops. shares: of the rate of one of them, that Poisson arrivals have.
  requests: of each measurement, and twice the clients at least.
  """

  prompt: tuple[int, int] = (32, 512)
  answer: tuple[int, int] = (16, 256)
  shared: int = 0
  clients: tuple[int, ...] = (1, 4, 16, 64)
  shares: tuple[float, ...] = (0.25, 0.5, 0.75)
  requests: int = 64
  rows: int = 16
  seed: int = 0

  @property
  def capacity(self) -> int:
    """Tokens that a row has to hold; a prompt may have a few more than were drawn."""
    return -(-(self.shared + self.prompt[1] * 5 // 4 + self.answer[1]) // 128) * 128

  def of_loop(self, clients: int) -> int:
    """Requests of a closed loop of so many clients."""
    return max(self.requests, 2 * clients)

  @property
  def total(self) -> int:
    """Requests of all measurements, and of what warms a side up."""
    loops = sum(map(self.of_loop, self.clients))
    return 2 * self.rows + loops + len(self.shares) * self.requests

  def drawn(self, tokenizer, count: int) -> list[tuple[str, int]]:
    """(prompt, new tokens) of so many requests, the same for all sides: texts of real tokens."""
    import numpy as np

    rng = np.random.default_rng(self.seed)
    words = [
      text
      for i in range(3, tokenizer.vocabulary)
      if (text := tokenizer.decode_bytes([i]).decode(errors='ignore')).isascii() and text.strip()
    ]

    def text(length):
      return ''.join(words[i] for i in rng.integers(0, len(words), length))

    first = text(self.shared)
    (least, most), (fewest, longest) = self.prompt, self.answer
    prompts = rng.integers(least, most + 1, count)
    answers = rng.integers(fewest, longest + 1, count)
    return [(first + text(int(prompt)), int(new)) for prompt, new in zip(prompts, answers)]


@dataclasses.dataclass
class Seen:
  """What a client saw of an answer. times: of its events; tokens: of all of them together."""

  asked: float
  times: list[float] = dataclasses.field(default_factory=list)
  tokens: int = 0
  failed: str = ''


# Of a prompt and so many new tokens; writes into the Seen what comes. Its RuntimeErrors are kept.
Ask = Callable[[str, int, Seen], Awaitable[None]]


async def answer(ask: Ask, prompt: str, new: int) -> Seen:
  stream = Seen(time.perf_counter())
  try:
    await ask(prompt, new, stream)
  except (wire.Broken, RuntimeError) as error:
    stream.failed = str(error) or type(error).__name__
  return stream


async def closed(ask: Ask, requests: Sequence[tuple[str, int]], clients: int) -> list[Seen]:
  """Each client asks again when it has its answer."""
  streams, waiting = [], iter(requests)

  async def client():
    for prompt, new in waiting:
      streams.append(await answer(ask, prompt, new))

  await asyncio.gather(*(client() for _ in range(clients)))
  return streams


async def poisson(
  ask: Ask, requests: Sequence[tuple[str, int]], rate: float, seed: int
) -> list[Seen]:
  """Requests come at random, so many a second, whoever waits."""
  import numpy as np

  gaps = np.random.default_rng(seed).exponential(1 / rate, len(requests))
  tasks = []
  for (prompt, new), gap in zip(requests, gaps, strict=True):
    await asyncio.sleep(gap)
    tasks.append(asyncio.create_task(answer(ask, prompt, new)))
  return list(await asyncio.gather(*tasks))


def summary(streams: Sequence[Seen], seconds: float, processor: float) -> dict:
  """What came of a load. processor: seconds of the server's processors."""
  import numpy as np

  done = [each for each in streams if not each.failed]
  tokens = sum(each.tokens for each in done)
  if not tokens:
    said = {each.failed for each in streams}
    raise RuntimeError(f'no request of {len(streams)} had an answer: {sorted(said)[:3]}')
  first = [each.times[0] - each.asked for each in done if each.times]
  gaps = [b - a for each in done for a, b in zip(each.times, each.times[1:])]
  between = [
    (each.times[-1] - each.times[0]) / (each.tokens - 1)
    for each in done
    if each.times and each.tokens > 1
  ]
  found = {
    'requests': len(streams),
    'failed': len(streams) - len(done),
    'requests_per_second': len(done) / seconds,
    'tokens_per_second': tokens / seconds,
    'tokens_per_event': tokens / max(1, sum(len(each.times) for each in done)),
    'cpu_ms_per_token': processor / tokens * 1e3,
    'seconds': seconds,
    'tokens': tokens,
  }
  for name, values in (('first', first), ('gap', gaps), ('token', between)):
    for percent in (50, 99):
      found[f'{name}_p{percent}'] = float(np.percentile(values, percent)) if values else 0.0
  return found


async def loads(
  ask: Ask, work: Work, requests: list, processor: Callable[[], float], rate: float = 0.0
) -> dict:
  """All measurements of a side, after one that warms it up. rate: requests a second of which
  Poisson arrivals have shares; 0: what the closed loop reached.
  """
  found: dict = {'closed': {}, 'poisson': {}}
  # Every measurement has prompts of its own: of those that a side has read before it may know the
  # keys, and sides keep more or fewer.
  fresh = iter(requests)

  def some(count):
    return list(itertools.islice(fresh, count))

  await closed(ask, some(2 * work.rows), work.rows)

  async def measured(run, count):
    asked = some(count)
    began, before = time.perf_counter(), processor()
    streams = await run(asked)
    return summary(streams, time.perf_counter() - began, processor() - before)

  for clients in work.clients:
    asked = work.of_loop(clients)
    found['closed'][clients] = await measured(lambda some: closed(ask, some, clients), asked)
  loop = LOOP if LOOP in work.clients else work.clients[-1]
  rate = rate or found['closed'][loop]['requests_per_second']
  for share in work.shares:
    found['poisson'][share] = await measured(
      lambda some: poisson(ask, some, share * rate, work.seed), work.requests
    )
  return found | {'rate': rate}


def over_http(port: int, model: str) -> Ask:
  """Of a server that speaks as OpenAI's."""

  async def ask(prompt: str, new: int, stream: Seen) -> None:
    body = {'model': model, 'prompt': prompt, 'max_tokens': new, 'temperature': 0}
    body |= {'stream': True, 'stream_options': {'include_usage': True}, 'ignore_eos': True}
    content = json.dumps(body).encode()
    sent = wire.request('POST', '/v1/completions', content, content_type='application/json')
    async with wire.asked(port, sent) as (status, _, pieces):
      if status != 200:
        text = b''.join([piece async for piece in pieces]).decode(errors='replace')
        raise RuntimeError(f'{status}: {text[:200]}')
      async for data in wire.events(pieces):
        said = {} if data == '[DONE]' else json.loads(data)
        if 'error' in said:
          raise RuntimeError(str(said['error']))
        if any(choice.get('text') for choice in said.get('choices', ())):
          stream.times.append(time.perf_counter())
        # How many tokens there are, usage says, not the number of events.
        stream.tokens = (said.get('usage') or {}).get('completion_tokens', stream.tokens)
    if not stream.tokens:
      raise RuntimeError('an answer had no usage')

  return ask


def processor_seconds(process: int) -> float:
  """That a process, and whatever it has started, has used."""
  where, ticks = pathlib.Path(f'/proc/{process}'), os.sysconf('SC_CLK_TCK')
  try:
    fields = (where / 'stat').read_text().rpartition(')')[2].split()
    children = [
      child
      for task in (where / 'task').iterdir()
      for child in (task / 'children').read_text().split()
    ]
  except (FileNotFoundError, ProcessLookupError):
    return 0.0
  # utime, stime, and those of children that have ended.
  own = sum(int(field) for field in fields[11:15]) / ticks
  return own + sum(processor_seconds(int(child)) for child in children)
