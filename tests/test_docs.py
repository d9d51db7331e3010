"""Can what the pages print be typed? README's and docs' commands name files and flags that exist,
with values that they take; every config is built. (Links: tests/test_docs_site.py.)
"""

import functools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([ROOT / 'README.md', *ROOT.glob('docs/*.md'), *ROOT.glob('*/README.md')])
# Files of prompts by which the pages ask a run that was tuned before, and not any one.
ON_TUNED = {'--prompts=mixed.jsonl', '--prompts=ask.jsonl'}
BY_ABSL = ('train.py', 'generate.py', 'evaluate.py', 'serve.py', 'plan.py')
# Reads the flags of each command line without running it, in a fork of its own because config
# flags read sys.argv once; prints what is wrong, a line each. Lines with a placeholder (FILE, ..)
# or a run that is not there are read for the names of their flags alone.
ABSL = '''
import importlib, json, os, re, sys
module = importlib.import_module(sys.argv[1])
from absl import flags
from training import overrides
def read(line):
  subcommands = getattr(module, 'SUBCOMMANDS', {})
  if line and line[0] in subcommands:
    own = importlib.import_module(subcommands[line[0]].rpartition('.')[0])
    own.parser().parse_args(line[1:])
    return
  if any('..' in part or re.search('(^|=)[A-Z][A-Z:_]*$|config.init', part) for part in line):
    for part in line:
      name = part.lstrip('-').partition('=')[0]
      if part.startswith('--') and not name.startswith('config.') and name not in flags.FLAGS:
        raise ValueError(f'{part}: no such flag')
    return
  sys.argv = [sys.argv[0], *line]
  flags.FLAGS(sys.argv)
  if 'config' in flags.FLAGS and flags.FLAGS.config is not None:
    overrides.from_flag(flags.FLAGS.config)
for line in json.loads(sys.argv[2]):
  if not (child := os.fork()):
    try:
      read(line)
    except (Exception, SystemExit) as error:
      print(line, error, flush=True)
    os._exit(0)
  os.waitpid(child, 0)
'''
ARGPARSE = '''
import argparse, contextlib, importlib, io, json, runpy, sys
class Parsed(Exception):
  pass
parse = argparse.ArgumentParser.parse_args
def parsed(self, *arguments):
  parse(self, *arguments)
  raise Parsed
argparse.ArgumentParser.parse_args = parsed
for name, line in json.loads(sys.argv[1]):
  sys.argv = [name, *line]
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
      module = importlib.import_module(name)
      if not hasattr(module, 'main'):
        runpy.run_module(name, run_name='__main__')  # takes no arguments, and only prints
        continue
      module.main()
    print(name, line, 'parsed nothing')
  except Parsed:
    pass
  except SystemExit:
    print(name, line, said.getvalue())
'''


@functools.cache
def commands() -> dict[str, list[list[str]]]:
  """Words of every command line that a page prints, indented, between backticks or in a block of no
  language, by its page.
  """
  lines = {}
  for page in PAGES:
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.M | re.S)
    fences = re.findall(r'^```(\w*)\n(.*?)^```', page.read_text(), re.M | re.S)
    fenced = '\n'.join(block for language, block in fences if not language)
    blocks = '\n'.join(re.findall(r'^ {4}(.*)$', text, re.M)).replace('\\\n', ' ').split('\n')
    blocks += re.findall(r'^python \w+\.py .*$', fenced.replace('\\\n', ' '), re.M)
    spans = [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', text)]
    typed = [
      line.partition(' > ')[0]
      for line in blocks + spans
      if re.match(r'(python|make|launch/\S+) \S', line)
    ]
    lines[str(page.relative_to(ROOT))] = [shlex.split(line, comments=True) for line in typed]
  return lines


def python_commands() -> list[tuple[str, list[str]]]:
  """(file or module, its arguments) of every `python ...`."""
  every = [words[1:] for lines in commands().values() for words in lines if words[0] == 'python']
  return [(w[1], w[2:]) if w[0] == '-m' else (w[0], w[1:]) for w in every]


def problems(*command: str) -> str:
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  done = subprocess.run(
    [sys.executable, '-c', *command], cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_pages_print_commands():
  assert {'README.md', 'docs/plans.md', 'docs/measured.md'} <= commands().keys()
  assert {'train.py', 'generate.py', 'plan.py', 'convert.py'} <= {
    name for name, _ in python_commands()
  }
  served = [words[2:] for words in commands()['docs/serve.md'] if words[1] == 'serve.py']
  assert ['--workdir=runs/chat', '--port=8000'] in served and len(served) > 5


def check_flags(name: str) -> None:
  lines = {tuple(line): None for file, line in python_commands() if file == name}
  assert lines
  module = {'data.prepare': 'data.preparing'}.get(name, name.removesuffix('.py'))
  said = problems(ABSL, module, json.dumps([*lines]))
  assert not said, said


def test_flags_of_training_are_known():
  check_flags('train.py')


@pytest.mark.slow
def test_flags_of_other_commands_are_known():
  for name in (*BY_ABSL[1:], 'data.prepare'):
    check_flags(name)


def test_arguments_of_benchmarks_and_convert_are_known():
  lines = [(name.removesuffix('.py'), line) for name, line in python_commands()]
  lines = [
    (name, line) for name, line in lines if f'{name}.py' not in BY_ABSL and name != 'data.prepare'
  ]
  for name, _ in lines:
    assert (ROOT / (name.replace('.', '/') + '.py')).exists(), name
  said = problems(ARGPARSE, json.dumps(lines))
  assert not said, said


@pytest.mark.slow
def test_a_wrong_flag_is_found():
  wrong = ['--config=configs/tiny.py', '--config.modle.width=64']
  assert 'modle' in problems(ABSL, 'train', json.dumps([wrong]))
  assert 'nosuch' in problems(ARGPARSE, json.dumps([('convert', ['--nosuch', 'import'])]))


def test_targets_and_scripts_exist():
  targets = set(re.findall(r'^([\w.-]+):', (ROOT / 'Makefile').read_text(), re.M))
  for page, lines in commands().items():
    for words in lines:
      if words[0] == 'make' and not words[1].startswith('.venv'):
        assert words[1] in targets, (page, words)
      if words[0].startswith('launch/'):
        assert (ROOT / words[0]).exists(), (page, words)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_are_python(page):
  for block in re.findall(r'^```python\n(.*?)^```', page.read_text(), re.M | re.S):
    code = compile(block, str(page), 'exec')
    if 'def get_config' in block:
      module = {}
      exec(code, module)
      module['get_config']()
