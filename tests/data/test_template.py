"""Is a template what its file says, and is what cannot be told apart refused? And are labelled
texts held out by their text alone?
"""

import json

import numpy as np
import pytest

from data.batch import Batch
from data.config import CleanConfig, DataConfig, SourceConfig
from data.extra import extended
from data.labelled import LabelWriter, in_place, split
from data.records import LabelRecord, TextRecord
from data.template import Asking, Template
from data.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
MASKED = extended(BYTES, ['<mask>'])
WORDS = {'positive': ['good', 'fine'], 'negative': 'bad'}
PATTERN = 'Text: {{ text }}\nIt was [MASK]'


def template(**changes) -> Template:
  return Template.of({'pattern': PATTERN, 'words': WORDS} | changes)


def ids_of(text: str) -> tuple[int, ...]:
  return tuple(byte + 3 for byte in text.encode())


def test_a_file_is_toml_or_json(tmp_path):
  (tmp_path / 't.json').write_text(json.dumps({'pattern': PATTERN, 'words': WORDS}))
  (tmp_path / 't.toml').write_text(
    f'pattern = {json.dumps(PATTERN)}\n[words]\npositive = ["good", "fine"]\nnegative = "bad"\n'
  )
  made = Template.read(str(tmp_path / 't.json'))
  assert made == Template.read(str(tmp_path / 't.toml')) == template()
  assert made.labels == ('positive', 'negative')
  assert Template.of(made.values()) == made
  for name in ('sentiment', 'sentiment_cloze', 'banking'):
    Template.read(f'configs/templates/{name}.toml')


def test_a_text_is_put_into_the_pattern_behind_its_examples():
  shots = [LabelRecord('dull [MASK] {{ text }}', 'negative')]
  made = template(between='\n--\n')
  assert made.asked('fun') == ('Text: fun\nIt was', '')
  assert made.asked('fun', shots) == (
    'Text: dull [MASK] {{ text }}\nIt was bad\n--\nText: fun\nIt was',
    '',
  )
  cloze = template(pattern='It was [MASK]: {{ text }}.', ending='!')
  assert cloze.asked('fun') == ('It was', ': fun.')
  assert cloze.asked('fun', shots)[0].startswith('It was bad!: dull')


def test_what_each_kind_of_model_reads():
  made = Asking(template(), BYTES, 'prefix')
  assert made.ids('fun') == (1, *ids_of('Text: fun\nIt was'))
  assert [word.ids for word in made.words] == [ids_of(' good'), ids_of(' fine'), ids_of(' bad')]
  assert [(word.label, word.characters) for word in made.words] == [(0, 4), (0, 4), (1, 3)]
  kept = made.fitted(made.ids('fun'), 8)
  assert kept == (1, *ids_of('\nIt was')[-7:]), 'the question is kept'
  assert made.fitted(made.ids('fun'), 99) == made.ids('fun')

  made = Asking(template(), BYTES, 'target')
  assert made.ids('fun') == (*ids_of('Text: fun\nIt was'), 2)
  assert made.words[0].ids == (*ids_of('good'), 2)

  one = template(pattern='It:[MASK]; {{ text }}.', words={'positive': 'g', 'negative': 'b'})
  made = Asking(one, MASKED, 'cloze')
  assert made.ids('fun') == (1, *ids_of('It:'), 259, *ids_of('; fun.'), 2)
  assert [word.ids for word in made.words] == [ids_of('g'), ids_of('b')]
  with pytest.raises(ValueError, match='12 tokens pass the 9 that the model reads'):
    made.fitted(made.ids('fun'), 9)


