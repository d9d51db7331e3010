"""How does the tokenizer within a GGUF file become a tokenizer.json that gives the same ids?

The file has the pieces, their kinds, merges or scores, and names the way in which llama.cpp cuts a
text before it merges. A tokenizer.json says the last in regular expressions: those of the models
that the names are of. A name that is not here is refused, since another way to cut gives other ids
for some texts, which nothing later would show.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

import names
from data.export import around
from data.gguf import GGUF
from data.huggingface import DEFINITION, SETTINGS, HuggingFaceTokenizer

PREFIX = 'tokenizer.ggml.'
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token_type
SPACE = '\u2581'  # SentencePiece writes a space as this character

_GPT2 = {
  'type': 'ByteLevel',
  'add_prefix_space': False,
  'trim_offsets': True,
  'use_regex': True,
}


def _split(*patterns: str) -> dict:
  """Cuts by patterns, one after the other; what none matches is a part, too."""
  steps = [
    {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}
    for pattern in patterns
  ]
  return {'type': 'Sequence', 'pretokenizers': [*steps, _GPT2 | {'use_regex': False}]}


def _words(digits: str) -> dict:
  """As Llama 3 and Qwen cut, apart from how many digits go together."""
  return _split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + '|'
    r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
  )


_DIGITS = {
  'type': 'Sequence',
  'pretokenizers': [{'type': 'Digits', 'individual_digits': True}, _GPT2],
}
# What llama.cpp does where a file names no way: three patterns of its own.
_DEFAULT = _split(
  r'[\p{P}\$\+<=>\^~\|]+',
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
  r'\p{N}+',
  '[0-9][0-9][0-9]',
)
# tokenizer.ggml.pre -> (how a text is cut, how it is normalised, whether a part that is a piece is
# that piece, whatever the merges say).
PRETOKENIZERS: dict[str, tuple[dict, dict | None, bool]] = {
  'default': (_DEFAULT, None, False),
  'gpt-2': (_GPT2, None, False),
  'smollm': (_DIGITS, None, False),
  'starcoder': (_DIGITS, None, False),
  'llama-bpe': (_words(r'\p{N}{1,3}'), None, True),
  'qwen2': (_words(r'\p{N}'), {'type': 'NFC'}, False),
}


def read(gguf: GGUF) -> HuggingFaceTokenizer | None:
  """The tokenizer; None where the file has none.

  Raises ValueError or NotImplementedError, naming the file, for one that cannot be made again.
  """
  if PREFIX + 'tokens' not in gguf.keys:
    return None
  contents = {name: json.dumps(content).encode() for name, content in written(gguf).items()}
  try:
    return HuggingFaceTokenizer(contents)
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    raise ValueError(f'{gguf.path}: its tokenizer cannot be made again: {error}') from error


def written(gguf: GGUF) -> dict[str, dict]:
  """Its files, parsed: tokenizer.json and tokenizer_config.json."""
  tokens = _strings(gguf, 'tokens')
  kinds = _kinds(gguf, len(tokens))
  if len({*tokens}) < len(tokens):
    raise ValueError(f'{gguf.path}: {PREFIX}tokens has the same piece twice')
  # Rows of the embedding that no text becomes fill the end of some vocabularies.
  end = max((i + 1 for i, kind in enumerate(kinds) if kind != UNUSED), default=0)
  tokens, kinds = tokens[:end], kinds[:end]

  added = [i for i, kind in enumerate(kinds) if kind in (CONTROL, UNKNOWN, USER_DEFINED)]
  model = gguf.get(PREFIX + 'model', str)
  if model == 'gpt2':
    definition = _byte_level(gguf)
  elif model == 'llama':
    definition = _sentencepiece(gguf, tokens, kinds)
  else:
    raise NotImplementedError(
      f"{gguf.path}: {PREFIX}model={model!r} is not read; 'gpt2' and 'llama' are; import with "
      '--tokenizer=PATH, or none'
    )
  rules = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  definition['added_tokens'] = [
    rules | {'id': i, 'content': tokens[i], 'special': kinds[i] != USER_DEFINED} for i in added
  ]
  # A piece of the model is spelled in the model's characters, an added one as it stands: those
  # behind the others, which get their ids without being pieces, are none.
  last = max(set(range(len(tokens))).difference(added), default=-1)
  for i in added:
    if kinds[i] == USER_DEFINED and (SPACE in tokens[i] or (i < last and not tokens[i].isascii())):
      raise NotImplementedError(
        f'{gguf.path}: {PREFIX}tokens[{i}]={tokens[i]!r} is user-defined, and it is not '
        'known which text becomes it; import with --tokenizer=PATH, or none'
      )
  definition['model']['vocab'] = {token: i for i, token in enumerate(tokens[: last + 1])}
  settings = _settings(gguf, tokens)
  begins = settings['add_bos_token']
  definition['post_processor'] = (
    around(settings['bos_token'], _id(gguf, 'bos', len(tokens))) if begins else None
  )
  return {
    DEFINITION: {'version': '1.0', 'truncation': None, 'padding': None} | definition,
    SETTINGS: settings,
  }


def generation(gguf: GGUF) -> dict[str, list[int]]:
  """What a generation_config.json would say: the ids that end a text, the document's first."""
  count = len(gguf.keys.get(PREFIX + 'tokens', ()))
  ends = [_id(gguf, role, count) for role in ('eos', 'eot', 'eom')]
  ends = list(dict.fromkeys(i for i in ends if i is not None))
  return {'eos_token_id': ends} if ends else {}


