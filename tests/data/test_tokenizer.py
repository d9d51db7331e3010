"""Tokenizers: exact round trips over all of Unicode, streaming, saving,
and errors that say what to do.
"""

import collections
import functools
import io
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from data import sentencepiece as pieces, sources, tokenizers
from data.config import TOKENIZER_KINDS, SourceConfig, TokenizerConfig
from data.encoding import encoded_behind
from tests.data.tokenizer_families import CORPUS

T5 = pathlib.Path(__file__).parents[3] / 'shared' / 'data' / 't5.model'
HARD = [
  '',
  ' ',
  '  a  ',
  'a\u2581b',
  '\u2581',
  '\0',
  '\r\n',
  '\t\tx',
  '\u2047',
  '<s>',
  '</s>',
  '<unk>',
  '<0x0A>',
  '\ufeffx',
  'e\u0301',
  '\u2028',
  '\ufb01',
  '\U0001f600\u20ac',
  '\ufffd',
  '\n    def f():\n\n',
]
anything = st.text(st.characters(exclude_categories=['Cs']), max_size=40)


@functools.cache
def corpus():
  texts = [
    text for text in sources.documents(SourceConfig(), collections.Counter()) if len(text) < 20_000
  ]
  return texts[:80]


@functools.cache
def trained(**kinds):
  # Unigram takes fifteen times as long as BPE
  texts = corpus()[:20] if 'algorithm' in kinds else corpus()
  return tokenizers.build(TokenizerConfig(vocabulary=1024, **kinds), texts, texts)


def made(kind):
  if kind == 'char':
    return tokenizers.CharTokenizer(set(''.join(HARD)) | set(map(chr, range(0x250))))
  return {
    'byte': tokenizers.ByteTokenizer,
    'bpe': trained,
    'phrases': functools.partial(trained, split_by_whitespace=False),
    'unigram': functools.partial(trained, algorithm='unigram'),
  }[kind]()


@pytest.mark.parametrize('kind', ['byte', 'char', 'bpe', 'phrases', 'unigram'])
def test_round_trip_of_hard_texts_and_code(kind):
  tok = made(kind)
  texts = HARD + ([] if kind == 'char' else corpus()[:10])
  for text, array in zip(texts, tok.encode_arrays(texts)):
    ids = array.tolist()
    assert tok.decode(ids) == text and tok.losses(text, ids) == 0
    assert ids == tok.encode(text)
    assert not {tok.pad, tok.bos, tok.eos}.intersection(ids)


@pytest.mark.parametrize('removes', [False, True])
def test_a_model_with_a_dummy_prefix_gives_u2581_back(removes):
  tok = prefixed(remove_extra_whitespaces=removes)
  for text in ('a\u2581b', '\u2581', '\u2581a', 'a \u2581 b\u2581\u2581c d', ' \u2581 a'):
    assert tok.decode(tok.encode(text)) == text
  # Beside such a text, others have the ids that SentencePiece gives them.
  plain = tok.encode_arrays(['hello world', 'a\u2581b'])[0]
  assert plain.tolist() == tok._processor.encode('hello world')


def prefixed(**settings):
  import sentencepiece

  model = io.BytesIO()
  settings |= {'byte_fallback': True, 'normalization_rule_name': 'identity', 'minloglevel': 2}
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS), model_writer=model, model_type='bpe', vocab_size=350, **settings
  )
  return pieces.SentencePieceTokenizer(model.getvalue())


@pytest.mark.parametrize('kind', ['byte', 'char', 'bpe'])
def test_half_a_surrogate_pair_is_said(kind):
  with pytest.raises(
    ValueError, match=r"a text has '\\ud800' at 1, half of a surrogate pair.*; take it out"
  ):
    made(kind).encode('a\ud800b')


@pytest.mark.parametrize('kind', ['byte', 'bpe', 'phrases', 'unigram'])
@given(text=anything, other=anything)
@settings(max_examples=80, deadline=None)
def test_round_trip_of_anything_and_bytes_join(kind, text, other):
  tok = made(kind)
  one, two = tok.encode(text), tok.encode(other)
  assert tok.decode(one) == text
  assert (
    tok.decode_bytes(one + two)
    == tok.decode_bytes(one) + tok.decode_bytes(two)
    == (text + other).encode()
  )
  assert b''.join(tok.decode_bytes([i]) for i in one) == text.encode()


def test_decoding_agrees_with_sentencepiece():
  tok = trained()
  for text in corpus()[:20]:
    ids = tok.encode(text)
    assert tok.decode(ids) == tok._processor.decode(ids)


def test_training_is_deterministic_and_uses_the_share():
  config = TokenizerConfig(vocabulary=1024)
  assert pieces.train(config, corpus()) == trained().model
  assert pieces.train(config, corpus(), share=0.5) != trained().model


def test_a_sample_is_chosen_by_hash():
  """Of about the share's size, the same whatever else there is, and less of a smaller share."""
  chunks = [f'chunk {i}' for i in range(5000)]
  third, tenth = ({c for c in chunks if pieces.sampled(c, share)} for share in (0.3, 0.1))
  assert tenth < third and abs(len(third) - 1500) < 150 and abs(len(tenth) - 500) < 90
  assert all(pieces.sampled(c, 1.0) for c in chunks) and not any(
    pieces.sampled(c, 0.0) for c in chunks
  )


def test_code_compresses():
  tok = trained()
  texts = corpus()
  assert sum(len(text.encode()) for text in texts) / sum(map(len, tok.encode_arrays(texts))) > 2.7
  assert b'    ' in tok.token_bytes and any(b'\n' in piece[1:] for piece in tok.token_bytes)


