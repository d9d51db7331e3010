"""Does the tokenizer within a GGUF file give the ids of the one that it was made of?"""

import io
import json
import re
import types

import numpy as np
import pytest
import sentencepiece

import convert
from data import gguf_tokenizer
from data.gguf import GGUF
from data.gguf_tokenizer import PRETOKENIZERS
from data.huggingface import HuggingFaceTokenizer
from tests import gguf_files
from tests.data import tokenizer_families as families
from tests.goldens import ours
from tests.model.test_model_checkpoint import LLAMA

pytest.importorskip('gguf', reason='gguf is not installed')
TEXTS = [
  *families.CORPUS,
  '',
  ' lead',
  'a\u2581b \U0001f600',
  're\u0301sume\u0301 r\u00e9sum\u00e9',
  'x\n\n\ny \n z\r\n',
  '\t\r\n',
  '\u4f60\u597d',
  "it's 1234567 IT'S 12.5",
  'a <|endoftext|> <|eot|> <s> b <think>c</think>',
]
TEMPLATE = '{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}'


def stored(tmp_path, keys):
  """A file of a small model with these keys, read."""
  if not (tmp_path / 'hf').exists():
    ours.build(LLAMA | {'vocab_size': 512}, tmp_path / 'hf')
  path = tmp_path / 'model.gguf'
  tensors = ours.tensors(tmp_path / 'hf')
  gguf_files.write(path, LLAMA | {'vocab_size': 512}, tensors, tokenizer=keys)
  return GGUF(path)


def smollm():
  """A byte-level tokenizer whose digits stand alone, built as SmolLM's is."""
  import tokenizers as t

  made = t.Tokenizer(t.models.BPE())
  level = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.pre_tokenizer = t.pre_tokenizers.Sequence(
    [t.pre_tokenizers.Digits(individual_digits=True), level]
  )
  made.decoder = t.decoders.ByteLevel()
  special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
  trainer = t.trainers.BpeTrainer(
    vocab_size=400,
    initial_alphabet=level.alphabet(),
    special_tokens=special,
    show_progress=False,
  )
  made.train_from_iterator(families.CORPUS, trainer)
  settings = {'bos_token': '<|im_start|>', 'eos_token': '<|im_end|>', 'pad_token': '<|im_end|>'}
  return {
    'tokenizer.json': made.to_str().encode(),
    'tokenizer_config.json': json.dumps(settings | {'chat_template': TEMPLATE}).encode(),
  }


def qwen():
  """Of tests.data.tokenizer_families, with single digits, as Qwen's are."""
  contents = families.contents('qwen')
  changed = contents['tokenizer.json'].replace(rb'\\p{N}{1,3}', rb'\\p{N}')
  assert changed != contents['tokenizer.json']
  return contents | {'tokenizer.json': changed}


BYTE_LEVEL = {
  'gpt-2': lambda: families.contents('gpt2'),
  'llama-bpe': lambda: families.contents('llama3'),
  'smollm': smollm,
  'qwen2': qwen,
}


@pytest.mark.parametrize('pre', BYTE_LEVEL)
def test_ids_are_those_of_the_tokenizer_that_it_came_from(pre, tmp_path):
  contents = BYTE_LEVEL[pre]()
  expected = HuggingFaceTokenizer(contents)
  keys = gguf_files.tokenizer_keys(contents, pre)
  found = gguf_tokenizer.read(stored(tmp_path, keys))
  assert found.vocabulary == expected.vocabulary
  assert found.token_bytes == expected.token_bytes
  assert (found.pad, found.bos, found.eos) == (expected.pad, expected.bos, expected.eos)
  assert found.chat_templates == expected.chat_templates
  roles = found.special_tokens
  assert {role: roles.get(role) for role in expected.special_tokens} == expected.special_tokens
  for text in TEXTS:
    for special in (False, True):
      ids = found.encode(text, special=special)
      assert ids == expected.encode(text, special=special), text
      assert found.decode(ids) == expected.decode(ids)


def test_rows_that_no_text_becomes_are_left_out(tmp_path):
  contents = smollm()
  keys = gguf_files.tokenizer_keys(contents, 'smollm')
  count = len(keys['ggml.tokens'])
  keys['ggml.tokens'] = keys['ggml.tokens'] + ['[PAD1]', '[PAD2]']
  keys['ggml.token_type'] = keys['ggml.token_type'] + [5, 5]
  assert gguf_tokenizer.read(stored(tmp_path, keys)).vocabulary == count


