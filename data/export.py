"""How does transformers get the ids that a tokenizer gives here? By a tokenizer.json that its
AutoTokenizer reads as it stands, with settings that say so; what these files give is compared with
the tokenizer before they are handed out.

U+2581 stands for a space in SentencePiece's pieces only: here they are written with the space, so
that the character itself is spelled as bytes, as SentencePieceTokenizer does.
"""

import base64
import json
import random
from collections.abc import Mapping
from typing import Any

from data.huggingface import DEFINITION, SETTINGS
from data.sentencepiece import SPACE
from data.tokenizer import Tokenizer

# For this class AutoTokenizer takes tokenizer.json as it is; others, and what it infers from a
# config.json, build pre-tokenizers of their own.
CLASS = 'PreTrainedTokenizerFast'
NAMES = ('pad', 'bos', 'eos')
TEXTS = (
  *('', ' ', '  a  ', 'a b', ' \u2581 a', '\u2581', 'a\u2581b', '\0', '\r\n', '\t\tx', '\u2047'),
  *('\ufeffx', 'e\u0301', '\u2028', '\ufb01', '\U0001f600\u20ac', '\u4f60\u597d', '\ufffd'),
  *(
    '\n    def f(x):\n        return x + 1\n\n',
    'aaaaaaa',
    'ab' * 9,
    "don't STOP  12 3456",
    '\uff21',
  ),
)


def contents(
  tokenizer: Tokenizer, has_encoder: bool = False, has_types: bool = False
) -> tuple[dict[str, bytes], str]:
  """Files for the directory of a checkpoint, and what is to be known of them ('' for nothing).

  Those of a Hugging Face tokenizer are its own, but for their class: any other class than this one
  builds from them what it thinks its model needs.

  has_encoder: texts are what an encoder reads, and end with eos; else they begin with bos.
  has_types: the model tells the texts of a pair apart, which a class of its own would know.
  Raises ValueError where transformers has no tokenizer of these ids.
  """
  if tokenizer.kind == 'huggingface':
    files = tokenizer._files()
    settings = json.loads(files.get(SETTINGS, b'{}')) | {'tokenizer_class': CLASS}
    if has_types:
      settings.setdefault('model_input_names', ['input_ids', 'token_type_ids', 'attention_mask'])
    return files | {SETTINGS: _bytes(settings)}, ''

  makers = {'sentencepiece': _sentencepiece, 'byte': _byte, 'char': _char}
  definition, names = makers[tokenizer.kind](tokenizer)
  names |= tokenizer.extra
  definition = _whole(definition, names, tokenizer, has_encoder)
  note = _difference(definition, tokenizer, [*names])
  settings = {f'{role}_token': name for name, role in _roles(names, tokenizer).items()}
  if 'unk_token' in definition['model'] and definition['model']['unk_token'] in names:
    settings['unk_token'] = definition['model']['unk_token']
  settings |= {
    'tokenizer_class': CLASS,
    'clean_up_tokenization_spaces': False,
    'model_input_names': ['input_ids', 'attention_mask'],
    # A name of a control token in a text is text.
    'split_special_tokens': True,
  }
  return {DEFINITION: _bytes(definition), SETTINGS: _bytes(settings)}, note


def class_of(tokenizer: Tokenizer) -> str:
  """The class of transformers that a tokenizer was made for; '' where nothing says so."""
  if tokenizer.kind != 'huggingface':
    return ''
  return json.loads(tokenizer._files().get(SETTINGS, b'{}')).get('tokenizer_class') or ''


def _bytes(value: Mapping[str, Any]) -> bytes:
  return json.dumps(value, ensure_ascii=False, indent=2).encode()


def _roles(names: Mapping[str, int], tokenizer: Tokenizer) -> dict[str, str]:
  return {
    name: role for role in NAMES for name, i in names.items() if i == getattr(tokenizer, role)
  }


def _whole(parts: dict, names: Mapping[str, int], tokenizer: Tokenizer, has_encoder: bool) -> dict:
  """A tokenizer.json around a model, with its control tokens, and bos or eos around a text."""
  rules = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  added = [
    rules | {'id': index, 'content': name, 'special': special}
    for special, group in ((True, names), (False, parts.pop('named', {})))
    for name, index in group.items()
  ]
  end = tokenizer.eos if has_encoder else tokenizer.bos
  name = next(name for name, index in names.items() if index == end)
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': sorted(added, key=lambda token: token['id']),
    'normalizer': None,
    'pre_tokenizer': None,
    'post_processor': around(name, end, behind=has_encoder),
    'decoder': {'type': 'Sequence', 'decoders': [{'type': 'ByteFallback'}, {'type': 'Fuse'}]},
  } | parts


def around(name: str, index: int, behind: bool = False) -> dict:
  """A tokenizer.json's post_processor that puts a token before a text, or behind each of a pair."""
  token = {'SpecialToken': {'id': name, 'type_id': 0}}
  text = {'Sequence': {'id': 'A', 'type_id': 0}}
  other = {'Sequence': {'id': 'B', 'type_id': 0}}
  return {
    'type': 'TemplateProcessing',
    'single': [text, token] if behind else [token, text],
    'pair': [text, token, other, token] if behind else [token, text, other],
    'special_tokens': {name: {'id': name, 'ids': [index], 'tokens': [name]}},
  }


