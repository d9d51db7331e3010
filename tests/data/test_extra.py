"""Do ids that are added to a tokenizer stay, and stay out of every text?"""

import numpy as np
import pytest

from data import export, huggingface, tokenizers
from data.extra import extended, id_of
from tests.data import test_tokenizer, tokenizer_families as families

NAMES = ['<extra_id_1>', '<extra_id_0>']
KINDS = ['byte', 'char', 'bpe', 'gpt2', 'llama2', 'bert']


def made(kind):
  if kind in families.FAMILIES:
    return huggingface.HuggingFaceTokenizer(families.contents(kind))
  return test_tokenizer.made(kind)


@pytest.mark.parametrize('kind', KINDS)
def test_extra_ids_are_behind_the_others_and_are_kept(kind, tmp_path):
  before = made(kind)
  first, text = before.vocabulary, 'def a two'
  ours = extended(before, NAMES)
  ours.save(tmp_path)
  for tokenizer in (ours, tokenizers.load(tmp_path)):
    assert tokenizer.vocabulary == first + 2 and before.vocabulary == first
    assert [id_of(tokenizer, name) for name in NAMES] == [first, first + 1]
    assert tokenizer.encode(text) == before.encode(text)
    ids = before.encode(text)
    assert tokenizer.decode([first, *ids, first + 1]) == before.decode(ids)
    assert tokenizer.decode_bytes([first, first + 1]) == b''
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (before.bos, before.eos, before.pad)
  assert id_of(before, NAMES[0]) is None


@pytest.mark.parametrize('kind', ['byte', 'bpe', 'gpt2', 'llama2'])
def test_no_text_has_them(kind):
  tokenizer = extended(made(kind), NAMES)
  for text in (NAMES[0], f'a{NAMES[1]}b', ''.join(NAMES)):
    ids = np.array(tokenizer.encode(text))
    assert ids.max() < tokenizer.vocabulary - 2
    if kind != 'llama2':  # which puts a space before a text
      assert tokenizer.decode(ids) == text


def test_more_of_them_come_behind(tmp_path):
  tokenizer = extended(extended(made('byte'), ['<mask>']), NAMES)
  tokenizer.save(tmp_path)
  again = tokenizers.load(tmp_path)
  assert again.extra == tokenizer.extra == {'<mask>': 259, NAMES[0]: 260, NAMES[1]: 261}


@pytest.mark.parametrize('kind', ['byte', 'gpt2'])
def test_names_are_their_own(kind):
  tokenizer = extended(made(kind), NAMES)
  for names in (NAMES[:1], ['<a>', '<a>'], ['<a>', 3]):
    with pytest.raises(ValueError, match='have names of their own, not'):
      extended(tokenizer, names)
  assert extended(tokenizer, []) is tokenizer


@pytest.mark.parametrize('kind', ['byte', 'bpe'])
def test_transformers_get_them_too(kind, tmp_path):
  ours = extended(made(kind), NAMES)
  contents, _ = export.contents(ours, has_encoder=True)
  for name, content in contents.items():
    (tmp_path / name).write_bytes(content)
  again = tokenizers.load(tmp_path)
  assert again.vocabulary == ours.vocabulary
  assert [id_of(again, name) for name in NAMES] == [id_of(ours, name) for name in NAMES]
  text = f'def f(x): {NAMES[0]}'
  assert again.encode(text) == ours.encode(text)
