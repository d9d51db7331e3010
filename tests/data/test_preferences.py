"""Is a row of answers that are compared its records: both answers, whole, once, side by side, each
as supervised finetuning would have it?
"""

import dataclasses
import json

import numpy as np
import pytest
from templates import CHATML
from tokenizer_families import contents

from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from data.conversations import ExampleWriter
from data.huggingface import HuggingFaceTokenizer
from data.judged import mismatched
from data.preferences import ChoiceBatch, ChoiceWriter
from data.records import ChatRecord, PreferenceRecord, TextRecord, records
from data.tokenizers import build
from objectives.kto import KTO
from objectives.preference import Preference

T = 40
ASKED = [{'role': 'user', 'content': 'Hi'}]


def quiet(line):
  del line


def rows(count, seed=0):
  draw = np.random.default_rng(seed)
  return [
    {
      'prompt': f'{i:02}' + 'p' * int(a),
      'chosen': 'c' * int(b),
      'rejected': 'r' * int(c),
      'margin': i / 4,
    }
    for i, (a, b, c) in enumerate(draw.integers(1, 9, (count, 3)))
  ]


def config(tmp_path, given, **fields):
  path = tmp_path / f'{len(given)}.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in given))
  return DataConfig(
    **{
      'sources': (SourceConfig(kind='jsonl', path=str(path), format='preference'),),
      'clean': CleanConfig(anonymise=(), near_duplicates=0),
      'tokenizer': TokenizerConfig(kind='byte'),
      'sequence_length': T,
      'batch_size': 2,
      'validation_fraction': 0.2,
      'cache_dir': str(tmp_path / 'cache'),
      **fields,
    }
  )


def halves(source, length=T):
  """(inputs, targets, weights, margin) of each segment of each row, in order."""
  for row in range(len(source)):
    batch = ChoiceBatch.empty(1, length)
    source.fill(row, batch, 0)
    assert batch.segments.max() % 2 == 0 and (batch.weights[batch.segments == 0] == 0).all()
    for segment in range(1, batch.segments.max() + 1):
      at = np.flatnonzero(batch.segments[0] == segment)
      assert (batch.positions[0, at] == np.arange(len(at))).all() and (np.diff(at) == 1).all()
      (margin,) = {*batch.margins[0, at].tolist()}
      yield tuple(x[0, at] for x in (batch.tokens, batch.targets, batch.weights)) + (margin,)


def text(ids):
  return bytes(int(i) - 3 for i in ids if i > 2).decode()


def pairs(prepared, length=T):
  """(prompt, chosen, rejected, margin), decoded, of all rows."""
  for split in (*prepared.train, prepared.validation):
    each = list(halves(split, length))
    for (tokens, targets, weights, margin), other in zip(each[::2], each[1::2], strict=True):
      assert margin == other[3] and targets[-1] == 2  # eos, which is learned
      assert weights[-1] == other[2][-1] == 1 and {*weights} <= {0, 1}
      prompt, same = (
        text(tokens[: np.flatnonzero(weights)[0] + 1])
        for tokens, _, weights, _ in ((tokens, targets, weights, margin), other)
      )
      assert prompt == same
      yield prompt, text(targets[weights > 0]), text(other[1][other[2] > 0]), margin


@pytest.mark.parametrize('packed', ['fit', 'order', 'alone'])
def test_every_pair_is_in_one_row_once(tmp_path, packed):
  given = rows(60)
  prepared = Preference(packing=packed).read(config(tmp_path, given), quiet)
  assert sorted(pairs(prepared)) == sorted(
    tuple(row[name] for name in ('prompt', 'chosen', 'rejected', 'margin')) for row in given
  )
  trained = prepared.report['sources'][0]['train']['documents']
  assert (prepared.rows == trained) == (packed == 'alone')
  lengths = prepared.report['sources'][0]['lengths']
  assert {*lengths} == {'chosen tokens', 'rejected tokens'}


@pytest.mark.parametrize(
  'chosen', ['Hello.', [{'role': 'assistant', 'content': 'Hello.'}]], ids=['text', 'messages']
)
def test_answers_are_what_finetuning_makes_of_them(tmp_path, chosen):
  """Also where the record is of messages with a text behind them."""
  path = tmp_path / 'a.jsonl'
  path.write_text(json.dumps({'prompt': ASKED, 'chosen': chosen, 'rejected': 'No. Go away.'}))
  source = SourceConfig(kind='jsonl', path=str(path), format='preference')
  ((place, record),) = records(source)
  # The template writes a line's end behind the token that ends a turn, which is not learned.
  tokenizer = HuggingFaceTokenizer(contents('qwen') | {'chat_template.jinja': CHATML.encode()})
  choice = ChoiceWriter(tokenizer).example(place, record)
  for half, answer in zip(choice.halves, ('Hello.', 'No. Go away.'), strict=True):
    messages = [*ASKED, {'role': 'assistant', 'content': answer}]
    tuned = ExampleWriter(tokenizer).example('', ChatRecord(messages, given=1))
    n = len(half.ids)
    assert (tuned.ids[:n] == half.ids).all() and (tuned.scored[:n] == half.scored).all()
    # What follows the end of the turn is nothing that is learned, and is left out.
    assert not tuned.scored[n:].any() and len(tuned.ids) == n + 1 and half.scored[-1]


