"""How good is a text that a model wrote? Numbers of answers and what they should have been, each of
sums over documents, so that a bootstrap resamples rows of an array and counts no text twice.

S statistics of a document
"""

import abc
import collections
import functools
import importlib
import io
import os
import re
import string
import types
import warnings
from collections.abc import Callable, Sequence

import numpy as np

import names
from evaluation.arithmetic import agree, last_number
from evaluation.refusals import refuses
from evaluation.words import split_words, split_words_and_signs

ROUGE = ('rouge1', 'rouge2', 'rougeL', 'rougeLsum')
BLEU_TOKENIZERS = ('13a', 'intl', 'zh', 'char', 'none')
# Where WordNet's own programs look for its files.
WORDNET = 'WNSEARCHDIR'
LEXNAMES = 45
ARTICLES = re.compile(r'\b(a|an|the)\b')


class Metric(abc.ABC):
  """A number of answers.

  Attributes:
    name: with every setting that changes the number.
    lower_is_better: as of error rates.
    rate: whether it is a share of documents, each of which counts 0 or 1.
  """

  name: str
  lower_is_better = False
  rate = False

  @abc.abstractmethod
  def statistics(self, answer: str, references: list[str], row: dict) -> np.ndarray:
    """[S] f64 of a document, whose sum over documents is all that `value` needs.

    references: any of which would be right. row: the document's record.
    Raises ValueError where the metric needs what is not there.
    """

  @abc.abstractmethod
  def value(self, total: np.ndarray) -> float:
    """Of statistics [S] summed over documents."""

  @property
  def signature(self) -> str:
    """How to get the same number elsewhere, where its library has a form for that."""
    return ''


class Mean(Metric):
  """The mean over documents of `of`."""

  @abc.abstractmethod
  def of(self, answer: str, references: list[str], row: dict) -> float:
    """Of a document."""

  def statistics(self, answer, references, row):
    return np.array([self.of(answer, references, row), 1.0])

  def value(self, total):
    return _share(total)


class Corpus(Metric):
  """A metric of sacrebleu: of counts that are summed over documents, no mean of theirs."""

  def __init__(self, kind: str, name: str, lower_is_better: bool = False, **settings):
    """kind: the class in sacrebleu; settings: its arguments."""
    self._metric = getattr(_library('sacrebleu.metrics', 'sacrebleu'), kind)(**settings)
    self._counts: set[int] = set()
    self.name, self.lower_is_better = name, lower_is_better

  def statistics(self, answer, references, row):
    # As sacrebleu has it: an empty reference among others is none.
    given = [text for text in _needed(self, references) if text]
    if not given:
      raise ValueError(f'{self.name}: a document has empty references only; leave it out')
    self._counts.add(len(given))
    [made] = self._metric._extract_corpus_statistics([answer], [[text] for text in given])
    return np.array(made, np.float64)

  def value(self, total):
    return float(self._metric._compute_score_from_stats(total.tolist()).score)

  @property
  def signature(self):
    """Of what was counted until now: the numbers of references are in it."""
    self._metric.num_refs = -1 if len(self._counts) > 1 else next(iter(self._counts), 1)
    return str(self._metric.get_signature())


def bleu(tokenize: str = '13a') -> Metric:
  """BLEU (Papineni et al. 2002), 0 to 100. tokenize: 'zh' and 'char' for scripts without spaces."""
  names.check('tokenize', tokenize, BLEU_TOKENIZERS)
  return Corpus('BLEU', f'BLEU ({tokenize})', tokenize=tokenize, force=True)


def chrf(word_order: int = 0) -> Metric:
  """chrF2 (Popović 2015), 0 to 100; with n-grams of two words, too, chrF2++."""
  return Corpus('CHRF', 'chrF2' + '+' * word_order, word_order=word_order)


def ter() -> Metric:
  """Translation edit rate (Snover et al. 2006), in per cent; above 100 for answers too long."""
  return Corpus('TER', 'TER', lower_is_better=True)


class Rouge(Mean):
  """F1 of n-grams or of the longest common subsequence (Lin 2004); the best of the references.

  Args:
    kind: of ROUGE; 'rougeLsum' takes lines for sentences.
    stemmed: by Porter's rules for English.
    words: 'ascii', as rouge-score has it, which drops every letter but a to z; 'unicode': whatever
      a letter or digit is in any script.
  """

  def __init__(self, kind: str, stemmed: bool = False, words: str = 'ascii'):
    names.check('ROUGE', kind, ROUGE)
    names.check('words', words, ('ascii', 'unicode'))
    if stemmed and words == 'unicode':
      raise ValueError('stemmed=True is for words in ASCII: its rules are those of English')
    self._kind = kind
    made = _library('rouge_score.rouge_scorer', 'rouge-score')
    tokenizer = types.SimpleNamespace(tokenize=_unicode_words) if words == 'unicode' else None
    self._scorer = made.RougeScorer([kind], use_stemmer=stemmed, tokenizer=tokenizer)
    settings = ['stemmed' if stemmed else 'not stemmed', *(['unicode'] if tokenizer else [])]
    self.name = f'{kind} ({", ".join(settings)})'

  def of(self, answer, references, row):
    scores = (self._scorer.score(text, answer) for text in _needed(self, references))
    return max(score[self._kind].fmeasure for score in scores)


