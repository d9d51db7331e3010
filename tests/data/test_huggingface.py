"""Hugging Face tokenizers: ids as the library gives them, exact bytes,
control tokens out of the reach of text, files.
"""

import functools
import json

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

import files
from data import generation, huggingface, tokenizers
from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from data.prepare import prepare
from data.tokenizers import load
from decode.text import TextStream
from tests.data import tokenizer_families as families

TEXTS = [
  '',
  ' ',
  'hello world. don\'t stop, caf\u00e9!',
  ' lead',
  '  two',
  'x\n\n\ny',
  'a\u2581b \U0001f600',
  're\u0301sume\u0301 <think>ok</think>',
  'def f(x):\n    return x\t\r\n',
  '<0x41>',
  '##a',
  '\0',
]
anything = st.text(st.characters(exclude_categories=['Cs']), max_size=30)
each_family = pytest.mark.parametrize('family', families.FAMILIES)


@functools.cache
def ours(family):
  return huggingface.HuggingFaceTokenizer(families.contents(family))


theirs = functools.cache(families.theirs)


def control(family):
  """Names and ids of a family's control tokens."""
  tok = ours(family)
  roles = set(tok.special_tokens.values())
  return {
    token.content: i
    for i, token in theirs(family).get_added_tokens_decoder().items()
    if token.special or token.content in roles
  }


@st.composite
def hostile(draw, family):
  """Text with names of control tokens, whole and broken, in it."""
  names = list(control(family))
  parts = draw(
    st.lists(
      st.one_of(
        st.sampled_from(names), st.sampled_from(names).map(lambda name: name[1:]), anything
      ),
      max_size=6,
    )
  )
  return draw(st.sampled_from(['', ' '])).join(parts)


@each_family
def test_special_ids(family):
  tok = ours(family)
  assert (
    tuple(theirs(family).id_to_token(i) for i in (tok.bos, tok.eos, tok.pad))
    == families.ROLES[family]
  )
  assert tok.vocabulary == theirs(family).get_vocab_size() == len(tok.token_bytes)
  assert all(tok.token_bytes[i] == b'' for i in control(family).values())
  assert sum(piece == b'' for piece in tok.token_bytes) == len(control(family))


@each_family
@given(text=st.one_of(anything, st.sampled_from(TEXTS + families.CORPUS)))
@settings(max_examples=60)
def test_ids_text_and_bytes_are_the_librarys(family, text):
  assume(not any(name in text for name in control(family)))  # which the next test is of
  tok, lib = ours(family), theirs(family)
  ids = tok.encode(text)
  assert ids == tok.encode(text, special=True) == lib.encode(text, add_special_tokens=False).ids
  if family in families.EXACT:
    assert tok.decode(ids) == text == tok.decode_bytes(ids).decode() and tok.losses(text, ids) == 0
  assert (tok.decode(ids) == text) == (tok.losses(text, ids) == 0)
  first = lib.id_to_token(ids[0]) if ids else ''
  if not first.startswith('\u2581\u2581'):  # of these the library takes away all spaces, or none
    assert tok.decode(ids) == lib.decode(ids)
  assert b''.join(tok.decode_bytes([i]) for i in ids) == tok.decode_bytes(ids)
  stream = TextStream(tok)
  assert ''.join([stream.add([i]) for i in ids] + [stream.end()]) == tok.decode_bytes(ids).decode(
    errors='replace'
  )


@each_family
@given(data=st.data())
@settings(max_examples=60)
def test_text_cannot_name_control_tokens_unless_asked_to(family, data):
  tok, lib = ours(family), theirs(family)
  text = data.draw(hostile(family))
  ids = tok.encode(text)
  unknown = (
    tok.special_tokens.get('unk_token')
    if family in ('llama2', 'mistral', 'gemma', 't5', 'bert')
    else None
  )
  assert not {i for name, i in control(family).items() if name != unknown}.intersection(ids)
  if family in families.EXACT + families.BYTE_FALLBACK:
    assert control(family).get(unknown) not in ids
    assert (
      '\u2581' in text or family == 'mistral' and text.startswith(' ') or tok.decode(ids) == text
    )
  assert tok.encode(text, special=True) == lib.encode(text, add_special_tokens=False).ids
  # The library's own switch serves BPE; Unigram finds names all the same
  if family not in ('t5', 'bert'):
    switched = families.theirs(family)
    switched.encode_special_tokens = True
    assert ids == switched.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize('special', [False, True])
