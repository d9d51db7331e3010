"""Do exported tokenizers have the same ids? Here by the tokenizers library; tests/oracle/ has
transformers' AutoTokenizer.
"""

import json

import pytest

from data import export, huggingface, tokenizers
from tests.data import test_tokenizer, tokenizer_families as families


@pytest.mark.parametrize('kind', ['byte', 'char', 'bpe', 'phrases', 'unigram'])
def test_an_export_reads_back_as_a_tokenizer_of_the_same_ids(kind, tmp_path):
  ours = test_tokenizer.made(kind)
  contents, note = export.contents(ours)
  assert ('names of tokens' in note) == (kind == 'unigram')
  for name, content in contents.items():
    (tmp_path / name).write_bytes(content)
  again = tokenizers.load(tmp_path)
  unknown = ' \u2047 '.encode()  # SentencePiece's, which no text has: rare characters are bytes
  assert again.token_bytes == [b'' if x == unknown else x for x in ours.token_bytes]
  assert (again.bos, again.eos, again.pad) == (ours.bos, ours.eos, ours.pad)
  for text in test_tokenizer.HARD:
    if kind != 'unigram' or not text.startswith('<'):
      assert again.encode(text) == ours.encode(text)


def test_an_export_that_would_be_misread_is_refused(monkeypatch):
  ours = test_tokenizer.prefixed(user_defined_symbols=['<t>'])
  with pytest.raises(ValueError, match="ids of '<t>' would be"):
    export.contents(ours)
  monkeypatch.setattr(export, '_merges', lambda *_: [])
  with pytest.raises(ValueError, match='ids of .* would be'):
    export.contents(test_tokenizer.made('bpe'))


def test_a_tokenizer_of_others_keeps_its_files_but_for_the_class():
  ours = huggingface.HuggingFaceTokenizer(families.contents('gemma'))
  contents, note = export.contents(ours)
  assert note == '' and contents['tokenizer.json'] == families.contents('gemma')['tokenizer.json']
  settings = json.loads(contents['tokenizer_config.json'])
  assert settings == families.SETTINGS['gemma'] | {'tokenizer_class': 'PreTrainedTokenizerFast'}


@pytest.mark.parametrize('own', [None, ['input_ids']])
def test_texts_of_a_pair_are_told_apart_as_by_the_class_that_goes(own):
  """BertTokenizer gives token_type_ids; the class that takes its place does where it is told."""
  given = families.contents('bert')
  if own:
    settings = families.SETTINGS['bert'] | {'model_input_names': own}
    given = given | {'tokenizer_config.json': json.dumps(settings).encode()}
  contents, _ = export.contents(huggingface.HuggingFaceTokenizer(given), has_types=True)
  names = json.loads(contents['tokenizer_config.json'])['model_input_names']
  assert names == (own or ['input_ids', 'token_type_ids', 'attention_mask'])
