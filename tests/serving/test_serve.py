"""Does the command serve a run that is there, from its start to its end, and refuse flags that make
no sense?
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import jax
import pytest

from data.config import TokenizerConfig
from model import transformer
from tests.serving.test_http import joined
from tests.test_commands import ROOT, Process
from tests.training.conftest import tiny
from workdir.untrained import write_run

TEMPLATE = '{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}a:'
LONG = {'ignore_eos': True, 'max_tokens': 600, 'stream': True}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The directory of a model that nobody has trained, with a chat template."""
  import tokenizers as library

  directory = tmp_path_factory.mktemp('served') / 'toy'
  letters = sorted(library.pre_tokenizers.ByteLevel.alphabet())
  made = library.Tokenizer(library.models.BPE({each: i for i, each in enumerate(letters)}, []))
  made.pre_tokenizer = library.pre_tokenizers.ByteLevel(False)
  made.decoder = library.decoders.ByteLevel()
  made.add_special_tokens(['<end>'])
  (directory / 'tokenizer').mkdir(parents=True)
  made.save(str(directory / 'tokenizer' / 'tokenizer.json'))
  settings = {'eos_token': '<end>', 'chat_template': TEMPLATE}
  (directory / 'tokenizer' / 'tokenizer_config.json').write_text(json.dumps(settings))
  config = tiny(model={'max_length': 1024}, data={'cache_dir': str(directory.parent / 'cache')})
  tokenizer = TokenizerConfig(kind='huggingface', path=str(directory / 'tokenizer'))
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))
  model = jax.jit(transformer.init, static_argnums=(0, 1))(config.model, 0)
  write_run(directory, config, {'model': model}, print)
  return directory


def said(process: Process) -> str:
  return pathlib.Path(f'{process.path}.error').read_text()


@contextlib.contextmanager
def serving(run, *flags):
  """The process, and its address, from its first moment on."""
  process = Process(run.parent, 'serve.py', f'--workdir={run}', '--port=0', '--rows=2', *flags)
  try:
    assert process.until(lambda: 'http://' in said(process)), said(process)
    yield process, re.search(r'http://\S+(?=/)', said(process))[0]
  finally:
    process.process.kill()
    process.process.wait()


def asked(address, path, values=None):
  """What the server answers, to be read; values: of a request that has some."""
  body = None if values is None else json.dumps(values).encode()
  request = urllib.request.Request(f'{address}{path}', body, {'Content-Type': 'application/json'})
  opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  return opener.open(request, timeout=120)


def health(address):
  """The status of /health; 0 while nobody listens."""
  time.sleep(0.05)  # of two processors it needs both to compile
  try:
    return asked(address, '/health').status
  except urllib.error.HTTPError as error:
    return error.code
  except urllib.error.URLError:
    return 0


@pytest.mark.slow
def test_a_run_is_served_from_its_start_to_the_end_of_the_last_stream(run):
  with serving(run) as (process, address):
    assert process.until(lambda: health(address) == 200), said(process)
    (card,) = json.load(asked(address, '/v1/models'))['data']
    assert (card['id'], card['max_model_len']) == ('toy', 1024)
    chat = {'messages': [{'role': 'user', 'content': 'hello'}], 'max_tokens': 5, 'seed': 3}
    answers = [json.load(asked(address, '/v1/chat/completions', chat)) for _ in range(2)]
    assert answers[0]['usage']['completion_tokens'] == 5
    assert answers[0]['choices'] == answers[1]['choices']

    with asked(address, '/v1/completions', LONG | {'prompt': 'a'}) as stream:
      first = stream.readline()
      process.process.send_signal(signal.SIGTERM)
      lines = (first + stream.read()).decode().splitlines()
    events = [line[6:] for line in lines if line.startswith('data: ')]
    assert events[-1] == '[DONE]'
    (choice,) = joined(map(json.loads, events[:-1]), chat=False).values()
    assert choice['finish'] == 'length'
    done = process.end()
  assert done.code == 0, done.error
  assert 'texts that are not at their end: 1' in done.error and done.error.endswith('ended\n')
  assert not done.out and 'Traceback' not in done.error
  log = [json.loads(line) for line in done.error.splitlines() if line.startswith('{')]
  assert log[-1]['completion_tokens'] == 600 and log[-1]['status'] == 200