def test_half_a_surrogate_pair_is_said(special):
  with pytest.raises(
    ValueError, match=r"a text has '\\ud800' at 1, half of a surrogate pair.*; take it out"
  ):
    ours(families.EXACT[0]).encode('a\ud800b', special=special)


def test_the_librarys_own_switch_would_not_do():
  switched = families.theirs('t5')
  switched.encode_special_tokens = True
  # When it does, _anonymous can go
  assert control('t5')['</s>'] in switched.encode('a</s>').ids[:-1]
  assert control('t5')['</s>'] not in ours('t5').encode('a</s>')
  assert ours('t5').encode('a</s>', special=True)[-1] == control('t5')['</s>']


@pytest.mark.parametrize('merge', [['<', '|'], '< |'])
def test_a_merge_into_a_name_is_not_taken(merge):
  files = definition_of('gpt2')
  files['model']['vocab']['<|'] = len(files['model']['vocab'])
  files['model']['merges'] = [merge]
  tok = made(files, {'eos_token': '<|'})
  assert tok.eos not in tok.encode('<|') and tok.encode('<|', special=True) == [tok.eos]


def test_an_added_token_comes_out_as_it_stands():
  tok = ours('qwen')
  text = 'mon r\u00e9sum\u00e9 est l\u00e0'
  assert tok.decode(tok.encode(text)) == text != theirs('qwen').decode(tok.encode(text))
  assert tok.token_bytes[tok.encode('<think>')[0]] == b'<think>'


def test_words_of_a_wordpiece_model_are_joined_by_spaces():
  tok = ours('bert')
  ids = tok.encode('Hello brownworld.')
  assert tok.decode_bytes(ids) == b' hello brownworld.' and tok.decode(ids) == 'hello brownworld.'
  assert tok.losses('Hello', tok.encode('Hello')) == 1


@pytest.mark.parametrize(
  'decoder',
  [
    {'type': 'WordPiece', 'prefix': '##', 'cleanup': True},
    {'type': 'WordPiece', 'prefix': '@', 'cleanup': False},
    {'type': 'Metaspace', 'replacement': '_', 'prepend_scheme': 'never', 'split': True},
    {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True, 'use_regex': True},
    {'type': 'Replace', 'pattern': {'String': 'ab'}, 'content': 'x'},
    {'type': 'Sequence', 'decoders': [{'type': 'ByteFallback'}, {'type': 'Fuse'}]},
  ],
)
@given(
  piece=st.one_of(
    anything,
    st.sampled_from(
      [
        '.',
        '?',
        '!',
        ',',
        "'",
        "n't",
        "'m",
        "'s",
        "'ve",
        "'re",
        'do not',
        'a do not',
        '##s',
        '@s',
        '_',
        'a_',
        'xabab',
        '<0x41>',
        '<0x0a>',
        '<0xGG>',
      ]
    ),
  )
)
@settings(max_examples=60)
def test_a_piece_is_spelled_as_the_librarys_decoder_spells_it(decoder, piece):
  import tokenizers

  spell, joins_words, drops_space = huggingface.spelling(decoder)
  lib = tokenizers.Tokenizer(tokenizers.models.BPE())
  lib = tokenizers.Tokenizer.from_str(json.dumps(json.loads(lib.to_str()) | {'decoder': decoder}))
  assert 'a' + spell(piece).decode(errors='replace') == lib.decoder.decode(['a', piece])
  assert joins_words == drops_space == (decoder['type'] == 'WordPiece')


@each_family
def test_saved_files_are_the_same_and_load_as_the_same(family, tmp_path):
  tok = ours(family)
  (tmp_path / 'chat_template.jinja').write_text('of an earlier tokenizer')
  tok.save(tmp_path)
  assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == families.contents(family)
  for again in (tokenizers.load(tmp_path), tokenizers.load(tmp_path / 'tokenizer.json')):
    assert again.token_bytes == tok.token_bytes and again.kind == tok.kind == 'huggingface'
    assert (again.pad, again.bos, again.eos, again.special_tokens) == (
      tok.pad,
      tok.bos,
      tok.eos,
      tok.special_tokens,
    )
    assert again.encode(families.WORDS) == tok.encode(families.WORDS)


def test_save_writes_the_definition_last(tmp_path, monkeypatch):
  written = []
  monkeypatch.setattr(files, 'replace', lambda path, content: written.append(path.name))
  ours('gpt2').save(tmp_path)
  assert written == ['tokenizer_config.json', 'tokenizer.json']