def test_without_a_name_a_text_is_cut_as_by_llama_cpp():
  """Its four patterns, one after the other, over what the former left; by Python's expressions."""
  import tokenizers as t

  definition = {'model': {'type': 'BPE', 'vocab': {}, 'merges': []}}
  definition['pre_tokenizer'] = PRETOKENIZERS['default'][0]
  cut = t.Tokenizer.from_str(json.dumps(definition)).pre_tokenizer
  patterns = (
    r'[!-/:-@\[-`{-~]+',  # ASCII's P and S, all that the text below has
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[a-z]+| ?[0-9]+| ?[^\sa-z0-9]+|\s+(?!\S)",
    '[0-9]+',
    '[0-9][0-9][0-9]',
  )
  text = "it's 1234567 or 12,  and\n\n x=(y) 5 end  "
  parts = [text]
  for pattern in patterns:
    parts = [p for part in parts for p in re.split(f'({pattern})', part) if p]
  assert [text[a:b] for _, (a, b) in cut.pre_tokenize_str(text)] == parts
  assert '123' in parts and '456' in parts and '7' in parts


def trained(**settings):
  """A SentencePiece model of Llama 2's kind."""
  model = io.BytesIO()
  arguments = dict(
    model_type='bpe',
    vocab_size=480,
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    add_dummy_prefix=True,
    character_coverage=0.98,
    split_digits=True,
    unk_id=0,
    bos_id=1,
    eos_id=2,
    pad_id=-1,
    minloglevel=2,
  )
  corpus = [*families.CORPUS, *(families.WORDS[i:] for i in range(0, 90, 7))]
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(corpus), model_writer=model, **arguments | settings
  )
  return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_keys(processor, prefix=True):
  """Its keys, as llama.cpp's converter writes them."""

  def kind(i):
    kinds = (processor.is_unknown(i), processor.is_control(i), processor.is_byte(i))
    return next((number for number, is_it in zip((2, 3, 6), kinds) if is_it), 1)

  ids = range(processor.get_piece_size())
  return {
    'ggml.model': 'llama',
    'ggml.pre': 'default',
    'ggml.tokens': [processor.id_to_piece(i) for i in ids],
    'ggml.scores': [float(processor.get_score(i)) for i in ids],
    'ggml.token_type': [kind(i) for i in ids],
    'ggml.bos_token_id': processor.bos_id(),
    'ggml.eos_token_id': processor.eos_id(),
    'ggml.unknown_token_id': processor.unk_id(),
    'ggml.add_space_prefix': prefix,
    'chat_template': '{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}',
  }


@pytest.mark.parametrize('prefix', [True, False])
def test_sentencepiece_is_made_again_by_its_scores(prefix, tmp_path):
  processor = trained(add_dummy_prefix=prefix)
  found = gguf_tokenizer.read(stored(tmp_path, sentencepiece_keys(processor, prefix)))
  assert found.vocabulary == processor.get_piece_size()
  rng = np.random.default_rng(0)
  letters = [*'abcdefghijklmnopqrstuvwxyz  ,.12\n\u00e9\u4f60']
  drawn = [''.join(rng.choice(letters, 40)) for _ in range(200)]
  for text in [text for text in TEXTS + drawn if text and '\u2581' not in text]:
    assert found.encode(text) == processor.encode(text), text
    assert found.decode(found.encode(text)) == text
  assert found.encode('</s>')[0] != processor.eos_id()
  assert found.encode('</s>', special=True) == [processor.eos_id()]


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'ggml.pre': 'tekken'}, "tokenizer.ggml.pre.*'tekken'"),
    ({'ggml.model': 'bert'}, "tokenizer.ggml.model='bert' is not read"),
    ({'ggml.eos_token_id': 9999}, 'tokenizer.ggml.eos_token_id=9999 is no id of its'),
    ({'ggml.eos_token_id': None}, 'no key tokenizer.ggml.eos_token_id tells where a text ends'),
    ({'ggml.merges': ['ab']}, "tokenizer.ggml.merges has 'ab', not two pieces"),
    ({'ggml.merges': ['a \u0120zzzz']}, 'its tokenizer cannot be made again'),
    ({'ggml.merges': [1, 2]}, 'tokenizer.ggml.merges must be texts'),
    ({'ggml.merges': None}, 'no key tokenizer.ggml.merges'),
    ({'ggml.tokens': ['a', 'a'], 'ggml.token_type': [1, 1]}, 'has the same piece twice'),
    ({'ggml.token_type': [1]}, 'tokenizer.ggml.token_type has 1 entries for'),
    ({'ggml.model': 'llama'}, 'no key tokenizer.ggml.scores'),
  ],
)
def test_what_cannot_be_made_again_is_refused(changes, words, tmp_path):
  keys = gguf_files.tokenizer_keys(smollm(), 'smollm') | changes
  keys = {name: value for name, value in keys.items() if value is not None}
  file = stored(tmp_path, keys)
  with pytest.raises((ValueError, NotImplementedError), match=words) as stopped:
    gguf_tokenizer.read(file)
  assert str(file.path) in str(stopped.value)
  arguments = ['import', '--from', str(file.path), '--workdir', str(tmp_path / 'run')]
  with pytest.raises(SystemExit, match=words):
    convert.main(arguments)
  assert not (tmp_path / 'run').exists()


