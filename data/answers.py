"""How do texts with labels become pairs? The source is what evaluate.py has an encoder-decoder
read, the target the word of the label, with the end of text behind it.
"""

import numpy as np

from data.labelled import asked
from data.pairs import Pair
from data.records import Record
from data.template import TARGET, Asking, Template
from data.tokenizer import Tokenizer


class AnswerWriter:
  """Makes pairs of labelled texts; the label is its first word in the template.

  Raises ValueError as template.Asking.
  """

  def __init__(self, template: Template, tokenizer: Tokenizer):
    self.asking = Asking(template, tokenizer, TARGET)
    self._answers: dict[int, tuple[int, ...]] = {}
    for word in self.asking.words:
      self._answers.setdefault(word.label, word.ids)

  def example(self, place: str, record: Record) -> Pair:
    """Raises ValueError, naming the place, for no labelled text, and for an unknown label."""
    read, label = asked(self.asking, place, record)
    return Pair.of(np.array(read, np.int32), np.array(self._answers[label], np.int32))
