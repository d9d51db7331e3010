"""Where does a text that is generated end, and how do a model's authors sample, by its files?

That is a fact of the model: convert.py writes generation_config.json into the directory of a run,
train.py hands it on to runs that begin with that one, and whoever opens a run reads it.
"""

import os
from collections.abc import Mapping
from typing import Any

import files
from data.tokenizer import Tokenizer, directory_of

GENERATION = 'generation_config.json'


def ends(tokenizer: Tokenizer) -> tuple[int, ...]:
  """Ids that end a text: the tokenizer's eos, and those that the model's files add.

  A chat model often has several, <|eot_id|> after a turn and <|end_of_text|> after a document.
  Raises ValueError for what is no id.
  """
  more = end_ids(tokenizer.generation, GENERATION)
  return tuple(dict.fromkeys([tokenizer.eos, *(i for i in more if i < tokenizer.vocabulary)]))


def read(directory: str | os.PathLike) -> dict[str, Any]:
  """What the generation_config.json of a directory says; {} where there is none.

  Raises ValueError for one that cannot be read.
  """
  path = files.place(directory) / GENERATION
  generation = files.json_object(path.read_bytes(), path) if path.is_file() else {}
  end_ids(generation, path)
  return generation


def beside(path: str | os.PathLike) -> dict[str, Any]:
  """The same of the model whose tokenizer is at a path: in a checkpoint of transformers it lies in
  one directory with it, in a run beside the tokenizer's.
  """
  # Of a bucket's a copy would have nothing beside it.
  place = (files.here if files.of_hub(path) else files.place)(directory_of(path)).expanduser()
  directory = place if place.is_dir() else place.parent
  return read(directory) or read(directory.parent if directory.name == 'tokenizer' else directory)


def end_ids(settings: Mapping[str, Any], place: object) -> list[int]:
  """The ids that a config.json or generation_config.json ends texts with: one, several or none.

  Raises ValueError for what is no id.
  """
  given = settings.get('eos_token_id')
  ids = given if isinstance(given, list) else [] if given is None else [given]
  if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
    raise ValueError(f'eos_token_id={given!r} in {place} must be an id, or a list of ids')
  return ids
