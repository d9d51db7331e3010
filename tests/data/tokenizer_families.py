"""Which tokenizer.json forms are met in practice?
A tiny one of each, trained by the tokenizers library on the spot.
"""

import functools
import json

WORDS = (
  "the quick brown fox jumps over lazy dogs and two cats; don't stop, please! "
  'Is it 12 or 3456? naïve café über größte'
)
CORPUS = [
  WORDS,
  WORDS.upper(),
  'def f(x):\n    return x + 1\n\n\n',
  'a  b   c    d\t\te',
  'hello world. hello, world!',
] * 3

# What real names look like, and the roles that bos, eos and pad should end up with.
ROLES = {
  'gpt2': ('<|endoftext|>', '<|endoftext|>', '<|endoftext|>'),
  'llama3': ('<|begin|>', '<|eot|>', '<|eot|>'),
  'qwen': ('<|endoftext|>', '<|im_end|>', '<|endoftext|>'),
  'llama2': ('<s>', '</s>', '</s>'),
  'mistral': ('<s>', '</s>', '</s>'),
  'gemma': ('<bos>', '<eos>', '<pad>'),
  't5': ('<pad>', '</s>', '<pad>'),
  'bert': ('[CLS]', '[SEP]', '[PAD]'),
}
FAMILIES = tuple(ROLES)
EXACT = ('gpt2', 'llama3')  # give back every text
BYTE_FALLBACK = ('llama2', 'mistral', 'gemma')

SETTINGS = {
  'gpt2': {
    'bos_token': '<|endoftext|>',
    'eos_token': '<|endoftext|>',
    'unk_token': '<|endoftext|>',
    'add_prefix_space': False,
  },
  'llama3': {'bos_token': '<|begin|>', 'eos_token': '<|eot|>'},
  'qwen': {
    'bos_token': None,
    'eos_token': '<|im_end|>',
    'pad_token': '<|endoftext|>',
    'additional_special_tokens': ['<|im_start|>'],
  },
  'llama2': {
    'bos_token': {'__type': 'AddedToken', 'content': '<s>', 'lstrip': False},
    'eos_token': '</s>',
    'unk_token': '<unk>',
    'add_bos_token': True,
  },
  'mistral': {
    'bos_token': '<s>',
    'eos_token': '</s>',
    'unk_token': '<unk>',
    'additional_special_tokens': ['[INST]', '[/INST]'],
  },
  'gemma': {'bos_token': '<bos>', 'eos_token': '<eos>', 'pad_token': '<pad>', 'unk_token': '<unk>'},
  't5': {
    'eos_token': '</s>',
    'pad_token': '<pad>',
    'unk_token': '<unk>',
    'additional_special_tokens': ['<extra_id_0>'],
  },
  'bert': {
    'cls_token': '[CLS]',
    'sep_token': '[SEP]',
    'pad_token': '[PAD]',
    'unk_token': '[UNK]',
    'mask_token': '[MASK]',
  },
}


@functools.cache
def definition(family: str) -> str:
  """The tokenizer.json of a family."""
  import tokenizers

  return {
    'bert': _bert,
    't5': _t5,
    **dict.fromkeys(('gpt2', 'llama3', 'qwen'), _byte_level),
    **dict.fromkeys(BYTE_FALLBACK, _byte_fallback),
  }[family](tokenizers, family).to_str()


def contents(family: str) -> dict[str, bytes]:
  """The files of a family."""
  return {
    'tokenizer.json': definition(family).encode(),
    'tokenizer_config.json': json.dumps(SETTINGS[family]).encode(),
  }


def theirs(family: str):
  """The library's own tokenizer, without this project's changes."""
  import tokenizers

  return tokenizers.Tokenizer.from_str(definition(family))


