"""How records become rows: what is kept, what is learned, and that nothing is cut or doubled."""

import dataclasses
import datetime
import json
import types

import numpy as np
import pytest
from templates import CHATML, HEADERS
from tokenizer_families import contents

from data import chat, generation, loader
from data.batch import Batch
from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from data.examples import Settings, prepare
from data.huggingface import HuggingFaceTokenizer
from data.prepare import prepare as prepare_documents

LENGTH = 32
CLEAN = CleanConfig(anonymise=(), near_duplicates=0)


def rows(n, longest=20, seed=0):
  """Prompts and completions of digits; each has a number of its own."""
  random = np.random.default_rng(seed)
  return [
    {'prompt': f'{seed}{i:03}' + 'p' * int(random.integers(0, 5)), 'completion': 'c' * size}
    for i, size in enumerate(random.integers(1, longest, n).tolist())
  ]


def written(tmp_path, given, name='rows.jsonl'):
  path = tmp_path / name
  path.write_text(''.join(json.dumps(row) + '\n' for row in given))
  return SourceConfig(kind='jsonl', path=str(path), format='completion')


def config(tmp_path, *sources, **fields):
  return DataConfig(
    **{
      'sources': sources,
      'clean': CLEAN,
      'tokenizer': TokenizerConfig(kind='byte'),
      'sequence_length': LENGTH,
      'batch_size': 2,
      'validation_fraction': 0.2,
      'cache_dir': str(tmp_path / 'cache'),
      **fields,
    }
  )


def pieces(prepared, split=None, length=LENGTH):
  """(ids, learned) of each segment of a split's rows, in order."""
  for source in prepared.train if split is None else [split]:
    for row in range(len(source)):
      batch = Batch.empty(1, length)
      source.fill(row, batch, 0)
      for segment in range(1, batch.segments.max() + 1):
        inside = batch.segments[0] == segment
        assert (batch.positions[0, inside] == np.arange(inside.sum())).all()
        ids = [batch.tokens[0, inside][0], *batch.targets[0, inside]]
        yield [int(i) for i in ids], batch.weights[0, inside]


def quiet(line):
  del line


@pytest.mark.parametrize('packing', ['fit', 'order', 'alone'])
def test_every_example_is_in_one_row_once_with_its_answer_learned(tmp_path, packing):
  given = rows(60)
  prepared = prepare(config(tmp_path, written(tmp_path, given)), Settings(packing=packing), quiet)
  made = prepared.tokenizer
  expected = {
    (made.bos, *made.encode(row['prompt'] + row['completion']), made.eos): len(row['completion'])
    for row in given
  }
  seen = list(pieces(prepared)) + list(pieces(prepared, prepared.validation))
  assert sorted(map(tuple, (ids for ids, _ in seen))) == sorted(expected)
  for ids, weights in seen:
    learned = expected[tuple(ids)] + 1  # and the end
    np.testing.assert_array_equal(weights, [0] * (len(weights) - learned) + [1] * learned)
  trained = sum(len(source) for source in prepared.train)
  examples = prepared.report['sources'][0]['train']['documents']
  assert trained == examples if packing == 'alone' else trained < examples
  assert prepared.rows == trained
  assert prepared.report['validation']['documents'] == 60 - examples > 0


def test_an_example_counts_for_one_where_examples_count_alike(tmp_path):
  given = config(tmp_path, written(tmp_path, rows(40)))
  by_token = prepare(given, Settings(), quiet)
  by_example = prepare(given, Settings(weighting='example'), quiet)
  assert by_token.key != by_example.key
  for (ids, weights), (same, shares) in zip(pieces(by_token), pieces(by_example), strict=True):
    assert ids == same
    np.testing.assert_allclose(shares, weights / weights.sum(), rtol=1e-6)