def test_templates_travel_by_name_and_the_file_goes_first(tmp_path):
  contents = families.contents('gpt2')
  assert ours('gpt2').chat_templates == {} == tokenizers.ByteTokenizer().chat_templates
  given = json.loads(contents['tokenizer_config.json'])
  contents['tokenizer_config.json'] = json.dumps(given | {'chat_template': 'old'}).encode()
  assert huggingface.HuggingFaceTokenizer(contents).chat_templates == {'default': 'old'}
  contents['chat_template.jinja'] = 'n\u00e9w'.encode()
  huggingface.HuggingFaceTokenizer(contents).save(tmp_path / 'a')
  assert tokenizers.load(tmp_path / 'a').chat_templates == {'default': 'n\u00e9w'}
  (tmp_path / 'a' / 'additional_chat_templates').mkdir()
  (tmp_path / 'a' / 'additional_chat_templates' / 'tool_use.jinja').write_text('tools')
  tokenizers.load(tmp_path / 'a').save(tmp_path / 'b')
  assert tokenizers.load(tmp_path / 'b').chat_templates == {
    'default': 'n\u00e9w',
    'tool_use': 'tools',
  }
  assert {file.name for file in (tmp_path / 'b').iterdir()} == {
    'tokenizer.json',
    'tokenizer_config.json',
  }
  assert [file.name for file in huggingface.HuggingFaceTokenizer.paths(tmp_path / 'a')] == [
    'tokenizer.json',
    'tokenizer_config.json',
    'chat_template.jinja',
    'tool_use.jinja',
  ]


def test_who_gets_a_template_or_tokens_ends_texts_as_before():
  tokenizer = huggingface.HuggingFaceTokenizer(families.contents('gpt2'))
  tokenizer.generation = {'eos_token_id': [5, 7]}
  for changed in (tokenizer.with_template('new'), tokenizer.extended(['<a>'])):
    assert generation.ends(changed) == generation.ends(tokenizer) and 7 in generation.ends(changed)


def test_limits_of_length_in_the_file_cut_nothing():
  lib = families.theirs('bert')
  lib.enable_truncation(4)
  lib.enable_padding(length=8)
  tok = made(json.loads(lib.to_str()), families.SETTINGS['bert'])
  assert (
    tok.encode(families.WORDS) == ours('bert').encode(families.WORDS) and len(tok.encode('a')) == 1
  )
  assert len(tok.encode(families.WORDS, special=True)) > 8


def test_settings_complete_the_added_tokens():
  files = definition_of('gpt2')
  size = len(files['model']['vocab'])
  tok = made(
    files,
    {
      'eos_token': '<|endoftext|>',
      'added_tokens_decoder': {str(size): {'content': '<|new|>', 'special': True}},
    },
  )
  assert (
    tok.vocabulary == size + 1
    and tok.encode('<|new|>', special=True) == [size]
    and size not in tok.encode('<|new|>')
  )
  think = theirs('qwen').token_to_id('<think>')
  tok = made(
    definition_of('qwen'),
    families.SETTINGS['qwen']
    | {'added_tokens_decoder': {str(think): {'content': '<think>', 'special': True}}},
  )
  assert (
    tok.token_bytes[think] == b''
    and think not in tok.encode('<think>')
    and think in ours('qwen').encode('<think>')
  )
  files['model']['vocab']['!!'] = size
  tok = huggingface.HuggingFaceTokenizer(
    {
      'tokenizer.json': json.dumps(files).encode(),
      'special_tokens_map.json': b'{"eos_token": "!!"}',
    }
  )
  assert (
    tok.eos == size
    and tok.token_bytes[size] == b''
    and tok.encode('!!', special=True) == [size] != tok.encode('!!')
  )


def test_ids_that_no_piece_has_decode_to_nothing():
  files = definition_of('gpt2')
  files['model']['vocab']['zz'] = 1000
  tok = made(files, families.SETTINGS['gpt2'])
  assert tok.vocabulary == 1001 and tok.decode([1000]) == 'zz' and tok.token_bytes[999] == b''


def definition_of(family):
  return json.loads(families.definition(family))


def made(definition, given):
  return huggingface.HuggingFaceTokenizer(
    {
      'tokenizer.json': json.dumps(definition).encode(),
      'tokenizer_config.json': json.dumps(given).encode(),
    }
  )


EOS = {'eos_token': '<|endoftext|>'}


