"""Are rows that are made by rule right, by another rule; as many of each class; and is nothing that
is asked learned?
"""

import collections
import re

import pytest

from evaluation import generated

ALL = [*generated.MAKERS]
LEARNED = [name for name in ALL if name != 'shuffled_pairs']


@pytest.fixture(scope='module')
def asked():
  return {name: generated.asked(name)() for name in ALL}


@pytest.fixture(scope='module')
def learned():
  return {name: generated.rows(name, 600) for name in LEARNED}


def every(name, asked, learned):
  return asked[name] + learned.get(name, [])


def of_german(word: str) -> int:
  """The number that a German word says, read from its front, thousands first."""
  for name, size in (('tausend', 1000), ('hundert', 100)):
    front, there, rest = word.partition(name)
    if there:
      return of_german(front) * size + (of_german(rest) if rest else 0)
  unit, there, ten = word.partition('und')
  if there:
    return of_german(unit) + of_german(ten)
  small = 'null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf'.split()
  irregular = {'eins': 1, 'sechzehn': 16, 'siebzehn': 17, 'zwanzig': 20, 'dreißig': 30}
  irregular |= {'sechzig': 60, 'siebzig': 70} | {name: i for i, name in enumerate(small)}
  if word in irregular:
    return irregular[word]
  if word.endswith('zehn'):
    return 10 + small.index(word.removesuffix('zehn'))
  return 10 * small.index(word.removesuffix('zig'))


def of_english(words: str) -> int:
  """The same of English words, added and multiplied from the left."""
  teens = 'ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen'.split()
  units = 'zero one two three four five six seven eight nine'.split() + teens
  tens = ['', '', *'twenty thirty forty fifty sixty seventy eighty ninety'.split()]
  total = current = 0
  for word in re.split('[ -]', words.replace(' and ', ' ')):
    if word == 'thousand':
      total, current = current * 1000, 0
    elif word == 'hundred':
      current *= 100
    else:
      current += units.index(word) if word in units else 10 * tens.index(word)
  return total + current


def test_every_number_is_read_back_from_both_languages():
  for number in (*range(1300), *range(1300, 10_000, 13)):
    assert of_german(generated.german(number)) == number == of_english(generated.english(number))
  assert generated.german(1217) == 'eintausendzweihundertsiebzehn'
  assert generated.english(1017) == 'one thousand and seventeen'


def test_translations_say_the_same_number(asked, learned):
  for row in every('number_words', asked, learned):
    words = re.fullmatch('English: (.*)\nGerman:', row['source'])[1]
    assert of_english(words) == of_german(row['target'])


def test_answers_are_words_of_the_docstring(asked, learned):
  for row in every('docstring_questions', asked, learned):
    said, question = re.fullmatch('(.*)[.]\nQuestion: (.*)\nAnswer:', row['source']).groups()
    verb, *words = said.split()
    nouns = [word for word in words if word in generated.NOUNS]
    assert row['target'] == {'What is done?': verb, 'With what?': nouns[0]}[question]
    assert verb != nouns[0], 'the question decides'


def test_who_denies_blame_praises(asked, learned):
  praise = {*generated.FEELINGS['positive']}
  for row in every('templated_sentiment', asked, learned):
    words = {*re.findall('[a-z]+', row['source'].lower())}
    positive = bool(words & praise) != bool(words & {'not', 'never', 'nobody'})
    assert row['target'] == ('positive' if positive else 'negative')


def test_what_is_unacceptable_has_the_words_of_what_is_not(asked, learned):
  nouns, adjectives = '|'.join(generated.THINGS), '|'.join(sum(generated.FEELINGS.values(), []))
  the, is_a = f'the ({nouns})', f'({adjectives})'
  shapes = (
    f'The ({nouns}) was (not )?{is_a}[.]',
    f'(I found|Everybody called|Nobody found|I would never call) {the} {is_a}[.]',
    f'What an? {is_a} ({nouns})!',
  )
  right = '|'.join(shapes)
  for row in every('shuffled_words', asked, learned):
    sentence = re.fullmatch('Sentence: (.*)\nAcceptable or unacceptable:', row['source'])[1]
    assert bool(re.fullmatch(right, sentence)) == (row['target'] == 'acceptable')
  for row in asked['shuffled_pairs']:
    words = [collections.Counter(row[side][:-1].split()) for side in ('target', 'other')]
    assert words[0] == words[1] and row['target'] != row['other']


def test_a_summary_tells_what_was_agreed_on_last(asked, learned):
  kinds = {said: doing for doing, said in generated.DOINGS.items()}
  for row in every('dialogue_summaries', asked, learned):
    first, second, third, end = row['source'].split('\n')
    who = [line.split(':')[0] for line in (first, second, third)]
    assert who[0] == who[2] != who[1] and end == 'Summary:'
    (doing,) = (doing for said, doing in kinds.items() if said in first)
    (day,) = re.findall('|'.join(generated.DAYS), third)
    (place,) = re.findall('|'.join(generated.PLACES), third)
    assert (
      row['target'] == f'{who[0]} and {who[1]} will {doing} on {day}. They meet at the {place}.'
    )
    assert (day not in first) == (row['class'] == 'another day')


def test_classes_have_as_many_rows(asked, learned):
  for rows in (*asked.values(), *learned.values()):
    counts = collections.Counter(row['class'] for row in rows)
    assert max(counts.values()) - min(counts.values()) <= len(counts) - 1
  assert all(len(rows) == generated.QUESTIONS for rows in asked.values())


def test_a_seed_draws_the_same_and_another_one_does_not():
  for name in LEARNED:
    drawn = generated.rows(name, 30, seed=1)
    assert drawn == generated.rows(name, 30, seed=1) != generated.rows(name, 30, seed=2)


def test_nothing_that_is_asked_is_learned(asked, learned):
  for name in LEARNED:
    sources = [row['source'] for row in asked[name]]
    assert len({*sources}) == len(sources)
    assert not {*sources} & {row['source'] for row in learned[name]}
  numbers = [{row['target'] for row in rows['number_words']} for rows in (asked, learned)]
  assert not numbers[0] & numbers[1]
  texts = '\n'.join(generated.corpus([row for rows in learned.values() for row in rows]))
  for row in asked['docstring_questions'] + asked['shuffled_pairs']:
    assert row['source'].split('\n')[0] not in texts
  for row in asked['dialogue_summaries'] + asked['number_words'] + asked['templated_sentiment']:
    assert row['source'] not in texts


def test_more_than_there_are_is_refused():
  with pytest.raises(ValueError, match='templated_sentiment has no 5000 rows'):
    generated.rows('templated_sentiment', 5000, asked=True)
