"""By which rows is a run calibrated? Its own training rows; those of a file; or, of a run that was
imported, modules of the interpreter's library that judging does not read.
"""

import argparse
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import names
from data import clean, records
from data.batch import Batch, SourceBatch
from data.config import CleanConfig, SourceConfig
from data.conversations import ExampleWriter
from data.sources import Problems, documents
from data.tokenizer import Tokenizer, in_utf8
from evaluation import library
from training.config import Config
from workdir.checkpoint import Checkpoints
from workdir.open import step_of

ROWS = 4  # of a batch, which are on the device together
LENGTH = 512  # tokens of a row, or as many as the model has places for
FORMATS = 'chat', 'sharegpt', 'alpaca', 'completion', 'pair'
Log = Callable[[str], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
  """Which rows, and how many.

  Attributes:
    file: '' for the run's own training rows, or the library; else a text, or a .jsonl of records.
    format: of records, see data.records; messages are what the chat template makes of them. '': of
      texts where the first row has a `text`, else 'chat'.
    samples: rows. length: tokens of each; 0: LENGTH, or that of the run's own.
    seed: of which are drawn.

  Raises ValueError for a value that is impossible.
  """

  file: str = ''
  format: str = ''
  samples: int = 128
  length: int = 0
  seed: int = 0

  def __post_init__(self):
    names.check('--calibrate_format', self.format, ('', *FORMATS))
    if self.format and not self.file.endswith('.jsonl'):
      raise ValueError(
        f'--calibrate_format={self.format} is of records, and --calibrate={self.file!r} is no '
        '.jsonl file of them; leave it out, or give one'
      )
    for name, least in (('samples', 1), ('length', 0), ('seed', 0)):
      if getattr(self, name) < least:
        raise ValueError(f'--{name}={getattr(self, name)} must be at least {least}')


def take_options(made: argparse.ArgumentParser) -> None:
  """What a command takes, all of it optional."""
  add = made.add_argument
  add(
    '--calibrate',
    metavar='FILE',
    help='text, or JSONL of texts or records, that a method of calibration looks at; default: the '
    "run's training rows, or Python's library where it has none",
  )
  add(
    '--calibrate_format',
    help=f'of records: {", ".join(FORMATS)}; default: chat, or texts, where rows have a text',
  )
  add('--samples', type=int, help='rows; default: 128')
  add('--length', type=int, help=f'tokens of a row; default: {LENGTH}, or as the run was trained')
  add('--seed', type=int, help='of which rows; default: 0')


def from_options(options) -> Calibration | None:
  """Of a command line's options; None where none is given."""
  given = {
    'file': options.calibrate,
    'format': options.calibrate_format,
    'samples': options.samples,
    'length': options.length,
    'seed': options.seed,
  }
  given = {name: value for name, value in given.items() if value is not None}
  return Calibration(**given) if given else None


class CalibrationRows(NamedTuple):
  """Batches of rows, all of one shape, and what is said of them, JSON-able."""

  batches: list[Batch]
  described: dict


def rows(
  workdir: str | os.PathLike,
  config: Config,
  checkpoint: str,
  tokenizer: Tokenizer,
  calibration: Calibration,
  log: Log,
) -> CalibrationRows:
  """Rows of calibration for a run, on the mesh in context, and a line about them.

  Raises ValueError for a file without tokens, and for lengths that the model has no places for.
  """
  most = config.model.max_length
  if most and calibration.length > most:
    raise ValueError(f'--length={calibration.length} passes model.max_length={most}; give less')
  batches, of = None, calibration.file
  if not of:
    batches = _own(workdir, config, checkpoint, calibration, log)
    of = f'training rows of {workdir}'
  if batches is None:
    length = calibration.length or min(LENGTH, most or LENGTH)
    of = calibration.file or "modules of the interpreter's library"
    batches = _of_examples(config, tokenizer, calibration, length, log)
  tokens = sum(int((batch.segments > 0).sum()) for batch in batches)
  described = {
    'of': str(of),
    'samples': sum(int((batch.segments > 0).any(1).sum()) for batch in batches),
    'length': batches[0].tokens.shape[1],
    'tokens': tokens,
    'seed': calibration.seed,
    'digest': _digest(batches),
  }
  log(
    f'calibration: {described["samples"]} rows of at most {described["length"]} tokens, '
    f'{tokens:,} in all, of {of}; seed {calibration.seed}'
  )
  if described['samples'] < calibration.samples:
    log(f'NOTE: {calibration.samples} rows were asked for, and there is text for no more')
  return CalibrationRows(batches, described)


def _own(workdir, config: Config, checkpoint: str, calibration: Calibration, log: Log):
  """Rows of the run's training, in a new order; None where there are none that are texts."""
  checkpoints = Checkpoints(workdir)
  step = step_of(checkpoints, checkpoint)
  objective = config.objective
  if step is None or not checkpoints.record(step)['data'].get('examples'):
    return None  # imported
  data = dataclasses.replace(config.data, batch_size=ROWS * objective.rows, seed=calibration.seed)
  if calibration.length:
    data = dataclasses.replace(data, sequence_length=calibration.length)
  if objective.completed_by or not isinstance(objective.batch_like(data), Batch):
    log(f'NOTE: rows of objective.kind={objective.kind!r} are no texts to calibrate by')
    return None
  prepared = objective.read(data, log)
  loader = objective.batches(prepared, data, range(data.batch_size))
  count = -(-calibration.samples // data.batch_size)
  try:
    taken = [loader.take(None) for _ in range(count)]
  finally:
    if hasattr(loader, 'close'):
      loader.close()
  kind = SourceBatch if config.model.encoder_layers else Batch
  fields = [field.name for field in dataclasses.fields(kind)]
  batches = [kind(**{name: np.array(getattr(batch, name)) for name in fields}) for batch in taken]
  over = count * data.batch_size - calibration.samples
  for x in jax.tree.leaves(batches[-1]) if over else ():
    x[-over:] = 0
  return batches


def _of_examples(config: Config, tokenizer, calibration: Calibration, length: int, log: Log):
  """Rows of texts or records: each gives a piece, by chance, until there are enough; then another
  one of those that are longer.
  """
  draw = np.random.Generator(np.random.Philox(calibration.seed))
  if config.model.encoder_layers:
    return _of_pairs(config, tokenizer, calibration, length, draw)
  examples = [*_encoded(config, tokenizer, calibration)]
  room = calibration.samples * length
  pieces, total = [], 0
  for piece in _pieces(examples, length, draw):
    pieces.append(piece[: room - total])
    total += len(pieces[-1])
    if total == room:
      break
  if not total:
    raise ValueError(f'{calibration.file or "the library"} has no tokens to calibrate by')
  return _packed(pieces, length)


def _pieces(examples: Sequence, length: int, draw: np.random.Generator) -> Iterator[np.ndarray]:
  """Pieces of at most `length` tokens: one of each example, in an order by chance, and so on."""
  order = draw.permutation(len(examples))
  left: dict[int, tuple[np.ndarray, list[int]]] = {}
  again = True
  while again:
    again = False
    for i in order:
      if i not in left:
        ids = examples[i]()
        left[i] = ids, list(draw.permutation(-(-len(ids) // length)))
      ids, starts = left[i]
      if starts:
        again, start = True, starts.pop() * length
        yield ids[start : start + length]


def _packed(pieces: Sequence[np.ndarray], length: int) -> list[Batch]:
  """Pieces one behind the other, each a segment, or two where a row ends in it."""
  count = -(-sum(map(len, pieces)) // length)
  whole = Batch.empty(-(-count // ROWS) * ROWS, length)
  row = at = segment = 0
  for piece in pieces:
    while len(piece):
      here, piece = piece[: length - at], piece[length - at :]
      segment += 1
      part = np.s_[row, at : at + len(here)]
      whole.tokens[part], whole.segments[part] = here, segment
      whole.positions[part] = np.arange(len(here))
      at += len(here)
      if at == length:
        row, at, segment = row + 1, 0, 0
  return _batches(whole)


def _of_pairs(config: Config, tokenizer, calibration: Calibration, length: int, draw):
  """Rows of an encoder-decoder: a source and a target, of pairs, or of the halves of a text."""
  sides = []
  if calibration.file and calibration.format == 'pair':
    for _, record in records.records(_source(calibration)):
      sides.append([tokenizer.encode(in_utf8(text)) for text in (record.source, record.target)])
    draw.shuffle(sides)
  else:
    for piece in _pieces([*_encoded(config, tokenizer, calibration)], 2 * length, draw):
      if len(piece) > 1:
        sides.append([piece[: len(piece) // 2], piece[len(piece) // 2 :]])
      if len(sides) == calibration.samples:
        break
  sides = sides[: calibration.samples]
  if not sides:
    raise ValueError(f'{calibration.file or "the library"} has no pairs to calibrate by')
  whole = SourceBatch.empty(-(-len(sides) // ROWS) * ROWS, length, length)
  for row, (source, target) in enumerate(sides):
    source = [*source[: length - 1], tokenizer.eos]
    target = [tokenizer.bos, *target[: length - 1]]
    for name, ids in (('source', source), ('', target)):
      tokens = whole.source if name else whole.tokens
      prefix = f'{name}_' if name else ''
      tokens[row, : len(ids)] = ids
      getattr(whole, f'{prefix}segments')[row, : len(ids)] = 1
      getattr(whole, f'{prefix}positions')[row, : len(ids)] = np.arange(len(ids))
  return _batches(whole)


def _encoded(config: Config, tokenizer: Tokenizer, calibration: Calibration):
  """Of each text or record, a function that encodes it: most are not asked for."""

  def of_text(text):
    ids = [tokenizer.bos, *tokenizer.encode(in_utf8(text)), tokenizer.eos]
    return np.array(ids, np.int32)

  if not calibration.file:
    texts = _library()
  elif not calibration.file.endswith('.jsonl'):
    texts = (pathlib.Path(calibration.file).read_text(),)
  else:
    source = _source(calibration)
    first = next(records.json_rows(calibration.file), (None, {}))[1]
    if 'text' in first and not calibration.format:
      source = SourceConfig(kind='jsonl', path=calibration.file, text_field='text')
      texts = tuple(documents(source, Problems()))
    else:
      writer = ExampleWriter(tokenizer)
      for place, record in records.records(source):
        yield lambda place=place, record=record: writer.example(place, record).ids
      return
  for text in texts:
    yield lambda text=text: of_text(text)


def _library() -> tuple[str, ...]:
  """Modules that training on the library does not hold out, cleaned as there."""
  config, held_out, texts = CleanConfig(filters='code', near_duplicates=0), set(), []
  held_out.update(library.held_out())
  for text in documents(SourceConfig(), Problems()):
    cleaned = clean.clean(text, config)
    if not cleaned.dropped and cleaned.text not in held_out:
      texts.append(cleaned.text)
  return tuple(texts)


def _source(calibration: Calibration) -> SourceConfig:
  return SourceConfig(kind='jsonl', path=calibration.file, format=calibration.format or 'chat')


def _batches(whole: Batch) -> list[Batch]:
  return [
    jax.tree.map(lambda x: x[first : first + ROWS], whole)
    for first in range(0, len(whole.tokens), ROWS)
  ]


def _digest(batches: Sequence[Batch]) -> str:
  digest = hashlib.sha256()
  for x in jax.tree.leaves(list(batches)):
    digest.update(np.ascontiguousarray(x).tobytes())
  return digest.hexdigest()