@pytest.mark.parametrize('too_long', ['drop', 'left', 'right'])
def test_what_is_too_long_is_dropped_or_cut_and_counted(tmp_path, too_long):
  fits = {'prompt': 'p' * 10, 'completion': 'c' * (LENGTH - 11)}  # with bos and eos, T + 1
  long = {'prompt': 'P' * 10, 'completion': 'd' * LENGTH}
  asked = {'prompt': 'Q' * 2 * LENGTH, 'completion': 'e'}
  said = []
  source = written(tmp_path, [fits, long, asked] + rows(20))
  prepared = prepare(config(tmp_path, source), Settings(too_long=too_long), said.append)
  made, counts = prepared.tokenizer, prepared.report['sources'][0]
  seen = list(pieces(prepared)) + list(pieces(prepared, prepared.validation))
  texts = {made.decode(ids): (ids, weights) for ids, weights in seen}
  assert 'p' * 10 + 'c' * (LENGTH - 11) in texts
  if too_long == 'drop':
    assert counts['dropped'] == {'too_long': 2} and not counts['truncated']
  elif too_long == 'left':
    ids, weights = texts['d' * LENGTH]
    assert ids[-1] == made.eos and weights.sum() == LENGTH
    assert made.decode(ids) == 'd' * LENGTH and counts['truncated'] == 2
    assert any(text.endswith('Qe') for text in texts)
  else:
    ids, weights = texts['P' * 10 + 'd' * (LENGTH - 10)]
    assert ids[-1] != made.eos and weights.sum() == LENGTH - 10
    # Of the other one nothing that is learned is left.
    assert counts['truncated'] == 2 and counts['dropped'] == {'nothing_learned_when_truncated': 1}
  assert any(f'truncated: {counts["truncated"]}' in line for line in said)
  assert counts['lengths']['longest'] == 2 * LENGTH + 3


def test_duplicates_are_dropped_and_a_record_is_on_one_side_whatever_else_there_is(tmp_path):
  given = rows(50)
  once = prepare(config(tmp_path, written(tmp_path, given)), Settings(), quiet)
  more = written(tmp_path, given + given[:7] + rows(50, seed=1), 'more.jsonl')
  twice = prepare(config(tmp_path, more), Settings(), quiet)
  assert twice.report['sources'][0]['dropped'] == {'exact_duplicate': 7}
  held_out = {tuple(ids) for ids, _ in pieces(once, once.validation)}
  assert held_out < {tuple(ids) for ids, _ in pieces(twice, twice.validation)}


def test_sources_of_their_own_are_held_out_whole(tmp_path):
  ours, theirs = written(tmp_path, rows(20)), written(tmp_path, rows(10, seed=1), 'held.jsonl')
  given = config(tmp_path, ours, validation=(theirs,), validation_fraction=0)
  prepared = prepare(given, Settings(), quiet)
  assert len(list(pieces(prepared))) == 20
  held_out = [prepared.tokenizer.decode(ids) for ids, _ in pieces(prepared, prepared.validation)]
  assert held_out == [row['prompt'] + row['completion'] for row in rows(10, seed=1)]


def test_documents_have_held_out_sources_too(tmp_path):
  for name, word in (('a', 'alpha'), ('b', 'beta')):
    (tmp_path / f'{name}.txt').write_text(' '.join(f'{word}{i}' for i in range(50)))
  ours, theirs = (SourceConfig(kind='text', path=str(tmp_path / f'{x}.txt')) for x in 'ab')
  given = config(tmp_path, ours, validation=(theirs,), validation_fraction=0)
  prepared = prepare_documents(given, quiet)
  assert [text[:5] for text in prepared.validation_documents()] == ['beta0']
  decoded = [prepared.tokenizer.decode(ids) for ids in prepared.train[0].documents()]
  assert [text[:6] for text in decoded] == ['alpha0']
  other = prepare_documents(
    dataclasses.replace(given, validation=(ours,), sources=(theirs,)), quiet
  )
  assert other.key != prepared.key


def test_a_document_of_parquet_is_one_of_jsonl(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  table = [{'text': f'document number {i}', 'id': i} for i in range(40)]
  parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / 'a.parquet')
  (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in table))
  trained = []
  for kind in ('parquet', 'jsonl'):
    path = str(tmp_path / f'a.{kind}')
    source = SourceConfig(kind=kind, path=path, text_field='text')
    prepared = prepare_documents(config(tmp_path, source), quiet)
    trained.append([ids.tolist() for ids in prepared.train[0].documents()])
  assert trained[0] == trained[1] != []