def test_a_user_defined_piece_with_spaces_is_refused():
  """The text that becomes it has none of SentencePiece's."""
  file = types.SimpleNamespace(path='model.gguf')
  processor = trained()
  keys = {f'tokenizer.{name}': value for name, value in sentencepiece_keys(processor).items()}
  keys['tokenizer.ggml.token_type'] = np.array(keys['tokenizer.ggml.token_type'])
  keys['tokenizer.ggml.scores'] = np.array(keys['tokenizer.ggml.scores'])
  i = next(i for i, x in enumerate(keys['tokenizer.ggml.tokens']) if x.startswith('\u2581t'))
  keys['tokenizer.ggml.token_type'][i] = 4
  file.keys = keys
  file.get = lambda *arguments: GGUF.get(file, *arguments)
  with pytest.raises(NotImplementedError, match=rf'tokens\[{i}\]=.* is user-defined'):
    gguf_tokenizer.read(file)


@pytest.mark.slow
def test_a_run_has_the_tokenizer_its_ends_and_its_template(tmp_path):
  from data.chat import ChatTemplate
  from data.generation import ends
  from decode.generator import Generator

  keys = gguf_files.tokenizer_keys(smollm(), 'smollm')
  file = stored(tmp_path, keys | {'ggml.eot_token_id': 0})
  convert.main(['import', '--from', str(file.path), '--workdir', str(tmp_path / 'run')])
  generator = Generator.load(tmp_path / 'run')
  assert ends(generator.tokenizer) == (2, 0)
  messages = [{'role': 'user', 'content': 'hello'}]
  text = ChatTemplate.of(generator.tokenizer).render(messages)
  assert text == '<|im_start|>hello<|im_end|>'
  ids = generator.tokenizer.encode(text, special=True)
  assert (ids[0], ids[-1]) == (1, 2)
  assert generator('hello', max_new_tokens=2)[0].ids


@pytest.mark.parametrize(
  'pre, said, begins',
  [
    ('llama-bpe', None, True),
    ('llama-bpe', False, False),
    ('smollm', None, False),
    ('smollm', True, True),
    ('llama', None, True),
    ('llama', False, False),
  ],
)
def test_a_text_begins_as_the_file_says_or_as_with_llama_cpp(pre, said, begins, tmp_path):
  import tokenizers as t

  if pre == 'llama':
    keys = sentencepiece_keys(trained())
  else:
    keys = gguf_files.tokenizer_keys(BYTE_LEVEL[pre](), pre)
  keys |= {} if said is None else {'ggml.add_bos_token': said}
  found = gguf_tokenizer.read(stored(tmp_path, keys))
  assert found.begins == begins
  # As transformers has it, too, and without another id in the text itself.
  theirs = t.Tokenizer.from_str(found._files()['tokenizer.json'].decode())
  ids = theirs.encode('some text').ids
  assert ids == [found.bos] * begins + found.encode('some text')
  assert json.loads(found._files()['tokenizer_config.json'])['add_bos_token'] == begins


def test_a_text_begins_with_no_token_where_none_has_that_role(tmp_path):
  keys = sentencepiece_keys(trained())
  del keys['ggml.bos_token_id']
  assert not gguf_tokenizer.read(stored(tmp_path, keys)).begins