def _byte_level(t, family):
  made = t.Tokenizer(t.models.BPE(ignore_merges=family == 'llama3'))
  level = t.pre_tokenizers.ByteLevel
  made.pre_tokenizer = level(add_prefix_space=False)
  if family != 'gpt2':
    words = t.Regex(
      r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
      r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
    )
    made.pre_tokenizer = t.pre_tokenizers.Sequence(
      [t.pre_tokenizers.Split(words, 'isolated'), level(add_prefix_space=False, use_regex=False)]
    )
  made.post_processor, made.decoder = (
    t.processors.ByteLevel(trim_offsets=False),
    t.decoders.ByteLevel(),
  )
  special = ['<|endoftext|>'] if family == 'gpt2' else []
  made.train_from_iterator(
    CORPUS,
    t.trainers.BpeTrainer(
      vocab_size=400, initial_alphabet=level.alphabet(), special_tokens=special, show_progress=False
    ),
  )
  if family == 'llama3':
    made.add_special_tokens(['<|begin|>', '<|eot|>', '<|start|>', '<|end|>'])
    made.post_processor = t.processors.TemplateProcessing(
      single='<|begin|> $A',
      pair='<|begin|> $A $B',
      special_tokens=[('<|begin|>', made.token_to_id('<|begin|>'))],
    )
  if family == 'qwen':
    made.normalizer = t.normalizers.NFC()
    made.add_special_tokens(['<|endoftext|>', '<|im_start|>', '<|im_end|>'])
    made.add_tokens(
      [t.AddedToken(name, normalized=False) for name in ('<think>', '</think>', 'résumé')]
    )
  return made


def _byte_fallback(t, family):
  special = {'gemma': ['<pad>', '<eos>', '<bos>', '<unk>', '<turn>']}.get(
    family, ['<unk>', '<s>', '</s>', '[INST]', '[/INST]']
  )
  texts = [text.replace(' ', '\u2581') for text in CORPUS]
  made = t.Tokenizer(t.models.BPE())
  made.train_from_iterator(texts, t.trainers.BpeTrainer(vocab_size=200, show_progress=False))
  learned = json.loads(made.to_str())['model']
  pieces = (
    special
    + [f'<0x{byte:02X}>' for byte in range(256)]
    + (['\n\n', '\u2581\u2581'] if family == 'gemma' else [])
  )
  pieces += [piece for piece in learned['vocab'] if piece not in pieces]
  made = t.Tokenizer(
    t.models.BPE(
      vocab={piece: i for i, piece in enumerate(pieces)},
      merges=[tuple(m) for m in learned['merges']],
      unk_token='<unk>',
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  d, n = t.decoders, t.normalizers
  steps = [d.Replace('\u2581', ' '), d.ByteFallback(), d.Fuse()]
  if family == 'gemma':
    made.normalizer = n.Replace(' ', '\u2581')
    made.pre_tokenizer = t.pre_tokenizers.Split(' ', 'merged_with_previous')
  elif family == 'llama2':
    made.normalizer = n.Sequence([n.Prepend('\u2581'), n.Replace(' ', '\u2581')])
  else:
    made.pre_tokenizer = t.pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
  made.decoder = d.Sequence(steps if family == 'gemma' else [*steps, d.Strip(' ', 1, 0)])
  made.add_special_tokens(special)
  if family == 'gemma':
    made.add_tokens([t.AddedToken(name, normalized=False) for name in ('\n\n', '\u2581\u2581')])
  return made


def _t5(t, family):
  made = t.Tokenizer(t.models.Unigram())
  p = t.pre_tokenizers
  made.pre_tokenizer, made.decoder = (
    p.Sequence([p.WhitespaceSplit(), p.Metaspace()]),
    t.decoders.Metaspace(),
  )
  made.train_from_iterator(
    CORPUS,
    t.trainers.UnigramTrainer(
      vocab_size=120,
      special_tokens=['<pad>', '</s>', '<unk>', '<extra_id_0>'],
      unk_token='<unk>',
      show_progress=False,
    ),
  )
  made.post_processor = t.processors.TemplateProcessing(
    single='$A </s>', pair='$A </s> $B </s>', special_tokens=[('</s>', 1)]
  )
  return made


def _bert(t, family):
  made = t.Tokenizer(t.models.WordPiece(unk_token='[UNK]'))
  made.normalizer, made.pre_tokenizer, made.decoder = (
    t.normalizers.BertNormalizer(),
    t.pre_tokenizers.BertPreTokenizer(),
    t.decoders.WordPiece(),
  )
  made.train_from_iterator(
    CORPUS,
    t.trainers.WordPieceTrainer(
      vocab_size=150,
      special_tokens=['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'],
      show_progress=False,
    ),
  )
  made.post_processor = t.processors.BertProcessing(('[SEP]', 3), ('[CLS]', 2))
  return made