def test_what_changes_examples_changes_the_key(tmp_path):
  source = written(tmp_path, rows(30))
  given = config(tmp_path, source)
  base = prepare(given, Settings(), quiet).key
  assert prepare(given, Settings(), quiet).key == base
  keys = [
    prepare(given, Settings(turns='last'), quiet).key,
    prepare(given, Settings(too_long='left'), quiet).key,
    prepare(given, Settings(packing='alone'), quiet).key,
    prepare(dataclasses.replace(given, validation_fraction=0.3), Settings(), quiet).key,
    prepare(dataclasses.replace(given, sequence_length=48), Settings(), quiet).key,
  ]
  written(tmp_path, rows(31))
  keys.append(prepare(given, Settings(), quiet).key)
  assert len({base, *keys}) == 7


def test_the_template_that_is_given_becomes_the_run_s(tmp_path):
  HuggingFaceTokenizer(contents('qwen')).save(tmp_path / 'made')
  (tmp_path / 'chatml.jinja').write_text(CHATML)
  chats = [
    [{'role': 'user', 'content': f'{i}'}, {'role': 'assistant', 'content': f'{i}{i}'}]
    for i in range(20)
  ]
  path = tmp_path / 'chats.jsonl'
  path.write_text(''.join(json.dumps({'messages': chat}) + '\n' for chat in chats))
  given = config(
    tmp_path,
    SourceConfig(kind='jsonl', path=str(path), format='chat'),
    tokenizer=TokenizerConfig(kind='huggingface', path=str(tmp_path / 'made')),
    sequence_length=64,
  )
  settings = Settings(template=str(tmp_path / 'chatml.jinja'))
  assert prepare(given, settings, quiet).tokenizer.chat_templates == {'default': CHATML}
  with pytest.raises(ValueError, match='chats.jsonl:1: messages need a chat template'):
    prepare(given, Settings(), quiet)


@pytest.mark.parametrize('beside', ['run', 'checkpoint'])
def test_a_turn_may_end_as_the_model_s_generation_config_says(tmp_path, beside):
  """As Llama 3's do, by <|eot_id|> and not by the eos of documents: in a run that file is beside
  the tokenizer's directory, in a checkpoint of transformers in it.
  """
  template = HEADERS.replace('{{ eos_token }}', '<|end|>')
  place = tmp_path / 'run' / 'tokenizer'
  made = HuggingFaceTokenizer(contents('llama3') | {'chat_template.jinja': template.encode()})
  made.save(place)
  path = tmp_path / 'chats.jsonl'
  chats = [
    [{'role': 'user', 'content': f'{i}'}, {'role': 'assistant', 'content': f'{i}{i}'}]
    for i in range(20)
  ]
  path.write_text(''.join(json.dumps({'messages': chat}) + '\n' for chat in chats))
  given = config(
    tmp_path,
    SourceConfig(kind='jsonl', path=str(path), format='chat'),
    tokenizer=TokenizerConfig(kind='huggingface', path=str(place)),
    sequence_length=128,
  )
  with pytest.raises(ValueError, match='closed by no token that ends a text'):
    prepare(given, Settings(), quiet)
  end = made.control_ids()['<|end|>']
  where = place.parent if beside == 'run' else place
  (where / 'generation_config.json').write_text(json.dumps({'eos_token_id': [made.eos, end]}))
  prepared = prepare(given, Settings(), quiet)
  for ids, weights in pieces(prepared, length=128):
    assert ids[1:][np.flatnonzero(weights)[-1]] == end


@pytest.mark.parametrize(
  'fields, said',
  [
    ({'clean': CleanConfig()}, 'data.clean.anonymise=.* is done to documents and not to records'),
    ({'split': 'tail'}, "data.split='tail' would cut a record in two"),
    ({'tokenizer': TokenizerConfig()}, "data.tokenizer.kind='sentencepiece' without a path"),
    ({'tokenizer': TokenizerConfig(kind='char')}, "data.tokenizer.kind='char' without a path"),
    ({'sources': (SourceConfig(),)}, r"data.sources\[0\] .* has no format"),
    ({'validation_fraction': 1e-9}, 'nothing is held out: none of 9 records that were kept'),
    ({'validation_fraction': 1 - 1e-9}, 'nothing is left to train on'),
    ({'sequence_length': 2}, 'nothing is left to train on .* 9 too_long'),
  ],
)
def test_what_cannot_be_is_said(tmp_path, fields, said):
  with pytest.raises(ValueError, match=said):
    prepare(config(tmp_path, written(tmp_path, rows(9)), **fields), Settings(), quiet)


def test_records_are_no_documents(tmp_path):
  with pytest.raises(ValueError, match="source.format='completion' .* set objective.kind='sft'"):
    prepare_documents(config(tmp_path, written(tmp_path, rows(9))), quiet)