def _byte_level(gguf: GGUF) -> dict:
  """BPE of bytes, GPT-2's and its successors'."""
  name = names.check(f'{gguf.path}: {PREFIX}pre', gguf.get(PREFIX + 'pre', str), PRETOKENIZERS)
  cut, normalizer, whole_parts = PRETOKENIZERS[name]
  merges = [merge.split(' ', 1) for merge in _strings(gguf, 'merges')]
  if wrong := [merge for merge in merges if len(merge) != 2]:
    raise ValueError(f'{gguf.path}: {PREFIX}merges has {wrong[0][0]!r}, not two pieces')
  return {
    'normalizer': normalizer,
    'pre_tokenizer': cut,
    'decoder': _GPT2,
    'model': _bpe(merges) | {'ignore_merges': whole_parts},
  }


def _sentencepiece(gguf: GGUF, tokens: list[str], kinds: list[int]) -> dict:
  """BPE of SentencePiece with byte pieces, Llama 2's, whose scores order the merges."""
  scores = gguf.get(PREFIX + 'scores', np.ndarray)
  if len(scores) < len(tokens) or not np.isfinite(scores[: len(tokens)]).all():
    raise ValueError(f'{gguf.path}: {PREFIX}scores must be a number for each of the pieces')
  missing = {f'<0x{byte:02X}>' for byte in range(256)} - {*tokens}
  unknown = [token for token, kind in zip(tokens, kinds) if kind == UNKNOWN]
  if missing or not unknown:
    raise NotImplementedError(
      f'{gguf.path}: a SentencePiece tokenizer without {min(missing, default="an unknown piece")} '
      'is not read'
    )
  prefix = gguf.get(PREFIX + 'add_space_prefix', bool, True)
  spaces = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}
  back = {'type': 'Replace', 'pattern': {'String': SPACE}, 'content': ' '}
  strip = {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}
  return {
    'normalizer': {
      'type': 'Sequence',
      'normalizers': [{'type': 'Prepend', 'prepend': SPACE}] * prefix + [spaces],
    },
    'pre_tokenizer': None,
    'decoder': {
      'type': 'Sequence',
      'decoders': [back, {'type': 'ByteFallback'}, {'type': 'Fuse'}] + [strip] * prefix,
    },
    'model': _bpe(_merges(tokens, kinds, scores))
    | {'unk_token': unknown[0], 'fuse_unk': True, 'byte_fallback': True},
  }


