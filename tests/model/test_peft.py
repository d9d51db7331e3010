"""Is an adapter of PEFT's read as it is written, and refused where it would mean something else?"""

import dataclasses
import json

import numpy as np
import pytest

from model import families, peft
from model.adaptation import AdapterConfig
from model.config import ModelConfig, MoEConfig
from model.tensorfiles import TensorFiles

NETWORK = ModelConfig(
  vocabulary=32, width=16, layers=2, heads=4, kv_heads=2, feed_forward=24, tie_embeddings=False
)
LLAMA = families.FAMILIES['llama']
SHAPES = {
  'stack.blocks.0.attention.q': ((2, 16, 3), (2, 3, 4, 4)),
  'stack.blocks.0.attention.o': ((2, 4, 4, 3), (2, 3, 16)),
  'stack.blocks.0.feed_forward.down': ((2, 24, 3), (2, 3, 16)),
  'head.tokens': ((32, 3), (3, 16)),
}
CONFIG = AdapterConfig(kind='lora', rank=3, alpha=6.0, targets=tuple(sorted(SHAPES)))


def arrays():
  draw = np.random.default_rng(0)
  return {
    leaf: {'a': np.float32(draw.normal(size=a)), 'b': np.float32(draw.normal(size=b))}
    for leaf, (a, b) in SHAPES.items()
  }


@pytest.fixture
def written(tmp_path):
  peft.write(tmp_path, arrays(), CONFIG, NETWORK, LLAMA)
  return tmp_path


def change(directory, **settings):
  path = directory / peft.SETTINGS
  path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_what_is_written_is_read(written):
  config, read = peft.read(written, NETWORK, LLAMA)
  assert config == CONFIG
  expected = arrays()
  assert read.keys() == expected.keys()
  for leaf, parts in expected.items():
    for part, x in parts.items():
      np.testing.assert_array_equal(read[leaf][part], x, err_msg=f'{leaf} {part}')


def test_the_product_there_is_the_product_here(written):
  """B A of transformers' [outputs, inputs] is A B of ours, each in its own order of dimensions."""
  tensors, ours = TensorFiles(written, peft.TENSORS), arrays()

  def theirs(module):
    name = f'{peft.PREFIX}{module}.lora_'
    b, a = (
      tensors.read(f'{name}{part}.weight', 0, tensors.tensors[f'{name}{part}.weight'].shape[0])
      for part in 'BA'
    )
    return b @ a

  q, o, head = (
    ours[name]
    for name in ('stack.blocks.0.attention.q', 'stack.blocks.0.attention.o', 'head.tokens')
  )
  update = np.einsum('DZ,ZNH->NHD', q['a'][1], q['b'][1]).reshape(16, 16)
  np.testing.assert_allclose(theirs('model.layers.1.self_attn.q_proj'), update, rtol=1e-5)
  update = np.einsum('NHZ,ZD->DNH', o['a'][0], o['b'][0]).reshape(16, 16)
  np.testing.assert_allclose(theirs('model.layers.0.self_attn.o_proj'), update, rtol=1e-5)
  np.testing.assert_allclose(theirs('lm_head'), head['a'] @ head['b'], rtol=1e-5, atol=1e-6)


def test_rows_that_are_no_ids_stay_here(tmp_path):
  """Of a table with more rows than there are ids: there it has as many as ids, and comes back with
  zeros behind them.
  """
  padded = dataclasses.replace(NETWORK, vocabulary_multiple=64)
  draw = np.random.default_rng(0)
  part = {'a': np.float32(draw.normal(size=(64, 3))), 'b': np.float32(draw.normal(size=(3, 16)))}
  config = dataclasses.replace(CONFIG, targets=('head.tokens',))
  peft.write(tmp_path, {'head.tokens': part}, config, padded, LLAMA)
  name = f'{peft.PREFIX}lm_head.lora_B.weight'
  assert TensorFiles(tmp_path, peft.TENSORS).tensors[name].shape == (32, 3)
  expected = np.concatenate([part['a'][:32], np.zeros((32, 3), np.float32)])
  for network, a in ((padded, expected), (NETWORK, part['a'][:32])):
    found = peft.read(tmp_path, network, LLAMA)[1]['head.tokens']
    np.testing.assert_array_equal(found['a'], a)
    np.testing.assert_array_equal(found['b'], part['b'])


