"""Which tokenizers are there, and how is one made and read back? The only list, by the name that
--config.data.tokenizer.kind takes; the two kinds that need no training are here.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

import files
import names
from data.config import TokenizerConfig
from data.tokenizer import INDEX, Tokenizer, directory_of

# Kind -> its class, imported when it is asked for; the kinds are those of data.config.
KINDS = {
  'sentencepiece': 'data.sentencepiece.SentencePieceTokenizer',
  'huggingface': 'data.huggingface.HuggingFaceTokenizer',
  'byte': 'data.tokenizers.ByteTokenizer',
  'char': 'data.tokenizers.CharTokenizer',
}


class ByteTokenizer(Tokenizer):
  """The 256 bytes after the special ids; vocabulary 259."""

  kind = 'byte'

  def __init__(self):
    super().__init__([b''] * 3 + [bytes([i]) for i in range(256)])

  @classmethod
  def read(cls, path: pathlib.Path) -> 'ByteTokenizer':
    return cls()

  def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3 for text in texts]


class CharTokenizer(Tokenizer):
  """One id per character, in code point order as in nanoGPT's data/shakespeare_char,
  after the special ids.

  Args:
    characters: the characters that are known; sorted here.
  """

  kind = 'char'

  def __init__(self, characters: Iterable[str]):
    self.characters = ''.join(sorted(set(characters)))
    super().__init__([b''] * 3 + [character.encode() for character in self.characters])
    self._codes = np.frombuffer(self.characters.encode('utf-32-le'), np.uint32)

  @classmethod
  def read(cls, path: pathlib.Path) -> 'CharTokenizer':
    characters = files.json_object((path / INDEX).read_bytes(), path / INDEX).get('characters')
    if not isinstance(characters, str):
      raise ValueError(f'{path / INDEX}: a tokenizer of kind \'char\' has its characters as a text')
    return cls(characters)

  def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
    return [self._encode(text) for text in texts]

  def _encode(self, text: str) -> np.ndarray:
    codes = np.frombuffer(text.encode('utf-32-le'), np.uint32)
    ids = np.searchsorted(self._codes, codes).astype(np.int32)
    known = ids < len(self._codes)
    known[known] = self._codes[ids[known]] == codes[known]
    if not known.all():
      where = int(np.argmin(known))
      raise ValueError(
        f'character {text[where]!r} (U+{codes[where]:04X}), at {where}, is not among the '
        f'{len(self._codes)} characters of this tokenizer; remove it, or use kind=\'byte\''
      )
    return ids + 3

  def _files(self) -> dict[str, bytes]:
    index = json.loads(super()._files()[INDEX]) | {'characters': self.characters}
    return {INDEX: json.dumps(index).encode()}


def of(kind: str) -> type[Tokenizer]:
  """The class of a kind, one of KINDS."""
  return names.imported(KINDS[kind])


def load(path: str | os.PathLike) -> Tokenizer:
  """Loads a directory written by `save` or of Hugging Face's form,
  a tokenizer.json of one, or a SentencePiece .model.

  Raises:
    FileNotFoundError: no tokenizer is there.
    ValueError: a file that isn't what its name says; a tokenizer.json that can't be used, see
      data/huggingface.py.
  """
  path = files.here(directory_of(path)).expanduser()
  if path.is_file() and path.suffix != '.json':
    return of('sentencepiece').read(path)
  if not (path / INDEX).is_file():
    raise FileNotFoundError(
      f'no tokenizer at {str(path)!r}: neither a SentencePiece .model file nor a directory with '
      f'{INDEX}'
    )
  index = files.parsed((path / INDEX).read_bytes(), path / INDEX)
  if not isinstance(index, dict) or 'kind' not in index:
    return of('huggingface').read(path)
  saved = [kind for kind in KINDS if kind != 'huggingface']
  tokenizer = of(names.check(f'{path / INDEX}: kind', index['kind'], saved)).read(path)
  return names.imported('data.extra.extended')(tokenizer, index.get('extra') or [])


def build(
  config: TokenizerConfig, training: Iterable[str], everything: Iterable[str], share: float = 1.0
) -> Tokenizer:
  """Makes the tokenizer that a config asks for.

  Args:
    config: its kind and settings.
    training: texts of the training split, to train SentencePiece on.
    everything: texts of both splits, for the 'char' vocabulary
      (as nanoGPT: a list of characters tells nothing).
    share: of `training` that is to be trained on, see data.sentencepiece.train.

  Raises:
    ValueError: config.vocabulary isn't the number of ids that came out;
      the file at config.path is of another kind.
  """
  if config.path:
    tokenizer = load(config.path)
    if tokenizer.kind != config.kind:
      raise ValueError(
        f'the tokenizer at tokenizer.path={config.path!r} is of kind {tokenizer.kind!r}, not '
        f'{config.kind!r}; set tokenizer.kind to that'
      )
  elif config.kind == 'byte':
    tokenizer = ByteTokenizer()
  elif config.kind == 'char':
    tokenizer = CharTokenizer(set().union(*map(set, everything)))
  else:
    tokenizer = of(config.kind).trained(config, training, share)
  if config.vocabulary and config.vocabulary != tokenizer.vocabulary:
    raise ValueError(
      f'tokenizer.vocabulary={config.vocabulary} but this {config.kind!r} tokenizer has '
      f'{tokenizer.vocabulary} ids; set it to that, or to 0'
    )
  return tokenizer