@pytest.mark.parametrize(
  'change, given, message',
  [
    ({}, {}, 'no token ends a text.*eos_token'),
    ({}, {'eos_token': '<none>'}, "'<none>', which has no id"),
    ({}, {'eos_token': 'a'}, "'a' is a control token, and a piece of text too"),
    ({}, EOS | {'additional_special_tokens': ['<far>']}, "'<far>', which has no id"),
    (
      {},
      EOS | {'added_tokens_decoder': {'500': {'content': '<far>'}}},
      "'<far>' has id 500 .* gives it 400: .* without gaps",
    ),
    ({'decoder': None}, EOS, "decoder.type='none' is unknown.*Known: Sequence"),
    ({'decoder': {'type': 'ByteLevels'}}, EOS, "did you mean 'ByteLevel'"),
    ({'decoder': {'type': 'CTC', 'pad_token': '<pad>'}}, EOS, "'CTC' is unknown"),
    (
      {'decoder': {'type': 'Replace', 'pattern': {'Regex': 'a+'}, 'content': ''}},
      EOS,
      'only a fixed text',
    ),
    ({'decoder': {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}}, EOS, 'after Fuse'),
    (
      {
        'decoder': {
          'type': 'Sequence',
          'decoders': [{'type': 'Fuse'}, {'type': 'Strip', 'content': ' ', 'start': 0, 'stop': 1}],
        }
      },
      EOS,
      'one space before',
    ),
    (
      {
        'decoder': {
          'type': 'Sequence',
          'decoders': [
            {'type': 'Fuse'},
            {'type': 'Replace', 'pattern': {'String': 'ab'}, 'content': ''},
          ],
        }
      },
      EOS,
      'within one piece',
    ),
    (
      {
        'decoder': {
          'type': 'Sequence',
          'decoders': [{'type': 'ByteLevel'}, {'type': 'ByteFallback'}],
        }
      },
      EOS,
      'after ByteLevel',
    ),
    ({'model': {'type': 'BPE'}}, EOS, 'no model with a vocab'),
    ({'normalizer': {'type': 'Nobody'}}, EOS, 'can\'t read this tokenizer.json'),
  ],
)
def test_what_cannot_be_used_is_named(change, given, message):
  with pytest.raises(ValueError, match=message):
    made(definition_of('gpt2') | change, given)


def test_files_that_are_not_json(tmp_path):
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    for content, message in ((b'{', f'{name} is not JSON'), (b'[]', f'{name} holds list')):
      with pytest.raises(ValueError, match=message):
        huggingface.HuggingFaceTokenizer(families.contents('gpt2') | {name: content})
  with pytest.raises(FileNotFoundError, match='no tokenizer at'):
    tokenizers.load(tmp_path / 'tokenizer.json')


def test_config_asks_for_a_path_and_the_kind_that_is_there(tmp_path):
  with pytest.raises(ValueError, match="kind='huggingface': give the directory"):
    TokenizerConfig(kind='huggingface')
  ours('t5').save(tmp_path)
  assert (
    tokenizers.build(TokenizerConfig(kind='huggingface', path=str(tmp_path)), [], []).vocabulary
    == ours('t5').vocabulary
  )
  with pytest.raises(ValueError, match="kind 'huggingface', not 'sentencepiece'"):
    tokenizers.build(TokenizerConfig(path=str(tmp_path)), [], [])


def test_only_this_kind_takes_names_in_text():
  with pytest.raises(ValueError, match="'byte' tokenizer; use one of kind='huggingface'"):
    tokenizers.ByteTokenizer().encode('<|im_start|>', special=True)


@pytest.mark.parametrize('family', ['qwen', 't5'])
def test_a_corpus_is_prepared_with_it(family, tmp_path):
  ours(family).save(tmp_path / 'hf')
  (tmp_path / 'texts').mkdir()
  texts = [f'{text} <|im_end|></s> {i}' for i, text in enumerate(families.CORPUS * 4)]
  for i, text in enumerate(texts):
    (tmp_path / 'texts' / f'{i:02}.txt').write_text(text)
  config = DataConfig(
    sources=(SourceConfig(kind='text', path=f'{tmp_path}/texts/*.txt'),),
    sequence_length=32,
    validation_fraction=0.2,
    clean=CleanConfig(near_duplicates=0.0),
    cache_dir=str(tmp_path / 'cache'),
    tokenizer=TokenizerConfig(kind='huggingface', path=str(tmp_path / 'hf')),
  )
  prepared = prepare(config, log=lambda line: None)
  assert (
    prepared.tokenizer.kind == 'huggingface'
    and prepared.tokenizer.token_bytes == ours(family).token_bytes
  )
  assert (prepared.report['tokenizer']['characters_lost'] == 0) == (family == 'qwen')
  control_ids = set(control(family).values()) - {
    prepared.tokenizer.bos,
    prepared.tokenizer.eos,
    theirs(family).token_to_id('<unk>'),
  }
  for ids in prepared.tokenizer.encode_arrays(list(prepared.validation_documents())):
    assert ids.size and not control_ids.intersection(ids.tolist())


