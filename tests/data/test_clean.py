"""Cleaning: what is masked, what is left alone, what is dropped, and that counts tell."""

import concurrent.futures
import multiprocessing.spawn
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from data import clean, duplicates, filters, processes
from data.config import ANONYMISED_KINDS, CleanConfig


@pytest.mark.parametrize(
  'text, masked, counts',
  [
    ('mail ann.lee+x@mail.example.org now', 'mail <EMAIL> now', {'email': 1}),
    ('a@b.co, c@d.co', '<EMAIL>, <EMAIL>', {'email': 2}),
    ('from 192.168.0.1 to 10.0.0.255.', 'from <IP> to <IP>.', {'ip': 2}),
    ('at fe80::1 and 2001:db8::8a2e:370:7334', 'at <IP> and <IP>', {'ip': 2}),
    ('call +44 20 7946 0958 or (555) 010-9999', 'call <PHONE> or <PHONE>', {'phone': 2}),
    ('call 555-010-9999 or +35236450123', 'call <PHONE> or <PHONE>', {'phone': 2}),
    ('card 4111 1111 1111 1111, id 123456789', 'card <DIGITS>, id <DIGITS>', {'digits': 2}),
  ],
)
def test_personal_data_is_masked_and_counted(text, masked, counts):
  assert clean.anonymise(text, ANONYMISED_KINDS) == (masked, counts)


@pytest.mark.parametrize(
  'text',
  [
    '@functools.cache\ndef f(x): return x[1::2] + y[::3]',
    'pi = 3.14159265358979',
    'version 1.2.3',
    '999.999.999.999',
    '2024-01-31 12:30:45',
    'range(10000000)',
    'abc1234567890',
    '0x1234567890ab',
    'a @ b',
    '1_000_000_000',
    'x - 12 - 345',
  ],
)
def test_ordinary_text_is_left_alone(text):
  assert clean.anonymise(text, ANONYMISED_KINDS) == (text, {})


def test_only_the_kinds_asked_for():
  text = 'a@b.co 10.0.0.1 123456789'
  assert clean.anonymise(text, ('ip',)) == ('a@b.co <IP> 123456789', {'ip': 1})
  assert clean.anonymise(text, ()) == (text, {})


@given(st.text(st.sampled_from('0123456789abf@.:+-() <IP>\n'), max_size=60))
@settings(max_examples=300, deadline=None)
def test_anonymising_twice_changes_nothing_more(text):
  once, _ = clean.anonymise(text, ('email', 'ip'))
  assert clean.anonymise(once, ('email', 'ip')) == (once, {})


def test_surrogates_are_repaired_and_counted_and_empty_is_dropped():
  cleaned = clean.clean('a\ud800b', CleanConfig())
  assert cleaned.text == 'a\ufffdb' and cleaned.counts == {'repaired': 1}
  assert clean.clean(' \n', CleanConfig()).dropped == 'empty'


def test_digest_ignores_case_and_whitespace_only():
  def digest(text):
    return clean.clean(text, CleanConfig()).digest

  assert digest('Two  words\n') == digest('two words') != digest('two word s')


PROSE = (
  'The keeper of the lighthouse had counted ships for thirty years, and that morning there were '
  'none to be seen. He wrote the number in his book anyway. A storm was coming from the west, slow '
  'and grey as an old sheep, with all the patience of weather. His daughter asked why he counted '
  'what was not there. Because somebody will want to know that nothing happened, he said, and '
  'closed the book with great care. Outside, gulls walked about on the wet rocks like clerks who '
  'have lost their office keys again.'
)

BROKEN = {
  'word_count': 'The end of that.',
  'word_length': ' '.join(f'{a} {b} the of' for a in 'abcdefg' for b in 'hijklmn') + '.',
  'symbols': PROSE.replace('. ', '... ') + ' #' * 9,
  'bullets': '\n'.join(
    f'- the item and number {i} of that long list, which goes on and on.' for i in range(10)
  ),
  'letters': PROSE + ' 12345' * 60,
  'stop_words': ' '.join(f'word{chr(97 + i % 26)}{chr(97 + i // 26)}' for i in range(60)) + '.',
  'placeholder_text': PROSE + ' Lorem ipsum dolor.',
  'line_ends': PROSE.replace('.', ''),
  'short_lines': '\n'.join(' '.join(PROSE.split()[i : i + 4]) + '.' for i in range(0, 90, 4)),
  'repeated_lines': '\n'.join([PROSE] * 2),
  'repeated_ngrams': PROSE + ' ' + ' '.join(['and that of the very old king'] * 12) + '.',
}