def test_short_names_only_where_they_mean_the_same(written, tmp_path):
  settings = json.loads((written / peft.SETTINGS).read_text())
  assert sorted(settings['target_modules']) == ['down_proj', 'lm_head', 'o_proj', 'q_proj']
  # Of two kinds of layers one is adapted: 'q_proj' would be those of both.
  network = dataclasses.replace(NETWORK, window=4, global_every=2)
  part = {'stack.blocks.1.attention.q': {'a': np.ones((1, 16, 3)), 'b': np.ones((1, 3, 4, 4))}}
  family = families.FAMILIES['mistral']
  (tmp_path / 'one').mkdir()
  peft.write(tmp_path / 'one', part, CONFIG, network, family)
  settings = json.loads((tmp_path / 'one' / peft.SETTINGS).read_text())
  assert settings['target_modules'] == ['model.layers.1.self_attn.q_proj']


@pytest.mark.parametrize(
  'settings, said',
  [
    ({'init_lora_weights': 'pissa'}, "init_lora_weights='pissa' changes what the adapter computes"),
    ({'alpha_pattern': {'q_proj': 3}}, "alpha_pattern={'q_proj': 3} changes"),
    ({'modules_to_save': ['lm_head']}, 'modules_to_save='),
    ({'lora_bias': True}, 'lora_bias=True'),
    ({'bias': 'all'}, "bias='all'"),
    ({'use_a_new_thing': 1}, 'use_a_new_thing=1 changes'),
    ({'peft_type': ['LORA']}, r"peft_type=\['LORA'\]; supported: 'LORA'"),
    ({'peft_type': 'LOHA'}, "peft_type='LOHA'; supported: 'LORA'"),
    ({'r': '3'}, "r='3' and lora_alpha=6.0 must be numbers"),
    ({'use_dora': True}, 'lora_magnitude_vector is missing'),
    ({'r': 4}, r'q_proj.lora_A.weight: \[3, 16\], must be \[4, 16\]'),
  ],
)
def test_what_would_compute_something_else_is_refused(written, settings, said):
  change(written, **settings)
  with pytest.raises((ValueError, NotImplementedError), match=said):
    peft.read(written, NETWORK, LLAMA)


def test_what_changes_nothing_is_read(written):
  change(written, base_model_name_or_path='nobody/nothing', lora_dropout=0, rank_pattern={})
  assert peft.read(written, NETWORK, LLAMA)[0] == CONFIG


def test_dropout_is_taken_and_given(tmp_path, written):
  dropping = dataclasses.replace(CONFIG, dropout=0.1)
  change(written, lora_dropout=0.1)
  assert peft.read(written, NETWORK, LLAMA)[0] == dropping
  (tmp_path / 'again').mkdir()
  peft.write(tmp_path / 'again', arrays(), dropping, NETWORK, LLAMA)
  assert peft.read(tmp_path / 'again', NETWORK, LLAMA)[0] == dropping
  change(written, lora_dropout='much')
  with pytest.raises(ValueError, match="lora_dropout='much' must be a number"):
    peft.read(written, NETWORK, LLAMA)


def test_another_model_s_tensors_are_listed(written):
  small = dataclasses.replace(NETWORK, layers=1)
  with pytest.raises(ValueError, match=r'layers.1.self_attn.q_proj.lora_A.*not a part of a matrix'):
    peft.read(written, small, LLAMA)
  deep = dataclasses.replace(NETWORK, layers=3)
  with pytest.raises(ValueError, match=r'layers.2.self_attn.q_proj: lora_A.weight is missing'):
    peft.read(written, deep, LLAMA)


def test_pickles_are_not_read(written):
  (written / peft.TENSORS).rename(written / peft.PICKLE)
  with pytest.raises(ValueError, match='is a pickle, which runs code'):
    peft.read(written, NETWORK, LLAMA)
  with pytest.raises(FileNotFoundError, match="is no adapter of PEFT's"):
    peft.read(written / 'nowhere', NETWORK, LLAMA)


@pytest.mark.parametrize('leaf', ['embedding.tokens', 'stack.blocks.0.feed_forward.up'])
def test_what_peft_has_no_module_for_is_said(tmp_path, leaf):
  network = dataclasses.replace(NETWORK, moe=MoEConfig(experts=4))
  part = {leaf: {'a': np.ones((1, 1)), 'b': np.ones((1, 1))}}
  with pytest.raises(NotImplementedError, match='merge the adapter .convert.py merge.'):
    peft.write(tmp_path, part, CONFIG, network, families.FAMILIES['mixtral'])
