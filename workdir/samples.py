"""What does the model write while it learns? Texts every so many steps, kept in samples.jsonl, and
shown in the report and in TensorBoard.
"""

import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

import files
import names
from data import generation
from data.tokenizer import Tokenizer
from decode.generating import generating
from decode.generator import Generator
from model import params, transformer
from training import state as states
from training.config import Config

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
  """Writes samples of a run with the parameters that it has in hand, through the generator that
  generate.py uses: a copy of the matrices in the compute dtype is in memory meanwhile.

  What is drawn depends on the parameters alone, so that a run with samples trains as one without.
  """

  def __init__(
    self, config: Config, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, directory, first
  ):
    """first: the step after which the run goes on; later samples in the file are dropped.

    Raises NotImplementedError where there is nothing to generate with, and ValueError for a prompt
    that fills the context, saying what would do.
    """
    check(config)
    limit, soft = config.model.max_length, ''
    if limit and config.adapter.soft:
      limit, soft = limit - config.adapter.tokens, ' (less the soft tokens)'
    for prompt in config.train.sample_prompts:
      if 0 < limit <= (length := 1 + len(tokenizer.encode(prompt))):
        raise ValueError(
          f'train.sample_prompts: {prompt[:40]!r} is {length} tokens, which leaves no room for new '
          f'ones in model.max_length={limit}{soft}; shorten it'
        )
    self._train, self._main = config.train, config.objective.main
    tokenizer.generation = generation.read(directory)  # where its texts end
    self._tokenizer, self._mesh = tokenizer, mesh
    self._config, network = config, generating(config.model)
    if config.adapter.base:
      network = names.imported('workdir.adapted.untied')(network)
    with jax.set_mesh(mesh):
      abstract = params.abstract(lambda: _generating(config, network), mesh)
    self._structure = jax.tree.structure(abstract)
    self._path = pathlib.Path(directory) / FILE
    kept = [sample for sample in read(directory) if sample.step <= first]
    if self._path.exists():
      files.replace(self._path, ''.join(map(_line, kept)))

  def __call__(self, step: int, models: Mapping[str, Any]) -> str:
    """Samples with the models as they are after a step; returns them as Markdown."""
    prompts = list(self._train.sample_prompts)
    model = models[self._main]
    if self._config.adapter.kind:
      merged = names.imported('workdir.adapted.merged')
      model = merged(self._config, model, models[states.ADAPTER])
    model = jax.tree.unflatten(self._structure, jax.tree.leaves(model))
    generator = Generator(model, self._tokenizer, self._mesh)
    completions = generator(prompts, **OPTIONS)
    read = self._config.model.encoder_layers > 0
    samples = [
      Sample(step, prompt, completion.text, read)
      for prompt, completion in zip(prompts, completions)
    ]
    with open(self._path, 'a') as file:
      file.writelines(map(_line, samples))
    return '\n\n'.join(fenced(sample.whole) for sample in samples)


def _generating(config: Config, network):
  """A model of a run as it generates, with its adapter merged. Traced."""
  model = transformer.init(network, 0)
  if not config.adapter.kind:
    return model
  adapter = states.new_adapter(config, model)
  return names.imported('model.adapters.merged')(model, adapter, config.adapter)


def check(config: Config) -> None:
  """Raises NotImplementedError for a run that cannot be sampled from."""
  remedy = 'leave train.sample_every at 0, and write with generate.py from its checkpoints'
  if jax.process_count() > 1:
    raise NotImplementedError(
      f'train.sample_every={config.train.sample_every} in {jax.process_count()} processes, each of '
      f'which holds a part of the texts; {remedy}'
    )
  if config.train.offload_parameters:
    raise NotImplementedError(
      f'train.sample_every={config.train.sample_every} with train.offload_parameters, which keeps '
      f"the weights in the host's memory, where nothing generates; {remedy}"
    )
  if not config.model.causal:
    raise NotImplementedError(
      f'train.sample_every={config.train.sample_every} with model.causal=False: an encoder writes '
      'no text; leave train.sample_every at 0'
    )


def read(directory: str | os.PathLike) -> list[Sample]:
  """The samples of a run, in order; a last line that was cut short is left out.

  Raises ValueError for a file that holds something else.
  """
  path = pathlib.Path(directory) / FILE
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
