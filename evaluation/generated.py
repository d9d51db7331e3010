"""What can a model be taught and asked where there is no data? Tasks that are made by rule, of
number words, docstrings of the interpreter's own library, and templates.

A row is {'source', 'target', 'class'}: what a model reads, what it is to write, and what there are
as many rows of each of. What a row is about (a number, a docstring, words put together) says by its
digest whether it is asked or learned: no draw and no seed puts it on both sides.
"""

import functools
import hashlib
import random
import re
from collections.abc import Callable, Iterator

from data.config import SourceConfig
from data.sources import Problems, documents
from evaluation.task import Row

ASKED = 0.1  # of what rows are about, the share that is asked and not learned
QUESTIONS = 150  # of a task
DRAWS = 2000  # without a row that was not seen, before there is none to be found

Made = Iterator[tuple[str, Row]]  # (what a row is about, the row), without end

# Number words.

UNITS = (
  'zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen '
  'sixteen seventeen eighteen nineteen'
).split()
TENS = 'twenty thirty forty fifty sixty seventy eighty ninety'.split()
EINER = (
  'null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn '
  'sechzehn siebzehn achtzehn neunzehn'
).split()
ZEHNER = 'zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig'.split()


def english(number: int) -> str:
  """0 to 9999 in words."""
  for size, name in ((1000, 'thousand'), (100, 'hundred')):
    if number >= size:
      front, rest = f'{english(number // size)} {name}', number % size
      between = ' and ' if rest < 100 else ' '
      return front + (between + english(rest) if rest else '')
  if number < 20:
    return UNITS[number]
  tens, unit = divmod(number, 10)
  return TENS[tens - 2] + (f'-{UNITS[unit]}' if unit else '')


def german(number: int) -> str:
  """0 to 9999 in words."""
  for size, name in ((1000, 'tausend'), (100, 'hundert')):
    if number >= size:
      front, rest = f'{_stem(number // size)}{name}', number % size
      return front + (german(rest) if rest else '')
  if number < 20:
    return EINER[number]
  tens, unit = divmod(number, 10)
  return (f'{_stem(unit)}und' if unit else '') + ZEHNER[tens - 2]


def _stem(unit: int) -> str:
  """A unit in front of another word."""
  return 'ein' if unit == 1 else EINER[unit]


def number_words(draw: random.Random) -> Made:
  """Numbers, in English and German; as many of three digits as of four."""
  while True:
    digits = draw.choice((3, 4))
    number = draw.randrange(10 ** (digits - 1), 10**digits)
    row = {'source': f'English: {english(number)}\nGerman:', 'target': german(number)}
    yield str(number), row | {'class': f'{digits} digits'}


# Docstrings.


# By its text: to parse the library takes ten times as long, and finds few more.
DOCUMENTED = re.compile(r'^ *(?:def|class) [^\n]*:\n +r?"""(.+?)"""', re.MULTILINE | re.DOTALL)


@functools.cache
def docstrings() -> tuple[str, ...]:
  """Of what the interpreter's library documents, on a line each, in a fixed order."""
  texts = documents(SourceConfig(), Problems())
  return tuple(' '.join(said.split()) for text in texts for said in DOCUMENTED.findall(text))


@functools.cache
def sentences() -> tuple[str, ...]:
  """The first sentences of docstrings that are of 4 to 12 words."""
  shape = re.compile(r"[A-Z][a-z]+( [A-Za-z',-]+){3,11}\.(?= |$)")
  first = (shape.match(said) for said in docstrings())
  return tuple(sorted({each[0] for each in first if each}))


VERBS = (
  'Return Returns Set Create Get Add Construct Read Parse Write Convert Process Remove Find Format '
  'Test Configure Generate Delete Send Check Load Open Close Make Copy Run Produce Call Print'
).split()
NOUNS = (
  'file object list widget string class name text path value module data event line number command '
  'item message function type instance header code directory element server address handler option '
  'window variable frame exception node sequence mode request tree method stream context'
).split()


