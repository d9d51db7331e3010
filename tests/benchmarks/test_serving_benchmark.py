"""Is what the benchmark of servers prints what its clients saw? No timing is looked at."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks import serving, serving_load
from benchmarks.serving_load import Seen, Work
from data.tokenizers import ByteTokenizer
from launch.serve import wire


def test_a_summary_is_of_what_was_seen():
  fine = [Seen(0.0, [1.0, 2.0, 4.0], 7), Seen(1.0, [1.5], 1)]
  found = serving_load.summary([*fine, Seen(0.0, [9.0], 5, 'gone')], 4.0, 0.5)
  assert (found['requests'], found['failed'], found['tokens']) == (3, 1, 8)
  assert found['tokens_per_second'] == 2 and found['requests_per_second'] == 0.5
  assert found['tokens_per_event'] == 2 and found['cpu_ms_per_token'] == 62.5
  assert found['first_p50'] == 0.75 and found['gap_p50'] == 1.5
  assert found['token_p50'] == found['token_p99'] == 0.5
  with pytest.raises(RuntimeError, match="no request of 1 had an answer: \\['gone'\\]"):
    serving_load.summary([Seen(0.0, [], 0, 'gone')], 1.0, 1.0)


def test_a_closed_loop_has_so_many_at_a_time_and_arrivals_wait_for_nobody():
  now, most = 0, 0

  async def ask(prompt, new, stream):
    nonlocal now, most
    now += 1
    most = max(most, now)
    await asyncio.sleep(0.002)
    now -= 1
    stream.tokens = new

  requests = [('p', i + 1) for i in range(12)]
  streams = asyncio.run(serving_load.closed(ask, requests, 3))
  assert most == 3 and sorted(each.tokens for each in streams) == [*range(1, 13)]

  async def arrivals():
    all_are_here = asyncio.Barrier(12)  # where one waited for another's answer, none would end

    async def meet(prompt, new, stream):
      await all_are_here.wait()

    return await asyncio.wait_for(serving_load.poisson(meet, requests, 1e6, 0), 60)

  assert len(asyncio.run(arrivals())) == 12


def test_requests_are_the_same_for_all_and_within_what_was_asked_for():
  work = Work(prompt=(4, 9), answer=(2, 5), shared=6)
  drawn = work.drawn(ByteTokenizer(), 20)
  assert drawn == work.drawn(ByteTokenizer(), 20)
  assert {len(prompt) for prompt, _ in drawn} == {*range(10, 16)}
  assert {new for _, new in drawn} == {2, 3, 4, 5}
  assert len({prompt[:6] for prompt, _ in drawn}) == 1 and len({*drawn}) == 20


@contextlib.asynccontextmanager
async def saying(*said: dict | str):
  """The port of a server that says this to anyone."""
  body = ''.join(f'data: {each if each == "[DONE]" else json.dumps(each)}\n\n' for each in said)

  async def handle(reader, writer):
    _, headers = await wire.read_head(reader)
    [asked] = [json.loads(piece) async for piece in wire.read_body(reader, headers)]
    assert asked['max_tokens'] == 5 and asked['stream_options'] == {'include_usage': True}
    writer.write(wire.answer('200 OK', body.encode()))
    await wire.closed(writer)

  async with await asyncio.start_server(handle, wire.HOST, 0) as server:
    yield server.sockets[0].getsockname()[1]


def test_tokens_are_those_of_usage_and_times_those_of_texts():
  async def run(*said):
    async with saying(*said) as port:
      return await serving_load.answer(serving_load.over_http(port, 'm'), 'p', 5)

  def choice(text):
    return {'choices': [{'text': text}]}

  usage = {'choices': [], 'usage': {'completion_tokens': 5}}
  stream = asyncio.run(run(choice(''), choice('ab'), choice('c'), usage, '[DONE]'))
  assert (stream.tokens, len(stream.times), stream.failed) == (5, 2, '')
  assert 'no usage' in asyncio.run(run(choice('a'), '[DONE]')).failed
  assert 'lost' in asyncio.run(run({'error': {'message': 'lost'}})).failed


def test_processor_seconds_are_of_all_of_a_tree():
  spin = 'import time\nwhile time.process_time() < 0.3: pass\n'
  code = f'import subprocess, sys\nsubprocess.run([sys.executable, "-c", {spin!r}])\n{spin}input()'
  child = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE)
  ends = time.monotonic() + 60
  while serving_load.processor_seconds(child.pid) < 0.55:
    assert time.monotonic() < ends, 'those of a child that has ended are missing'
    time.sleep(0.05)
  child.communicate(b'\n')
  assert serving_load.processor_seconds(child.pid) == 0
  assert serving_load.processor_seconds(os.getpid()) >= time.process_time() - 0.1


def test_the_table_and_the_picture_are_of_the_better_run(capsys, tmp_path):
  to = tmp_path / 'serving.svg'
  options = serving.parser().parse_args(['--clients=2', '--workdir=w', f'--picture={to}'])
  each = serving_load.summary([Seen(0.0, [1.0, 2.0], 4)], 2.0, 0.4)

  def run(cpu):
    loads = {str(share): each for share in Work.shares}
    return {'closed': {'2': each | {'cpu_ms_per_token': cpu}}, 'poisson': loads}

  bare = {'offline': {'tokens_per_second': 4.0, 'cpu_ms_per_token': 1.0}}
  found = serving.show(
    options, {'tandem': [run(3.0), run(2.0)], 'vllm': [run(4.0)], 'offline': [bare]}
  )
  said = capsys.readouterr().out
  assert found['best']['closed 2']['tandem']['cpu_ms_per_token'] == 2.0
  assert '2 clients: 50% of its tokens/s' in said and 'w: 2 clients' in said
  assert serving.missing('vllm', serving.parser().parse_args(['--vllm=no-such'])) == (
    'no-such is not installed; give --vllm=PATH'
  )
  serving.picture(options, found)
  drawn = to.read_text()
  assert all(side in drawn for side in ('Tandem, serve.py', 'vLLM')) and '<svg' in drawn
  inside = {'own_share': 0.02, 'sharing': dict(tokens=1024, new=0.5, read_before=0.1, times=5.0)}
  assert serving.inside_said(inside).endswith('were read before: 100 ms, otherwise 500 (5.0x)')


def test_a_side_that_fails_loses_itself_alone(monkeypatch, tmp_path, capsys):
  load = dict.fromkeys((name for name, _ in serving.COLUMNS.values()), 1.0)
  load |= {'failed': 0, 'requests': 1}

  def in_process(module, *flags, environment):
    if '--run=vllm' in flags:
      raise RuntimeError('vllm did not become ready')
    return {'closed': {'1': load}, 'rate': 2.0}

  monkeypatch.setattr(serving.train_step, 'in_process', in_process)
  monkeypatch.setattr('sys.argv', ['serving'])
  path = tmp_path / 'serving.json'
  flags = ['--runs=2', '--clients=1', '--shares=', f'--json={path}']
  options = serving.parser().parse_args(flags)
  runs = serving.measured(options, ['tandem', 'vllm'], 'somewhere')
  assert json.loads(path.read_text())['results']['runs'] == runs, 'kept before the end'
  found = serving.show(options, runs)
  assert found['best'] == {'closed 1': {'tandem': load}} and found['runs'] == runs
  assert runs['vllm'] == [{'error': 'vllm did not become ready'}] * 2
  assert 'Tandem, serve.py' in capsys.readouterr().out