def test_prose_passes_and_each_rule_drops_what_breaks_it():
  config = CleanConfig(filters='prose')
  assert clean.clean(PROSE, config).dropped == ''
  assert set(BROKEN) == set(filters.FILTERS['prose'])
  for rule, text in BROKEN.items():
    assert clean.clean(text, config).dropped == rule


def test_code_survives_the_code_preset_but_not_long_lines_or_symbols():
  config = CleanConfig(filters='code')
  assert clean.clean('def f(x):\n  return {x: [x] for _ in ()}\n', config).dropped == ''
  assert clean.clean('x = 1\n' * 50 + 'a' * 1001, config).dropped == 'line_length'
  assert clean.clean('x = 1  # long\n' + ('y' * 150 + '\n') * 9, config).dropped == 'line_length'
  assert clean.clean('{}[]()!@#$%^&*' * 5, config).dropped == 'alphanumeric'


def words(rng, n):
  return [b'%d' % i for i in rng.integers(0, 10**6, n)]


def test_minhash_estimates_jaccard():
  rng = np.random.default_rng(0)
  one = words(rng, 400)
  other = one[:300] + words(rng, 100)
  shingles = [{tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in (one, other)]
  exact = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
  estimate = (duplicates.minhash(one) == duplicates.minhash(other)).mean()
  assert abs(estimate - exact) < 0.15  # three standard deviations of a mean of 112
  assert (duplicates.minhash(one) == duplicates.minhash(list(one))).all()
  assert (
    duplicates.minhash(one) == duplicates.minhash(sorted(one))
  ).mean() < 0.1  # the same words in another order


def test_near_duplicates_keep_the_first_of_each_cluster():
  rng = np.random.default_rng(1)
  base = [words(rng, 300) for _ in range(4)]
  near = [text[:145] + [b'changed'] + text[146:] for text in base]
  signatures = np.stack(
    [duplicates.minhash(text) for text in base[:2] + near[:2] + base[2:] + near[:1]]
  )
  assert duplicates.near_duplicates(signatures, 0.75).tolist() == [
    False,
    False,
    True,
    True,
    False,
    False,
    True,
  ]
  assert duplicates.near_duplicates(signatures[:1], 0.75).tolist() == [False]
  assert duplicates.near_duplicates(signatures, 1.0).tolist() == [False] * 6 + [True]


def test_workers_change_nothing():
  texts = [f'{PROSE} number {i}, write to a{i}@b.co' for i in range(40)]
  default, clean.CHUNK_CHARACTERS = clean.CHUNK_CHARACTERS, 3000
  try:
    parallel = list(clean.clean_all(iter(texts), CleanConfig(), workers=2))
  finally:
    clean.CHUNK_CHARACTERS = default
  alone = list(clean.clean_all(iter(texts), CleanConfig()))
  assert [(c.text, c.dropped, c.counts, c.digest, c.signature.tolist()) for c in parallel] == [
    (c.text, c.dropped, c.counts, c.digest, c.signature.tolist()) for c in alone
  ]


def simulated(rng, documents, similarity, shared):
  """Signatures of documents in random order, every second of which resembles the one before by
  about `similarity`; a share of them have a phrase in common, whose hash is the smallest in some of
  their places.
  """
  values = rng.integers(0, 2**32, (documents, duplicates.HASHES), np.uint32)
  phrase = rng.integers(0, 2**32, duplicates.HASHES, np.uint32)
  with_phrase = rng.random((documents, 1)) < shared
  values = np.where(with_phrase & (rng.random(values.shape) < 0.3), phrase, values)
  equal = rng.random((documents // 2, duplicates.HASHES)) < similarity
  values[1::2] = np.where(equal, values[::2], values[1::2])
  return values[rng.permutation(documents)]


# Of documents without and with a phrase in common, which fills the bands of many with one key.
@pytest.mark.costly
@pytest.mark.parametrize('threshold', [0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize('shared', [0.0, 0.9])
def test_of_all_pairs_at_the_threshold_nearly_all_are_found(threshold, shared, monkeypatch):
  rng = np.random.default_rng(0)
  signatures = simulated(rng, 1600, threshold, shared)
  alike = np.stack([(signatures == one).mean(axis=1) >= threshold for one in signatures])
  pairs = np.argwhere(np.triu(alike, 1))
  assert len(pairs) > 300
  for large in (duplicates.LARGE, 64):
    monkeypatch.setattr(duplicates, 'LARGE', large)
    dropped = duplicates.near_duplicates(signatures, threshold)
    # A pair that was found keeps its first at most, and nothing is dropped that resembles nothing.
    recall = dropped[pairs[:, 1]].mean()
    assert recall >= 0.99 and not dropped[~np.isin(np.arange(1600), pairs[:, 1])].any()


def test_no_third_document_stands_between_two_that_are_alike():
  rng = np.random.default_rng(0)
  number, values = duplicates.bands(0.75)
  first, other = rng.integers(0, 2**32, (2, duplicates.HASHES), np.uint32)
  near = np.append(first[:-10], other[-10:])
  for copies in (1, 2 * duplicates.SMALL):
    # In every band others stand between the two, which agree with both there and nowhere else.
    between = rng.integers(0, 2**32, (number, copies, duplicates.HASHES), np.uint32)
    for band in range(number):
      here = slice(band * values, (band + 1) * values)
      between[band, :, here] = first[here]
    signatures = np.stack([first, *between.reshape(-1, duplicates.HASHES), near])
    dropped = duplicates.near_duplicates(signatures, 0.75)
    assert np.flatnonzero(dropped).tolist() == [len(dropped) - 1]


def test_bands_meet_in_nearly_all_pairs_at_the_threshold():
  for threshold in np.linspace(0.5, 1, 51):
    number, values = duplicates.bands(threshold)
    assert number * values <= duplicates.HASHES
    assert 1 - (1 - threshold**values) ** number >= 0.99
  assert duplicates.bands(0.75) == (22, 5) and duplicates.bands(1.0) == (1, 112)


def test_workers_begin_without_what_their_parent_was_started_by(monkeypatch):
  """Otherwise a script that prepares at its top level runs anew in each, and waits for itself."""
  begun = []

  class Pool(concurrent.futures.ThreadPoolExecutor):
    def __init__(self, workers, context):
      super().__init__(workers)

    def submit(self, *arguments):
      begun.append(multiprocessing.spawn.get_preparation_data('x'))
      return super().submit(*arguments)

  monkeypatch.setattr(concurrent.futures, 'ProcessPoolExecutor', Pool)
  monkeypatch.setattr(clean, 'CHUNK_CHARACTERS', 10)
  main = sys.modules['__main__']
  monkeypatch.setattr(main, '__file__', '/a/script.py', raising=False)
  monkeypatch.setattr(main, '__spec__', None)
  assert 'init_main_from_path' in multiprocessing.spawn.get_preparation_data('x')
  texts = [f'some text {i}' for i in range(9)]
  assert [each.text for each in clean.clean_all(texts, CleanConfig(), workers=2)] == texts
  assert len(begun) == 9 and not any('init_main_from_path' in each for each in begun)
  assert sys.modules['__main__'] is main


@pytest.mark.slow
def test_a_script_may_prepare_at_its_top_level(tmp_path):
  script = tmp_path / 'script.py'
  script.write_text(f"""
import os
from data import prepare
from data.config import DataConfig, SourceConfig, TokenizerConfig
os.sched_getaffinity = lambda process: {0, 1}
prepare.PARALLEL_BYTES = 1
prepare.prepare(DataConfig(
  sources=(SourceConfig(kind='text', path={str(tmp_path / '*.txt')!r}),), split='tail',
  tokenizer=TokenizerConfig(kind='byte'), sequence_length=16, cache_dir={str(tmp_path / 'cache')!r},
))
print('prepared')
""")
  for i in range(4):
    (tmp_path / f'{i}.txt').write_text(' '.join(f'{i}{j}' for j in range(99)))
  outcome = subprocess.run(
    [sys.executable, str(script)],
    env=os.environ | {'PYTHONPATH': str(pathlib.Path(__file__).parents[2])},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert outcome.stdout.count('prepared\n') == 1, outcome.stderr


def test_processors_are_counted_where_the_system_does_not_say_which_may_be_used(monkeypatch):
  monkeypatch.delattr(os, 'sched_getaffinity', raising=False)
  monkeypatch.setattr(os, 'cpu_count', lambda: 3)
  assert processes.cpus() == 3
