"""Is what is held out never asked in training, whatever the format of a record and its answer?"""

import json

import pytest

from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from data.judged import JudgedSettings
from data.preferences import ChoiceSettings
from data.prompts import prepare as prepare_prompts
from data.records import (
  ChatRecord,
  JudgedRecord,
  LabelRecord,
  PairRecord,
  PreferenceRecord,
  PromptRecord,
  TextRecord,
)
from data.splits import question, share_of

SYSTEM = {'role': 'system', 'content': 'Be brief.'}
HI = {'role': 'user', 'content': 'Hi'}


def answer(text):
  return {'role': 'assistant', 'content': text}


def chat(*messages, given=0, tools=None):
  return ChatRecord([*messages], tools, given)


def test_the_same_text_is_the_same_question_in_every_format():
  asked = {
    question(record)
    for record in (
      TextRecord('Hi', 'a'),
      TextRecord('Hi', 'b'),
      PairRecord('Hi', 'c'),
      LabelRecord('Hi', 'd'),
      PreferenceRecord(TextRecord('Hi', 'e'), TextRecord('Hi', 'f')),
      JudgedRecord(TextRecord('Hi', 'g'), True),
      PromptRecord('Hi', None, {'prompt': 'Hi', 'truth': 'h'}),
    )
  }
  assert asked == {b'Hi'}
  assert question(TextRecord('Hi ', 'a')) != b'Hi'
  assert question(TextRecord('\ud800', 'a'))  # what is wrong with it is told elsewhere


def test_the_same_messages_are_the_same_question_in_every_format():
  expected = question(chat(SYSTEM, HI, answer('a')))
  for record in (
    chat(SYSTEM, HI, answer('b'), HI, answer('c')),
    chat(SYSTEM, HI, answer('d') | {'tool_calls': None}, given=2),
    chat(SYSTEM, HI | {'name': None}, answer('a')),
    PreferenceRecord(chat(SYSTEM, HI, answer('e'), given=2), chat(SYSTEM, HI, given=2)),
    JudgedRecord(chat(SYSTEM, HI, answer('f'), given=2), False),
    PromptRecord([SYSTEM, HI], None, {'prompt': [SYSTEM, HI], 'truth': 1}),
  ):
    assert question(record) == expected
  for other in (
    chat(HI, answer('a')),
    chat(SYSTEM, HI, answer('a'), tools=[{'name': 'f'}]),
    chat(SYSTEM, HI, answer('a'), HI, answer('b'), given=4),
  ):
    assert question(other) != expected


@pytest.mark.parametrize(
  'one, other',
  [
    (TextRecord('', 'a'), TextRecord('', 'b')),
    (chat(SYSTEM, answer('a')), chat(SYSTEM, answer('b'))),
    (chat(answer('Yes?'), HI, answer('a')), chat(answer('Yes?'), HI | {'content': 'Ho'})),
    (chat(SYSTEM, answer('a'), given=1), chat(SYSTEM, answer('b'), given=1)),
    (PromptRecord('', None, {'truth': 1}), PromptRecord('', None, {'truth': 2})),
  ],
)
def test_records_that_begin_with_no_question_are_not_all_one(one, other):
  assert question(one) != question(other)


def test_shares_are_of_all_hashes():
  shares = [share_of(b'%d' % i) for i in range(2000)]
  assert all(0 <= share < 1 for share in shares)
  assert sum(share < 0.25 for share in shares) == pytest.approx(500, abs=5 * (2000 * 3 / 16) ** 0.5)
  # Of what `b2sum -l 128` says of abc, cf4ab791c62b8d2b..: another hash would move every record.
  assert share_of(b'abc') == 0x2B8D2BC691B74ACF / 2**64


@pytest.mark.parametrize('settings', [ChoiceSettings(), JudgedSettings()], ids=['two', 'judged'])
def test_answers_to_one_prompt_are_on_one_side(tmp_path, settings):
  from data.examples import prepare

  path = tmp_path / 'a.jsonl'
  rows = [
    {'prompt': f'{i // 4:03}?', 'chosen': f'{i}+', 'rejected': f'{i}-', 'completion': f'{i}'}
    for i in range(160)
  ]
  path.write_text(''.join(json.dumps(row | {'label': True}) + '\n' for row in rows))
  prepared = prepare(_config(tmp_path, settings.formats[0]), settings, lambda line: None)

  def asked(split):
    return {prepared.tokenizer.decode(ids).partition('?')[0] for ids in split.documents()}

  held_out = asked(prepared.validation)
  assert 1 < len(held_out) < 25 and not held_out & asked(prepared.train[0])


def test_prompts_of_one_text_are_on_one_side(tmp_path):
  path = tmp_path / 'a.jsonl'
  rows = [{'prompt': f'{i // 4:03}?', 'truth': i} for i in range(160)]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  read = prepare_prompts(_config(tmp_path, 'prompt'), '', 20, 1, lambda line: None)
  held_out = {prompt.text for prompt in read.validation}
  assert 1 < len(held_out) < 25 and len(read.train) + len(read.validation) == 160
  assert not held_out & {prompt.text for prompt in read.train}


def _config(tmp_path, format):
  return DataConfig(
    sources=(SourceConfig(kind='jsonl', path=str(tmp_path / 'a.jsonl'), format=format),),
    clean=CleanConfig(anonymise=(), near_duplicates=0),
    tokenizer=TokenizerConfig(kind='byte'),
    sequence_length=64,
    batch_size=2,
    validation_fraction=0.2,
    cache_dir=str(tmp_path / 'cache'),
  )