@functools.cache
def described() -> tuple[tuple[str, str, str], ...]:
  """(sentence, its verb, its first noun) of those that begin with one of VERBS and have NOUNS."""
  every = []
  for said in sentences():
    verb, *words = said[:-1].split()
    nouns = [word for word in words if word in NOUNS]
    if verb in VERBS and nouns:
      every.append((said, verb, nouns[0]))
  return tuple(every)


def docstring_questions(draw: random.Random) -> Made:
  """What a docstring says is done, or with what: a word of it. Who gives one of the two without a
  look at the question is right for a half.
  """
  while True:
    said, verb, noun = draw.choice(described())
    answers = {'What is done?': verb, 'With what?': noun}
    question = draw.choice([*answers])
    source = f'{said}\nQuestion: {question}\nAnswer:'
    yield said, {'source': source, 'target': answers[question], 'class': question}


def shuffled_pairs(draw: random.Random) -> Made:
  """A sentence of a docstring, and its words shuffled: one of the two is to be found likelier."""
  while True:
    said = draw.choice(sentences())
    yield said, {'source': said, 'target': said, 'other': shuffled(said, draw), 'class': ''}


def shuffled(sentence: str, draw: random.Random) -> str:
  """Its words in another order, but for the first one; what it ends with stays, too."""
  first, *words = sentence[:-1].split()
  other = words
  while other == words:
    other = draw.sample(words, len(words))
  return ' '.join([first, *other]) + sentence[-1]


# Templates.

THINGS = (
  'film book song play meal hotel concert game talk show trip story garden museum picture house '
  'party letter dress coffee'
).split()
FEELINGS = {
  'positive': (
    'wonderful great lovely brilliant excellent charming delightful superb pleasant perfect'
  ).split(),
  'negative': 'awful boring terrible dreadful poor ugly horrible dull disappointing bad'.split(),
}
AFFIRMED = (
  'The {thing} was {word}.',
  'I found the {thing} {word}.',
  'What {a} {word} {thing}!',
  'Everybody called the {thing} {word}.',
)
DENIED = (
  'The {thing} was not {word}.',
  'Nobody found the {thing} {word}.',
  'I would never call the {thing} {word}.',
)


def feeling(draw: random.Random) -> tuple[str, str]:
  """A sentence, and whether it is of praise or blame."""
  target, other = draw.sample([*FEELINGS], 2)
  pattern = draw.choice(AFFIRMED + DENIED)
  word = draw.choice(FEELINGS[other if pattern in DENIED else target])
  a = 'an' if word[0] in 'aeiou' else 'a'
  return pattern.format(thing=draw.choice(THINGS), word=word, a=a), target


def templated_sentiment(draw: random.Random) -> Made:
  """Whether a sentence is of praise or blame; some deny what their adjective says."""
  while True:
    text, target = feeling(draw)
    yield text, {'source': f'Sentence: {text}\nSentiment:', 'target': target, 'class': target}


def shuffled_words(draw: random.Random) -> Made:
  """Whether such a sentence is as it should be, or its words were shuffled."""
  while True:
    said, _ = feeling(draw)
    target = draw.choice(('acceptable', 'unacceptable'))
    text = said if target == 'acceptable' else shuffled(said, draw)
    source = f'Sentence: {text}\nAcceptable or unacceptable:'
    yield said, {'source': source, 'target': target, 'class': target}


PEOPLE = (
  'Anna Ben Clara David Emma Felix Grace Henry Ida Jonas Karla Leo Maria Noah Olga Paul Rosa Simon '
  'Tara Victor'
).split()
DAYS = 'Monday Tuesday Wednesday Thursday Friday Saturday Sunday'.split()
PLACES = 'station library museum park cinema office harbour market theatre airport'.split()
DOINGS = {
  'have lunch': 'lunch',
  'play chess': 'a game of chess',
  'go for a walk': 'a walk',
  'plan the trip': 'a talk about the trip',
  'buy the tickets': 'buying the tickets',
  'practise the song': 'practising the song',
}
OPENINGS = (
  'Hi {b}, do you have time for {thing} on {first}?',
  'Hello {b}, what about {thing} on {first}?',
  '{b}, are you free on {first}? I thought of {thing}.',
)
REFUSALS = (
  'Not on {first}, sorry. How about {day}?',
  'I have to work on {first}. {day} would be fine.',
  'Sorry, {first} is bad. Could we do it on {day}?',
)
AGREEMENTS = ('Yes, {day} is fine.', 'Sure, {day} it is.', 'Good idea, I am free on {day}.')
ENDINGS = (
  '{day} then. Let us meet at the {place}.',
  'Good. See you on {day} at the {place}!',
  'Fine, I will wait for you at the {place} on {day}.',
)


