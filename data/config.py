"""Which settings does the data pipeline have, and which of them are impossible?"""

import dataclasses
import math
import os

import names

SOURCE_KINDS = ('stdlib', 'text', 'jsonl', 'csv', 'parquet')
ROWS = SOURCE_KINDS[2:]  # kinds whose files hold rows of named fields
FORMATS = (
  '',
  'chat',
  'sharegpt',
  'alpaca',
  'completion',
  'pair',
  'label',
  'preference',
  'judged',
  'prompt',
)
FILTER_PRESETS = ('none', 'code', 'prose')
ANONYMISED_KINDS = ('email', 'ip', 'phone', 'digits')
TOKENIZER_KINDS = ('sentencepiece', 'huggingface', 'byte', 'char')
TOKENIZER_ALGORITHMS = ('bpe', 'unigram')
# Settings of a tokenizer that is trained here.
OF_TRAINING = ('algorithm', 'split_by_whitespace', 'training_bytes')
SPLITS = ('hash', 'tail')

# Beyond any use, and below what no machine could hold: said at once and not by a killed process.
MOST_IDS = 2**24
MOST_TRAINING_BYTES = 2**40
MOST_LENGTH = 2**24
MOST_POSITIONS = 2**31  # of a batch, which is 20 bytes each on the hosts


