"""How alike are what a model wrote and what it should have written, in meaning? BERTScore (Zhang et
al., arXiv:1904.09675): every token of one side is compared with the most similar one of the other,
by the cosine of their hidden states in a model that reads.

  python -m evaluation.bertscore --workdir=runs/bert --answers=answers.jsonl --idf

A line of the file has an `answer`, and `references` (or `reference`): what it is compared with. An
evaluation's own NAME-K.jsonl of texts that a model wrote is such a file: of each question its first
answer, as it was judged.

B pairs of a batch · T tokens of an answer · S of a reference · D width · n documents
"""

import collections
import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

import commands
import files
from data.classes import ids_of, within
from data.tokenizer import in_utf8
from decode.choices import length_of, side_by_side
from decode.loaded import LoadedModel, bucket
from evaluation.intervals import Estimate, summed
from model import rearranged
from model.transformer import Decoder
from model.vocabulary import TOKENS
from parallel import axes as ax
from parallel.gathering import everywhere

HELD = 2**16  # tokens of texts whose states are held at a time, at most, but for a pair
ROWS = 64  # pairs that are compared side by side, at most
HALVES = 32  # tokens from which on texts are filled up to finer lengths than powers of two
PARTS = ('precision', 'recall', 'f1')


@dataclasses.dataclass(frozen=True)
class BertSettings:
  """What changes the number, with the model.

  Attributes:
    layer: whose output is compared, from 1 on; 0: the last one. Which is best was found on human
      ratings, for each model (bert-base 9 of 12, bert-large 18 of 24, in bert-score's table).
    idf: weighs a token of an id in c of n references by log((n + 1) / (c + 1)); otherwise all weigh
      the same.
    baseline: a file of bert-score, LAYER,P,R,F: what unlike texts get, which becomes 0; '': none.
  """

  layer: int = 0
  idf: bool = False
  baseline: str = ''

  @property
  def name(self) -> str:
    """For a number of it."""
    rescaled = f'rescaled by {os.path.basename(self.baseline)}' if self.baseline else 'not rescaled'
    layer = f'layer {self.layer}' if self.layer else 'last layer'
    return f'BERTScore ({layer}, {"idf" if self.idf else "no idf"}, {rescaled})'


