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
import json
import os
import pathlib
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

import files
import names
from data import cache, clean, duplicates, shards, sources, tokenizers
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.encoding import encoded_by, sides_of
from data.prepared import Prepared, described, held_out_sources, kept
from data.processes import cpus
from data.texts import Texts
from data.tokenizer import Tokenizer, directory_of

FORMAT = 5  # part of every key: raise it when the code changes what a config means
PARALLEL_BYTES = 2**26  # below this, starting worker processes costs more than they save


def prepare(
  config: DataConfig, log: Callable[[str], object] = print, build: Callable | None = None
) -> Prepared:
  """Prepares the corpus that a config describes, or loads it if that was done before.

  Args:
    config: the pipeline's settings.
    log: called with a line for each thing read, written or loaded.
    build: another way to write the same bytes, (config, directory, log); see data/corpus.py.

  Raises:
    ValueError: nothing is left for training or for validation; a tokenizer that can't be made.
    cache.CorruptShardError: files in the cache aren't those that were written.
    FileNotFoundError: a source matches no file.
  """
  records = [source for source in (*config.sources, *config.validation) if source.format]
  if records:
    of_others = {'pair': 'seq2seq', 'judged': 'kto', 'prompt': 'grpo', 'preference': 'preference'}
    kind = of_others.get(records[0].format, 'sft')
    raise ValueError(
      f'source.format={records[0].format!r} is of records to tune on: set objective.kind={kind!r}, '
      "or leave it '' and name the field that holds a document by source.text_field"
    )
  if config.tokenizer.path or config.tokenizer.kind == 'byte':
    # What needs no text is found wrong now, and not after hours of reading the corpus.
    tokenizers.build(config.tokenizer, (), ())
  began = time.perf_counter()
  prepared = kept(config, corpus_key(config), build or _build_corpus, log)
  train, held_out = prepared.report['packing']['train'], prepared.report['validation']
  log(
    f'data: loaded {prepared.directories[0]} in {time.perf_counter() - began:.2f} s: '
    f'{sum(entry["pairs"] for entry in train):,} training tokens in '
    f'{sum(entry["rows"] for entry in train):,} rows of {config.sequence_length}, '
    f'{held_out["tokens"]:,} held out ({held_out["bytes"]:,} bytes)'
  )
  return prepared


def identity(of: Iterable[SourceConfig], memo: pathlib.Path) -> list[list[str]]:
  """What decides which documents some sources give, with digests of their content."""
  return [
    [source.kind, source.text_field, sources.content_digest(sources.paths(source), memo)]
    for source in of
  ]


def tokenizer_identity(config: TokenizerConfig, memo: pathlib.Path) -> dict:
  """What decides which ids a text gets: the settings, with a digest of the files at their path."""
  settings = dataclasses.asdict(config)
  if config.path:
    within = tokenizers.of(config.kind).paths(files.here(directory_of(config.path)))
    settings['path'] = sources.content_digest([str(file) for file in within], memo)
  return settings


def corpus_key(config: DataConfig) -> str:
  """Hash (hex) of the sources' content and of every setting that changes the cleaned,
  tokenised corpus.
  """
  import importlib.metadata

  memo = files.kept(config.cache_dir) / 'sources.json'
  trained = config.tokenizer.trained
  cleaning = dataclasses.asdict(config.clean)
  for name in ('word_list', 'classifier'):
    if cleaning[name]:
      path = os.path.expanduser(cleaning[name])
      if not os.path.isfile(path):
        raise FileNotFoundError(f'clean.{name}={cleaning[name]!r} is no file')
      cleaning[name] = sources.content_digest([path], memo)

  content = {
    'format': FORMAT,
    'sources': identity(config.sources, memo),
    'clean': cleaning,
    'tokenizer': tokenizer_identity(config.tokenizer, memo),
    # What decides besides: the trainer, and (by lower() and isalpha()) the tables of characters.
    # Ids of a tokenizer that is there are its files', and no new version of a library throws away
    # what was prepared.
    'sentencepiece': importlib.metadata.version('sentencepiece') if trained else '',
    'unicode': unicodedata.unidata_version,
    'split': [config.split, config.validation_fraction],
  }
  if config.validation:
    content['validation'] = identity(config.validation, memo)
  if len(held_out_sources(config)) > 1:
    content['held_out'] = 'apart'
  return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=12).hexdigest()