class Meteor(Mean):
  """METEOR as nltk has it (Banerjee and Lavie 2005): words that are equal, then stems, then
  synonyms (of stems: of 'automobile' there are none), less a penalty for their order; the best of
  the references.

  wordnet: directory of WordNet's files, for synonyms; '': those are not looked for.
  Raises ValueError where it is none.
  """

  def __init__(self, wordnet: str = ''):
    self._score = _library('nltk.translate.meteor_score', 'nltk').single_meteor_score
    self._words = _library('nltk.tokenize', 'nltk').NLTKWordTokenizer()
    if wordnet and not os.path.exists(os.path.join(wordnet, 'index.noun')):
      raise ValueError(
        f'{wordnet} has no WordNet (no file index.noun); give its directory of index and data '
        f'files by {WORDNET}, or unset that, and synonyms are left out'
      )
    self._synonyms = (
      _wordnet(wordnet) if wordnet else types.SimpleNamespace(synsets=lambda word: ())
    )
    self.name = f'METEOR (exact, stem{", synonyms" if wordnet else "; no synonyms"})'

  def of(self, answer, references, row):
    said = self._words.tokenize(answer)
    return max(
      self._score(self._words.tokenize(text), said, wordnet=self._synonyms)
      for text in _needed(self, references)
    )


def normalised(text: str) -> str:
  """As SQuAD's own script has it (Rajpurkar et al. 2016): lower case, without ASCII punctuation and
  English articles, single spaces.
  """
  text = text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
  return ' '.join(ARTICLES.sub(' ', text).split())


class ExactMatch(Mean):
  """The share of answers that are one of their references, normalised."""

  name = 'exact match (SQuAD)'
  rate = True

  def of(self, answer, references, row):
    return float(normalised(answer) in map(normalised, _needed(self, references)))


class TokenF1(Mean):
  """F1 of words as bags, normalised; the best of the references. Where a side has no words, 1 if
  the other has none (as SQuAD 2.0 has it).
  """

  name = 'token F1 (SQuAD)'

  def of(self, answer, references, row):
    return max(_f1(normalised(answer), normalised(text)) for text in _needed(self, references))


class NumberMatch(Mean):
  """The share of answers whose last number is the last one of a reference (GSM8K: '#### 18')."""

  name = 'number match'
  rate = True

  def of(self, answer, references, row):
    numbers = [last_number(text) for text in _needed(self, references)]
    if None in numbers:
      text = references[numbers.index(None)]
      raise ValueError(f'{self.name}: the reference {text[-60:]!r} names no number; leave it out')
    return float(any(agree(answer, text) for text in references))


class Distinct(Metric):
  """n-grams of words that differ over all of an answer (Li et al., arXiv:1510.03055), summed over
  answers: what an answer repeats counts, not what answers have in common. 0 where there are none.
  """

  def __init__(self, n: int):
    self._n = n
    self.name = f'distinct-{n} (within answers)'

  def statistics(self, answer, references, row):
    counts = _ngrams(answer, self._n)
    return np.array([len(counts), counts.total()], np.float64)

  def value(self, total):
    return _share(total)


class Repetition(Metric):
  """seq-rep-n (Welleck et al., arXiv:1908.04319): the share of an answer's n-grams of words that
  came before in it, mean over answers that have any. 0 where none has.
  """

  lower_is_better = True

  def __init__(self, n: int = 4):
    self._n = n
    self.name = f'repetition-{n}'

  def statistics(self, answer, references, row):
    counts = _ngrams(answer, self._n)
    if not counts:
      return np.zeros(2)
    return np.array([1 - len(counts) / counts.total(), 1.0])

  def value(self, total):
    return _share(total)


class Length(Mean):
  """The mean length of answers, in 'words' (white space is between them) or 'characters'."""

  def __init__(self, unit: str = 'words'):
    self._unit = names.check('unit', unit, ('words', 'characters'))
    self.name = f'length ({unit})'

  def of(self, answer, references, row):
    return float(len(answer.split() if self._unit == 'words' else answer))


