"""How does text become integers, and how do they become exactly that text again? What every
tokenizer is (data/tokenizers.py has the kinds).

All tokenizers are a table from id to bytes (so decoding, also of half a character while streaming,
is one join) and a way to encode. A document is [bos] + ids + [eos]: bos gives its first token a
context, eos lets a model end a text. Encoding adds neither, and text can't name them: '</s>' in a
document is four characters (see `Tokenizer.encode`).
"""

import collections
import json
import os
import pathlib
import secrets
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

import files

# Of the tokenizers made here; a loaded SentencePiece model keeps its own.
PAD, BOS, EOS, UNK = range(4)
# Within a name of a control token: it is text, see `Tokenizer.encode`. No text can guess it.
CUT = f'<{secrets.token_hex(16)}>'
INDEX = 'tokenizer.json'


class Encoded(NamedTuple):
  """Ids of a text, and where each stands in it, [begin, end) in characters."""

  ids: list[int]
  begins: np.ndarray
  ends: np.ndarray


class Tokenizer:
  """A table of bytes per id, and `encode_arrays`, which subclasses give.

  Attributes:
    kind: 'sentencepiece', 'huggingface', 'byte' or 'char'.
    token_bytes: what each id decodes to; b'' for special ids.
    pad, bos, eos: special ids. pad only fills; it never is a target. bos is what a document's first
      token is predicted from: where a tokenizer has none of that name, another of its special ids
      (its class says which).
    special_tokens: names of control tokens by their role ('bos_token': '<s>'),
      for chat templates; {} when it has none.
    chat_templates: Jinja texts by name, see data/chat.py; {} when it has none.
    generation: what the run's generation_config.json says of ends and of sampling, see
      data/generation.py; {} when there is none.
    extra: ids by name that were added behind its own, see data/extra.py; {} when there are none.
  """

  kind: str

  def __init__(self, token_bytes: list[bytes], *, pad: int = PAD, bos: int = BOS, eos: int = EOS):
    self.token_bytes = token_bytes
    self.pad = pad
    self.bos = bos
    self.eos = eos
    self.special_tokens: dict[str, str] = {}
    self.chat_templates: dict[str, str] = {}
    self.generation: dict[str, object] = {}
    self.extra: dict[str, int] = {}

  @classmethod
  def read(cls, path: pathlib.Path) -> 'Tokenizer':
    """From the directory that `save` wrote, and what else a kind comes in. Raises ValueError where
    a file is not what its name says.
    """
    raise NotImplementedError

  @staticmethod
  def paths(path: str | os.PathLike) -> list[pathlib.Path]:
    """The files that decide what `read` gives."""
    path = directory_of(path).expanduser()
    return sorted(filter(pathlib.Path.is_file, (path, *path.rglob('*'))), key=str) or [path]

  @property
  def vocabulary(self) -> int:
    """Number of ids."""
    return len(self.token_bytes)

  def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of each text, int32 [tokens], without bos and eos."""
    raise NotImplementedError

  def encode(self, text: str, *, special: bool = False) -> list[int]:
    """Ids of a text, without bos and eos.

    Args:
      text: any text.
      special: take the names of control tokens ('<|im_start|>') for those tokens, as in what a chat
        template renders. Never for text that others wrote: it could end a turn, or begin one;
        data.chat.quoted puts CUT, which is taken out here, into the names that it holds.

    Raises:
      ValueError: special, for a kind whose control tokens text can't name;
        a text that UTF-8 can't hold.
    """
    if special:
      raise ValueError(
        f"special=True: text can't name the control tokens of a {self.kind!r} tokenizer; use one "
        "of kind='huggingface', or put their ids (bos, eos) around the text's"
      )
    return self.encode_arrays([in_utf8(text)])[0].tolist()

  def encode_with_places(self, text: str) -> Encoded:
    """As encode(text, special=True). Raises as that does."""
    self.encode(text, special=True)
    raise NotImplementedError(f'a {self.kind!r} tokenizer does not tell where its tokens stand')

  def control_ids(self) -> dict[str, int]:
    """Ids of control tokens by name; those that every tokenizer has, where it knows no others."""
    return {'<pad>': self.pad, '<s>': self.bos, '</s>': self.eos} | self.extra

  def with_template(self, source: str) -> 'Tokenizer':
    """The same with this chat template, Jinja text. Raises ValueError for kinds that keep none."""
    raise ValueError(
      f'a {self.kind!r} tokenizer keeps no chat template; use one of kind=\'huggingface\', or '
      "records of format 'completion'"
    )

  def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
    """The UTF-8 bytes of ids, id by id: decode_bytes(a + b) == decode_bytes(a) + decode_bytes(b).

    They may begin or end within a character,
    so whoever streams holds an incomplete last character back.

    Raises:
      ValueError: an id is outside the vocabulary.
    """
    ids = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    if ids and not 0 <= min(ids) <= max(ids) < self.vocabulary:
      wrong = next(i for i in ids if not 0 <= i < self.vocabulary)
      raise ValueError(
        f'id {wrong} is outside the vocabulary of {self.vocabulary}: was the model trained with '
        'another tokenizer?'
      )
    return b''.join([self.token_bytes[i] for i in ids])

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """The text of ids; bytes that are no UTF-8 become U+FFFD."""
    return self.decode_bytes(ids).decode('utf-8', errors='replace')

  def losses(self, text: str, ids: Sequence[int] | np.ndarray) -> int:
    """Number of characters of `text` that decode(ids) doesn't give back;
    0 means an exact round trip.
    """
    decoded = self.decode(ids)
    if decoded == text:
      return 0
    missing = collections.Counter(text) - collections.Counter(decoded)
    return max(1, missing.total())

  def save(self, directory: str | os.PathLike) -> None:
    """Writes everything that `load` needs into a directory, which is made if needed."""
    for name, content in self._files().items():
      files.replace(files.place(directory) / name, content)

  def _files(self) -> dict[str, bytes]:
    extra = {'extra': [*self.extra]} if self.extra else {}
    return {INDEX: json.dumps({'kind': self.kind, **extra}).encode()}


def directory_of(path: str | os.PathLike) -> pathlib.Path:
  """Of a path to the index within a tokenizer's directory, that directory; any other as it is."""
  return place.parent if (place := pathlib.Path(str(path))).name == INDEX else place


def in_utf8(text: str) -> str:
  """The text, if UTF-8 can hold it. Raises ValueError otherwise,
  where libraries of tokenizers fail each in a way of its own.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f'a text has {text[error.start]!r} at {error.start}, half of a surrogate pair, which UTF-8 '
      'cannot hold; take it out, or give both halves as one character'
    ) from error
  return text
