"""What is prepared data, and where is it kept? Rows of tokens in a cache, with their tokenizer,
under a key of all that decided about them; made once, by whoever knows how.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np

import files
from data import building, cache, mirrored, shards, tokenizers
from data.config import DataConfig, SourceConfig
from data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A prepared corpus.

  Attributes:
    key: hash of everything that determines the training rows, '<corpus key>-<sequence length>'.
    directories: where the corpus lies, and its packing.
    files: digest of all files there, by their sizes and checksums.
    tokenizer: of the corpus.
    train: the packed rows of each source, with its weight.
    validation: the packed held-out rows of all sources, in order; no row is of two.
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

  def bytes_of(self, tokens: Mapping[str, float]) -> float:
    """UTF-8 bytes of the held-out text in which so many tokens were predicted: exact for all of a
    source, in proportion for a part.

    Args:
      tokens: of each source by its name in validation.parts, or by '' of all together.
    """
    if '' in tokens:
      pairs = self.report['packing']['validation']['pairs']
      return self.validation_bytes * tokens[''] / pairs
    offsets = np.load(self.directories[0] / 'validation.text.npy', mmap_mode='r')
    entries, total = self.report['validation']['shards'], 0.0
    ends = np.cumsum([0, *(entry['documents'] for entry in entries)])
    for source, read in tokens.items():
      part = self.validation.parts[source]
      size = int(offsets[ends[part.stop]] - offsets[ends[part.start]])
      # Every token of a document but its first is predicted once.
      pairs = sum(entries[i]['tokens'] - entries[i]['documents'] for i in part)
      total += size * read / pairs
    return total

  @property
  def rows(self) -> int:
    """Training rows of all sources together: what an epoch goes through."""
    return sum(map(len, self.train))

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


def kept(
  config: DataConfig,
  key: str,
  build: Callable,
  log: Callable[[str], object],
  rows: shards.Rows | None = None,
) -> Prepared:
  """What has this key: from the cache, and built first where it is not there.

  Args:
    build: (config, directory, log), which writes shards, and an index with a report of them.
    rows: how training rows are filled; None: with documents, of config.sequence_length.
  """
  rows = rows or shards.Rows(config.sequence_length)
  place = files.kept(config.cache_dir)
  directory = place / key

  def once(name: str, build: Callable) -> None:
    building.once(place / name, mirrored.built(config.cache_dir, name, build, log), log)

  once(key, lambda partial: build(config, partial, log))
  plan = directory / rows.name
  once(f'{key}/{rows.name}', lambda partial: _build_plan(rows, directory, partial, log))
  return _load(config, directory, plan, rows, log)


def held_out_sources(config: DataConfig) -> tuple[SourceConfig, ...]:
  """Those of which something is held out."""
  return config.validation or config.sources


def described(source: SourceConfig) -> dict:
  """A source as reports have it, JSON-able."""
  return dataclasses.asdict(source) | {'columns': [*source.columns]}


def _build_plan(
  rows: shards.Rows, corpus: pathlib.Path, directory: pathlib.Path, log: Callable[[str], object]
) -> None:
  """Packs every split's shards into rows."""
  report = cache.read_index(corpus)['report']
  began = time.perf_counter()
  splits = [counts['train']['shards'] for counts in report['sources']]
  plans = [[rows.write_plan(corpus, directory, entry) for entry in split] for split in splits]
  held_out = report['validation']['shards']
  plans.append([rows.in_order.write_plan(corpus, directory, entry) for entry in held_out])
  conclude_plans(rows, directory, plans, began, log)


def conclude_plans(
  rows: shards.Rows,
  directory: pathlib.Path,
  splits: list[list[dict]],
  began: float,
  log: Callable[[str], object],
) -> None:
  """Completes a directory of plans.

  Args:
    splits: of each source, and last of what is held out, the plans' entries.
    began: when, by time.perf_counter.
  """
  packed, written = [], []
  for plans, form in zip(splits, [*[rows] * (len(splits) - 1), rows.in_order]):
    totals = {name: sum(plan[name] for plan in plans) for name in ('rows', *form.counts)}
    per_shard = [plan['rows'] for plan in plans]
    packed.append({**totals, 'fill': form.fill(totals), 'rows_per_shard': per_shard})
    written += [file for plan in plans for file in plan['files']]

  log(
    f'data: packed into rows of {rows.size} in {time.perf_counter() - began:.1f} s; filled '
    + ', '.join(f'{split["fill"]:.2%}' for split in packed[:-1])
    + f' (held out, in order: {packed[-1]["fill"]:.2%})'
  )
  cache.write_index(directory, written, {'train': packed[:-1], 'validation': packed[-1]})


def _load(
  config: DataConfig,
  directory: pathlib.Path,
  plan: pathlib.Path,
  rows: shards.Rows,
  log: Callable[[str], object],
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
    counts['source'] = described(of)

  def source(name: str, weight: float, entries: list[dict], packing: dict) -> shards.PackedSource:
    return rows.source(
      name,
      weight,
      tuple(
        shards.PackedShard(directory, plan, entry['name'], entry['dtype'], 'scored' in entry)
        for entry in entries
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
  validation = dataclasses.replace(validation, parts=_parts(config, report))
  return Prepared(
    f'{directory.name}-{plan.name.removeprefix("rows-")}',
    (directory, plan),
    files.digest([index['files'] for index in indices.values()]),
    tokenizers.load(directory / 'tokenizer'),
    train,
    validation,
    report,
  )


def _parts(config: DataConfig, report: dict) -> dict[str, range]:
  """The shards of what is held out of each source, by a name of its own; {} of one source."""
  of = held_out_sources(config)
  if len(of) == 1:
    return {}
  counts = report['validation_sources' if config.validation else 'sources']
  parts, first = {}, 0
  for source, count in zip(of, counts, strict=True):
    # Of 'plays/**/*.txt', 'plays'.
    fixed = [part for part in pathlib.PurePath(source.path).parts if not set(part) & set('*?[')]
    name = label = pathlib.PurePath(fixed[-1]).stem if fixed else source.kind
    i = 2
    while name in parts:
      name, i = f'{label}-{i}', i + 1
    parts[name] = range(first, first := first + count['held_out_shards'])
  return parts
