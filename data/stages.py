"""What does each stage of preparing a corpus do with one part of it? Pure functions: of files that
earlier stages wrote, and of settings, into files of a directory of their own, and a report. In the
order in which they run:

  clean     a part's documents, read, repaired, filtered and anonymised
  exact     of all documents with certain digests: which repeat an earlier one
  bands     a part's band keys, sorted, so that a range of them can be read of each part
  near      of all documents with certain keys of a band: which resemble each other
  clusters  which documents resemble an earlier one, through whatever others
  keep      what is left of a part, counted
  look      which characters a part has, for a tokenizer of characters
  sample    the chunks of a part that a tokenizer is trained on
  (tokens, shards and rows: data/stages_encode.py)

A stage that brings documents of all parts together is divided by hashes: what it reads of each part
is a slice of a file that is sorted by them. data/corpus.py says what runs when.
"""

import array
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from data import cache, clean as cleaning, duplicates, sources
from data.config import ANONYMISED_KINDS, CleanConfig, SourceConfig
from data.engine import TaskOutput
from data.partitions import Partition, Signatures, Workspace, raw, version
from data.sentencepiece import chunked, sampled

KILLED = 'it ended its process'
BLOCK = 2**20  # documents, or pairs of them, in memory


class PlacedProblems(sources.Problems):
  """Problems, and where each kind was met first: path, and line within what is read of it."""

  def __init__(self):
    super().__init__()
    self.places: dict[str, tuple[str, int | str]] = {}

  def add(self, kind: str, path: str, line: int | str = 0) -> None:
    super().add(kind, path, line)
    self.places.setdefault(kind, (path, line))


class _Columns:
  """What is kept of each document that passed, besides its text."""

  def __init__(self):
    self.bytes, self.characters = array.array('q'), array.array('q')
    self.digests, self.masked = bytearray(), array.array('I')

  def add(self, document: cleaning.Cleaned, size: int) -> None:
    self.bytes.append(size)
    self.characters.append(len(document.text))
    self.digests += document.digest
    self.masked.extend(document.counts.get(kind, 0) for kind in ANONYMISED_KINDS)

  def save(self, path: pathlib.Path) -> None:
    """Digests as two numbers each: as they come, the first, by which the split goes; and sorted,
    both, with the documents' numbers in `order`.
    """
    digests = np.frombuffer(bytes(self.digests), '<u8').reshape(-1, 2)
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    np.save(path / 'bytes.npy', np.array(self.bytes, np.int64))
    np.save(path / 'characters.npy', np.array(self.characters, np.int64))
    np.save(
      path / 'masked.npy', np.array(self.masked, np.uint32).reshape(-1, len(ANONYMISED_KINDS))
    )
    np.save(path / 'hashes.npy', digests[:, 0].astype(np.uint64))
    digests[order, 0].astype(np.uint64).tofile(path / 'digests-0')
    digests[order, 1].astype(np.uint64).tofile(path / 'digests-1')
    order.astype(np.int64).tofile(path / 'order')


def clean(out: TaskOutput, config: CleanConfig, source: SourceConfig, part: Partition) -> dict:
  """Reads and cleans a part.

  A document on which the code fails is left out, as 'poisoned', with its place; so is one that
  ended a worker's process, whose number is in out.without.
  """
  problems, keys, columns = PlacedProblems(), {}, _Columns()
  span = sources.Span(*part.span) if part.span else None
  counts = {'documents': 0, 'characters': 0, 'repaired': 0}
  fates, reasons, poisoned = bytearray(), [], []

  def dropped(reason: str) -> None:
    if reason not in reasons:
      reasons.append(reason)
    fates.append(1 + reasons.index(reason))

  with open(out.path / 'texts', 'wb') as texts, open(out.path / 'signatures', 'wb') as signatures:
    for place, text in _read(out, source, part, span, problems, keys):
      number = counts['documents']
      counts['documents'] += 1
      counts['characters'] += len(text)
      document, error = None, KILLED
      if number not in out.without:
        try:
          document = cleaning.clean(text, config)
        except Exception as failed:  # whatever it is: of one document in a billion
          error = type(failed).__name__  # and no more of it, which might quote the document
      if document is None:
        poisoned.append([*place, error])
        dropped('poisoned')
        continue
      counts['repaired'] += document.counts.get('repaired', 0)
      if document.dropped:
        dropped(document.dropped)
        continue
      fates.append(0)
      columns.add(document, texts.write(document.text.encode()))
      if document.signature is not None:
        signatures.write(document.signature.tobytes())

  columns.save(out.path)
  np.save(out.path / 'fates.npy', np.frombuffer(bytes(fates), np.uint8))
  return counts | {
    'passed': len(columns.bytes),
    'problems': dict(problems),
    'places': problems.places,
    'lines': span.lines if span else 0,
    'reasons': reasons,
    'poisoned': poisoned,
    'keys': keys,
  }