def _check_whole(name: str, value: object) -> None:
  if isinstance(value, bool) or not isinstance(value, int):
    raise ValueError(f'{name}={value!r} must be a whole number, such as 4096')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
  """One source of documents.

  Attributes:
    kind: 'stdlib' (the running interpreter's own source, without tests), 'text' (a document per
      file), 'jsonl' (a document per line), 'csv' (a document per record), 'parquet' (a document per
      row; needs the extra 'parquet').
    path: glob of the files ('**' crosses directories, but no links to them); '' for 'stdlib'. Names
      that end in .gz, .bz2, .xz or .zst are decompressed.
    text_field: the JSON key or column that holds the text; '' for 'stdlib' and 'text', and for
      records.
    format: '' for documents; of records to tune on, which fields they have: 'chat', 'sharegpt',
      'alpaca' or 'completion' (objective.kind='sft', 'distil_sft'), 'pair' ('seq2seq'), 'label'
      ('classify', 'classify_head'), 'preference' ('preference', 'reward'), 'judged' ('kto') or
      'prompt' ('grpo', 'ppo', 'gkd'), those of a T5 by the same ('kto_seq2seq'); see
      data/records.py.
    columns: of records, where a field has another name in the file: 'prompt=question'.
    weight: this source's share of the training examples, relative to the other sources' weights.
  """

  kind: str = 'stdlib'
  path: str = ''
  text_field: str = ''
  format: str = ''
  columns: tuple[str, ...] = ()
  weight: float = 1.0

  def __post_init__(self):
    names.check('source.kind', self.kind, SOURCE_KINDS)
    names.check('source.format', self.format, FORMATS)
    if self.format and self.kind not in ROWS:
      raise ValueError(
        f'source.format={self.format!r} with kind={self.kind!r}, whose documents have no fields; '
        f'records are in files of kind {", ".join(ROWS)}'
      )
    if self.columns and not self.format:
      raise ValueError(
        f'source.columns={self.columns} names fields of records, and source.format is empty; set '
        'it, or name the field of a document by source.text_field'
      )
    if bool(self.path) == (self.kind == 'stdlib'):
      remedy = (
        "set source.kind='text' (or 'jsonl', 'csv') to read files; 'stdlib', which is the default, "
        "knows where its own are: leave it ''"
        if self.path
        else 'give a file or a glob'
      )
      raise ValueError(f'source.path={self.path!r} with kind={self.kind!r}: {remedy}')
    if bool(self.text_field) != (self.kind in ROWS and not self.format):
      whole = 'a record is more than a text' if self.format else 'the whole file is the text'
      remedy = f"leave it '' ({whole})" if self.text_field else 'name the field that holds the text'
      raise ValueError(f'source.text_field={self.text_field!r} with kind={self.kind!r}: {remedy}')
    if not (self.weight > 0 and math.isfinite(self.weight)):
      raise ValueError(
        f'source.weight={self.weight} must be positive; remove a source that should give nothing'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleanConfig:
  """What is dropped and what is masked before anything is learned from the text.

  Attributes:
    filters: quality rules, see data/clean.py: 'none', 'code' (StarCoder's)
      or 'prose' (Gopher's, C4's, FineWeb's).
    anonymise: kinds replaced by placeholders such as <EMAIL>: 'email', 'ip',
      'phone', 'digits' (runs of nine or more, cards, IBANs, US social security numbers); see
      data/personal.py. Give () for fine-tuning, as configs/finetune.py does: a model that is to
      copy a number from its prompt must see numbers.
    exact_duplicates: drop documents equal to an earlier one up to case and whitespace.
    near_duplicates: drop documents whose estimated Jaccard similarity (5-word shingles) with an
      earlier one is at least this; 0 switches the stage off.
    word_list: a file of words and phrases, one a line; a document with any of them is dropped. None
      comes with the code; '' drops nothing.
    classifier: a file that `python -m data.labels` made of labelled lines; '' drops nothing.
    classifier_threshold: the probability from which the classifier drops a document.
  """

  filters: str = 'none'
  anonymise: tuple[str, ...] = ANONYMISED_KINDS
  exact_duplicates: bool = True
  near_duplicates: float = 0.75
  word_list: str = ''
  classifier: str = ''
  classifier_threshold: float = 0.5

  def __post_init__(self):
    names.check('clean.filters', self.filters, FILTER_PRESETS)
    for kind in self.anonymise:
      names.check('clean.anonymise', kind, ANONYMISED_KINDS)
    if not 0 < self.classifier_threshold < 1:
      raise ValueError(
        f'clean.classifier_threshold={self.classifier_threshold} must be between 0 and 1, both '
        'excluded'
      )
    if self.near_duplicates != 0 and not 0.5 <= self.near_duplicates <= 1:
      raise ValueError(
        f'clean.near_duplicates={self.near_duplicates} must be 0 (off) or in [0.5, 1]: the MinHash '
        'bands find hardly any pair below 0.5'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
  """How text becomes integers.

  Attributes:
    kind: 'sentencepiece', 'huggingface' (a tokenizer.json), 'byte' (256 bytes)
      or 'char' (the characters found in the corpus).
    path: what to load: a run's tokenizer directory; a SentencePiece .model file ('' trains one on
      the training split); a directory with tokenizer.json and what Hugging Face keeps beside it.
    vocabulary: number of ids. 0: the kind's own (4096 for a trained SentencePiece model). For a
      kind that fixes its own number, any other value than that number is an error.
    algorithm: 'bpe' or 'unigram', for training; as the two below, of no tokenizer that is there.
    split_by_whitespace: keep pieces within words;
      False lets frequent phrases become pieces (shorter sequences).
    training_bytes: train on a sample of about this many bytes of text, chosen by hash.
  """

  kind: str = 'sentencepiece'
  path: str = ''
  vocabulary: int = 0
  algorithm: str = 'bpe'
  split_by_whitespace: bool = True
  training_bytes: int = 32_000_000

  def __post_init__(self):
    names.check('tokenizer.kind', self.kind, TOKENIZER_KINDS)
    names.check('tokenizer.algorithm', self.algorithm, TOKENIZER_ALGORITHMS)
    if self.path and self.kind == 'byte':
      raise ValueError(
        f"tokenizer.path={self.path!r}: kind='byte' has nothing to load; drop the path"
      )
    if self.kind == 'huggingface' and not self.path:
      raise ValueError(
        "tokenizer.path='' with kind='huggingface': give the directory that holds its "
        "tokenizer.json, or train one here with kind='sentencepiece'"
      )
    _check_whole('tokenizer.vocabulary', self.vocabulary)
    _check_whole('tokenizer.training_bytes', self.training_bytes)
    if not 0 <= self.vocabulary <= MOST_IDS:
      raise ValueError(
        f'tokenizer.vocabulary={self.vocabulary} must be in [0, {MOST_IDS}]; 0 takes the '
        'kind\'s own'
      )
    if self.trained and 0 < self.vocabulary < 512:
      raise ValueError(
        f'tokenizer.vocabulary={self.vocabulary} must be >= 512 to train: 256 byte pieces and 4 '
        "special ones come first; use kind='byte' for a smaller one"
      )
    if not 1000 <= self.training_bytes <= MOST_TRAINING_BYTES:
      raise ValueError(
        f'tokenizer.training_bytes={self.training_bytes} must be in [1000, {MOST_TRAINING_BYTES}]: '
        'the trainer keeps the sample in memory, several times over'
      )
    for name in () if self.trained else OF_TRAINING:
      default = getattr(TokenizerConfig, name)
      if getattr(self, name) != default:
        raise ValueError(
          f'tokenizer.{name}={getattr(self, name)!r} would not be read: kind={self.kind!r} with '
          f'path={self.path!r} trains no tokenizer; leave it at {default!r}'
        )

  @property
  def trained(self) -> bool:
    """Whether this tokenizer is a SentencePiece model to be trained here."""
    return self.kind == 'sentencepiece' and not self.path


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """The whole data pipeline.

  Attributes:
    sources: where text comes from; examples are drawn in proportion to the sources' weights.
    clean: what is dropped and masked.
    tokenizer: how text becomes integers.
    sequence_length: T, positions per row.
    batch_size: B, rows per global batch (all processes together).
    validation: sources that are held out, all of them; then nothing is of `sources`, and
      validation_fraction is 0. Their weights are not read.
    validation_fraction: held-out share: of the documents ('hash')
      or of each source's characters ('tail').
    split: 'hash' decides by a hash of the document's content, so a document keeps its side as the
      corpus grows and duplicates never straddle (a record by what it asks, see data/splits.py);
      'tail' holds out the end of each source, for a
      corpus that is a single text.
    seed: order of the training examples; that of prompts is of train.seed, and this one 0.
    cache_dir: where prepared corpora are kept, each under a hash of its content and settings; '~'
      is the home directory.
  """

  sources: tuple[SourceConfig, ...] = (SourceConfig(),)
  validation: tuple[SourceConfig, ...] = ()
  clean: CleanConfig = CleanConfig()
  tokenizer: TokenizerConfig = TokenizerConfig()
  sequence_length: int = 512
  batch_size: int = 8
  validation_fraction: float = 0.05
  split: str = 'hash'
  seed: int = 0
  cache_dir: str = 'runs/cache'

  def __post_init__(self):
    names.check('data.split', self.split, SPLITS)
    if not self.sources:
      raise ValueError('data.sources is empty: give at least one SourceConfig')
    for name in ('sequence_length', 'batch_size', 'seed'):
      _check_whole(f'data.{name}', getattr(self, name))
    if self.sequence_length < 1 or self.batch_size < 1:
      raise ValueError(
        f'data.sequence_length={self.sequence_length} and data.batch_size={self.batch_size} '
        'must be >= 1'
      )
    if self.sequence_length > MOST_LENGTH:
      raise ValueError(
        f'data.sequence_length={self.sequence_length} must be at most {MOST_LENGTH}; longer '
        'documents are cut'
      )
    if self.batch_size * self.sequence_length > MOST_POSITIONS:
      raise ValueError(
        f'data.batch_size={self.batch_size} rows of data.sequence_length={self.sequence_length} '
        f'are {self.batch_size * self.sequence_length:,} positions, of at most '
        f'{MOST_POSITIONS:,}; lower one of the two'
      )
    if self.validation and self.validation_fraction:
      raise ValueError(
        f'data.validation has sources of its own, and data.validation_fraction='
        f'{self.validation_fraction} would hold out more; set it to 0'
      )
    if not self.validation and not 0 < self.validation_fraction < 1:
      raise ValueError(
        f'data.validation_fraction={self.validation_fraction} must be between '
        '0 and 1, both excluded; 0 is for data.validation, which has sources of its own'
      )
    if not 0 <= self.seed < 2**32:
      raise ValueError(f'data.seed={self.seed} must be in [0, 2**32)')
    object.__setattr__(self, 'cache_dir', os.path.expanduser(self.cache_dir))
    if not self.cache_dir:
      raise ValueError("data.cache_dir is '': give a directory that can be written")
