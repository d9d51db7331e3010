"""Is prepared data a function of its key alone, whatever the process and the machine?"""

import json
import os
import random
import subprocess
import sys

import pytest

PROGRAM = """
import hashlib, json, os, pathlib, sys
cores, directory, cache = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
from data import prepare
from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
prepare.PARALLEL_BYTES = 0 if cores > 1 else 2**40
source = SourceConfig(kind='jsonl', path=f'{directory}/*.jsonl', text_field='text')
digests = {}
for algorithm in ('unigram', 'bpe'):
  prepared = prepare.prepare(DataConfig(
    sources=(source,),
    clean=CleanConfig(filters='prose'),
    tokenizer=TokenizerConfig(vocabulary=600, algorithm=algorithm),
    sequence_length=32, validation_fraction=0.3, cache_dir=cache,
  ), log=lambda line: None)
  for file in sorted(pathlib.Path(cache, prepared.key.split('-')[0]).rglob('*')):
    if file.is_file():
      digests[str(file.relative_to(cache))] = hashlib.sha256(file.read_bytes()).hexdigest()
  digests[algorithm] = prepared.report['sources'][0]['dropped']
print(json.dumps(digests))
"""


def documents(count):
  """Prose in which two pairs of words are the most frequent ones, as often as each other; the rule
  against repetition drops a document for the longer pair, and keeps it for the shorter.
  """
  rng = random.Random(0)
  vowels, consonants = 'aeiou', 'bcdfglmnprst'

  def word():
    return ''.join(
      rng.choice(letters) for _ in range(rng.randrange(1, 4)) for letters in (consonants, vowels)
    )

  for _ in range(count):
    pairs = ['the extraordinarily', 'to be'] * 5
    rng.shuffle(pairs)
    yield ' '.join(f'{pair} {word()} {word()} and {word()}.' for pair in pairs)


@pytest.mark.slow
def test_other_hash_seeds_core_counts_and_locales_prepare_the_same_bytes(tmp_path):
  lines = [json.dumps({'text': text}) for text in documents(120)]
  # Names whose order and characters depend on the locale, and one that is no UTF-8.
  for i, name in enumerate(
    ('é.jsonl'.encode(), b'\xff.jsonl', b'z.jsonl', '\uffe6.jsonl'.encode())
  ):
    with open(os.fsencode(tmp_path) + b'/' + name, 'w') as file:
      file.write('\n'.join(lines[i::4]))

  def prepared(name, cores, **environment):
    outcome = subprocess.run(
      [sys.executable, '-c', PROGRAM, str(cores), str(tmp_path), str(tmp_path / name)],
      env=os.environ | environment,
      capture_output=True,
      text=True,
      check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(outcome.stdout)

  first = prepared(
    'one', 1, PYTHONHASHSEED='1', LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0'
  )
  other = prepared('two', 7, PYTHONHASHSEED='2', LC_ALL='C.utf8')
  assert 10 < first['unigram']['repeated_ngrams'] < 110
  assert len(first) > 20 and first == other