def _build_corpus(
  config: DataConfig, directory: pathlib.Path, log: Callable[[str], object]
) -> None:
  report, seconds = {'sources': []}, {}
  texts = Texts(directory)

  with _timed(seconds, 'clean'):
    seen: set[bytes] = set()
    bounds = [0]
    for source in (*config.sources, *config.validation):
      counts = no_counts(source)
      texts.write(_cleaned(config, source, seen, counts))
      counts['first_problems'] = counts['problems'].first
      bounds.append(len(texts))
      report['sources'].append(counts)
  del seen

  kept = np.ones(len(texts), bool)
  if config.clean.near_duplicates and len(texts):
    with _timed(seconds, 'near_duplicates'):
      kept = ~duplicates.near_duplicates(texts.signatures(), config.clean.near_duplicates)
      for counts, first, last in zip(report['sources'], bounds, bounds[1:]):
        counts['dropped']['near_duplicate'] = int((~kept[first:last]).sum())
  for counts in report['sources']:
    log(described_counts(counts))

  boundary = _split(config, texts, kept, bounds)

  def everything():
    return (text for _, text in texts.read(0, len(texts), kept))

  def training():
    return (text[: boundary[d]] for d, text in texts.read(0, len(texts), kept) if boundary[d])

  with _timed(seconds, 'tokenizer'):
    sizes = (
      [int(of[first:last].sum()) for of in (texts.sizes * kept, texts.characters * kept, boundary)]
      for first, last in zip(bounds, bounds[1:])
    )
    share = sampled_share(config.tokenizer, sizes)
    made = tokenizers.build(config.tokenizer, training(), everything(), share)
    made.save(directory / 'tokenizer')
  log(described_tokenizer(made, seconds['tokenizer']))

  with _timed(seconds, 'encode'):
    written = _encode(directory, texts, kept, boundary, bounds, made, report)
  texts.delete()
  log(described_encoding(report, seconds['encode']))
  # Not in the report, which is the same whoever makes it, and how fast.
  log('data: seconds: ' + ', '.join(f'{stage} {took:.2f}' for stage, took in seconds.items()))
  write_index(config, directory, written, report)


def write_index(config: DataConfig, directory: pathlib.Path, written: list, report: dict) -> None:
  """Completes a corpus: files' records, and the report on all sources, those held out apart."""
  training_sources = len(config.sources)
  report['validation_sources'] = report['sources'][training_sources:]
  report['sources'] = report['sources'][:training_sources]
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

  large = sum(map(sources.size, sources.paths(source))) > PARALLEL_BYTES
  for document in clean.clean_all(reading(), config.clean, workers=cpus() if large else 1):
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


