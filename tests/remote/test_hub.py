"""Does what lies on the hub come here, and is it said what to do where it does not?"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import files
from data import sources, tokenizers
from remote import hub
from tests.goldens import ours
from tests.model.test_model_checkpoint import LLAMA, write_tokenizer
from tests.remote.hub import Hub
from training import config as configs

ROOT = pathlib.Path(__file__).parents[2]
READ = """
import sys
from data import sources
from data.config import SourceConfig
source = SourceConfig(kind='jsonl', path=sys.argv[1], text_field='text')
print(sorted(sources.documents(source, sources.Problems())))
"""


@pytest.fixture
def served(tmp_path):
  made = Hub(tmp_path / 'hub')
  yield made
  made.shutdown()


def asking(url: str, home: pathlib.Path) -> dict:
  """The environment of a process that asks a hub; its library reads it when it is imported."""
  return os.environ | {
    'HF_ENDPOINT': url,
    'HF_HOME': str(home),
    'HF_HUB_DISABLE_XET': '1',
    'HF_HUB_OFFLINE': '0',
    'HF_HUB_DOWNLOAD_TIMEOUT': '5',
    'JAX_PLATFORMS': 'cpu',
  }


def test_an_address_is_read_as_it_is_meant():
  assert hub.named('hf://org/name') == ('model', 'org/name', None, '')
  assert hub.named('hf://org/na-me.2@v1.0') == ('model', 'org/na-me.2', 'v1.0', '')
  assert hub.named('hf://datasets/org/name@main/data/**/*.parquet') == (
    'dataset',
    'org/name',
    'main',
    'data/**/*.parquet',
  )
  # pathlib takes one of the slashes away.
  assert hub.named('hf:/org/name') == hub.named('hf://org/name')
  for address in ('hf://org', 'hf://org/..', 'hf://', 'hf:///etc/passwd'):
    with pytest.raises(ValueError, match='names nothing on the hub; give hf://ORG/NAME'):
      hub.named(address)
  with pytest.raises(ValueError, match=r'names no files; give hf://datasets/ORG/NAME'):
    sources.found('hf://org/name/*.jsonl')


@pytest.mark.parametrize(
  'path, brought',
  [
    ('', ['tokenizer.json']),
    ('/tokenizer.json', ['tokenizer.json']),
    ('/onnx/tokenizer.json', ['onnx/tokenizer.json']),
    ('/onnx', ['onnx/tokenizer.json']),
    ('@main/nowhere', []),
  ],
)
def test_a_file_of_a_model_comes_from_wherever_it_lies(path, brought, monkeypatch, tmp_path):
  library = pytest.importorskip('huggingface_hub')
  there = ['tokenizer.json', 'onnx/tokenizer.json', 'onnx/model.onnx', 'model.safetensors']
  came = []

  def download(repository, *, revision, **only):
    came.extend(library.utils.filter_repo_objects(there, **only))
    return tmp_path

  monkeypatch.setattr(library, 'snapshot_download', download)
  place = hub.here(f'hf://org/name{path}')
  assert came == brought and place == tmp_path / path.removeprefix('@main').lstrip('/')


@pytest.mark.parametrize(
  'pattern, brought',
  [
    ('data/**/train-*.parquet', ['data/train-0.parquet', 'data/en/train-0.parquet']),
    ('data/**/a.jsonl', ['data/a.jsonl', 'data/x/a.jsonl', 'data/x/y/a.jsonl']),
    ('data/*/a.jsonl', ['data/x/a.jsonl']),
  ],
)
def test_all_files_that_a_pattern_matches_come(pattern, brought, monkeypatch, tmp_path):
  library = pytest.importorskip('huggingface_hub')
  there = [f'data/{name}/train-0.parquet' for name in ('en', '.')] + ['b.jsonl', 'data/b.jsonl']
  there = [*map(os.path.normpath, there), *(f'data/{x}a.jsonl' for x in ('', 'x/', 'x/y/'))]

  def download(repository, *, revision, repo_type, **only):
    for name in library.utils.filter_repo_objects(there, **only):
      (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / name).write_text('')
    return tmp_path

  monkeypatch.setattr(library, 'snapshot_download', download)
  found = sources.found(f'hf://datasets/org/name/{pattern}')
  assert sorted(found) == sorted(str(tmp_path / name) for name in brought)


def test_where_the_hub_is_not_read_it_is_said_where_it_is():
  for what in ('--workdir', 'config.init', 'data.cache_dir'):
    with pytest.raises(
      ValueError, match=f'{what}=hf://org/name.*convert.py import --from=hf://org'
    ):
      files.check_local(what, 'hf://org/name', buckets=True)
  files.check_local('data.sources[0].path', 'hf://datasets/org/name/*', buckets=True, hub=True)


@pytest.mark.slow
def test_files_of_a_dataset_are_a_source(served, tmp_path):
  """Those that match, once; and those that came, without a network."""
  root = served.root / 'datasets' / 'org' / 'name'
  for name, text in (('a', 'one'), ('deep/b', 'two'), ('deep/er/c', 'three')):
    path = root / 'data' / f'{name}.jsonl'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({'text': text}) + '\n')
  (root / 'data' / 'weights.bin').write_bytes(b'0')

  def read(pattern, url, home='home'):
    command = [sys.executable, '-c', READ, f'hf://datasets/org/name{pattern}']
    environment = asking(url, tmp_path / home)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

  done = read('/data/**/*.jsonl', served.url)
  assert done.stdout == "['one', 'three', 'two']\n", done.stderr
  assert sorted(served.seen) == ['a.jsonl', 'b.jsonl', 'c.jsonl']
  assert read('@main/data/deep/*.jsonl', served.url).stdout == "['two']\n"
  assert len(served.seen) == 3, 'what is here is not brought again'
  nobody = 'http://127.0.0.1:9'
  assert read('/data/**/*.jsonl', nobody).stdout == "['one', 'three', 'two']\n"
  done = read('/data/**/*.jsonl', nobody, 'another')
  assert 'FileNotFoundError: org/name is no directory here' in done.stderr
  assert 'bring the files into a directory, and give that' in done.stderr


@pytest.mark.slow
def test_a_model_of_the_hub_becomes_a_run(served, tmp_path):
  """And its tokenizer another run's; without weights where none are read."""
  root = served.root / 'models' / 'org' / 'name'
  root.parent.mkdir(parents=True)
  ours.build(LLAMA | {'vocab_size': 300}, root)
  write_tokenizer(root)
  (root / 'pytorch_model.bin').write_bytes(b'0')
  environment = asking(served.url, tmp_path / 'home')

  def command(*arguments):
    line = [sys.executable, *arguments]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

  load = "from data import tokenizers; print(tokenizers.load('hf://org/name').vocabulary)"
  vocabulary = int(command('-c', load))
  assert vocabulary == tokenizers.load(root).vocabulary
  assert not [name for name in served.seen if name.endswith(('.safetensors', '.bin'))]
  command('convert.py', 'import', '--from=hf://org/name@main', f'--workdir={tmp_path / "run"}')
  assert configs.load(tmp_path / 'run').model.width == LLAMA['hidden_size']
  assert 'model.safetensors' in served.seen and 'pytorch_model.bin' not in served.seen