def test_batches_go_on_where_they_were_left(tmp_path):
  given = config(tmp_path, written(tmp_path, rows(60)))
  prepared = prepare(given, Settings(), quiet)
  batches = loader.train_loader(prepared, given)
  before = [next(batches) for _ in range(5)]
  again = loader.train_loader(prepared, given)
  next(again)
  state = again.state()
  third = loader.train_loader(prepared, given)
  third.restore(state)
  np.testing.assert_array_equal(next(third).weights, before[1].weights)
  other = loader.train_loader(prepare(given, Settings(weighting='example'), quiet), given)
  with pytest.raises(ValueError, match='the data order has changed'):
    other.restore(state)


TODAY = """Today: {{ strftime_now('%d %b %Y') }}
{% for m in messages %}
{{ m.role }}: {% if m.role == 'assistant' %}
{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}

{% endfor %}"""


def test_examples_are_the_same_on_any_day(tmp_path, monkeypatch):
  HuggingFaceTokenizer(contents('qwen') | {'chat_template.jinja': TODAY.encode()}).save(
    tmp_path / 'made'
  )
  path = tmp_path / 'chats.jsonl'
  chats = [
    [{'role': 'user', 'content': f'{i}'}, {'role': 'assistant', 'content': f'{i}{i}'}]
    for i in range(20)
  ]
  path.write_text(''.join(json.dumps({'messages': chat}) + '\n' for chat in chats))
  digests = set()
  for day in (1, 2):
    now = datetime.datetime(2026, 11, day)
    frozen = type('Frozen', (datetime.datetime,), {'now': classmethod(lambda cls, now=now: now)})
    monkeypatch.setattr(chat, 'datetime', types.SimpleNamespace(datetime=frozen))
    given = config(
      tmp_path,
      SourceConfig(kind='jsonl', path=str(path), format='chat'),
      tokenizer=TokenizerConfig(kind='huggingface', path=str(tmp_path / 'made')),
      sequence_length=128,
      cache_dir=str(tmp_path / f'cache-{day}'),
    )
    prepared = prepare(given, Settings(), quiet)
    digests.add((prepared.key, prepared.files))
    own = chat.ChatTemplate.of(prepared.tokenizer).render(chats[0])
    assert own.startswith(f'Today: 0{day} Nov 2026'), 'who is asked is asked today'
  assert len(digests) == 1
  held_out = [prepared.tokenizer.decode(ids) for ids, _ in pieces(prepared, length=128)]
  assert all(text.startswith('oday: 26 Jul 2024') or '26 Jul 2024' in text for text in held_out)


def test_a_prompt_is_on_one_side_however_many_answers_it_has(tmp_path):
  given = [{'prompt': f'{i // 4:03}?', 'completion': f'{i}'} for i in range(200)]
  prepared = prepare(config(tmp_path, written(tmp_path, given)), Settings(), quiet)

  def asked(split=None):
    return {prepared.tokenizer.decode(ids).partition('?')[0] for ids, _ in pieces(prepared, split)}

  held_out = asked(prepared.validation)
  assert 3 < len(held_out) < 25 and len(held_out | asked()) == 50
  assert not held_out & asked()


def test_a_tokenizer_of_the_hub_is_read_with_what_lies_beside_it(tmp_path, monkeypatch):
  import remote.hub

  asked = []
  monkeypatch.setattr(remote.hub, 'here', lambda of: asked.append(of) or tmp_path / 'made')
  made = HuggingFaceTokenizer(contents('qwen') | {'chat_template.jinja': CHATML.encode()})
  made.save(tmp_path / 'made')
  end = {'eos_token_id': [made.eos, made.pad]}
  (tmp_path / 'made' / 'generation_config.json').write_text(json.dumps(end))
  source = written(tmp_path, rows(20))
  for address in ('hf://org/name', 'hf://org/name/tokenizer.json'):
    tokenizer = TokenizerConfig(kind='huggingface', path=address)
    given = config(tmp_path, source, tokenizer=tokenizer)
    assert generation.beside(address) == end
    assert prepare(given, Settings(), quiet).tokenizer.chat_templates == {'default': CHATML}
  assert {str(of).rpartition('/')[2] for of in asked} == {'name'}, 'and not a file alone'
