"""What does a model say to questions, and what counts of it? A way to score for every kind of task,
each of which gives lines, one a question, with all that scores are made of.

A line depends on its question, and on which are scored with it: blocks begin at multiples
of `Scorer.block`, so that an evaluation that was interrupted goes on with the same lines.
"""

import abc
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from data.records import LabelRecord
from data.template import Template, mask_of
from decode.choices import PairScore, room, score_pairs
from decode.generator import Generator
from decode.request import FAILED
from evaluation import writing
from evaluation.classify import CONTENT_FREE, asking_of, label_scores, probabilities
from evaluation.examples import Asker, Item, Manner, Questions, fitted, is_pairs
from evaluation.measures import Measure, chance_of, classified, measures
from evaluation.pseudo import pair_scores
from evaluation.sandbox import CONFINED
from evaluation.task import Classification, Generate, MultipleChoice, Perplexity, Task, at_fault

Line = dict
# Tokens of a window where the model has no end of positions, and what it reads at a time at most.
WINDOW = 2048


class Scorer(abc.ABC):
  """Scores questions of a task by a model.

  Attributes:
    measures: what is told, the first first. block: questions that are scored together.
  """

  block = 64

  def __init__(
    self, model: Generator, task: Task, manner: Manner, asked: Questions | Sequence[Item]
  ):
    self.model, self.task, self.manner, self.asked = model, task, manner, asked
    self.asker = Asker(model, task, manner)
    self.measures: list[Measure] = measures(task)

  def lines(self, first: int = 0) -> Iterator[list[Line]]:
    """Of the questions from this one on, in order, some at a time; a multiple of `block`."""
    rest = itertools.islice(self.asked, first, None)
    for begin in itertools.count(first, self.block):
      here = [*itertools.islice(rest, self.block)]
      if not here:
        return
      more = self.scores(here)
      yield [
        {'i': begin + i, 'place': asked.place, 'digest': asked.digest, 'prompt': asked.prompt}
        | line
        for i, (asked, line) in enumerate(zip(here, more, strict=True))
      ]

  @abc.abstractmethod
  def scores(self, asked: Sequence[Item]) -> list[Line]:
    """What a line says besides, of each."""

  def guessed(self, asked: Item) -> int:
    """Among how many who knows nothing guesses; 0: there is nothing to guess."""
    return 0

  @property
  def chance(self) -> float:
    """The score of who knows nothing."""
    return self.chance_among(map(self.guessed, self.asked))

  def chance_among(self, guessed: Iterable[int]) -> float:
    """The same, where it is known of every question among how many."""
    return chance_of(self.task, [n for n in guessed if n])


def scorer(
  model: Generator, task: Task, manner: Manner, asked: Questions | Sequence[Item]
) -> Scorer:
  """Of the task's kind. Raises ValueError where the model cannot be asked so."""
  kinds = {
    MultipleChoice: Choosing,
    Classification: Labelling,
    Perplexity: Foretelling,
    Generate: Writing,
  }
  made = kinds[type(task.kind)]
  if made is Choosing and not model.model.config.causal:
    made = BlankFilling
  return made(model, task, manner, asked)


class Choosing(Scorer):
  """Of a MultipleChoice: log-probabilities of the choices of each, whose context is read once."""

  def scores(self, asked):
    kind, contexts, behind, cuts = self.task.kind, [], [], []
    for each in asked:
      answers = [self.asker.answer(choice) for choice in each.choices]
      ids, of_answers, cut = self.asker.pairs(self.asker.text(each), answers)
      contexts += [ids] * len(of_answers)
      behind += of_answers
      cuts.append(cut)
    pairs = len(contexts)
    if kind.calibration == 'pmi':
      empty = Item('', {}, kind.empty)
      for each in asked:
        answers = [self.asker.answer(choice) for choice in each.choices]
        ids, of_answers, _ = self.asker.pairs(self.asker.text(empty), answers)
        contexts += [ids] * len(of_answers)
        behind += of_answers
    scored = score_pairs(self.model, contexts, behind)
    said, free = iter(scored[:pairs]), iter(scored[pairs:])
    lines = []
    for each, cut in zip(asked, cuts, strict=True):
      own = [next(said) for _ in each.choices]
      nothing = [next(free) for _ in each.choices] if kind.calibration == 'pmi' else None
      lines.append(self._line(each, own, nothing) | {'cut': int(cut)})
    return lines

  def _line(self, each: Item, scored, free) -> Line:
    sums = np.array([score.logprob for score in scored])
    line = {
      'choices': [*each.choices],
      'logprobs': plain(sums),
      'tokens': [score.tokens for score in scored],
      'greedy': [score.greedy for score in scored],
      'truth': each.truth,
    }
    sizes = np.array([self._size(*pair) for pair in zip(each.choices, scored)], np.float64)
    normalised = sums / sizes
    if free is not None:
      nothing = np.array([score.logprob for score in free])
      line['logprobs behind nothing'] = plain(nothing)
      normalised = (sums - nothing) / sizes
    nan = not np.isfinite(normalised).all()
    stats = {}
    pairs = is_pairs(self.task)
    for measure, scores in zip(self.measures, (normalised, sums)):
      said = -1 if nan else likeliest(scores, pairs)
      stats[measure.name] = [float(said == each.truth), 1.0]
    said = -1 if nan else likeliest(normalised, pairs)
    return line | {'said': said, 'nan': int(nan), 'stats': stats}

  def _size(self, choice: str, score) -> int:
    """What the log-probability of a choice is divided by; a choice of no text by 1."""
    sizes = {
      'sum': 1,
      'token': score.tokens,
      'character': len(choice),
      'byte': len(choice.encode()),
    }
    return max(sizes[self.task.kind.normalise], 1)

  def guessed(self, asked):
    return len(asked.choices)