def _read(
  out: TaskOutput,
  source: SourceConfig,
  part: Partition,
  span: sources.Span | None,
  problems: PlacedProblems,
  keys: dict[str, str],
) -> Iterator[tuple[tuple[str, int], str]]:
  """The texts of a part, each behind its place: path, and number there from 1."""
  read = 0
  for path, *seen in part.files:
    size, changed = version(path)
    if [size, changed] != seen:
      raise ValueError(
        f'{path} has {size:,} bytes of {changed} (its time or tag), and had {seen[0]:,} of '
        f'{seen[1]} when its corpus was begun: every machine must see the same files, and they '
        'must stay as they are meanwhile; begin again'
      )
    out.at(read)
    for number, text in enumerate(sources.of_file(source, path, problems, keys, span), 1):
      yield (path, number), text
      read += 1
      out.at(read)


def exact(out: TaskOutput, directory: str, bucket: int, buckets: int) -> dict:
  """Which documents with digests of a bucket repeat an earlier one."""
  work = Workspace(directory)
  firsts, seconds, numbers = [], [], []
  for part in work.parts:
    where = work.of('clean', part)
    digests = raw(where / 'digests-0', np.uint64)
    here = _range(digests, bucket, buckets)
    firsts.append(digests[here])
    seconds.append(raw(where / 'digests-1', np.uint64)[here])
    numbers.append(raw(where / 'order', np.int64)[here] + work.numbers[part])
  first, second, number = map(np.concatenate, (firsts, seconds, numbers))
  order = np.lexsort((number, second, first))
  first, second, number = first[order], second[order], number[order]
  again = (first[1:] == first[:-1]) & (second[1:] == second[:-1])
  dropped = np.sort(number[1:][again])
  dropped.tofile(out.path / 'dropped')
  return {'documents': len(number), 'dropped': len(dropped)}