@pytest.mark.parametrize('kind', ['byte', 'char', 'bpe'])
def test_save_and_load(kind, tmp_path):
  tok = made(kind)
  tok.save(tmp_path / 'run')
  again = tokenizers.load(tmp_path / 'run')
  assert again.token_bytes == tok.token_bytes and again.kind == tok.kind
  assert (again.pad, again.bos, again.eos) == (tok.pad, tok.bos, tok.eos)
  assert again.encode('a\r\n b') == tok.encode('a\r\n b')


def test_char_ids_are_nanogpts_after_the_special_ones():
  tok = tokenizers.CharTokenizer('hello\n')
  assert tok.vocabulary == 3 + 5 and tok.encode('\nehlo') == [3, 4, 5, 6, 7]


def test_char_names_an_unknown_character():
  with pytest.raises(ValueError, match=r"'Z' \(U\+005A\), at 2"):
    tokenizers.CharTokenizer('ab').encode('abZ')


def test_ids_outside_the_vocabulary_are_named():
  for wrong in (259, -1):
    with pytest.raises(ValueError, match=f'id {wrong} is outside the vocabulary of 259'):
      tokenizers.ByteTokenizer().decode([5, wrong])


def test_losses_count_characters():
  tok = tokenizers.ByteTokenizer()
  tok.token_bytes[3 + ord('a')] = b'o'
  assert (
    tok.losses('banana', tok.encode('banana')) == 3 and tok.losses('bonn', tok.encode('bonn')) == 0
  )


def test_vocabulary_must_be_the_one_that_comes_out():
  with pytest.raises(ValueError, match='vocabulary=300.*259'):
    tokenizers.build(TokenizerConfig(kind='byte', vocabulary=300), [], [])


def test_too_many_pieces_for_a_small_corpus():
  with pytest.raises(ValueError, match='lower tokenizer.vocabulary'):
    tokenizers.build(TokenizerConfig(vocabulary=4096), ['a b c'], [])


def test_no_tokenizer_there(tmp_path):
  with pytest.raises(FileNotFoundError, match='no tokenizer at'):
    tokenizers.load(tmp_path)


@pytest.mark.skipif(not T5.exists(), reason=f'{T5} is not beside the checkout')
def test_a_loaded_model_keeps_its_ids_and_its_losses_are_counted():
  tok = tokenizers.load(T5)
  assert (tok.vocabulary, tok.pad, tok.bos, tok.eos) == (32000, 0, 1, 1)
  assert tok.encode('summarize:') == [21603, 10]
  ids = tok.encode('Hello, world!')
  assert tok.decode(ids) == 'Hello, world!' and tok.losses('Hello, world!', ids) == 0
  assert tok.losses('two  spaces\n', tok.encode('two  spaces\n')) == 2
  assert tok.losses('{', tok.encode('{')) > 0


def test_every_kind_that_a_config_may_name_is_a_class():
  assert tuple(tokenizers.KINDS) == TOKENIZER_KINDS
  assert all(tokenizers.of(kind).kind == kind for kind in TOKENIZER_KINDS)


def test_arrays_are_int32():
  for kind in ('byte', 'char', 'bpe'):
    assert all(array.dtype == np.int32 for array in made(kind).encode_arrays(['ab', '']))


@pytest.mark.parametrize(
  'content',
  [b'', b'[' * 100_000, b'9' * 5000, b'\xff', b'[]', b'{"kind": "bite"}', b'{"kind": "char"}'],
)
def test_a_damaged_tokenizer_is_named(tmp_path, content):
  (tmp_path / 'tokenizer.json').write_bytes(content)
  with pytest.raises(ValueError, match=f'{tmp_path}.*tokenizer.json'):
    tokenizers.load(tmp_path)


# Of tiktoken, which has files of that name, and an empty one.
@pytest.mark.parametrize('content', [b'IQ== 0\nIg== 1\n', b''])
def test_what_is_no_sentencepiece_model_is_named(tmp_path, content):
  (tmp_path / 'tokenizer.model').write_bytes(content)
  with pytest.raises(ValueError, match=f'{tmp_path}/tokenizer.model'):
    tokenizers.load(tmp_path / 'tokenizer.model')


@pytest.mark.parametrize('kind', TOKENIZER_KINDS)
def test_the_files_of_a_directory_are_those_of_the_index_in_it(kind, tmp_path):
  (tmp_path / 'more').mkdir()
  for name in ('tokenizer.json', 'tokenizer.model', 'tokenizer_config.json'):
    (tmp_path / name).write_text('{}')
  files = tokenizers.of(kind).paths(tmp_path)
  assert all(file.is_file() for file in files) and len(files) > 1
  assert tokenizers.of(kind).paths(tmp_path / 'tokenizer.json') == files
  alone = tmp_path / 'tokenizer.model'
  if kind == 'sentencepiece':
    assert tokenizers.of(kind).paths(alone) == [alone]


@pytest.mark.parametrize('removes', [False, True])
@pytest.mark.parametrize(
  'text', ['lazy', ' lazy', '  lazy', 'ü', '你好', '.', '12', 'a\u2581b', '']
)
def test_what_stands_behind_a_text_has_no_dummy_prefix(removes, text):
  """The ids that the two have as one text, where no piece is of both."""
  tok = prefixed(remove_extra_whitespaces=removes)
  before = tok.encode('fox;')
  assert before + encoded_behind(tok, text) == tok.encode('fox;' + text)
  assert encoded_behind(trained(), text) == trained().encode(text)