class BertScore:
  """Scores of texts by a model of any family: an encoder, an encoder of an encoder-decoder, or what
  a decoder makes of a text that it reads from left to right.

  Raises ValueError for a layer that the model does not have, and for a baseline without it.
  """

  def __init__(self, model: LoadedModel, settings: BertSettings = BertSettings()):
    config = model.model.config
    layers = config.encoder_layers or config.L
    if not 0 <= settings.layer <= layers:
      raise ValueError(
        f'layer={settings.layer}: this model has {layers}; give one in [1, {layers}], or 0 for the '
        'last'
      )
    self._layer = settings.layer or layers
    self.settings = dataclasses.replace(settings, layer=self._layer)
    self._baseline = _baseline(settings.baseline, self._layer)
    self._loaded = model
    self._seq2seq = config.encoder_layers > 0
    self._causal = config.causal and not self._seq2seq
    self._around = 1 if self._seq2seq or self._causal else 2  # ids that stand around any text
    with jax.set_mesh(model.mesh):
      self._model = _first_layers(model.model, self._layer)

  def __call__(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """[n, 3] f64: precision, recall and F1 of each answer; of several references the best of each.

    An answer, or a reference, without a token of its own has 0, before it is rescaled. Raises
    ValueError for no answers, and for an answer without references.
    """
    if not answers or len(answers) != len(references) or not all(references):
      raise ValueError(
        f'{len(answers)} answers and {len(references)} lists of references: give each answer a '
        'list of at least one'
      )
    said = [self._ids(text.strip()) for text in answers]
    true = [[self._ids(text.strip()) for text in each] for each in references]
    weights = self._weights([*itertools.chain.from_iterable(true)])
    pairs = [(i, a, b) for i, a in enumerate(said) for b in true[i]]
    scores = np.full((len(answers), 3), -np.inf)
    for here, made in self._batches(pairs, weights):
      np.maximum.at(scores, [pairs[p][0] for p in here], made)
    return (scores - self._baseline) / (1 - self._baseline)

  def _ids(self, text: str) -> list[int]:
    tokenizer, limit = self._loaded.tokenizer, self._loaded.context
    if self._seq2seq:  # whose encoder reads no beginning of text
      return [*tokenizer.encode(in_utf8(text))[: limit - 1], tokenizer.eos]
    return within(ids_of(text, tokenizer, self._causal), limit, 'right', self._causal)

  def _weights(self, references: Sequence[Sequence[int]]) -> Mapping[int, float]:
    """Of every id."""
    if not self.settings.idf:
      # What every text has says nothing of it, but that of a T5 counts, as in bert-score.
      around = () if self._seq2seq else (self._loaded.tokenizer.bos, self._loaded.tokenizer.eos)
      return collections.defaultdict(lambda: 1.0, {i: 0.0 for i in around})
    n = len(references)
    counts = collections.Counter(itertools.chain.from_iterable(map(set, references)))
    weights = {i: math.log((n + 1) / (count + 1)) for i, count in counts.items()}
    return collections.defaultdict(lambda: math.log(n + 1), weights)

  def _batches(self, pairs, weights) -> Iterator[tuple[list[int], np.ndarray]]:
    """(places of pairs, their scores [.., 3]): long ones first, those of about the same length side
    by side. A text is read once for all pairs of a block that have it.
    """
    longest = [max(len(said), len(true)) for _, said, true in pairs]
    order = sorted(range(len(pairs)), key=lambda p: (-longest[p], p))
    while order:
      count = max(1, HELD // (2 * self._length(longest[order[0]])))
      block, order = order[:count], order[count:]
      states = self._read({tuple(ids) for p in block for ids in pairs[p][1:]})
      for first in range(0, len(block), ROWS):
        here = block[first : first + ROWS]
        rows = -(-bucket(len(here), 1) // self._loaded.parts) * self._loaded.parts
        length = self._length(longest[here[0]])
        sides = [
          self._side([tuple(pairs[p][side]) for p in here], states, weights, (rows, length))
          for side in (1, 2)
        ]
        with jax.set_mesh(self._loaded.mesh):
          scores = np.array(everywhere(_matched(*sides)), np.float64)[: len(here)]
        for row, p in zip(scores, here):
          if min(map(len, pairs[p][1:])) <= self._around:
            row[:] = 0
        yield here, scores

  def _length(self, tokens: int) -> int:
    return length_of(tokens, self._loaded.plain.positions, HALVES)

  def _read(self, texts: set[tuple[int, ...]]) -> dict[tuple[int, ...], np.ndarray]:
    """[T, D] f32 hidden states of texts, of length 1."""
    model, states = self._loaded, {}
    due = sorted(texts, key=lambda ids: (-len(ids), ids))
    while due:
      T = self._length(len(due[0]))
      here = due[: side_by_side(T, model.parts)]
      due = due[len(here) :]
      rows = -(-bucket(len(here), 1) // model.parts) * model.parts
      tokens, lengths = np.full((rows, T), model.tokenizer.pad, np.int32), np.ones(rows, np.int32)
      for row, ids in enumerate(here):
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
      with jax.set_mesh(model.mesh):
        made = _states(self._model, model.put(tokens), model.put(lengths), seq2seq=self._seq2seq)
        made = everywhere(made)
      states |= {ids: made[row, : len(ids)] for row, ids in enumerate(here)}
    return states

  def _side(self, texts, states, weights, shape: tuple[int, int]):
    """States, lengths and weights of one text of each pair, on the mesh."""
    rows, length = shape
    x = np.zeros((rows, length, states[texts[0]].shape[1]), np.float32)
    lengths, weighed = np.ones(rows, np.int32), np.zeros((rows, length), np.float32)
    for row, ids in enumerate(texts):
      x[row, : len(ids)], lengths[row] = states[ids], len(ids)
      weighed[row, : len(ids)] = [weights[i] for i in ids]
    return tuple(map(self._loaded.put, (x, lengths, weighed)))


def estimates(scores: Float[np.ndarray, 'n 3'], seed: int = 0) -> dict[str, Estimate]:
  """Means over documents, with their intervals."""
  ones = np.ones((len(scores), 1))
  return {
    part: summed(np.concatenate([scores[:, i : i + 1], ones], 1), lambda t: t[0] / t[1], seed)
    for i, part in enumerate(PARTS)
  }


def _baseline(path: str, layer: int) -> np.ndarray:
  """[3]: what to subtract."""
  if not path:
    return np.zeros(3)
  with open(path, newline='', encoding='utf-8') as file:
    rows = [*csv.DictReader(file)]
  for row in rows:
    try:
      if int(row['LAYER']) == layer:
        made = np.array([float(row[name]) for name in 'PRF'])
        break
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(f'{path} has no lines of LAYER,P,R,F: {error!r} in {row}') from error
  else:
    raise ValueError(f'{path} has no line of layer {layer}; it has {len(rows)} layers')
  if not (made < 1).all():
    raise ValueError(f'{path} has {made} for layer {layer}; a baseline is below 1')
  return made


def _first_layers(model: Decoder, layers: int) -> Decoder:
  """The model up to one of its layers, or its encoder's, with the final norm."""
  config = model.config
  if layers == (config.encoder_layers or config.L):
    return model
  if not config.encoder_layers:
    return rearranged.shallow(model, layers)
  model = jax.tree.map(lambda x: x, model)  # a copy, to be written to
  model.config = dataclasses.replace(config, encoder_layers=layers)
  model.encoder.periods = model.config.encoder_stacks
  model.encoder.blocks = nnx.List(list(model.encoder.blocks)[:layers])
  return model


@functools.partial(jax.jit, static_argnames='seq2seq')
def _states(model, tokens: Int[jax.Array, 'B T'], lengths: Int[jax.Array, 'B'], *, seq2seq: bool):
  """[B, T, D] f32 hidden states of length 1, those of padding 0."""
  real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
  with ax.whole_rows(tokens.shape[1] % ax.size('length') > 0):
    tokens = ax.place(tokens, *TOKENS)
    segments = ax.place(real.astype(jnp.int32), *TOKENS)
    if seq2seq:
      x = model.encode(tokens, segments=segments)
    else:
      x = model(tokens, segments=segments).hidden
    x = ax.place(x, 'batch', None, None).astype(jnp.float32)
  # A state of padding may be anything.
  x = jnp.where(real[:, :, None], x, 0)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


@jax.jit
def _matched(said, true):
  """[B, 3] of two sides: states [B, T, D], how many of them are real [B], and weights [B, T].

  What padding would match is -inf, and not 0 as in bert-score, where a token that is like nothing
  gets more in company of longer texts.
  """
  (said, T, said_weights), (true, S, true_weights) = said, true
  alike = jnp.einsum('BTD,BSD->BTS', said, true, precision='highest')
  there = jnp.arange(said.shape[1])[None] < T[:, None], jnp.arange(true.shape[1])[None] < S[:, None]
  best = (
    jnp.where(there[1][:, None, :], alike, -jnp.inf).max(2),
    jnp.where(there[0][:, :, None], alike, -jnp.inf).max(1),
  )
  P, R = (
    jnp.where(real, x * weights, 0).sum(1) / jnp.where(weights.sum(1) > 0, weights.sum(1), 1)
    for x, weights, real in zip(best, (said_weights, true_weights), there)
  )
  f1 = jnp.where(P + R != 0, 2 * P * R / jnp.where(P + R != 0, P + R, 1), 0)
  return jnp.stack([P, R, f1], 1)


def read(path: str) -> tuple[list[str], list[list[str]]]:
  """Answers and their references, of a file of lines; of what an evaluation wrote the first
  answers, as they were judged. Raises ValueError, naming the line, for one without them.
  """
  answers, references = [], []
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      row = files.json_object(line, f'{path}:{number}')
      given = row.get('references', row.get('reference'))
      given = [given] if isinstance(given, str) else given
      answer = row.get('answer', next(iter(row.get('judged') or ()), None))
      if not isinstance(answer, str) or not given or not all(map(_is_text, given)):
        raise ValueError(
          f'{path}:{number} needs an answer, a text, and references, a list of texts (or a '
          "reference), or to be an evaluation's line of what was written (judged, references); it "
          f'has {", ".join(row) or "nothing"}'
        )
      answers.append(answer)
      references.append([*given])
  return answers, references


def main(arguments: Sequence[str] | None = None) -> None:
  """The command line."""
  from decode.generator import Generator
  from parallel.flag import mesh_of

  parser = commands.parser(__doc__.split('\n')[0])
  parser.add_argument('--workdir', required=True, help='a run whose model reads the texts')
  parser.add_argument('--answers', required=True, metavar='FILE', help='of JSON lines')
  parser.add_argument('--layer', type=int, default=0, help='whose output is compared; 0: the last')
  parser.add_argument('--idf', action='store_true', help='rare tokens of references weigh more')
  parser.add_argument('--baseline', default='', metavar='FILE', help="one of bert-score's tables")
  parser.add_argument('--checkpoint', default='last')
  parser.add_argument('--mesh', default='data=1', help='sizes of axes, as in data=2,tensor=4')
  parser.add_argument('--seed', type=int, default=0, help='of the bootstrap')
  options = parser.parse_args(arguments)
  with commands.mendable():
    answers, references = read(options.answers)
    settings = BertSettings(options.layer, options.idf, options.baseline)
    run = Generator.told(options.workdir, options.checkpoint)
    model = Generator.load(options.workdir, options.checkpoint, mesh_of(options.mesh))
    scorer = BertScore(model, settings)
    made = estimates(scorer(answers, references), options.seed)
    title = f'{scorer.settings.name} of {len(answers)} answers, with 95% intervals'
    commands.table(title, [*made], [[*map(str, made.values())]])
    texts = json.dumps([answers, references]).encode()
    results = {
      'name': scorer.settings.name,
      'run': run,
      'answers': options.answers,
      'texts': hashlib.blake2b(texts, digest_size=16).hexdigest(),
      'seed': options.seed,
    }
    results |= {part: estimate.values() for part, estimate in made.items()}
    commands.write_json(options.json, 'bertscore', results)


def _is_text(value) -> bool:
  return isinstance(value, str)


if __name__ == '__main__':
  commands.end(main)
