"""What tunes an encoder-decoder to classify as it is asked to? The cross-entropy of the label's
word and its end of text, given the text as evaluate.py asks by the same template.
"""

import dataclasses

from data.answers import AnswerWriter
from data.template import Template
from objectives.objective import MAIN
from objectives.seq2seq import Seq2Seq


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifySeq2Seq(Seq2Seq):
  """Packed pairs, as Seq2Seq has them, each made of a text with a label (data/answers.py).

  Attributes:
    template: file of the pattern and of the labels' words (data/template.py).
  """

  tells_labels = 'words'
  kind: str = 'classify_seq2seq'
  template: str = 'configs/templates/sentiment.toml'
  term = tunes = 'classify_seq2seq'
  formats = ('label',)
  does = 'answers with the word of a label'

  def __post_init__(self):
    super().__post_init__()
    if self.prefix:
      raise ValueError(
        f'objective.prefix={self.prefix!r} would stand before the text, and evaluate.py asks '
        "without it; put it into the template's pattern"
      )
    for name in ('too_long', 'target_too_long'):
      if getattr(self, name) != 'drop':
        raise ValueError(
          f'objective.{name}={getattr(self, name)!r} would cut off a part of the question or of '
          "its word; use 'drop'"
        )

  def accepts(self, models):
    config = models[MAIN]
    if not config.encoder_layers:
      form = 'prefix' if config.causal else 'cloze'
      raise NotImplementedError(
        f'objective.kind={self.kind!r} {self.does} to what an encoder read, and '
        'model.encoder_layers=0 has no encoder beside a decoder; use '
        f"objective.kind='classify' with objective.form={form!r}"
      )
    super().accepts(models)

  def writer(self, tokenizer):
    return AnswerWriter(Template.read(self.template), tokenizer), tokenizer

  def facts(self, config):
    return super().facts(config) | {'answers': Template.read(self.template).values()}
