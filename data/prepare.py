"""How does a config become batches' worth of tokens on disk?
The whole pipeline, in the order in which it runs.

  read -> clean -> drop duplicates -> split -> train the tokenizer -> encode -> pack

Everything streams: memory holds one chunk of documents, and some 200 bytes per document. The result
lies in cache_dir/<key>, where the key is a hash of the sources' content and of the settings that
change it, and of nothing else (no hash seed, core count or locale changes a byte); a second call
loads it. cache_dir/<key>/rows-<T> holds the packing for one sequence length, so that another one
needs no second tokenising.
"""

import array
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import time
import unicodedata
from collections.abc import Callable, Iterator

import numpy as np

import files
from data import building, cache, clean, duplicates, shards, sources, tokenizers
from data.config import DataConfig, SourceConfig
from data.texts import Texts
from data.tokenizer import Tokenizer

FORMAT = 3  # part of every key: raise it when the code changes what a config means
ENCODE_CHARACTERS = 2**22  # encoded at a time: SentencePiece returns Python integers, 36 bytes each
PARALLEL_BYTES = 2**26  # below this, starting worker processes costs more than they save


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A prepared corpus.

  Attributes:
    key: hash of everything that determines the training rows, '<corpus key>-<sequence length>'.
    directories: where the corpus lies, and its packing.
    files: digest of all files there, by their sizes and checksums.
    tokenizer: of the corpus.
    train: the packed rows of each source, with its weight.
    validation: the packed held-out rows of all sources, in order.
    report: counts per source and stage, JSON-able.
  """

  key: str
  directories: tuple[pathlib.Path, pathlib.Path]
  files: str
  tokenizer: Tokenizer
  train: tuple[shards.PackedSource, ...]
  validation: shards.PackedSource
  report: dict

  @property
  def validation_bytes(self) -> int:
    """UTF-8 bytes of the held-out text:
    bits per byte = nats summed over validation / ln 2 / this.
    """
    return self.report['validation']['bytes']

  @property
  def document_length(self) -> float:
    """Length of the piece of document that a training token stands in,
    averaged over tokens: what attention to it costs.
    """
    means = [
      packing['squared_pairs'] / packing['pairs'] for packing in self.report['packing']['train']
    ]
    return float(np.average(means, weights=[source.weight for source in self.train]))

  def validation_documents(self) -> Iterator[str]:
    """The held-out documents as they were encoded, cleaned, in order."""
    offsets = np.load(self.directories[0] / 'validation.text.npy')
    with open(self.directories[0] / 'validation.text', 'rb') as file:
      for n in np.diff(offsets).tolist():
        yield file.read(n).decode()


def prepare(config: DataConfig, log: Callable[[str], object] = print) -> Prepared:
  """Prepares the corpus that a config describes, or loads it if that was done before.

  Args:
    config: the pipeline's settings.
    log: called with a line for each thing read, written or loaded.

  Raises:
    ValueError: nothing is left for training or for validation; a tokenizer that can't be made.
    cache.CorruptShardError: files in the cache aren't those that were written.
    FileNotFoundError: a source matches no file.
  """
  began = time.perf_counter()
  if config.tokenizer.path or config.tokenizer.kind == 'byte':
    # What needs no text is found wrong now, and not after hours of reading the corpus.
    tokenizers.build(config.tokenizer, (), ())
  key = corpus_key(config)
  directory = pathlib.Path(config.cache_dir) / key
  building.once(directory, lambda partial: _build_corpus(config, partial, log), log)
  plan = directory / f'rows-{config.sequence_length}'
  building.once(plan, lambda partial: _build_plan(config, directory, partial, log), log)
  prepared = _load(config, directory, plan, log)
  train, held_out = prepared.report['packing']['train'], prepared.report['validation']
  log(
    f'data: loaded {directory} in {time.perf_counter() - began:.2f} s: '
    f'{sum(entry["pairs"] for entry in train):,} training tokens in '
    f'{sum(entry["rows"] for entry in train):,} rows of {config.sequence_length}, '
    f'{held_out["tokens"]:,} held out ({held_out["bytes"]:,} bytes)'
  )
  return prepared


def corpus_key(config: DataConfig) -> str:
  """Hash (hex) of the sources' content and of every setting that changes the cleaned,
  tokenised corpus.
  """
  import importlib.metadata

  memo = pathlib.Path(config.cache_dir) / 'sources.json'
  trained = config.tokenizer.trained
  settings = dataclasses.asdict(config.tokenizer)
  if config.tokenizer.path:
    within = tokenizers.of(config.tokenizer.kind).paths(config.tokenizer.path)
    settings['path'] = sources.content_digest([str(file) for file in within], memo)

  cleaning = dataclasses.asdict(config.clean)
  for name in ('word_list', 'classifier'):
    if cleaning[name]:
      path = os.path.expanduser(cleaning[name])
      if not os.path.isfile(path):
        raise FileNotFoundError(f'clean.{name}={cleaning[name]!r} is no file')
      cleaning[name] = sources.content_digest([path], memo)

  content = {
    'format': FORMAT,
    'sources': [
      [source.kind, source.text_field, sources.content_digest(sources.paths(source), memo)]
      for source in config.sources
    ],
    'clean': cleaning,
    'tokenizer': settings,
    # What decides besides: the trainer, and (by lower() and isalpha()) the tables of characters.
    'sentencepiece': importlib.metadata.version('sentencepiece') if trained else '',
    'unicode': unicodedata.unidata_version,
    'split': [config.split, config.validation_fraction],
  }
  return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=12).hexdigest()


def _build_corpus(
  config: DataConfig, directory: pathlib.Path, log: Callable[[str], object]
) -> None:
  report = {'sources': [], 'seconds': {}}
  texts = Texts(directory)

  with _timed(report, 'clean'):
    seen: set[bytes] = set()
    bounds = [0]
    for source in config.sources:
      counts = {
        'source': dataclasses.asdict(source),
        'read': collections.Counter(),
        'problems': sources.Problems(),
        'dropped': collections.Counter(),
        'repaired_characters': 0,
        'anonymised': collections.Counter(),
      }
      texts.write(_cleaned(config, source, seen, counts))
      counts['first_problems'] = counts['problems'].first
      bounds.append(len(texts))
      report['sources'].append(counts)
  del seen

  kept = np.ones(len(texts), bool)
  if config.clean.near_duplicates and len(texts):
    with _timed(report, 'near_duplicates'):
      kept = ~duplicates.near_duplicates(texts.signatures(), config.clean.near_duplicates)
      for counts, first, last in zip(report['sources'], bounds, bounds[1:]):
        counts['dropped']['near_duplicate'] = int((~kept[first:last]).sum())
  for counts in report['sources']:
    log(_describe(counts))

  boundary = _split(config, texts, kept, bounds)

  def everything():
    return (text for _, text in texts.read(0, len(texts), kept))

  def training():
    return (text[: boundary[d]] for d, text in texts.read(0, len(texts), kept) if boundary[d])

  with _timed(report, 'tokenizer'):
    characters = int(boundary[kept].sum())
    made = tokenizers.build(
      config.tokenizer,
      training(),
      everything(),
      share=min(1.0, config.tokenizer.training_bytes / max(characters, 1)),
    )
    made.save(directory / 'tokenizer')
  special = None
  if 'bos_token' not in made.special_tokens:
    special = {made.pad: 'pad', made.eos: 'eos'}.get(made.bos)
  log(
    f'data: {made.kind} tokenizer of {made.vocabulary} ids in '
    f'{report["seconds"]["tokenizer"]:.1f} s'
    + (f'; it has no bos, so documents begin with its {special}' if special else '')
  )

  with _timed(report, 'encode'):
    written = _encode(directory, texts, kept, boundary, bounds, made, report)
  texts.delete()
  total = (
    sum(counts['train']['bytes'] for counts in report['sources']) + report['validation']['bytes']
  )
  log(
    f'data: encoded {total / 1e6:.1f} MB in {report["seconds"]["encode"]:.1f} s, '
    f'{report["tokenizer"]["bytes_per_token"]:.2f} bytes per token, '
    f'{report["tokenizer"]["characters_lost"]} characters lost in '
    f'{report["tokenizer"]["documents_lost"]} documents'
  )
  cache.write_index(directory, written, report)


def _cleaned(
  config: DataConfig, source: SourceConfig, seen: set[bytes], counts: dict
) -> Iterator[clean.Cleaned]:
  """The documents of one source that pass every stage up to exact duplicates;
  updates `counts` on the way.
  """

  def reading() -> Iterator[str]:
    for text in sources.documents(source, counts['problems']):
      counts['read'].update(documents=1, characters=len(text))
      yield text

  large = sum(map(os.path.getsize, sources.paths(source))) > PARALLEL_BYTES
  for document in clean.clean_all(
    reading(), config.clean, workers=(os.cpu_count() or 1) if large else 1
  ):
    masked = collections.Counter(document.counts)
    counts['repaired_characters'] += masked.pop('repaired', 0)
    if document.dropped:
      counts['dropped'][document.dropped] += 1
      continue
    if config.clean.exact_duplicates:
      if document.digest in seen:
        counts['dropped']['exact_duplicate'] += 1
        continue
      seen.add(document.digest)
    counts['anonymised'].update(masked)
    yield document


def _split(config: DataConfig, texts: Texts, kept: np.ndarray, bounds: list[int]) -> np.ndarray:
  """How many leading characters of each document are for training, int64 [documents];
  the others are held out.
  """
  characters = np.frombuffer(texts.characters, np.int64) * kept
  if config.split == 'hash':
    boundary = np.where(texts.hash_shares() < config.validation_fraction, 0, characters)
  else:
    boundary = np.zeros(len(texts), np.int64)
    for first, last in zip(bounds, bounds[1:]):
      begins = np.cumsum(characters[first:last]) - characters[first:last]
      training = int(characters[first:last].sum() * (1 - config.validation_fraction))
      boundary[first:last] = np.clip(training - begins, 0, characters[first:last])
  for source, first, last in zip(config.sources, bounds, bounds[1:]):
    if not boundary[first:last].any():
      raise ValueError(
        f'nothing is left to train on of {source} ({last - first} documents passed the filters, '
        f'{int(kept[first:last].sum())} after near-duplicates): see the counts above; loosen '
        'data.clean, lower validation_fraction, or remove the source'
      )
  if (boundary == characters).all():
    raise ValueError(
      f'nothing is held out: none of {int(kept.sum())} documents falls into validation_fraction='
      f"{config.validation_fraction}; raise it, or use split='tail' for a corpus of few documents"
    )
  return boundary


def _encode(
  directory: pathlib.Path,
  texts: Texts,
  kept: np.ndarray,
  boundary: np.ndarray,
  bounds: list[int],
  made: Tokenizer,
  report: dict,
) -> list[dict]:
  """Encodes both splits into shards and keeps the held-out text;
  completes `report`; returns the files' records.
  """
  lost = collections.Counter()
  held_out = report['validation'] = collections.Counter(documents=0, bytes=0, tokens=0)
  offsets = array.array('q', [0])
  with (
    shards.ShardWriter(directory, 'validation', made.vocabulary) as validation,
    open(directory / 'validation.text', 'wb') as validation_text,
  ):
    for i, counts in enumerate(report['sources']):
      trained = counts['train'] = collections.Counter(documents=0, bytes=0, tokens=0)
      with shards.ShardWriter(directory, f'train-{i}', made.vocabulary) as train:
        sides = _sides(texts.read(bounds[i], bounds[i + 1], kept), boundary)
        for for_training, text, ids in _encoded(made, sides):
          losses = made.losses(text, ids)
          lost.update(documents_lost=losses > 0, characters_lost=losses)
          encoded = text.encode()
          (trained if for_training else held_out).update(
            documents=1, bytes=len(encoded), tokens=len(ids) + 1
          )
          (train if for_training else validation).add(np.concatenate([[made.bos], ids, [made.eos]]))
          if not for_training:
            validation_text.write(encoded)
            offsets.append(offsets[-1] + len(encoded))
      trained['shards'] = train.shards
  held_out['shards'] = validation.shards
  np.save(directory / 'validation.text.npy', np.array(offsets, np.int64))

  splits = [counts['train'] for counts in report['sources']] + [held_out]
  total_bytes, total_tokens = (sum(split[unit] for split in splits) for unit in ('bytes', 'tokens'))
  report['tokenizer'] = {
    'kind': made.kind,
    'vocabulary': made.vocabulary,
    'documents_lost': lost['documents_lost'],
    'characters_lost': lost['characters_lost'],
    'bos_is_eos': made.bos == made.eos,
    'bytes_per_token': total_bytes / total_tokens,
  }

  names = ['validation.text', 'validation.text.npy']
  names += [f'tokenizer/{path.name}' for path in sorted((directory / 'tokenizer').iterdir())]
  written = [file for split in splits for shard in split['shards'] for file in shard['files']]
  return written + [cache.record(directory, name) for name in names]


def _sides(
  documents: Iterator[tuple[int, str]], boundary: np.ndarray
) -> Iterator[tuple[bool, str]]:
  """Cuts documents at their boundaries: (is for training, text), without empty texts."""
  for d, text in documents:
    for for_training, part in ((True, text[: boundary[d]]), (False, text[boundary[d] :])):
      if part:
        yield for_training, part


def _encoded(
  made: Tokenizer, sides: Iterator[tuple[bool, str]]
) -> Iterator[tuple[bool, str, np.ndarray]]:
  """Adds each text's ids, encoding many texts together."""
  batch, characters = [], 0
  for side in itertools.chain(sides, [None]):
    if side is not None:
      batch.append(side)
      characters += len(side[1])
    if batch and (side is None or characters >= ENCODE_CHARACTERS):
      encoded = made.encode_arrays([text for _, text in batch])
      yield from ((for_training, text, ids) for (for_training, text), ids in zip(batch, encoded))
      batch, characters = [], 0