def test_arrays_are_int32():
  assert all(array.dtype == np.int32 for array in ours('gpt2').encode_arrays(['ab', '']))


def test_it_agrees_with_sentencepiece_on_a_real_model(shared_data):
  """T5's own pieces and scores as a tokenizer.json: the same ids and text as the .model gives,
  where normalisation has nothing to do.
  """
  import tokenizers

  sentencepiece = load(shared_data / 't5.model')
  processor = sentencepiece._processor
  pieces = [
    (processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())
  ]
  lib = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=processor.unk_id()))
  p = tokenizers.pre_tokenizers
  lib.pre_tokenizer, lib.decoder = (
    p.Sequence([p.WhitespaceSplit(), p.Metaspace()]),
    tokenizers.decoders.Metaspace(),
  )
  tok = made(json.loads(lib.to_str()), families.SETTINGS['t5'] | {'additional_special_tokens': []})
  text = (shared_data / 'tinyshakespeare.txt').read_text()
  lines = [' '.join(line.split()) for line in text.splitlines()[:3000]] + [
    '</s> is four characters and <pad> five'
  ]
  encoded, expected = (each.encode_arrays(lines) for each in (tok, sentencepiece))
  assert [ids.tolist() for ids in encoded] == [ids.tolist() for ids in expected]
  assert [tok.decode(ids) for ids in encoded[:-1]] == [
    sentencepiece.decode(ids).replace(' \u2047 ', '') for ids in expected[:-1]
  ]


def test_older_files_read_the_same():
  files = definition_of('gpt2')
  files['model']['merges'] = [' '.join(merge) for merge in files['model']['merges']]
  assert made(files, families.SETTINGS['gpt2']).encode(families.WORDS) == ours('gpt2').encode(
    families.WORDS
  )
  files = definition_of('t5')
  files['decoder'] = {'type': 'Metaspace', 'replacement': '\u2581', 'add_prefix_space': True}
  assert made(files, families.SETTINGS['t5']).decode(ours('t5').encode('a b')) == 'a b'
  files['decoder'] |= {'add_prefix_space': False, 'prepend_scheme': 'never'}
  assert made(files, families.SETTINGS['t5']).decode(ours('t5').encode('a b')) == ' a b'


def test_json_of_another_form_is_one_line_that_names_the_directory(tmp_path):
  ours('gpt2').save(tmp_path)
  definition = json.loads((tmp_path / 'tokenizer.json').read_text())
  shapes = [
    {'model': {'vocab': 7}},
    {'model': {'vocab': [1, 2]}},
    {'model': definition['model'] | {'vocab': {'a': 'x'}}},
    {'added_tokens': 7},
    {'added_tokens': [{}]},
    {'added_tokens': ['</s>']},
    {'decoder': 7},
    {'decoder': {'type': ['ByteLevel']}},
    {'decoder': {'type': 'Sequence'}},
    {'decoder': {'type': 'Replace', 'pattern': 'a'}},
  ]
  for shape in shapes:
    (tmp_path / 'tokenizer.json').write_text(json.dumps(definition | shape))
    with pytest.raises(ValueError, match=str(tmp_path)):
      tokenizers.load(tmp_path)
  (tmp_path / 'tokenizer.json').write_text(json.dumps(definition))
  for damaged in (b'[' * 100_000, b'9' * 5000, b'\xff', b'{"eos_token": {"a": 1}}', b'[]'):
    (tmp_path / 'tokenizer_config.json').write_bytes(damaged)
    with pytest.raises(ValueError, match=str(tmp_path)):
      tokenizers.load(tmp_path)
  (tmp_path / 'tokenizer_config.json').write_bytes(b'{"eos_token": "<|endoftext|>"}')
  (tmp_path / 'chat_template.jinja').write_bytes(b'\xff')
  with pytest.raises(ValueError, match='chat_template.jinja is not UTF-8'):
    tokenizers.load(tmp_path)