def _range(keys: np.ndarray, bucket: int, buckets: int) -> slice:
  """Where sorted keys, uint64, are in a bucket: a part of their range."""
  edges = [(2**64 * edge) // buckets for edge in (bucket, bucket + 1)]
  return slice(
    *(len(keys) if edge == 2**64 else int(np.searchsorted(keys, np.uint64(edge))) for edge in edges)
  )


def bands(out: TaskOutput, directory: str, part: int, buckets: int, threshold: float) -> dict:
  """The keys of each band of a part's documents, those that repeat an earlier one apart: sorted,
  with the documents' numbers in the part.
  """
  work = Workspace(directory)
  alive = np.flatnonzero(work.kept('exact', buckets, part))
  signatures = raw(work.of('clean', part) / 'signatures', np.uint32)
  signatures = signatures.reshape(-1, duplicates.HASHES)
  number, values = duplicates.bands(threshold)
  with open(out.path / 'keys', 'wb') as keys, open(out.path / 'documents', 'wb') as documents:
    for band in range(number if len(alive) else 0):
      of = duplicates.band_keys(signatures[:, band * values : (band + 1) * values][alive])
      order = np.argsort(of, kind='stable')
      keys.write(of[order].tobytes())
      documents.write(alive[order].tobytes())
  return {'documents': len(alive)}


def near(
  out: TaskOutput, directory: str, band: int, bucket: int, buckets: int, threshold: float
) -> dict:
  """Of the documents with a band's keys in a bucket, each that resembles another, with the first of
  its cluster.
  """
  work = Workspace(directory)
  bands_, _ = duplicates.bands(threshold)
  keys, numbers = [], []
  for part in work.parts:
    where = work.of('bands', part)
    of = raw(where / 'keys', np.uint64).reshape(bands_, -1)[band]
    here = _range(of, bucket, buckets)
    keys.append(of[here])
    documents = raw(where / 'documents', np.int64).reshape(bands_, -1)[band]
    numbers.append(documents[here] + work.numbers[part])
  key, number = np.concatenate(keys), np.concatenate(numbers)
  firsts = np.arange(len(key))
  if len(key) > 1:
    firsts = duplicates.clustered(Signatures(work, number), key, firsts, threshold)
  linked = np.flatnonzero(firsts != np.arange(len(key)))
  np.stack([number[linked], number[firsts[linked]]], axis=1).tofile(out.path / 'links')
  return {'documents': len(key), 'links': len(linked)}


def clusters(out: TaskOutput, directory: str, tasks: int) -> dict:
  """Which documents are not the first of their cluster, by the links that `near` found.

  Links are read block by block, and a forest of all documents is on disk: for each one that is
  earlier in its cluster. The first document of each cluster is its root.
  """
  work = Workspace(directory)
  total = int(work.numbers[-1])
  forest = out.path / 'forest'
  with open(forest, 'wb') as file:
    for begin in range(0, total, BLOCK):
      np.arange(begin, min(begin + BLOCK, total)).tofile(file)
  earlier = np.memmap(forest, np.int64, 'r+') if total else np.zeros(0, np.int64)
  links = 0
  for task in range(tasks):
    of = raw(work.of('near', task) / 'links', np.int64).reshape(-1, 2)
    links += len(of)
    for begin in range(0, len(of), BLOCK):
      duplicates.join(earlier, np.array(of[begin : begin + BLOCK]))

  dropped = 0
  with open(out.path / 'dropped', 'wb') as file:
    for begin in range(0, total, BLOCK):
      block = np.arange(begin, min(begin + BLOCK, total))
      repeated = block[earlier[begin : begin + BLOCK] != block]
      repeated.tofile(file)
      dropped += len(repeated)
  del earlier
  forest.unlink()
  return {'documents': total, 'links': links, 'dropped': dropped}


def keep(out: TaskOutput, directory: str, part: int, buckets: int, near_: int, held: float) -> dict:
  """What is left of a part: `kept`, and how many of its documents were dropped and why, in the
  order in which the reasons were met.

  Args:
    buckets, near_: tasks of `exact` and of `clusters`; 0 where they were not to run.
    held: share of documents that are held out by their hashes.
  """
  work = Workspace(directory)
  where = work.of('clean', part)
  report = cache.read_index(where)['report']
  fates = np.load(where / 'fates.npy').copy()
  different = work.kept('exact', buckets, part)
  kept = different & work.kept('clusters', near_, part)
  np.save(out.path / 'kept.npy', kept)

  reasons = [*report['reasons'], 'exact_duplicate']
  fates[np.flatnonzero(fates == 0)[~different]] = len(reasons)
  met, first, counts = np.unique(fates, return_index=True, return_counts=True)
  why = [
    [reasons[met[i] - 1], int(counts[i])] for i in np.argsort(first, kind='stable') if met[i] > 0
  ]
  masked = np.load(where / 'masked.npy') * different[:, None]
  kinds = [
    (int(np.argmax(masked[:, i] > 0)), i)
    for i in range(len(ANONYMISED_KINDS))
    if masked[:, i].any()
  ]
  characters = np.load(where / 'characters.npy') * kept
  trained = characters[np.load(where / 'hashes.npy') / 2.0**64 >= held]
  return {
    'different': int(different.sum()),
    'kept': int(kept.sum()),
    'bytes': int((np.load(where / 'bytes.npy') * kept).sum()),
    'characters': int(characters.sum()),
    'trained': int(trained.sum()),
    'dropped': why,
    'masked': [[ANONYMISED_KINDS[i], int(masked[:, i].sum())] for _, i in sorted(kinds)],
  }


def boundary(work: Workspace, part: int, side: tuple[str, float]) -> np.ndarray:
  """How many leading characters of each document are for training, int64 [documents]; as
  data.prepare has it of a whole corpus.

  side: ('all', 1 or 0): of all or none; ('hash', share that is held out); ('tail', characters that
    are for training from this part's beginning on).
  """
  where = work.of('clean', part)
  characters = np.load(where / 'characters.npy') * np.load(work.of('keep', part) / 'kept.npy')
  how, value = side
  if how == 'all':
    return characters * int(value)
  if how == 'hash':
    return np.where(np.load(where / 'hashes.npy') / 2.0**64 < value, 0, characters)
  begins = np.cumsum(characters) - characters
  return np.clip(int(value) - begins, 0, characters)


def texts(work: Workspace, part: int) -> Iterator[tuple[int, str]]:
  """Numbers in the part, and texts, of the documents that are kept."""
  where = work.of('clean', part)
  kept = np.load(work.of('keep', part) / 'kept.npy')
  with open(where / 'texts', 'rb') as file:
    for document, size in enumerate(np.load(where / 'bytes.npy').tolist()):
      if kept[document]:
        yield document, file.read(size).decode()
      else:
        file.seek(size, os.SEEK_CUR)


def look(out: TaskOutput, directory: str, part: int) -> dict:
  """Which characters there are."""
  every = set().union(*(set(text) for _, text in texts(Workspace(directory), part)))
  return {'characters': ''.join(sorted(every))}


def sample(
  out: TaskOutput, directory: str, part: int, side: tuple[str, float], share: float
) -> dict:
  """The chunks of a part that are trained on, such a share of all of the corpus."""
  work = Workspace(directory)
  training = boundary(work, part, side)
  sizes = array.array('q')
  with open(out.path / 'sample', 'wb') as file:
    for document, text in texts(work, part):
      for chunk in chunked([text[: training[document]]]):
        if sampled(chunk, share):
          sizes.append(file.write(chunk.encode()))
  np.save(out.path / 'sizes.npy', np.array(sizes, np.int64))
  return {'chunks': len(sizes)}
