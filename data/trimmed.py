"""How does a tokenizer lose the control tokens that a model has no rows for? Gemma 3's has one of
images, behind the last row of its text models; others were given a padding token.
"""

import json
from collections.abc import Collection

import files
from data.huggingface import (
  DEFINITION,
  SETTINGS,
  SPECIAL_MAP,
  HuggingFaceTokenizer,
  content_of,
  definition_of,
  vocabulary_of,
)
from data.tokenizer import Tokenizer

LISTED = 'additional_special_tokens', 'extra_special_tokens', 'added_tokens_decoder'


def trimmed(tokenizer: Tokenizer, rows: int) -> tuple[Tokenizer, list[str]]:
  """A tokenizer whose ids are all below `rows`, and the names of the control tokens that it lost.

  Raises ValueError where another id is not: one of text, or by which a text begins or ends.
  """
  if tokenizer.vocabulary <= rows:
    return tokenizer, []
  control = tokenizer.control_ids() if tokenizer.kind == 'huggingface' else {}
  gone = {name: i for name, i in control.items() if i >= rows}
  needed = {*range(rows, tokenizer.vocabulary)} - {*gone.values()}
  needed |= {tokenizer.bos, tokenizer.eos} & {*gone.values()}
  if needed:
    raise ValueError(
      f'the tokenizer has {tokenizer.vocabulary:,} ids, and the model {rows:,} rows for them: none '
      f'for {min(needed):,}, which texts may have; give the tokenizer that the model was trained '
      'with, --tokenizer=PATH, or --tokenizer=none'
    )
  contents = tokenizer._files()
  definition = definition_of(contents)
  added = [token for token in definition['added_tokens'] if token['content'] not in gone]
  vocabulary = definition['model']['vocab']
  if gone.keys() & vocabulary_of(definition):
    # Those of a list, whose places are their ids, are the last of it.
    vocabulary = (
      {name: i for name, i in vocabulary.items() if name not in gone}
      if isinstance(vocabulary, dict)
      else vocabulary[:rows]
    )
  definition |= {'added_tokens': added, 'model': definition['model'] | {'vocab': vocabulary}}
  changed = {DEFINITION: definition}
  for name in {SETTINGS, SPECIAL_MAP} & contents.keys():
    changed[name] = _without(files.json_object(contents[name], name), gone)
  changed = {
    name: json.dumps(content, ensure_ascii=False).encode() for name, content in changed.items()
  }
  return HuggingFaceTokenizer(contents | changed), [*gone]


def _without(settings: dict, gone: Collection[str]) -> dict:
  """Settings that name none of these tokens, in whatever role."""
  kept = {}
  for key, value in settings.items():
    if key in LISTED and isinstance(value, dict):
      value = {k: token for k, token in value.items() if content_of(token) not in gone}
    elif key in LISTED and value:
      value = [token for token in value if content_of(token) not in gone]
    elif key.endswith('_token') and isinstance(value, (str, dict)) and content_of(value) in gone:
      continue
    kept[key] = value
  return kept