WRONG = {
  'name': ({'normalize': 'sum'}, "field of a template='normalize' is unknown; did you mean"),
  'normalise': ({'normalise': 'mean'}, "normalise='mean' is unknown"),
  'text': ({'pattern': 'Say:'}, 'is the same for every record'),
  'masks': ({'pattern': '{{ text }} [MASK] [MASK]'}, r'has \[MASK\] 2 times'),
  'jinja': ({'pattern': '{{ text'}, 'the pattern, at'),
  'variable': ({'pattern': '{{ text }}{{ title }}'}, "'title' is undefined"),
  'alone': ({'words': {'positive': 'good'}}, 'words are of 1 labels'),
  'empty': ({'words': {'positive': 'good', 'negative': []}}, "words of label 'negative'"),
  'a number': ({'words': {'positive': 'good', 'negative': 3}}, r"label 'negative': \[3\] must be"),
  'a table': ({'words': {'positive': 'good', 'negative': {'a': 'b'}}}, "words of label 'negative'"),
  'ending': ({'ending': 3}, 'ending=3 must be a text'),
  'between': ({'between': 3}, 'between=3 must be a text'),
  'blank': ({'words': {'positive': 'good', 'negative': ' '}}, "words of label 'negative'"),
}


@pytest.mark.parametrize('changes, said', WRONG.values(), ids=WRONG)
def test_what_is_no_template_is_an_error(changes, said):
  with pytest.raises(ValueError, match=said):
    template(**changes)


def test_an_error_names_the_file(tmp_path):
  (tmp_path / 't.toml').write_text('pattern = "{{ text }}"\n')
  with pytest.raises(ValueError, match='t.toml: a template has a pattern.*and a table of words'):
    Template.read(str(tmp_path / 't.toml'))
  (tmp_path / 't.json').write_text('{')
  with pytest.raises(ValueError, match='t.json'):
    Template.read(str(tmp_path / 't.json'))


UNFIT = {
  'a beginning': (
    {'words': {'a': 'card', 'b': 'card arrival'}},
    'prefix',
    "'card' of label 'a' is the beginning of 'card arrival' of label 'b'.*give other words, or an "
    'ending',
  ),
  'twice': ({'words': {'a': 'x', 'b': ['y', 'x']}}, 'prefix', "'x' of label 'a' is the beginning"),
  'goes on': ({'pattern': '[MASK]: {{ text }}'}, 'prefix', 'the pattern goes on behind'),
  'target': ({'pattern': '[MASK]: {{ text }}'}, 'target', 'the pattern goes on behind'),
  'several': ({'pattern': '{{ text }}:[MASK].'}, 'cloze', "'good' of label 'positive' is 4 tokens"),
  'no place': ({'pattern': '{{ text }}'}, 'cloze', r'the pattern has no \[MASK\]'),
}


