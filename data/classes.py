"""How do texts with labels become rows for a head that names labels by their numbers?

    decoder   <s> text         the last token has the label's number as its target
    encoder   <s> text </s>    the first one has

All other targets weigh nothing. So rows are packed, split and cut like any others.
"""

from collections.abc import Sequence

import numpy as np

from data.batch import Batch
from data.conversations import Example
from data.labelled import in_places
from data.loader import Loader, ValidationBatches
from data.records import LabelRecord, Record
from data.template import Template
from data.tokenizer import Tokenizer, in_utf8


def ids_of(text: str, tokenizer: Tokenizer, causal: bool) -> list[int]:
  """What a model with a head reads of a text. Raises ValueError for what is no UTF-8."""
  ids = [tokenizer.bos, *tokenizer.encode(in_utf8(text))]
  return ids if causal else [*ids, tokenizer.eos]


def within(ids: Sequence[int], limit: int, side: str, causal: bool) -> list[int]:
  """At most so many of `ids_of`: of the text itself the 'left' or the 'right' end is cut off.

  Raises ValueError where no token of it would be left.
  """
  if len(ids) <= limit:
    return [*ids]
  end = [] if causal else [*ids[-1:]]
  inside, room = ids[1 : len(ids) - len(end)], limit - 1 - len(end)
  if room < 1:
    raise ValueError(f'rows of {limit} tokens have no room for a text; make them longer')
  return [ids[0], *(inside[-room:] if side == 'left' else inside[:room]), *end]


class ClassWriter:
  """Makes examples of labelled texts: the ids that a model reads, and behind them the number of the
  label in the template's order, which is learned.

  Raises ValueError for more labels than the tokenizer has ids, below which numbers are stored.
  """

  def __init__(self, template: Template, tokenizer: Tokenizer, causal: bool):
    self._template, self._tokenizer, self._causal = template, tokenizer, causal
    if len(template.labels) > tokenizer.vocabulary:
      raise ValueError(
        f'{len(template.labels)} labels are more than the {tokenizer.vocabulary} ids of the '
        'tokenizer; take one with more, or fewer labels'
      )

  def example(self, place: str, record: Record) -> Example:
    """Raises ValueError, naming the place, for no labelled text, and for an unknown label."""
    if not isinstance(record, LabelRecord):
      raise ValueError(
        f"{place}: objective.kind='classify_head' takes records of a text and a label; set "
        'source.format=label'
      )
    label = self._template.number(place, record)
    try:
      read = ids_of(record.text, self._tokenizer, self._causal)
    except ValueError as error:
      raise ValueError(f'{place}: {error}') from error
    return Example(np.array([*read, label], np.int32), np.arange(len(read) + 1) == len(read))


class _Firsts:
  """Rows of an encoder, whose first tokens have the targets."""

  def _fill(self, index: int, batch: Batch, into: int) -> None:
    super()._fill(index, batch, into)
    begins = (batch.positions[into] == 0) & (batch.segments[into] > 0)
    in_places(batch, into, np.flatnonzero(begins))


class FirstLoader(_Firsts, Loader):
  """As Loader, of examples of a ClassWriter for an encoder."""


class FirstValidation(_Firsts, ValidationBatches):
  """As ValidationBatches, of examples of a ClassWriter for an encoder."""