def _build_plan(
  config: DataConfig, corpus: pathlib.Path, directory: pathlib.Path, log: Callable[[str], object]
) -> None:
  """Packs every split's shards into rows of config.sequence_length."""
  report = cache.read_index(corpus)['report']
  length = config.sequence_length
  began = time.perf_counter()
  splits = [(counts['train']['shards'], False) for counts in report['sources']]
  splits.append((report['validation']['shards'], True))

  packed, written = [], []
  for entries, in_order in splits:
    plans = [shards.write_plan(corpus, directory, entry, length, in_order) for entry in entries]
    rows = [plan['rows'] for plan in plans]
    pairs, squared = (sum(plan[name] for plan in plans) for name in ('pairs', 'squared_pairs'))
    packed.append(
      {
        'rows': sum(rows),
        'pairs': pairs,
        'squared_pairs': squared,
        'fill': pairs / (sum(rows) * length),
        'rows_per_shard': rows,
      }
    )
    written += [file for plan in plans for file in plan['files']]

  seconds = time.perf_counter() - began
  log(
    f'data: packed into rows of {length} in {seconds:.1f} s; filled '
    + ', '.join(f'{split["fill"]:.2%}' for split in packed[:-1])
    + f' (held out, in order: {packed[-1]["fill"]:.2%})'
  )
  cache.write_index(
    directory, written, {'train': packed[:-1], 'validation': packed[-1], 'seconds': seconds}
  )


