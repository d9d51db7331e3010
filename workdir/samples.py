"""What does the model write while it learns? Texts every so many steps, kept in samples.jsonl, and
shown in the report and in TensorBoard.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

import files
from data.tokenizer import Tokenizer
from training.config import Config
from workdir.in_hand import InHand

FILE = 'samples.jsonl'
# The same draws each time: what differs is the model.
OPTIONS = {'max_new_tokens': 64, 'temperature': 0.7, 'seed': 0}
SHOWN = 6  # steps in a report, the last one among them


class Sample(NamedTuple):
  """What was written at a step after a prompt; read: which an encoder read, so that the text does
  not go on from it.
  """

  step: int
  prompt: str
  text: str
  read: bool = False

  @property
  def whole(self) -> str:
    """Both, as they are shown."""
    return self.prompt + ('\n-> ' if self.read else '') + self.text


class Sampler:
  """Writes samples of a run with the parameters that it has in hand.

  What is drawn depends on the parameters alone, so that a run with samples trains as one without.
  """

  def __init__(
    self, config: Config, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, directory, first
  ):
    """first: the step after which the run goes on; later samples in the file are dropped.

    Raises NotImplementedError where there is nothing to generate with, and ValueError for a prompt
    that fills the context, saying what would do.
    """
    self._in_hand = InHand(config, tokenizer, mesh, directory)
    limit, soft = config.model.max_length, ''
    if limit and config.adapter.soft:
      limit, soft = limit - config.adapter.tokens, ' (less the soft tokens)'
    for prompt in config.train.sample_prompts:
      if 0 < limit <= (length := 1 + len(tokenizer.encode(prompt))):
        raise ValueError(
          f'train.sample_prompts: {prompt[:40]!r} is {length} tokens, which leaves no room for new '
          f'ones in model.max_length={limit}{soft}; shorten it'
        )
    self._prompts = list(config.train.sample_prompts)
    self._read = config.model.encoder_layers > 0
    self._path = files.place(directory) / FILE
    kept = [sample for sample in read(directory) if sample.step <= first]
    if self._path.exists():
      files.replace(self._path, ''.join(map(_line, kept)))

  def __call__(self, step: int, models: Mapping[str, Any]) -> str:
    """Samples with the models as they are after a step; returns them as Markdown."""
    completions = self._in_hand.generator(models)(self._prompts, **OPTIONS)
    samples = [
      Sample(step, prompt, completion.text, self._read)
      for prompt, completion in zip(self._prompts, completions)
    ]
    with self._path.open('a') as file:
      file.writelines(map(_line, samples))
    return '\n\n'.join(fenced(sample.whole) for sample in samples)


def read(directory: str | os.PathLike) -> list[Sample]:
  """The samples of a run, in order; a last line that was cut short is left out.

  Raises ValueError for a file that holds something else.
  """
  path = files.place(directory) / FILE
  lines = path.read_text().split('\n')[:-1] if path.exists() else []
  return [_parsed(line, f'{path}, line {number}') for number, line in enumerate(lines, 1)]


def markdown(samples: Sequence[Sample]) -> str:
  """For a report: at a few steps over the run, each text as it was; '' without samples."""
  steps = sorted({sample.step for sample in samples})
  spacing = -(-len(steps) // SHOWN)
  shown = set(steps[::-1][:: max(1, spacing)])
  parts = []
  for step in steps:
    if step in shown:
      parts.append(f'Step {step:,}:')
      parts += [fenced(s.whole) for s in samples if s.step == step]
  return '\n\n'.join(parts)


def fenced(text: str) -> str:
  """A text as Markdown that shows it as it is, whatever it holds."""
  fence = '`' * max(3, 1 + max(map(len, re.findall('`+', text)), default=0))
  return f'{fence}text\n{text}\n{fence}'


def _line(sample: Sample) -> str:
  return json.dumps(sample._asdict()) + '\n'


def _parsed(line: str, place: str) -> Sample:
  values = files.json_object(line, place)
  try:
    return Sample(**values)
  except TypeError as error:
    raise ValueError(f'{place} is no sample ({error}); remove it to go on') from error