def likeliest(scores: np.ndarray, pairs: bool) -> int:
  """Which of several choices is said. Of two texts of a minimal pair none where they are as likely,
  -1: the right one has to be the likelier one, as BLiMP has it (Warstadt et al. 2020), or a model
  that tells nothing apart would be right always. Else the first of those that are as likely, as
  lm_eval has it.
  """
  if pairs and scores.min() == scores.max():
    return -1
  return int(scores.argmax())


class BlankFilling(Choosing):
  """Of pairs of texts, by an encoder: pseudo-log-likelihoods of what both have."""

  def __init__(self, model, task, manner, asked):
    super().__init__(model, task, manner, asked)
    if manner.system or manner.chat:
      raise ValueError('--system and --chat are of models that write; leave them out')
    mask_of(model.tokenizer)

  def scores(self, asked):
    pairs = pair_scores(self.model, [tuple(each.choices) for each in asked])
    lines = []
    for each, pair in zip(asked, pairs, strict=True):
      scored = [PairScore(math.fsum(logs), len(logs), False) for logs in pair]
      lines.append(self._line(each, scored, None) | {'cut': 0})
    return lines


class Labelling(Scorer):
  """Of a Classification: probabilities of labels, as evaluation.classify has them."""

  def __init__(self, model, task, manner, asked):
    self._template = Template.read(task.kind.template)
    super().__init__(model, task, manner, asked)
    _check_unasked(task, manner, 'whose template is all that is said')
    self._asking = asking_of(model, self._template)
    self._free = None
    for each in asked:
      for text, label in ((each.prompt, each.choices[0]), *each.shots):
        self._template.number(each.place, LabelRecord(text, label))

  def scores(self, asked):
    asking, template = self._asking, self._template
    questions = [(each.prompt, self._shown(each)) for each in asked]
    scores, cut = label_scores(self.model, asking, questions)
    if self._free is None and self.task.kind.calibration != 'none':
      nothing = [(text, self._shown(next(iter(self.asked)))) for text in CONTENT_FREE]
      self._free, _ = label_scores(self.model, asking, nothing)
    free = np.zeros_like(scores[:1]) if self._free is None else self._free
    lines = []
    for each, row, was_cut in zip(asked, scores, cut.tolist(), strict=True):
      truth = template.labels.index(each.choices[0])
      p = probabilities(row[None], free, self.task.kind.calibration)[0]
      nan = not np.isfinite(p).all()
      stats = classified(np.eye(len(p))[truth - 1] if nan else p, truth)
      lines.append(
        {
          'labels': dict(zip(template.labels, plain(p))),
          'truth': each.choices[0],
          'said': '' if nan else template.labels[int(p.argmax())],
          'cut': int(was_cut),
          'nan': int(nan),
          'stats': stats,
        }
      )
    return lines

  def _shown(self, each: Item) -> list[LabelRecord]:
    return [LabelRecord(*shot) for shot in each.shots]

  def guessed(self, asked):
    return len(self._template.labels)


def _check_unasked(task: Task, manner: Manner, why: str) -> None:
  """Raises ValueError for what would stand before questions, where nothing does."""
  for name, said in (('--system', manner.system), ('instruction', task.instruction)):
    if said:
      raise ValueError(f'{name}={said!r} is not of a {type(task.kind).__name__}, {why}')


class Foretelling(Scorer):
  """Of a Perplexity: log-probabilities of all tokens of each text."""

  block = 16

  def __init__(self, model, task, manner, asked):
    super().__init__(model, task, manner, asked)
    _check_unasked(task, manner, 'which is of texts as they are')

  def scores(self, asked):
    contexts, behind, texts = [], [], []
    size, new = self.window()
    begin = self.model.tokenizer.bos
    for each in asked:
      ids = self.model.tokenizer.encode(each.prompt)
      pairs = windows(ids, begin, size, new)
      contexts += [context for context, _ in pairs]
      behind += [ids for _, ids in pairs]
      texts.append((each.prompt, len(ids), len(pairs)))
    scored = iter(score_pairs(self.model, contexts, behind)) if contexts else iter(())
    lines = []
    for text, tokens, count in texts:
      nats = -sum(next(scored).logprob for _ in range(count))
      sums = [nats, float(tokens), float(len(text.encode())), float(len(text.split()))]
      nan = not math.isfinite(nats)
      # What is no number cannot be added to others: the document is left out, and counted.
      stats = None if nan else {measure.name: sums for measure in self.measures}
      line = {'nats': plain([nats])[0], 'tokens': tokens, 'windows': count, 'nan': int(nan)}
      lines.append(line | {'empty': int(not tokens), 'stats': stats})
    return lines

  def window(self) -> tuple[int, int]:
    """(tokens that are read at a time, new ones of them at most)."""
    kind, context = self.task.kind, self.model.context
    if kind.window > context:
      raise ValueError(f'window={kind.window} passes {self.model.plain.limit}; make it smaller')
    size = kind.window or min(context, WINDOW)
    return size, min(kind.stride or size, size)


