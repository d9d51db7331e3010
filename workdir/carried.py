"""Which tokenizer, and which settings of generation, come in with a checkpoint of others, and go
out with a run?
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import files
from data import export, generation as generations, gguf_tokenizer, tokenizers
from data.generation import GENERATION
from data.gguf import GGUF
from model import checkpoint

Log = Callable[[str], Any]
SENTENCEPIECE = (
  'tokenizer.model',
  'spiece.model',
  'sentencepiece.bpe.model',
  'sentencepiece.model',
)


def tokenizer_in(path: pathlib.Path, wanted: bool, log: Log, gguf: GGUF | None = None):
  """The tokenizer at a path, or in a checkpoint's directory or file; None where there is none and
  none was asked for.
  """
  if gguf:
    tokenizer = gguf_tokenizer.read(gguf)
    if tokenizer is None:
      log(f'NOTE: {path} holds no tokenizer')
    return tokenizer
  models = [path / name for name in SENTENCEPIECE if (path / name).is_file()]
  if (path / 'tokenizer.json').is_file() or not models:
    try:
      return tokenizers.load(path)
    except FileNotFoundError:
      if wanted:
        raise
      log(f'NOTE: {path} holds no tokenizer.json and no SentencePiece model')
      return None
  return tokenizers.load(models[0])


def generation_in(source: pathlib.Path, opened: checkpoint.Opened, tokenizer, log: Log) -> dict:
  """What generation_config.json says, with all ids that it and config.json end texts with.

  {} where neither says more than the tokenizer.
  """
  gguf = getattr(opened.tensors, 'gguf', None)
  generation = gguf_tokenizer.generation(gguf) if gguf else generations.read(source)
  ids = [
    *generations.end_ids(opened.hf, source / 'config.json'),
    *generations.end_ids(generation, source / GENERATION),
  ]
  ids = list(dict.fromkeys([tokenizer.eos, *ids]))
  if unknown := [i for i in ids if i >= tokenizer.vocabulary]:
    log(
      f'NOTE: eos_token_id has {unknown}, but the tokenizer only {tokenizer.vocabulary} ids: no '
      'text ends there'
    )
  ids = [i for i in ids if i < tokenizer.vocabulary]
  if len(ids) > 1:
    log(f'texts end with the ids {", ".join(map(str, ids))}')
  return generation | {'eos_token_id': ids} if generation or len(ids) > 1 else {}


def write_tokenizer(directory: pathlib.Path, tokenizer, config, family: str, log: Log) -> None:
  """Files that give others the tokenizer's ids, or none that would give them other ones."""
  model = getattr(tokenizer, 'model', None)  # of SentencePiece
  try:
    contents, note = export.contents(
      tokenizer, bool(config.encoder_layers), bool(config.token_types)
    )
    if model:
      contents = {'tokenizer.model': model} | contents
  except ValueError as error:
    # Under another name: AutoTokenizer would make a tokenizer of it, with other ids.
    contents, note = {'sentencepiece.model': model}, f'no tokenizer for transformers: {error}'
  for name, content in contents.items():
    files.replace(directory / name, content)
  if note:
    log(f'NOTE: {note}')
  if family == 'qwen2' and 'Qwen2' not in export.class_of(tokenizer):
    log(
      "NOTE: transformers' AutoTokenizer makes Qwen2Tokenizer of whatever stands beside a qwen2 "
      'model; load this one by PreTrainedTokenizerFast.from_pretrained(DIR)'
    )


def write_generation(directory: pathlib.Path, generation: dict) -> None:
  """generation_config.json, which transformers prefers to config.json where both tell of ids."""
  hf = checkpoint.read_json(directory)
  keys = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'decoder_start_token_id')
  ids = {key: hf[key] for key in keys if hf.get(key) is not None}
  files.replace(directory / GENERATION, json.dumps(generation | ids, indent=2) + '\n')
