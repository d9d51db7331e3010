"""What does each stage of encoding a corpus do with one part, or one shard, of it? As
data/stages.py, behind it:

  tokenizer  made, or loaded and kept
  encode     a part's tokens, of either side, and the held-out text
  shard      a shard's files, of slices of parts, and its rows
  held_out   the held-out text of all parts
"""

import collections
import functools
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from data import cache, shards, tokenizers
from data.config import TokenizerConfig
from data.encoding import encoded_by, sides_of
from data.engine import Output
from data.partitions import Work, raw
from data.stages import boundary, texts
from data.tokenizer import Tokenizer

SIDES = 'train', 'validation'
COPIED = 2**24  # bytes at a time


def tokenizer(out: Output, directory: str, config: TokenizerConfig) -> dict:
  """The tokenizer of a corpus, trained on the chunks that `sample` chose, or of the characters that
  `look` found, where it is to be.
  """
  work = Work(directory)

  def sampled() -> Iterator[str]:
    for part in work.parts:
      where = work.of('sample', part)
      with open(where / 'sample', 'rb') as file:
        for size in np.load(where / 'sizes.npy').tolist():
          yield file.read(size).decode()

  def characters() -> Iterator[str]:
    for part in work.parts:
      yield cache.read_index(work.of('look', part))['report']['characters']

  made = tokenizers.build(config, sampled(), characters())
  made.save(out.path / 'tokenizer')
  return {'vocabulary': made.vocabulary}


@functools.lru_cache(1)
def loaded(path: str) -> Tokenizer:
  """The tokenizer that `tokenizer` kept."""
  return tokenizers.load(path)


def encode(out: Output, directory: str, part: int, side: tuple[str, float]) -> dict:
  """Tokens of a part's documents, and how many each has, by side; the text of those held out."""
  work = Work(directory)
  made = loaded(str(work.of('tokenizer', 0) / 'tokenizer'))
  dtype = shards.dtype_of(made.vocabulary)
  counts = {name: {'documents': 0, 'bytes': 0, 'tokens': 0} for name in SIDES}
  lengths = {name: [] for name in SIDES}
  sizes, lost = [], collections.Counter(documents_lost=0, characters_lost=0)
  with (
    open(out.path / 'train', 'wb') as train,
    open(out.path / 'validation', 'wb') as validation,
    open(out.path / 'text', 'wb') as held_out,
  ):
    files = dict(zip(SIDES, (train, validation)))
    sides = sides_of(texts(work, part), boundary(work, part, side))
    for for_training, text, ids in encoded_by(made, sides):
      losses = made.losses(text, ids)
      lost.update(documents_lost=losses > 0, characters_lost=losses)
      name, content = SIDES[not for_training], text.encode()
      document = np.concatenate([[made.bos], ids, [made.eos]])
      files[name].write(document.astype(dtype).tobytes())
      lengths[name].append(len(document))
      for what, n in (('documents', 1), ('bytes', len(content)), ('tokens', len(ids) + 1)):
        counts[name][what] += n
      if not for_training:
        sizes.append(held_out.write(content))
  for name in SIDES:
    np.save(out.path / f'{name}.npy', np.array(lengths[name], np.int64))
  np.save(out.path / 'text.npy', np.array(sizes, np.int64))
  return counts | {'lost': dict(lost)}


def shard(
  out: Output,
  directory: str,
  name: str,
  side: str,
  slices: Sequence[tuple[int, int, int]],
  rows: shards.Rows,
) -> dict:
  """One shard, as data.shards.ShardWriter writes it, and the plan of its rows, in `rows`.

  Args:
    slices: part, and of its documents of this side the first, and the one behind the last.
  """
  work = Work(directory)
  made = loaded(str(work.of('tokenizer', 0) / 'tokenizer'))
  dtype = shards.dtype_of(made.vocabulary)
  lengths = []
  with open(out.path / f'{name}.tokens', 'wb') as file:
    for part, first, last in slices:
      where = work.of('encode', part)
      of = np.load(where / f'{side}.npy')
      lengths.append(of[first:last])
      begin, end = int(of[:first].sum()), int(of[:last].sum())
      _copy(where / side, file, begin * dtype.itemsize, end * dtype.itemsize)
  offsets = np.append(0, np.cumsum(np.concatenate(lengths)))
  np.save(out.path / f'{name}.documents.npy', offsets)
  entry = shards.entry_of(out.path, name, dtype, offsets, ('tokens', 'documents.npy'))
  (out.path / rows.name).mkdir()
  form = rows if side == SIDES[0] else rows.in_order
  return {'shard': entry, 'plan': form.write_plan(out.path, out.path / rows.name, entry)}


def held_out(out: Output, directory: str) -> dict:
  """The held-out text of all parts, and where each document begins."""
  work = Work(directory)
  sizes = [np.zeros(1, np.int64)]
  with open(out.path / 'validation.text', 'wb') as file:
    for part in work.parts:
      where = work.of('encode', part)
      sizes.append(np.load(where / 'text.npy'))
      _copy(where / 'text', file, 0, (where / 'text').stat().st_size)
  np.save(out.path / 'validation.text.npy', np.cumsum(np.concatenate(sizes)))
  names = ('validation.text', 'validation.text.npy')
  return {'files': [cache.record(out.path, name) for name in names]}


def _copy(path: pathlib.Path, into, begin: int, end: int) -> None:
  of = raw(path, np.uint8)
  for at in range(begin, end, COPIED):
    into.write(of[at : min(at + COPIED, end)].tobytes())