def sampled_share(config: TokenizerConfig, each: Iterable[Sequence[int]]) -> float:
  """The share of text that a tokenizer is trained on, so that it is about config.training_bytes.

  Args:
    each: of each source, how many bytes and characters are left, and characters for training.
  """
  size = sum(size * training // max(characters, 1) for size, characters, training in each)
  return min(1.0, config.training_bytes / max(size, 1))


def _split(config: DataConfig, texts: Texts, kept: np.ndarray, bounds: list[int]) -> np.ndarray:
  """How many leading characters of each document are for training, int64 [documents];
  the others are held out.
  """
  characters = texts.characters * kept
  if config.validation:
    training = np.arange(len(texts)) < bounds[len(config.sources)]
    boundary = np.where(training, characters, 0)
  elif config.split == 'hash':
    boundary = np.where(texts.hash_shares() < config.validation_fraction, 0, characters)
  else:
    boundary = np.zeros(len(texts), np.int64)
    for first, last in zip(bounds, bounds[1:]):
      begins = np.cumsum(characters[first:last]) - characters[first:last]
      training = int(characters[first:last].sum() * (1 - config.validation_fraction))
      boundary[first:last] = np.clip(training - begins, 0, characters[first:last])
  parts = [slice(first, last) for first, last in zip(bounds, bounds[1:])]
  check_split(
    config,
    [(part.stop - part.start, int(kept[part].sum()), bool(boundary[part].any())) for part in parts],
    held_out=bool((boundary < characters).any()),
  )
  return boundary


def check_split(config: DataConfig, each: Sequence[tuple[int, int, bool]], held_out: bool) -> None:
  """Raises ValueError where a side is empty.

  Args:
    each: of each source, how many documents passed the filters, how many are left after
      near-duplicates, and whether there is anything to train on.
    held_out: whether anything is.
  """
  for source, (passed, left, training) in zip(config.sources, each):
    if not training:
      raise ValueError(
        f'nothing is left to train on of {source} ({passed} documents passed the filters, '
        f'{left} after near-duplicates): see the counts above; loosen '
        'data.clean, lower validation_fraction, or remove the source'
      )
  if not held_out:
    raise ValueError(
      f'nothing is held out: none of {sum(left for _, left, _ in each)} documents falls into '
      f'validation_fraction={config.validation_fraction}; raise it, use '
      "split='tail' for a corpus of few documents, or name other sources by data.validation"
    )


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
      before = len(validation.shards)
      with shards.ShardWriter(directory, f'train-{i}', made.vocabulary) as train:
        sides = sides_of(texts.read(bounds[i], bounds[i + 1], kept), boundary)
        for for_training, text, ids in encoded_by(made, sides):
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
      validation.end_shard()
      counts['held_out_shards'] = len(validation.shards) - before
  held_out['shards'] = validation.shards
  np.save(directory / 'validation.text.npy', np.array(offsets, np.int64))
  return conclude(directory, made, lost, report)


def conclude(
  directory: pathlib.Path, made: Tokenizer, lost: Mapping[str, int], report: dict
) -> list[dict]:
  """Completes the report on what was encoded by what the tokenizer gave; the files' records."""
  splits = [counts['train'] for counts in report['sources']] + [report['validation']]
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


def no_counts(source: SourceConfig) -> dict:
  """What the report says of a source of which nothing was read."""
  return {
    'source': described(source),
    'read': collections.Counter(),
    'problems': sources.Problems(),
    'dropped': collections.Counter(),
    'repaired_characters': 0,
    'anonymised': collections.Counter(),
  }


def described_counts(counts: dict) -> str:
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


def described_tokenizer(made: Tokenizer, seconds: float) -> str:
  special = None
  if 'bos_token' not in made.special_tokens:
    special = {made.pad: 'pad', made.eos: 'eos'}.get(made.bos)
  return f'data: {made.kind} tokenizer of {made.vocabulary} ids in {seconds:.1f} s' + (
    f'; it has no bos, so documents begin with its {special}' if special else ''
  )


def described_encoding(report: dict, seconds: float) -> str:
  total = (
    sum(counts['train']['bytes'] for counts in report['sources']) + report['validation']['bytes']
  )
  made = report['tokenizer']
  return (
    f'data: encoded {total / 1e6:.1f} MB in {seconds:.1f} s, {made["bytes_per_token"]:.2f} bytes '
    f'per token, {made["characters_lost"]} characters lost in {made["documents_lost"]} documents'
  )


@contextlib.contextmanager
def _timed(seconds: dict, stage: str):
  began = time.perf_counter()
  yield
  seconds[stage] = time.perf_counter() - began


if __name__ == '__main__':
  names.imported('data.preparing.main')()