def test_a_text_behind_a_text_goes_on_with_it(tmp_path):
  record = PreferenceRecord(TextRecord('a', ' b'), TextRecord('a', ' c'), 2.0)
  tokenizer = build(TokenizerConfig(kind='byte'), (), ())
  choice = ChoiceWriter(tokenizer).example('', record)
  for half, side in zip(choice.halves, (record.chosen, record.rejected), strict=True):
    tuned = ExampleWriter(tokenizer).example('', side)
    assert (tuned.ids == half.ids).all() and (tuned.scored == half.scored).all()
  assert choice.notes == (5, 2)


@pytest.mark.parametrize('then', ['drop', 'left', 'right'])
def test_what_is_too_long_is_dropped_or_both_prompts_are_cut_alike(tmp_path, then):
  given = [
    {'prompt': 'a' * 20 + 'z' * 20, 'chosen': 'long', 'rejected': 'prompt'},
    {'prompt': 'p', 'chosen': 'c' * T, 'rejected': 'r'},
    {'prompt': 'p', 'chosen': 'same', 'rejected': 'same'},
    *rows(12),
  ]
  prepared = Preference(too_long=then).read(config(tmp_path, given), quiet)
  seen = {pair[1]: pair for pair in pairs(prepared)}
  counts = prepared.report['sources'][0]
  assert 'same' not in seen and 'c' * T not in seen
  if then == 'drop':
    assert counts['dropped'] == {'too_long': 2, 'answers_are_the_same': 1} and 'long' not in seen
  else:
    # 40 tokens for two prompts, answers of 5 and 7 with their ends, of which the last are no input.
    kept = 'z' * 15 if then == 'left' else 'a' * 14
    assert seen['long'] == (kept, 'long', 'prompt', 0.0)
    dropped = {'no_prompt_left_when_truncated': 1, 'answers_are_the_same': 1}
    assert counts['dropped'] == dropped and counts['truncated'] == 2


def test_other_settings_are_refused_where_nothing_reads_them():
  with pytest.raises(ValueError, match="weighting='example' is of answers .* leave it 'token'"):
    Preference(weighting='example')


def judged(count):
  return [
    {
      'prompt': f'{i:02}' + 'p' * (i % 4),
      'completion': f'{i:02}' + 'c' * (i % 7),
      'label': i % 3 > 0,
    }
    for i in range(count)
  ]


def test_a_judged_answer_stands_beside_the_one_before_it(tmp_path):
  given = judged(20)
  made = config(tmp_path, given)
  source = dataclasses.replace(made.sources[0], format='judged')
  made = dataclasses.replace(made, sources=(source,))
  prepared = KTO().read(made, quiet)
  others = [given[1], *given[:-1]]
  assert sorted(pairs(prepared)) == sorted(
    (row['prompt'], row['completion'], other['completion'], float(row['label']))
    for row, other in zip(given, others, strict=True)
  )
  # Only the end of the other answer gives way where there is no room for both.
  short = dataclasses.replace(made, sequence_length=16)
  for prompt, own, other, _ in pairs(KTO().read(short, quiet), 16):
    row = next(row for row in given if row['prompt'] == prompt)
    whole = others[given.index(row)]['completion']
    assert own == row['completion'] and whole.startswith(other) and other


def test_the_other_answer_is_to_another_prompt(tmp_path):
  """Also where all answers to a prompt follow one another; one prompt has no other."""
  path = tmp_path / 'a.jsonl'
  source = SourceConfig(kind='jsonl', path=str(path), format='judged')

  def others(prompts):
    rows = [{'prompt': p, 'completion': f'{p}{i}', 'label': True} for i, p in enumerate(prompts)]
    path.write_text('\n'.join(map(json.dumps, rows)))
    return [each.other.completion for _, each in mismatched(records(source))]

  assert others('aabbcb') == ['b2', 'b2', 'a1', 'a1', 'b3', 'c4']
  for alone in ('a', 'aaa'):
    with pytest.raises(ValueError, match='a.jsonl:1: the only prompt of its source'):
      others(alone)
