"""How does a Hugging Face tokenizer.json become bytes per id,
with control tokens that no text can name?

Families met in practice: byte-level BPE (GPT-2, Llama 3, Qwen), SentencePiece-style BPE with byte
pieces (Llama 2, Mistral, Gemma), Unigram (T5), WordPiece (BERT). Encoding is the tokenizers
library's; no file is executed.
"""

import functools
import json
import os
import pathlib
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

import files
import names
from data.tokenizer import CUT, Encoded, Tokenizer, directory_of, in_utf8

DEFINITION, SETTINGS = 'tokenizer.json', 'tokenizer_config.json'
SPECIAL_MAP, TEMPLATE = 'special_tokens_map.json', 'chat_template.jinja'
MORE_TEMPLATES = 'additional_chat_templates'  # a folder of <name>.jinja
DECODERS = (
  'Sequence',
  'Fuse',
  'ByteLevel',
  'ByteFallback',
  'Replace',
  'Strip',
  'Metaspace',
  'WordPiece',
)

Spelling = Callable[[str], 'str | bytes']  # a decoder's step on one piece; bytes are final


class HuggingFaceTokenizer(Tokenizer):
  """A tokenizer.json with the settings that lie beside it.

  Control tokens are the added tokens marked special and those that the settings name (bos_token,
  additional_special_tokens, ...). They decode to b''. Text can't name them,
  `encode(text, special=True)` excepted; the library's own switch for that, `encode_special_tokens`,
  is not used because Unigram and WordPiece still find their names as ordinary pieces. Added tokens
  that are not special (Qwen's <think>) are text, and are found in any text.

  eos is eos_token, or sep_token (BERT's [SEP]). pad is pad_token, or else eos. bos, which a
  document's first token is predicted from, is bos_token, or cls_token (BERT's [CLS]), or where
  there is neither, pad: T5's decoder starts with its pad, and Qwen's, <|endoftext|>, is what stands
  between its documents.

  `decode` follows the file's decoder, with two differences: only one leading space is taken away,
  and added tokens outside the model's vocabulary come out as they stand (the library takes them for
  byte-level or metaspace pieces). WordPiece's pieces without ## begin with a space, which a text's
  first piece loses again.

  Args:
    contents: 'tokenizer.json' and, of 'tokenizer_config.json', 'special_tokens_map.json' and
      'chat_template.jinja', those that there are, as bytes. `save` writes them as they are:
      transformers loads the directory, too.

  Raises:
    ValueError: a file that can't be read as what it should be; no token ends a text; a special
      token without an id; a decoder that can't be written as bytes per id.
  """

  kind = 'huggingface'

  def __init__(self, contents: Mapping[str, bytes]):
    self._contents = dict(contents)
    settings = _settings(contents)
    roles = _roles(settings)
    if not {'eos_token', 'sep_token'} & roles.keys():
      raise ValueError(
        f'no token ends a text: {SETTINGS} names no eos_token (nor sep_token); put one beside '
        f'{DEFINITION} that does, such as {{"eos_token": "</s>"}}'
      )

    definition = definition_of(contents)
    vocabulary = vocabulary_of(definition)
    added = {token['content']: token['id'] for token in definition['added_tokens']}
    control = {
      token['content']: token['id'] for token in definition['added_tokens'] if token['special']
    }

    spell, joins_words, self._drops_space = spelling(definition.get('decoder'))
    ids = vocabulary | added
    token_bytes = [b''] * (max(ids.values()) + 1)
    for piece, index in ids.items():
      if piece not in control:
        token_bytes[index] = (
          piece.encode() if piece not in vocabulary and not joins_words else spell(piece)
        )

    eos = ids[roles.get('eos_token') or roles['sep_token']]
    pad = ids[roles['pad_token']] if 'pad_token' in roles else eos
    first = roles.get('bos_token') or roles.get('cls_token')
    super().__init__(token_bytes, pad=pad, bos=ids[first] if first else pad, eos=eos)
    self.special_tokens = roles
    self.chat_templates = _templates(contents, settings)
    self._control = control
    nonce = secrets.token_hex(16)
    self._hidden = {content: f'{nonce}:{index}:' for content, index in control.items()}
    # The longest first, as the library looks for them.
    self.control_names = re.compile(
      '|'.join(map(re.escape, sorted(control, key=len, reverse=True))) or '(?!)'
    )
    self._named = re.compile(f'{self.control_names.pattern}|{re.escape(CUT)}')
    self._plain = _build(_anonymous(definition, self._hidden))

  @classmethod
  def read(cls, path: str | os.PathLike) -> 'HuggingFaceTokenizer':
    """From a directory with a tokenizer.json, or from that file;
    the files beside it count in both cases. Its ValueErrors name the directory.
    """
    directory = directory_of(path).expanduser()
    try:
      return cls(_contents(directory))
    except ValueError as error:
      raise ValueError(f'{directory}: {error}') from error
    except (LookupError, TypeError, AttributeError) as error:
      # Other JSON than a tokenizer's: a list where an object with names should be, or without one.
      raise ValueError(
        f'{directory}: {DEFINITION} or the settings beside it are not of the form that the '
        f'tokenizers library writes ({type(error).__name__}: {error}); save the tokenizer anew'
      ) from error

  @staticmethod
  def paths(path: str | os.PathLike) -> list[pathlib.Path]:
    """The files that make the tokenizer at `path`, a directory or its tokenizer.json;
    a checkpoint's others stay out.
    """
    directory = directory_of(path).expanduser()
    beside = [directory / name for name in (DEFINITION, SETTINGS, SPECIAL_MAP, TEMPLATE)]
    templates = (directory / MORE_TEMPLATES).glob('*.jinja')
    return [file for file in beside if file.is_file()] + sorted(templates)

  @property
  def begins(self) -> bool:
    """Whether its files say that a text begins with `bos`, as transformers then has it."""
    return self._plain.encode('a').ids[:1] == [self.bos]

  def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
    encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]

  def encode(self, text: str, *, special: bool = False) -> list[int]:
    if not special:
      return super().encode(text)
    return super().encode(''.join(spelled for spelled, _ in self._spelled(text)))

  def encode_with_places(self, text: str) -> Encoded:
    pieces = [(spelled, *place) for spelled, place in self._spelled(text)]
    spelled = in_utf8(''.join(piece for piece, *_ in pieces))
    # Where each character of what is encoded begins and ends in the text.
    begins, ends = (np.zeros(len(spelled), np.int64) for _ in range(2))
    at = 0
    for piece, begin, end in pieces:
      here = slice(at, at + len(piece))
      alike = np.arange(begin, begin + len(piece))
      begins[here] = alike if end - begin == len(piece) else begin
      ends[here] = alike + 1 if end - begin == len(piece) else end
      at += len(piece)
    encoding = self._plain.encode(spelled, add_special_tokens=False)
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    # A token of no characters stands between two.
    last = np.maximum(offsets[:, 1] - 1, offsets[:, 0]).clip(0, max(len(spelled) - 1, 0))
    first = offsets[:, 0].clip(0, max(len(spelled) - 1, 0))
    return Encoded(encoding.ids, begins[first], ends[last])

  def _spelled(self, text: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Pieces of a text as the plain tokenizer has them, with their places: control tokens under
    their hidden names, those with CUT in them without it.
    """
    at = 0
    for match in self._named.finditer(text):
      yield text[at : match.start()], (at, match.start())
      yield self._hidden.get(match[0], ''), match.span()
      at = match.end()
    yield text[at:], (at, len(text))

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    decoded = super().decode(ids)
    return decoded.removeprefix(' ') if self._drops_space else decoded

  def control_ids(self) -> dict[str, int]:
    return dict(self._control)

  def with_template(self, source: str) -> 'HuggingFaceTokenizer':
    return self._changed({TEMPLATE: source.encode()})

  def extended(self, names: Sequence[str]) -> 'HuggingFaceTokenizer':
    """With control tokens of these names behind all others."""
    definition = _json(self._contents, DEFINITION)
    rules = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    more = [
      {'id': self.vocabulary + i, 'content': name, **rules, 'special': True}
      for i, name in enumerate(names)
    ]
    definition['added_tokens'] = [*(definition.get('added_tokens') or []), *more]
    return self._changed({DEFINITION: json.dumps(definition, ensure_ascii=False).encode()})

  def _changed(self, contents: dict[str, bytes]) -> 'HuggingFaceTokenizer':
    """With other files, of the same model: what ends its texts stays."""
    changed = HuggingFaceTokenizer(self._contents | contents)
    changed.generation = self.generation
    return changed

  def save(self, directory: str | os.PathLike) -> None:
    for name in {SETTINGS, SPECIAL_MAP, TEMPLATE} - self._contents.keys():
      # Another tokenizer's would be read with this one.
      (files.place(directory) / name).unlink(missing_ok=True)
    super().save(directory)

  def _files(self) -> dict[str, bytes]:
    # Whoever finds the definition, which comes last, finds the others.
    return dict(sorted(self._contents.items(), key=lambda item: item[0] == DEFINITION))


def _contents(directory: pathlib.Path) -> dict[str, bytes]:
  """The files of HuggingFaceTokenizer.paths by name, with all templates in the settings."""
  contents, more = {}, {}
  for file in HuggingFaceTokenizer.paths(directory):
    if file.parent.name == MORE_TEMPLATES:
      more[file.stem] = _utf8(file.read_bytes(), f'{MORE_TEMPLATES}/{file.name}')
    else:
      contents[file.name] = file.read_bytes()

  # Where older versions keep them, so that they travel in plain files.
  if more:
    settings = _json(contents, SETTINGS)
    templates = _templates(contents, settings) | more
    contents.pop(TEMPLATE, None)
    settings['chat_template'] = [
      {'name': name, 'template': template} for name, template in templates.items()
    ]
    contents[SETTINGS] = json.dumps(settings, ensure_ascii=False, indent=2).encode()
  return contents


def _utf8(content: bytes, name: str) -> str:
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    raise ValueError(f'{name} is not UTF-8 ({error}); save it as UTF-8') from error


def _json(contents: Mapping[str, bytes], name: str) -> dict:
  return files.json_object(contents[name], name) if name in contents else {}


def _settings(contents: Mapping[str, bytes]) -> dict:
  return _json(contents, SPECIAL_MAP) | _json(contents, SETTINGS)


def _roles(settings: dict) -> dict[str, str]:
  """The tokens named by role, by settings such as bos_token
  (but not add_bos_token, which is true or false).
  """
  tokens = {
    key: value
    for key, value in settings.items()
    if key.endswith('_token') and isinstance(value, (str, dict))
  }
  return {key: content_of(value) for key, value in tokens.items()}


def content_of(token: str | dict) -> str:
  """Of a token given by its text, or by an object with its matching rules."""
  return token if isinstance(token, str) else token['content']


def _templates(contents: Mapping[str, bytes], settings: dict) -> dict[str, str]:
  """Chat templates by name; one without a name is the 'default'.
  The file comes before the settings.
  """
  given = settings.get('chat_template') or {}
  if isinstance(given, str):
    templates = {'default': given}
  elif isinstance(given, dict):
    templates = given
  else:
    templates = {entry['name']: entry['template'] for entry in given}
  return templates | (
    {'default': _utf8(contents[TEMPLATE], TEMPLATE)} if TEMPLATE in contents else {}
  )


def vocabulary_of(definition: dict) -> dict[str, int]:
  """Ids of a parsed tokenizer.json's pieces."""
  # Unigram has a list of [piece, score], the others a dict.
  vocabulary = definition['model']['vocab']
  if isinstance(vocabulary, dict):
    return vocabulary
  return {piece: index for index, (piece, _) in enumerate(vocabulary)}


def definition_of(contents: Mapping[str, bytes]) -> dict:
  """The parsed tokenizer.json, without truncation and padding,
  with all added tokens that the settings tell of.
  """
  settings = _settings(contents)
  definition = _json(contents, DEFINITION)
  if not isinstance(definition.get('model'), dict) or 'vocab' not in definition['model']:
    raise ValueError(
      f'{DEFINITION} has no model with a vocab: not a file of the tokenizers library'
    )

  rules = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized', 'special'), False)
  added = {token['content']: rules | token for token in definition.get('added_tokens') or []}
  for index, token in (settings.get('added_tokens_decoder') or {}).items():
    known = added.setdefault(token['content'], rules | token | {'id': int(index)})
    known['special'] = known['special'] or token.get('special', False)

  vocabulary = vocabulary_of(definition)
  more = [settings.get(key) or [] for key in ('additional_special_tokens', 'extra_special_tokens')]
  listed = [
    content_of(token)
    for tokens in more
    for token in (tokens.values() if isinstance(tokens, dict) else tokens)
  ]
  for content in [*_roles(settings).values(), *listed]:
    if content not in added and content not in vocabulary:
      raise ValueError(
        f'{SETTINGS} names the special token {content!r}, which has no id in {DEFINITION}: add it '
        "there with the number of the model's row for it, or remove it from the settings"
      )
    token = {'content': content, 'id': vocabulary.get(content)}
    added.setdefault(content, rules | token)['special'] = True

  # The library gives ids to added tokens in their order, and its own limits of length would cut
  # documents.
  added = sorted(added.values(), key=lambda token: token['id'])
  return definition | {'added_tokens': added, 'truncation': None, 'padding': None}


def _anonymous(definition: dict, renamed: dict[str, str]) -> dict:
  """The same, with control tokens under names that no text can hold (they can't be guessed):
  same ids, never found.
  """
  model = dict(definition['model'])
  if isinstance(model['vocab'], dict):
    model['vocab'] = {renamed.get(piece, piece): index for piece, index in model['vocab'].items()}
  else:
    model['vocab'] = [[renamed.get(piece, piece), score] for piece, score in model['vocab']]
  if model.get('unk_token') in renamed:
    model['unk_token'] = renamed[model['unk_token']]
  if model.get('merges'):
    merges = [merge.split(' ', 1) if isinstance(merge, str) else merge for merge in model['merges']]
    for part in renamed.keys() & {part for merge in merges for part in merge}:
      raise ValueError(
        f'{part!r} is a control token, and a piece of text too: merges in {DEFINITION} make longer '
        f'pieces from it; name another token in {SETTINGS}'
      )
    model['merges'] = [merge for merge in merges if ''.join(merge) not in renamed]
  added = [
    token | {'content': renamed.get(token['content'], token['content'])}
    for token in definition['added_tokens']
  ]
  return definition | {'model': model, 'added_tokens': added}


def _build(definition: dict):
  """The library's tokenizer. Raises ValueError for one it can't read,
  and for ids that it gives anew.
  """
  import tokenizers

  try:
    built = tokenizers.Tokenizer.from_str(json.dumps(definition))
  except Exception as error:  # the library raises no narrower class
    raise ValueError(
      f'tokenizers {tokenizers.__version__} can\'t read this {DEFINITION}: {error}'
    ) from error
  for token in definition['added_tokens']:
    given = built.token_to_id(token['content'])
    if given != token['id']:
      raise ValueError(
        f'the added token {token["content"]!r} has id {token["id"]} in the files, but the '
        f'tokenizers library gives it {given}: '
        'ids of added tokens must follow the vocabulary without gaps'
      )
  return built


def spelling(decoder: dict | None) -> tuple[Callable[[str], bytes], bool, bool]:
  """A tokenizer.json's decoder as bytes of single pieces.

  Returns: bytes of a piece; whether spaces join pieces, as in WordPiece; whether a text loses a
  leading space. Raises ValueError for a decoder, or a setting of one, that needs more than one
  piece at a time.
  """
  steps: list[Spelling] = []
  fused = joins_words = drops_space = False
  for step in _flat(decoder):
    kind = names.check(f'{DEFINITION}: decoder.type', step.get('type'), DECODERS)
    if kind not in ('Fuse', 'Strip') and _from_byte_level in steps:
      raise _unsupported(
        step, 'it comes after ByteLevel, whose pieces need not be whole characters'
      )
    if kind == 'Fuse':
      fused = True
    elif kind == 'ByteLevel':
      steps.append(_from_byte_level)
    elif kind == 'ByteFallback':
      steps.append(_from_byte_piece)
    elif kind == 'Replace':
      pattern = step['pattern'].get('String')
      if not pattern or (fused and len(pattern) > 1):
        raise _unsupported(step, 'only a fixed text within one piece can be replaced')
      steps.append(lambda piece, old=pattern, new=step['content']: piece.replace(old, new))
    elif kind == 'Strip':
      if not fused or (step['content'], step['start'], step['stop']) != (' ', 1, 0):
        raise _unsupported(
          step, 'only one space before the whole text (after Fuse) can be stripped'
        )
      drops_space = True
    elif kind == 'Metaspace':
      steps.append(lambda piece, old=step['replacement']: piece.replace(old, ' '))
      drops_space = step.get('prepend_scheme', 'always') != 'never'
    elif kind == 'WordPiece':
      steps.append(
        functools.partial(_from_word_piece, prefix=step['prefix'], cleanup=step['cleanup'])
      )
      joins_words = drops_space = True

  def spell(piece: str) -> bytes:
    for step in steps:
      if isinstance(piece, bytes):
        break
      piece = step(piece)
    return piece if isinstance(piece, bytes) else piece.encode()

  return spell, joins_words, drops_space


def _flat(decoder: dict | None) -> Iterator[dict]:
  if decoder and decoder.get('type') == 'Sequence':
    for step in decoder['decoders']:
      yield from _flat(step)
  else:
    yield decoder or {'type': 'none'}


def _unsupported(step: dict, why: str) -> ValueError:
  shown = json.dumps(step, ensure_ascii=False)
  return ValueError(f'{DEFINITION}: the decoder {shown} can\'t be written as bytes per id: {why}')


# GPT-2's character for each byte (Radford et al. 2019, bytes_to_unicode): printable ones are
# themselves, the others follow the 256 in their order.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_LEVEL = {chr(byte): byte for byte in _PRINTABLE} | {
  chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)
}
_BYTE_PIECE = re.compile('<0x([0-9A-Fa-f]{2})>')


def _from_byte_level(piece: str) -> bytes:
  try:
    return bytes(map(_BYTE_LEVEL.__getitem__, piece))
  except KeyError:  # the library, too, takes a piece with any other character as text
    return piece.encode()


def _from_byte_piece(piece: str) -> str | bytes:
  match = _BYTE_PIECE.fullmatch(piece)
  return bytes([int(match[1], 16)]) if match else piece


def _from_word_piece(piece: str, prefix: str, cleanup: bool) -> str:
  piece = piece.removeprefix(prefix) if piece.startswith(prefix) else ' ' + piece
  if cleanup:  # the library's rules, in its order
    for spaced, joined in (
      (' .', '.'),
      (' ?', '?'),
      (' !', '!'),
      (' ,', ','),
      (" ' ", "'"),
      (" n't", "n't"),
      (" 'm", "'m"),
      (' do not', " don't"),
      (" 's", "'s"),
      (" 've", "'ve"),
      (" 're", "'re"),
    ):
      piece = piece.replace(spaced, joined)
  return piece