@pytest.mark.parametrize('changes, form, said', UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit_a_model_is_an_error(changes, form, said):
  with pytest.raises(ValueError, match=said):
    Asking(template(**changes), MASKED, form)


def test_a_tokenizer_without_a_mask_and_an_ending_that_tells_words_apart():
  with pytest.raises(ValueError, match="the 'byte' tokenizer has no mask"):
    Asking(template(pattern='{{ text }}:[MASK].', words={'a': 'x', 'b': 'y'}), BYTES, 'cloze')
  made = Asking(template(words={'a': 'card', 'b': 'card arrival'}, ending='\n'), BYTES, 'prefix')
  assert made.words[0].ids == ids_of(' card\n')
  # The end of text does the same for an answer.
  Asking(template(words={'a': 'card', 'b': 'card arrival'}), BYTES, 'target')


@pytest.mark.parametrize('normalise, sizes', [('sum', 1), ('token', 5), ('character', 4)])
def test_a_label_has_the_probability_of_its_words(normalise, sizes):
  made = Asking(template(normalise=normalise), BYTES, 'prefix')
  sums = np.log([[0.1, 0.2, 0.4], [0.5, 0.1, 0.1]])
  size = np.array([sizes, sizes, {'sum': 1, 'token': 4, 'character': 3}[normalise]])
  p = np.exp(sums / size)
  expected = np.log(np.stack([p[:, 0] + p[:, 1], p[:, 2]], 1))
  np.testing.assert_allclose(made.label_scores(sums), expected, rtol=1e-12)


def test_examples_to_train_on():
  record = LabelRecord('fun', 'positive')
  made = LabelWriter(template(), BYTES, 'prefix', 'tokens').example('f:1', record)
  assert made.ids.tolist() == [1, *ids_of('Text: fun\nIt was good'), 2]
  assert made.ids[made.scored].tolist() == [*ids_of(' good'), 2]
  one = template(pattern='It:[MASK]; {{ text }}.', words={'positive': 'g', 'negative': 'b'})
  writer = LabelWriter(one, MASKED, 'cloze', 'labels')
  made = writer.example('f:1', record)
  assert made.ids.tolist() == [1, *ids_of('It:'), 259, *ids_of('; fun.'), 2, *ids_of('g')]
  assert np.flatnonzero(made.scored).tolist() == [len(made.ids) - 1]

  with pytest.raises(ValueError, match='f:3: label=.neutral. is unknown.*positive, negative'):
    writer.example('f:3', LabelRecord('x', 'neutral'))
  with pytest.raises(ValueError, match='f:4: .*takes records of a text and a label'):
    writer.example('f:4', TextRecord('x', 'y'))
  with pytest.raises(ValueError, match="over='labels' is a choice between words of one token"):
    LabelWriter(template(), BYTES, 'prefix', 'labels')


def test_a_cloze_is_learned_where_its_mask_is():
  batch = Batch.empty(2, 8)
  # Two examples in a row: 5 [mask] 6 and its word 7; 8 [mask] and its word 9.
  batch.tokens[1, :5] = [5, 259, 6, 8, 259]
  batch.targets[1, :5] = [259, 6, 7, 259, 9]
  batch.weights[1, :5] = [0, 0, 1, 0, 1]
  in_place(batch, 1, 259)
  assert batch.weights[1].tolist() == [0, 1, 0, 0, 1, 0, 0, 0]
  assert batch.targets[1, [1, 4]].tolist() == [7, 9]


def test_the_same_texts_are_held_out_whatever_they_are_asked_with(tmp_path):
  rows = [f'text {i},{"ab"[i % 2]}' for i in range(200)]
  (tmp_path / 'a.csv').write_text('\n'.join(['text,label', *rows, 'text 7,a']) + '\n')
  (tmp_path / 'b.csv').write_text('\n'.join(['text,label', *rows[::-1][:150], 'more,a']) + '\n')

  def config(name, fraction=0.25, **more):
    source = SourceConfig(kind='csv', path=str(tmp_path / name), format='label')
    clean = CleanConfig(anonymise=(), near_duplicates=0)
    return DataConfig(sources=(source,), clean=clean, validation_fraction=fraction, **more)

  train, held_out = split(config('a.csv'))
  assert len(train) + len(held_out) == 200, 'a text counts once'
  assert 25 < len(held_out) < 75
  texts = {record.text for _, record in held_out}
  again = {record.text for _, record in split(config('b.csv'))[1]} - {'more'}
  assert again == texts & {row.split(',')[0] for row in rows[::-1][:150]}
  place, record = train[0]
  assert place.endswith('a.csv:2') or record.text != 'text 0'

  other = SourceConfig(kind='csv', path=str(tmp_path / 'b.csv'), format='label')
  _, held_out = split(config('a.csv', 0.0, validation=(other,)))
  assert [record.text for _, record in held_out] == ['more'], 'what was trained on is not asked'
  with pytest.raises(ValueError, match='data.sources.0..format=.completion. has no labels'):
    wrong = SourceConfig(kind='csv', path=str(tmp_path / 'a.csv'), format='completion')
    split(DataConfig(sources=(wrong,)))
  with pytest.raises(ValueError, match='200 records are to train on and 0 held out'):
    split(config('a.csv', 1e-9))