class Refusal(Mean):
  """The share of answers that refuse, by rules (evaluation/refusals.py), for English."""

  name = 'refusal (rules)'
  rate = True

  def of(self, answer, references, row):
    return float(refuses(answer))


class PassAt(Mean):
  """pass@k: row['samples'] programs were drawn for a problem, of which row['passed'] pass."""

  def __init__(self, k: int):
    self._k = k
    self.name = f'pass@{k}'

  def of(self, answer, references, row):
    missing = [key for key in ('samples', 'passed') if key not in row]
    if missing:
      raise ValueError(f'{self.name}: a record has no {missing[0]!r}; it has {", ".join(row)}')
    return pass_at(self._k, row['samples'], row['passed'])


def pass_at(k: int, samples: int, passed: int) -> float:
  """The probability that of k of the samples, drawn without putting back, one has passed: without
  bias that of k new ones (Chen et al., arXiv:2107.03374, equation 1).

  Raises ValueError for fewer than k samples, or more that passed than there are.
  """
  if not 0 <= passed <= samples or not 1 <= k <= samples:
    raise ValueError(
      f'pass@{k} of {samples} samples, of which {passed} passed: k must be in [1, {samples}], and '
      f'what passed in [0, {samples}]; draw at least k samples'
    )
  # 1 - C(samples - passed, k) / C(samples, k), without numbers that are too large for f64.
  return 1 - float(np.prod(1 - k / np.arange(samples - passed + 1, samples + 1)))


def made(metric: str) -> Metric:
  """The metric of this name in METRICS. Raises ValueError for another, ImportError naming the extra
  where its library is not there.
  """
  return METRICS[names.check('metric', metric, METRICS)]()


METRICS: dict[str, Callable[[], Metric]] = {
  'bleu': bleu,
  **{f'bleu_{name}': functools.partial(bleu, name) for name in BLEU_TOKENIZERS[1:]},
  'chrf': chrf,
  'chrf++': functools.partial(chrf, 2),
  'ter': ter,
  **{kind: functools.partial(Rouge, kind) for kind in ROUGE},
  **{f'{kind}_stemmed': functools.partial(Rouge, kind, stemmed=True) for kind in ROUGE},
  **{f'{kind}_unicode': functools.partial(Rouge, kind, words='unicode') for kind in ROUGE},
  'meteor': lambda: Meteor(os.environ.get(WORDNET, '')),
  'exact_match': ExactMatch,
  'token_f1': TokenF1,
  'number_match': NumberMatch,
  **{f'distinct_{n}': functools.partial(Distinct, n) for n in (1, 2, 3)},
  'repetition': Repetition,
  'refusal': Refusal,
  'length': Length,
  'length_characters': functools.partial(Length, 'characters'),
  **{f'pass@{k}': functools.partial(PassAt, k) for k in (1, 10, 100)},
}


def _library(module: str, package: str):
  """A module that the extra brings."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ImportError(
      f'{module} needs {package}: pip install {package} (the extra tandem[evaluate])'
    ) from error


def _wordnet(directory: str):
  """nltk's reader of WordNet, in English alone."""
  paths = _library('nltk.data', 'nltk').path
  if directory not in paths:  # outside of which nltk reads nothing
    paths.append(directory)

  class Reader(_library('nltk.corpus.reader.wordnet', 'nltk').WordNetCorpusReader):
    def open(self, file):
      # Kinds of words, of which synonyms know nothing; Debian's package has no list of them.
      if file == 'lexnames':
        return io.StringIO(''.join(f'{i:02} {i:02} 0\n' for i in range(LEXNAMES)))
      return super().open(file)

    def map_wn(self, version=''):
      return None  # to another edition, which other languages are joined by

  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # that it has no other languages
    return Reader(directory, omw_reader=None)


def _needed(metric: Metric, references: Sequence[str]) -> Sequence[str]:
  if not references:
    raise ValueError(f'{metric.name}: a document has no references; leave it out')
  return references


def _share(total: np.ndarray) -> float:
  """The first sum over the second; 0 where that is 0."""
  return float(total[0] / total[1]) if total[1] else 0.0


def _f1(said: str, true: str) -> float:
  a, b = collections.Counter(said.split()), collections.Counter(true.split())
  if not a or not b:
    return float(a == b)
  return 2 * (a & b).total() / (a.total() + b.total())


def _unicode_words(text: str) -> list[str]:
  return split_words(text.casefold())


def _ngrams(text: str, n: int) -> collections.Counter:
  words = split_words_and_signs(text)
  return collections.Counter(zip(*(words[i:] for i in range(n))))
