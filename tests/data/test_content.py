"""Do a person's own words and labels drop what they name, and show nothing of it?"""

import json
import random
import subprocess
import sys

import numpy as np
import pytest

from data import content, labels
from data.clean import clean
from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from data.prepare import corpus_key, prepare

GOOD, BAD = 'apple bread cloud dance early field'.split(), 'grime hateful insult jeer'.split()


def labelled(count):
  rng = random.Random(0)
  for _ in range(count):
    label = rng.random() < 0.3
    yield ' '.join(rng.choices(GOOD, k=20) + rng.choices(BAD if label else GOOD, k=6)), label


def test_listed_words_are_whole_words_of_any_case(tmp_path):
  (tmp_path / 'words').write_text('# a comment\nBad\ntwo  words\n\nc++\n')
  config = CleanConfig(word_list=str(tmp_path / 'words'))
  for text, dropped in {
    'this is BAD.': 'word_list',
    'badly done': '',
    'Two\nwords here': 'word_list',
    'two of words': '',
    'a comment': '',
  }.items():
    assert clean(text, config).dropped == dropped
  (tmp_path / 'none').write_text('# nothing\n')
  with pytest.raises(ValueError, match='no word in it'):
    clean('a', CleanConfig(word_list=str(tmp_path / 'none')))


def test_a_classifier_learns_the_labels_and_measures_on_lines_it_has_not_seen(tmp_path):
  lines = [json.dumps({'text': text, 'label': label}) for text, label in labelled(300)]
  (tmp_path / 'in.jsonl').write_text('\n'.join(lines))
  command = [sys.executable, '-m', 'data.labels', f'--labelled={tmp_path}/in.jsonl']
  said = subprocess.run(
    [*command, f'--output={tmp_path}/filter.npz'], capture_output=True, text=True, check=True
  ).stdout
  assert 'on 60 lines held out of 300: every 5th, from 5 to 300' in said
  file, report = labels.train(list(labelled(300)))
  assert (tmp_path / 'filter.npz').read_bytes() == file
  assert report['precision'] >= 0.95 and report['recall'] >= 0.95
  config = CleanConfig(classifier=str(tmp_path / 'filter.npz'))
  assert clean(' '.join(GOOD * 4), config).dropped == ''
  assert clean(' '.join(GOOD * 4 + BAD * 2), config).dropped == 'classifier'

  (tmp_path / 'a.jsonl').write_text(
    '\n'.join(json.dumps({'text': f'{i} {text}'}) for i, (text, _) in enumerate(labelled(100)))
  )
  base = DataConfig(
    sources=(SourceConfig(kind='jsonl', path=f'{tmp_path}/a.jsonl', text_field='text'),),
    clean=config,
    tokenizer=TokenizerConfig(kind='byte'),
    validation_fraction=0.3,
    cache_dir=str(tmp_path / 'cache'),
  )
  spoken = []
  prepared = prepare(base, log=spoken.append)
  bad = sum(label for _, label in labelled(100))
  assert abs(prepared.report['sources'][0]['dropped']['classifier'] - bad) <= 3
  assert not any(word in ''.join(spoken) + json.dumps(prepared.report) for word in BAD)
  key = corpus_key(base)
  (tmp_path / 'filter.npz').write_bytes(labels.train(list(labelled(200)))[0])
  assert corpus_key(base) != key  # by what is in the file, not by its name


@pytest.mark.parametrize('line', ['{"text": 1, "label": true}', '{"text": "a"}', '[', '7'])
def test_labelled_lines_of_another_form_are_named(tmp_path, line):
  (tmp_path / 'a.jsonl').write_text('{"text": "a", "label": 0}\n' + line)
  with pytest.raises(ValueError, match='a.jsonl:2'):
    list(labels.read_labelled(str(tmp_path / 'a.jsonl')))


def test_files_that_cannot_be_read_or_written_end_the_command_in_a_line(tmp_path, monkeypatch):
  (tmp_path / 'one.jsonl').write_text('{"text": "a", "label": 0}')
  for given, output, said in (
    ('missing.jsonl', 'a.npz', 'error: .*missing.jsonl: .*give a file of UTF-8 text'),
    ('one.jsonl', 'a.npz', 'error: .*both labels are needed'),
    ('one.jsonl', '', 'error: .*a directory is where a file should be'),
  ):
    arguments = ['labels', f'--labelled={tmp_path / given}', f'--output={tmp_path / output}']
    monkeypatch.setattr(sys, 'argv', arguments)
    with pytest.raises(SystemExit, match=said):
      labels.main()


def test_words_of_scripts_without_spaces_are_met_within_text(tmp_path):
  (tmp_path / 'words').write_text('毒品\nยาบ้า\nドラッグ bad\n')
  has = content.listed(str(tmp_path / 'words'))
  assert has('我卖毒品。') and has('ขายยาบ้าที่') and has('xドラッグ Bad')
  assert not has('毒的品') and not has('品毒') and not has('ドラッグ badly')


def test_phrases_that_begin_alike_are_told_apart(tmp_path):
  words = '\n'.join(
    ['new york', 'new york city', 'new deal now', *(f'w{i}' for i in range(20_000))]
  )
  (tmp_path / 'words').write_text(words)
  has = content.listed(str(tmp_path / 'words'))
  assert has('in New  York') and has('a new deal now') and has('x w19999') and has('new new york')
  assert not has('a new deal') and not has('york new') and not has('w20000 new')


def test_what_is_no_classifier_or_has_one_label_is_refused(tmp_path):
  (tmp_path / 'a.npz').write_bytes(b'no')
  with pytest.raises(ValueError, match='is no file of python -m data.labels'):
    content.classifier(str(tmp_path / 'a.npz'))
  # Also a file that was copied in part.
  whole = tmp_path / 'b.npz'
  np.savez_compressed(whole, weights=np.zeros(content.BUCKETS), bias=0.0)
  for cut in (9, 100, whole.stat().st_size - 9):
    (tmp_path / 'c.npz').write_bytes(whole.read_bytes()[:cut])
    with pytest.raises(ValueError, match='is no file of python -m data.labels'):
      content.classifier(str(tmp_path / 'c.npz'))
  with pytest.raises(ValueError, match='both labels are needed'):
    labels.train([('a', True)] * 20)
  with pytest.raises(ValueError, match='classifier_threshold=1.5'):
    CleanConfig(classifier_threshold=1.5)