def _bpe(merges: list[list[str]]) -> dict:
  return {
    'type': 'BPE',
    'dropout': None,
    'unk_token': None,
    'continuing_subword_prefix': '',
    'end_of_word_suffix': '',
    'fuse_unk': False,
    'byte_fallback': False,
    'merges': merges,
  }


def _merges(tokens: list[str], kinds: list[int], scores: np.ndarray) -> list[list[str]]:
  """The pairs that make pieces, in the order in which SentencePiece merges them: it takes the pair
  whose piece has the highest score, however that piece is made.
  """
  ids = {token: i for i, token in enumerate(tokens) if kinds[i] == NORMAL}
  pairs = []
  for token, i in ids.items():
    for cut in range(1, len(token)):
      left, right = ids.get(token[:cut]), ids.get(token[cut:])
      if left is not None and right is not None:
        pairs.append((-float(scores[i]), i, left, right))
  return [[tokens[left], tokens[right]] for _, _, left, right in sorted(pairs)]


def _settings(gguf: GGUF, tokens: list[str]) -> dict[str, Any]:
  """tokenizer_config.json: tokens by their roles, and chat templates."""
  roles = {'bos': 'bos', 'eos': 'eos', 'padding': 'pad', 'unknown': 'unk', 'seperator': 'sep'}
  settings: dict[str, Any] = {}
  for theirs, ours in roles.items():
    i = _id(gguf, theirs, len(tokens))
    if i is not None:
      settings[f'{ours}_token'] = tokens[i]

  ends = generation(gguf).get('eos_token_id')
  if not ends:
    raise ValueError(f'{gguf.path}: no key {PREFIX}eos_token_id tells where a text ends')
  settings.setdefault('eos_token', tokens[ends[0]])
  settings['add_bos_token'] = _begins(gguf) and 'bos_token' in settings
  if templates := _templates(gguf.keys):
    settings['chat_template'] = templates
  return settings


def _begins(gguf: GGUF) -> bool:
  """Whether a text begins with bos; where the file does not say it, as llama.cpp has it: texts of
  Llama 2 (SentencePiece) and 3 do.
  """
  built = gguf.get(PREFIX + 'model', str) == 'llama' or gguf.keys.get(PREFIX + 'pre') == 'llama-bpe'
  return gguf.get(PREFIX + 'add_bos_token', bool, built)


def _templates(keys: Mapping[str, Any]) -> list[dict[str, str]]:
  start = 'tokenizer.chat_template'
  return [
    {'name': name.removeprefix(start).removeprefix('.') or 'default', 'template': text}
    for name, text in keys.items()
    if (name == start or name.startswith(start + '.')) and isinstance(text, str)
  ]


def _id(gguf: GGUF, role: str, count: int) -> int | None:
  """The id of a role's token, None where there is none."""
  name = f'{PREFIX}{role}_token_id'
  if name not in gguf.keys:
    return None
  i = gguf.get(name, int)
  if not 0 <= i < count:
    raise ValueError(f'{gguf.path}: {name}={i} is no id of its {count} pieces')
  return i


def _strings(gguf: GGUF, name: str) -> list[str]:
  texts = gguf.get(PREFIX + name, (list, np.ndarray))
  if not isinstance(texts, list):
    raise ValueError(f'{gguf.path}: {PREFIX}{name} must be texts')
  return texts


def _kinds(gguf: GGUF, count: int) -> list[int]:
  """What each piece is; without a list all are text."""
  if PREFIX + 'token_type' not in gguf.keys:
    return [NORMAL] * count
  kinds = gguf.get(PREFIX + 'token_type', np.ndarray).tolist()
  if len(kinds) != count:
    raise ValueError(f'{gguf.path}: {PREFIX}token_type has {len(kinds)} entries for {count} pieces')
  return kinds