@pytest.mark.slow
def test_a_signal_while_it_compiles_ends_it_with_0(run):
  with serving(run) as (process, address):
    assert process.until(lambda: health(address) == 503), said(process)
    process.process.send_signal(signal.SIGTERM)
    done = process.end()
  assert done.code == 0 and done.error.endswith('ended\n'), done.error


# Imports the command once, for flags of its name can be defined once in a process.
CASES = """
import contextlib, io, json, sys
from types import SimpleNamespace as Of
from absl import flags
from absl.testing import flagsaver
import serve

def tried(given):
  flags.FLAGS(['serve.py', *given['flags']])
  if given.get('sagemaker'):
    serve.as_sagemaker()
  serve.check_flags(given.get('sagemaker', False))
  config = Of(causal=given.get('causal', True), max_length=64)
  tokenizer = Of(generation={'do_sample': True, 'top_k': 7, 'max_new_tokens': 9, 'watermark': 1})
  generator = Of(model=Of(config=config), tokenizer=tokenizer)
  return {
    'defaults': serve.defaults_of(generator),
    'options': serve.options_of(generator),
    'hosts': sorted(serve.known_hosts()),
    'values': {name: flags.FLAGS[name].value for name in ('workdir', 'port', 'host')},
  }

done = []
for given in json.loads(sys.argv[1]):
  heard = io.StringIO()
  with flagsaver.flagsaver(), contextlib.redirect_stderr(heard):
    try:
      result = tried(given)
    except ValueError as error:
      result = {'error': str(error)}
  done.append(result | {'said': heard.getvalue()})
print(json.dumps(done))
"""
W = '--workdir=runs/chat'
GIVEN = [
  dict(flags=[W]),
  dict(flags=[]),
  dict(flags=[W, '--log_prompts', '--noaccess_log']),
  dict(flags=[W, '--draft_tokens=3']),
  dict(flags=[W, '--host=0.0.0.0']),
  dict(flags=[W, '--host=0.0.0.0', '--api_keys=keys', '--hosts=a.example']),
  dict(flags=[W, '--hosts=*']),
  dict(flags=[], sagemaker=True),
  dict(flags=['--workdir=x', '--port=9'], sagemaker=True),
  dict(flags=[W, '--defaults=model']),
  dict(flags=[W, '--defaults=model', '--default_max_tokens=5']),
  dict(flags=[W, '--default_max_tokens=5', '--rows=3', '--lookup=2', '--draft_tokens=5']),
  dict(flags=[W, '--max_model_len=65']),
  dict(flags=[W], causal=False),
  dict(flags=[W, '--rows=4'], causal=False),
]


def test_flags_are_judged_before_anything_takes_time():
  done = subprocess.run(
    [sys.executable, '-c', CASES, json.dumps(GIVEN)], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  results = iter(json.loads(done.stdout))

  plain = next(results)
  assert plain['defaults'] == {} and plain['options'] == {'scores': False, 'pooling': ''}
  assert plain['values'] == {'workdir': 'runs/chat', 'port': 8000, 'host': '127.0.0.1'}
  assert {'127.0.0.1', 'localhost', '::1'} == set(plain['hosts']) and not plain['said']
  for error in ('--workdir is missing', '--log_prompts with', '--draft_tokens=3', '--api_keys is'):
    assert error in next(results)['error']
  others, any_host, container, elsewhere, model, both, more = (next(results) for _ in range(7))
  assert 'a.example' in others['hosts'] and '0.0.0.0' in others['hosts'] and not others['said']
  assert 'NOTE: --hosts=* without --api_keys' in any_host['said']
  expected = {'workdir': '/opt/ml/model', 'port': 8080, 'host': '0.0.0.0'}
  assert container['values'] == expected and '*' in container['hosts'] and not container['said']
  assert elsewhere['values'] == expected | {'workdir': 'x', 'port': 9}
  assert model['defaults'] == {'top_k': 7, 'max_new_tokens': 9}
  assert 'not taken: watermark=1' in model['said'] and 'top_k=7' in model['said']
  assert both['defaults'] == {'top_k': 7, 'max_new_tokens': 5}
  assert more['defaults'] == {'max_new_tokens': 5}
  sizes = {'rows': 3, 'lookup': 2, 'draft_tokens': 5}
  assert more['options'] == sizes | {'scores': False, 'pooling': ''}
  assert '--max_model_len=65 passes model.max_length=64' in next(results)['error']
  assert next(results)['options'] == {'scores': False, 'pooling': 'mean'}
  assert '--rows: the model is an encoder' in next(results)['error']