def _load(
  config: DataConfig, directory: pathlib.Path, plan: pathlib.Path, log: Callable[[str], object]
) -> Prepared:
  indices = {where: cache.read_index(where) for where in (directory, plan)}
  size = sum(file['bytes'] for index in indices.values() for file in index['files'])
  for where, index in indices.items():
    cache.check(where, index['files'], contents=size <= cache.CHECK_BYTES)
  if size > cache.CHECK_BYTES:
    log(
      f'data: checked the sizes but not the checksums of {size / 1e9:.1f} GB: more than '
      f'{cache.CHECK_BYTES / 1e9:.1f} GB are not read again at every start'
    )

  report = indices[directory]['report'] | {'packing': indices[plan]['report']}
  for of, counts in zip(config.sources, report['sources']):
    # Weight and path may differ from those of the run that built this.
    counts['source'] = dataclasses.asdict(of)

  def source(name: str, weight: float, entries: list[dict], packing: dict) -> shards.PackedSource:
    return shards.PackedSource(
      name,
      weight,
      tuple(
        shards.PackedShard(directory, plan, entry['name'], entry['dtype']) for entry in entries
      ),
      np.cumsum(packing['rows_per_shard'], dtype=np.int64),
    )

  train = tuple(
    source(f'{of.kind} {of.path}'.strip(), of.weight, counts['train']['shards'], packing)
    for of, counts, packing in zip(config.sources, report['sources'], report['packing']['train'])
  )
  validation = source(
    'validation', 1.0, report['validation']['shards'], report['packing']['validation']
  )
  return Prepared(
    f'{directory.name}-{config.sequence_length}',
    (directory, plan),
    files.digest([index['files'] for index in indices.values()]),
    tokenizers.load(directory / 'tokenizer'),
    train,
    validation,
    report,
  )


def _describe(counts: dict) -> str:
  def listed(of: dict) -> str:
    return ', '.join(f'{count:,} {name}' for name, count in of.items() if count) or 'none'

  source = counts['source']
  places = ''.join(f', first {kind} {at}' for kind, at in counts['first_problems'].items())
  return (
    f'data: {source["kind"]} {source["path"]}: read {counts["read"]["documents"]:,} documents '
    f'({counts["read"]["characters"] / 1e6:.1f} M characters); problems: '
    f'{listed(counts["problems"])}{places}; dropped: {listed(counts["dropped"])}; masked: '
    f'{listed(counts["anonymised"])}'
  )


@contextlib.contextmanager
def _timed(report: dict, stage: str):
  began = time.perf_counter()
  yield
  report['seconds'][stage] = time.perf_counter() - began