def _bpe(vocabulary: Mapping[str, int], merges=(), **settings) -> dict:
  model = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None}
  model |= {'end_of_word_suffix': None, 'fuse_unk': True, 'byte_fallback': True}
  return model | {'ignore_merges': False, 'vocab': vocabulary, 'merges': [*merges]} | settings


def _byte(tokenizer) -> tuple[dict, dict[str, int]]:
  names = {'<pad>': tokenizer.pad, '<s>': tokenizer.bos, '</s>': tokenizer.eos}
  pieces = {f'<0x{byte:02X}>': 3 + byte for byte in range(256)}
  return {'model': _bpe(names | pieces)}, names


def _char(tokenizer) -> tuple[dict, dict[str, int]]:
  names = {'<pad>': tokenizer.pad, '<s>': tokenizer.bos, '</s>': tokenizer.eos}
  pieces = {character: 3 + i for i, character in enumerate(tokenizer.characters)}
  # Without an unk_token an unknown character is an error, as it is here.
  model = {'type': 'WordLevel', 'vocab': names | pieces, 'unk_token': '<unk>'}
  split = {
    'type': 'Split',
    'pattern': {'Regex': r'[\s\S]'},
    'behavior': 'Isolated',
    'invert': False,
  }
  return {'model': model, 'pre_tokenizer': split, 'decoder': {'type': 'Fuse'}}, names


def _sentencepiece(tokenizer) -> tuple[dict, dict[str, int]]:
  from sentencepiece import sentencepiece_model_pb2 as schema

  proto = schema.ModelProto.FromString(tokenizer.model)
  kinds = schema.ModelProto.SentencePiece
  pieces = [piece.piece.replace(SPACE, ' ') for piece in proto.pieces]
  if len(set(pieces)) < len(pieces):
    raise ValueError('two pieces of this SentencePiece model differ in U+2581 and a space only')

  def of(*wanted):
    return {
      piece: i
      for i, (piece, entry) in enumerate(zip(pieces, proto.pieces, strict=True))
      if entry.type in wanted
    }

  names = of(kinds.CONTROL) | of(kinds.UNKNOWN)
  (unknown,) = of(kinds.UNKNOWN)
  falls_back = proto.trainer_spec.byte_fallback
  if proto.trainer_spec.model_type == schema.TrainerSpec.UNIGRAM:
    scored = [[piece, entry.score] for piece, entry in zip(pieces, proto.pieces, strict=True)]
    model = {'type': 'Unigram', 'unk_id': names[unknown], 'vocab': scored}
    model['byte_fallback'] = falls_back
  else:
    normal = of(kinds.NORMAL)
    merges = _merges(normal, {piece: proto.pieces[i].score for piece, i in normal.items()})
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = _bpe(vocabulary, merges, unk_token=unknown, byte_fallback=falls_back)

  spec, steps, decoders = proto.normalizer_spec, [], []
  if spec.precompiled_charsmap:
    charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
    steps.append({'type': 'Precompiled', 'precompiled_charsmap': charsmap})
  if spec.remove_extra_whitespaces:
    # Spaces only: the library's Strip takes ends of lines, too.
    for pattern, content in ((r'\A +| +\z', ''), (' {2,}', ' ')):
      steps.append({'type': 'Replace', 'pattern': {'Regex': pattern}, 'content': content})
  if spec.add_dummy_prefix:
    steps.append({'type': 'Prepend', 'prepend': ' '})
    decoders = [{'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}]
  if not falls_back:
    steps.append({'type': 'Replace', 'pattern': {'String': SPACE}, 'content': ' '})
  decoders = [{'type': 'ByteFallback'}, {'type': 'Fuse'}, *decoders]
  return {
    'model': model,
    'named': of(kinds.USER_DEFINED),
    'normalizer': {'type': 'Sequence', 'normalizers': steps} if steps else None,
    'decoder': {'type': 'Sequence', 'decoders': decoders},
  }, names


def _merges(pieces: Mapping[str, int], scores: Mapping[str, float]) -> list[list[str]]:
  """Pairs that make a piece, in the order in which SentencePiece would: its best piece first."""
  merges = []
  for piece in pieces:
    for i in range(1, len(piece)):
      left, right = piece[:i], piece[i:]
      if left in pieces and right in pieces:
        merges.append((-scores[piece], pieces[left], pieces[right], [left, right]))
  return [pair for *_, pair in sorted(merges)]


def _difference(definition: dict, tokenizer: Tokenizer, names: list[str]) -> str:
  """A note where texts with U+2581 or names of tokens have other ids; '' where all have the same.

  Raises ValueError for another text.
  """
  import tokenizers

  theirs = tokenizers.Tokenizer.from_str(json.dumps(definition))
  theirs.encode_special_tokens = True
  pieces = [piece.decode(errors='replace') for piece in tokenizer.token_bytes]
  draw = random.Random(0)
  drawn = [''.join(draw.choices(pieces, k=draw.randint(2, 30))) for _ in range(200)]
  note = ''
  for text in [*TEXTS, *pieces[:1000], *drawn, *(f'a{name} b' for name in [*names, '<0x41>'])]:
    try:
      expected = tokenizer.encode(text)
    except ValueError:  # a character that it does not know
      continue
    given = theirs.encode(text, add_special_tokens=False).ids
    if given != expected:
      if not any(name in text for name in [*names, '<0x', SPACE]):
        raise ValueError(f'ids of {text!r} would be {given}, not {expected}')
      note = 'texts with U+2581 or names of tokens, such as </s>, have other ids in transformers'
  return note