def dialogue_summaries(draw: random.Random) -> Made:
  """Two people agree to do something, on a day that may change, and who does what, when and where
  is to be told.
  """
  while True:
    a, b = draw.sample(PEOPLE, 2)
    first, other = draw.sample(DAYS, 2)
    moved = draw.choice((True, False))
    facts = {'a': a, 'b': b, 'first': first, 'day': other if moved else first}
    doing, facts['thing'] = draw.choice([*DOINGS.items()])
    facts['place'] = draw.choice(PLACES)
    turns = (OPENINGS, REFUSALS if moved else AGREEMENTS, ENDINGS)
    said = [draw.choice(turn).format(**facts) for turn in turns]
    talk = '\n'.join(f'{who}: {text}' for who, text in zip((a, b, a), said))
    target = f'{a} and {b} will {doing} on {{day}}. They meet at the {{place}}.'.format(**facts)
    about = ' '.join([*sorted((a, b)), facts['day'], facts['place'], doing])
    row = {'source': f'{talk}\nSummary:', 'target': target}
    yield about, row | {'class': 'another day' if moved else 'the same day'}


GENERAL = ('number_words', 'docstring_questions', 'templated_sentiment', 'shuffled_words')
TARGET = 'dialogue_summaries'
# Of each how many classes there are, which have as many rows.
CLASSES = {
  number_words: 2,
  docstring_questions: 2,
  templated_sentiment: 2,
  shuffled_words: 2,
  shuffled_pairs: 1,
  dialogue_summaries: 2,
}
MAKERS: dict[str, Callable[[random.Random], Made]] = {each.__name__: each for each in CLASSES}

# Rows of them.


def is_asked(about: str) -> bool:
  """Whether rows about this are asked, and never learned."""
  digest = hashlib.blake2b(about.encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'little') < ASKED * 2**64


def rows(name: str, count: int, asked: bool = False, seed: int = 0) -> list[Row]:
  """So many rows of one of MAKERS to learn from, as many of each class; of those that are asked no
  two are alike.

  Raises ValueError where there are not so many.
  """
  draw, maker = random.Random(f'{name} {asked} {seed}'), MAKERS[name]
  made, seen = maker(draw), set()
  each_class = -(-count // CLASSES[maker])
  of_class: dict[str, list[Row]] = {}
  vain = 0
  while vain < DRAWS:
    about, row = next(made)
    vain += 1
    if is_asked(about) != asked or asked and row['source'] in seen:
      continue
    seen.add(row['source'])
    of = of_class.setdefault(row['class'], [])
    if len(of) == each_class:
      continue
    of.append(row)
    vain = 0
    if sum(map(len, of_class.values())) == each_class * CLASSES[maker]:
      every = [row for of in of_class.values() for row in of]
      draw.shuffle(every)
      return every[:count]
  raise ValueError(f'{name} has no {count} rows that differ; ask for fewer')


def asked(name: str) -> Callable[[], list[Row]]:
  """What asks QUESTIONS of one of MAKERS: the data of a task."""

  def questions() -> list[Row]:
    return rows(name, QUESTIONS, asked=True)

  questions.__name__ = name
  return questions


def corpus(learned: list[Row]) -> list[str]:
  """Texts to pretrain on: all docstrings, but for those with a sentence that is asked, and rows
  that are learned from.
  """
  held = [said for said in sentences() if is_asked(said)]
  read = dict.fromkeys(docstrings())
  texts = [said for said in read if not any(each in said for each in held)]
  texts += [f'{row["source"]} {row["target"]}' for row in learned]
  random.Random(0).shuffle(texts)
  return texts