def windows(
  ids: Sequence[int], begin: int, size: int, new: int
) -> list[tuple[list[int], list[int]]]:
  """(what is before them, tokens) of a text, in which each token is once: the first `size` behind
  `begin`, then `new` at a time, each behind as many as there is room for in `size` that are read.
  """
  whole, parts, at = [begin, *ids], [], 1
  while at < len(whole):
    end = min(len(whole), at + (size if at == 1 else new))
    parts.append((whole[max(0, end - 1 - size) : at], whole[at:end]))
    at = end
  return parts


class Writing(Scorer):
  """Of a Generate: answers, and what metrics make of them."""

  def __init__(self, model, task, manner, asked):
    # What an engine has room for depends on all prompts: they are in memory.
    super().__init__(model, task, manner, [*asked])
    self._metrics = task.measured
    kind = task.kind
    if kind.program and not manner.programs:
      raise ValueError(
        'its answers are programs, which have to run to be judged: evaluate.py '
        f'--run_programs={CONFINED} runs them without files and network, =trusted with the rights '
        'of who evaluates'
      )
    self.block = writing.together(model, kind)
    limit = room(model, 1) if self.asker.encoder else room(model, kind.max_new_tokens + 1)
    if limit < 1:
      raise ValueError(
        f'max_new_tokens={kind.max_new_tokens} leaves no room for a prompt in {model.plain.limit}; '
        'make it smaller'
      )
    whole = [self.asker.ids(self.asker.text(each)) for each in asked]
    self._ids = [fitted(ids, limit) for ids in whole]
    self._cut = [len(a) < len(b) for a, b in zip(self._ids, whole)]

  def lines(self, first=0):
    # What was written before counts in what metrics say of themselves: how many references.
    for each in {len(each.references): each for each in self.asked[:first]}.values():
      self._stats(each, '', dict(each.row) | {'samples': self.task.kind.samples, 'passed': 0})
    kind = self.task.kind
    if self.manner.chat and kind.program:
      # A chat may write a program whole, and about it: what of that is one `program` finds.
      kind = dataclasses.replace(kind, stops=())
    written = writing.answers(self.model, self._ids, kind, self.manner.seed, first)
    for i, answers in enumerate(written, first):
      each = self.asked[i]
      line = {'i': i, 'place': each.place, 'digest': each.digest, 'prompt': each.prompt}
      yield [line | {'cut': int(self._cut[i])} | self._line(each, answers)]

  def scores(self, asked):
    raise NotImplementedError('answers end in an order of their own; ask for lines')

  def _line(self, each: Item, answers: Sequence[writing.Reply]) -> Line:
    kind, row = self.task.kind, dict(each.row)
    said = [self._extracted(each, answer.text) for answer in answers]
    faults = [self.manner.programs.fault(kind.program(text, row)) for text in said if kind.program]
    if kind.program:
      row |= {'samples': len(said), 'passed': faults.count('')}
    elif kind.passed:
      row |= {'samples': len(said), 'passed': sum(bool(kind.passed(text, row)) for text in said)}
    line = {
      'answers': [answer.text for answer in answers],
      'judged': said,
      'references': [*each.references],
      'finish': [answer.finish for answer in answers],
    }
    if kind.passed or kind.program:
      line['passed'] = row['passed']
    if kind.program:
      line['faults'] = faults
    counts = {
      'empty': sum(not text.strip() for text in said),
      'endless': sum(answer.finish == 'length' for answer in answers),
      'failed': sum(answer.finish == FAILED for answer in answers),
    }
    return line | counts | {'stats': self._stats(each, said[0], row)}

  def _stats(self, each: Item, said: str, row: dict) -> dict[str, list[float]]:
    references = [*each.references]
    try:
      return {m.name: m.statistics(said, references, row).tolist() for m in self._metrics}
    except ValueError as error:
      raise ValueError(f'{each.place}: {error}') from error

  def _extracted(self, each: Item, text: str) -> str:
    if self.task.kind.extract is None:
      return text.strip()
    try:
      return str(self.task.kind.extract(text))
    except Exception as error:  # the function of a task's file
      name = getattr(self.task.kind.extract, '__code__', None)
      where = name.co_filename if name else 'extract'
      raise ValueError(f'{each.place}: {at_fault(where, error)}') from error


def plain(values: Iterable[float]) -> list[float | None]:
  """As JSON has them: None for what is no number."""
  return [float(x) if math.isfinite(x) else None for x in values]
