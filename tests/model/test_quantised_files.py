"""Is a checkpoint in codes the model of the numbers that they stand for, kept as codes or not, and
is one that is damaged named?
"""

import dataclasses
import functools
import json
import re
import shutil
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

from model import checkpoint, families, transformer
from model.config import ModelConfig
from model.params import by_name, named_leaves
from model.quantised_files import KEY, QuantisedTensors, coded as coding
from model.quantised_files.fitted import fitted
from model.quantised_files.outgoing import outgoing
from model.tensorfiles import TensorFiles
from model.weights import read
from parallel.mesh import MeshConfig, make_mesh
from tests import quantised_files as files
from tests.goldens import ours
from tests.model.test_families import HF

LLAMA = dict(
  model_type='llama',
  architectures=['LlamaForCausalLM'],
  vocab_size=68,
  hidden_size=64,
  num_attention_heads=4,
  num_key_value_heads=2,
  intermediate_size=96,
  max_position_embeddings=64,
  num_hidden_layers=2,
  rms_norm_eps=1e-5,
  tie_word_embeddings=False,
)
MOE = HF['qwen3_moe'] | {
  'hidden_size': 64,
  'intermediate_size': 96,
  'moe_intermediate_size': 32,
  'head_dim': 16,
}
DEEPSEEK = HF['deepseek_v3'] | {
  'intermediate_size': 96,
  'hidden_size': 64,
  'moe_intermediate_size': 32,
  'q_lora_rank': 32,
  'kv_lora_rank': 32,
  'qk_nope_head_dim': 16,
  'qk_rope_head_dim': 8,
  'v_head_dim': 16,
  'head_dim': 8,
  'qk_head_dim': 24,
}
GPT_OSS = HF['gpt_oss'] | {'hidden_size': 64, 'intermediate_size': 32}
T5 = HF['t5'] | {'d_model': 64, 'd_kv': 16, 'd_ff': 96}
BERT = HF['bert'] | {'hidden_size': 64, 'intermediate_size': 96}


def shuffled(count):
  return np.random.default_rng(0).permutation(count)


def but_one(name):
  return name != 'model.layers.1.mlp.down_proj.weight'


# hf, form, what is kept, words about what is not or is otherwise.
FORMS = {
  'int4': (LLAMA, files.pack_quantized(), ['*=int4:group=32'], 'stay as they are in 7 kinds'),
  'int4 asymmetric': (
    LLAMA,
    files.pack_quantized(symmetric=False),
    ['*=int4:group=32:asymmetric'],
    'stay as they are',
  ),
  '3 bits of an output': (
    LLAMA,
    files.pack_quantized(3, 0),
    ['stack.blocks.*.feed_forward.down=int4:group=96', '*=int4:group=64'],
    'stay as they are',
  ),
  'packed bytes': (LLAMA, files.pack_quantized(8), ['*=int8:group=32'], 'stay as they are'),
  'int8': (LLAMA, files.int_quantized(), ['*=int8'], 'rounds to int8 as it runs, stay numbers'),
  'int8 of a tensor': (
    LLAMA,
    files.int_quantized('tensor', form='naive-quantized'),
    ['*=int8'],
    'stay as they are',
  ),
  'int8 asymmetric': (
    LLAMA,
    files.int_quantized(symmetric=False),
    ['*=int8:asymmetric'],
    'stay as they are',
  ),
  'fp8': (LLAMA, files.float_quantized(), ['*=fp8'], 'rounds to fp8'),
  'fp8 of a tensor': (LLAMA, files.float_quantized('tensor'), ['*=fp8:tensor'], 'rounds to fp8'),
  'fp8 in squares': (
    LLAMA,
    files.float_quantized('block', (32, 32)),
    ['*=fp8:block=32'],
    'rounds to fp8',
  ),
  'gptq': (LLAMA, files.gptq(), ['*=int4:group=32'], 'stay as they are'),
  'gptq v2': (
    LLAMA,
    files.gptq(symmetric=False, version=2),
    ['*=int4:group=32:asymmetric'],
    r'calls zero points those of gptq, and by their values .* as they are \(v2\)',
  ),
  'gptq v1 said to be v2': (
    LLAMA,
    files.gptq(8, label='gptq_v2'),
    ['*=int8:group=32'],
    r'stored less 1 \(v1\)',
  ),
  'gptq that cannot be judged': (
    LLAMA,
    files.gptq(8, symmetric=False),
    ['*=int8:group=32:asymmetric'],
    'could be of either version',
  ),
  'gptq of experts': (MOE, files.gptq(), ['*=int4:group=32'], 'stay as they are in 14 kinds'),
  'gptq of 3 bits': (
    LLAMA,
    files.gptq(3, version=2, label='gptq_v2'),
    ['*=int4:group=32'],
    'stay as they are',
  ),
  'gptq in act-order': (
    LLAMA,
    files.gptq(order=shuffled),
    [],
    r'NOTE: codes become numbers in .* and 4 more: g_idx .* \(desc_act\)',
  ),
  'gptq in an act-order that is none': (
    LLAMA,
    files.gptq(order=np.arange),
    ['*=int4:group=32'],
    'stay as they are',
  ),
  'awq': (LLAMA, files.awq(), ['*=int4:group=32:asymmetric'], 'stay as they are'),
  'nf4': (LLAMA, files.bnb4(nested=True), ['*=nf4:group=32'], 'stay as they are'),
  'nf4 of T5': (T5, files.bnb4(), ['*=nf4:group=32'], 'stay as they are'),
  'nf4 across rows': (
    LLAMA,
    files.bnb4(size=64),
    ['stack.blocks.*.feed_forward.down=keep', '*=nf4:group=64'],
    'feed_forward.down: blocks of 64 cross its rows of 96',
  ),
  'nf4 of some rows': (
    LLAMA,
    files.bnb4(size=128),
    ['stack.blocks.*.feed_forward.down=keep', '*=nf4:group=64'],
    'blocks of 128 cross its rows of 96',
  ),
  'fp4': (LLAMA, files.bnb4('fp4'), [], 'codes of a table of its own are those of no scheme'),
  'LLM.int8 of BERT': (BERT, files.int8(), ['*=int8'], 'LLM.int8 rounds to int8'),
  'fp8 of DeepSeek': (
    DEEPSEEK,
    files.fp8(16),
    ['stack.blocks.*.attention.q=fp8:block=8', '*=fp8:block=16'],
    'rounds to fp8',
  ),
  'fp8 whose squares are not whole': (
    LLAMA,
    files.fp8(64),
    [
      'stack.blocks.*.feed_forward.down=fp8:block=32',
      'stack.blocks.*.feed_forward.gate=fp8',
      'stack.blocks.*.feed_forward.up=fp8',
      '*=fp8:tensor',
    ],
    'rounds to fp8',
  ),
  'mxfp4': (
    GPT_OSS,
    files.mxfp4(),
    [f'stack.blocks.*.feed_forward.{x}=mxfp4:group=32' for x in ('down', 'gate', 'up')],
    'stay as they are',
  ),
  'a layer that is none': (
    LLAMA,
    files.awq(),
    ['stack.blocks.*.feed_forward.down=keep', '*=int4:group=32:asymmetric'],
    'down: 1 of its 2 tensors are no codes, such as model.layers.1.mlp.down_proj.weight',
  ),
}
# Of what is loaded and goes out again, not looked at only: all others are slow.
QUICK = ('int4 asymmetric',)
OUT = ('int4', 'int4 asymmetric', 'packed bytes', 'int8', 'int8 asymmetric', 'fp8')
OUT += ('fp8 of a tensor', 'fp8 in squares', 'fp8 of DeepSeek')


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """name -> a directory with codes/ and plain/, of FORMS."""

  @functools.cache
  def of(name):
    directory = tmp_path_factory.mktemp('form')
    chosen = but_one if name == 'a layer that is none' else lambda name: True
    files.build(FORMS[name][0], directory, FORMS[name][1], chosen)
    return directory

  return of


def load(directory, codes='exact', mesh=ours.MESH, **options):
  lines = []
  config, model = checkpoint.load(directory, mesh=mesh, codes=codes, log=lines.append, **options)
  return config, model, '\n'.join(lines)


def numbers(model):
  return {name: np.asarray(read(p).numbers('float32')) for name, p in by_name(model).items()}


def same(found, expected):
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(found[name], x, err_msg=name)


@pytest.mark.costly
@pytest.mark.parametrize('name', FORMS)
def test_a_file_gives_the_numbers_of_its_codes(name, built):
  """Bit for bit, in any range of rows; and what a model keeps of it is said."""
  _, _, kept, words = FORMS[name]
  opened, plain = checkpoint.opened(built(name) / 'codes'), ours.tensors(built(name) / 'plain')
  tensors = opened.tensors
  assert tensors.tensors.keys() == plain.keys() and KEY not in opened.hf
  for tensor, x in plain.items():
    assert tensors.tensors[tensor].shape == x.shape
    for start, stop in ((0, len(x)), (1, 2), (len(x) // 2 - 1, len(x))):
      np.testing.assert_array_equal(tensors.read(tensor, start, stop), x[start:stop], tensor)

  family, config = families.read(opened.hf, set(tensors.tensors))
  parts = checkpoint.parts_of(family, config)
  called = checkpoint.resolve(parts, tensors, family)
  found = fitted(config, parts, called, tensors, 'exact')
  assert [*found.stored] == kept
  assert re.search(words, '\n'.join([*tensors.notes, *found.lines]))
  assert not fitted(config, parts, called, tensors, 'none').stored


def slow_but_quick(every):
  return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in every]


@pytest.mark.slow
@pytest.mark.parametrize('name', FORMS)
def test_a_model_keeps_them(name, built):
  """Its codes stand for the same numbers, bit for bit, and so do the numbers without codes."""
  _, expected, _ = load(built(name) / 'plain')
  for codes in ('exact', 'none'):
    config, model, _ = load(built(name) / 'codes', codes)
    assert bool(config.execution.stored) == (codes == 'exact' and bool(FORMS[name][2]))
    same(numbers(model), numbers(expected))


@pytest.mark.slow
@pytest.mark.parametrize('name', slow_but_quick(OUT))
def test_codes_go_out_as_they_came(name, built, tmp_path, monkeypatch):
  """As compressed-tensors, and in again, bit for bit: in pieces, and of compressed-tensors itself
  with the same tensors, but for scales, which are f32.
  """
  config, model, _ = load(built(name) / 'codes')
  if name not in QUICK:
    monkeypatch.setattr(checkpoint, 'PIECE', 3000)
  checkpoint.save(model, config, tmp_path / 'out', form='compressed-tensors')
  again, back, _ = load(tmp_path / 'out')
  if name in QUICK:  # the numbers of a matrix of all layers: of others, test_a_model_keeps_them
    down = read(by_name(model)['stack.blocks.0.feed_forward.down']).numbers('float32')
    plain = ours.tensors(built(name) / 'plain')
    for i, x in enumerate(np.asarray(down)):
      np.testing.assert_array_equal(x, plain[f'model.layers.{i}.mlp.down_proj.weight'].T)
  assert again.execution.stored == config.execution.stored
  same(leaves(back), leaves(model))
  if FORMS[name][1][1]['quant_method'] == 'compressed-tensors':
    found, expected = everything(tmp_path / 'out'), everything(built(name) / 'codes')
    same(found, {key: x.astype(found[key].dtype) for key, x in expected.items()})


@pytest.mark.parametrize(
  'name, words',
  [
    ('nf4', r'q_proj.weight lies in nf4:group=32, of which it has no form'),
    ('mxfp4', 'experts.down_proj is no matrix of a linear layer'),
    ('fp4', 'no matrix of the run lies in codes'),
  ],
)
@pytest.mark.slow
def test_codes_without_a_form_are_named(name, words, built, tmp_path):
  config, model, _ = load(built(name) / 'codes')
  with pytest.raises(ValueError, match=words):
    checkpoint.save(model, config, tmp_path / 'out', form='compressed-tensors')
  assert not (tmp_path / 'out').exists()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['int4', 'fp8 of DeepSeek', 'mxfp4'])
def test_every_device_gets_its_codes(name, built, monkeypatch):
  _, one, _ = load(built(name) / 'codes')
  monkeypatch.setattr(checkpoint, 'PIECE', 500)  # so that pieces begin and end within shards
  _, many, _ = load(built(name) / 'codes', mesh=make_mesh(MeshConfig(data=4, fsdp=2)))
  same(leaves(many), leaves(one))
  assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(many))


def leaves(model):
  return {name: np.asarray(x) for name, x in named_leaves(model).items()}


# Bytes of the formats, by hand.


def test_codes_in_words():
  """compressed-tensors adds 8, the lowest bits first; three bits cross words."""
  codes = np.int8([-8, -7, -1, 0, 1, 2, 6, 7])
  word = coding.packed((codes + 8).astype(np.uint8)[None], 4)
  assert word.dtype == np.int32 and word.view(np.uint32).tolist() == [[0xFEA98710]]
  assert coding.unpacked(word, 4)[0].tolist() == [0, 1, 7, 8, 9, 10, 14, 15]
  # The eleventh of three bits has two in the first word, and one in the second.
  assert coding.packed(np.uint8([[0] * 10 + [7]]), 3).view(np.uint32).tolist() == [[0xC0000000, 1]]
  assert coding.unpacked(np.int32([[-(2**30), 1, 0]]), 3)[0].tolist() == [0] * 10 + [7] + [0] * 21


def read_one(tmp_path, settings, tensors, name='a.weight'):
  files.write(tmp_path, {key: np.asarray(x) for key, x in tensors.items()})
  tensors = QuantisedTensors(TensorFiles(tmp_path), settings)
  return tensors.read(name, 0, tensors.tensors[name].shape[0]).tolist()


def test_gptq_by_hand(tmp_path):
  """Eight inputs in a word of an output, [inputs / 8, outputs]; zero points of 7 are 8."""
  word = np.uint32([[0x76543210, 0xFEDCBA98]]).view(np.int32)
  tensors = {'a.qweight': word, 'a.qzeros': np.int32([[0x77]]), 'a.scales': np.float16([[1, 0.5]])}
  found = read_one(tmp_path, {'quant_method': 'gptq', 'bits': 4, 'group_size': 8}, tensors)
  assert found == [[-8, -7, -6, -5, -4, -3, -2, -1], [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]]


@pytest.mark.parametrize(
  'bits, stored',
  [
    (2, [0xFFFFFFFE - 0x55555555]),  # zero points 2, 3, 3, ..
    (4, [0x0F8100F0 - 0x11111111 + 2**32]),  # 0, 15, 0, 0, 1, 8, 15, 0
    (8, [0x00FF0100 - 0x01010101 + 2**32]),  # 0, 1, 255, 0
    (3, [0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF]),  # each by itself: 7 + 1 is 0
    # As GPTQModel stores a zero point of 4 for each: words of 4s less 0x24924924, 0x92492492, and
    # 0x49249249.
    (3, [0, 0xB6DB6DB7, 0x49249249]),
  ],
)
def test_gptq_zero_points_of_0(bits, stored, tmp_path):
  """v1 takes 1 from all zero points of a word at once: what one of 0 borrowed is given back."""
  meant = {
    2: [2] + [3] * 15,
    4: [0, 15, 0, 0, 1, 8, 15, 0],
    8: [0, 1, 255, 0],
    3: [4] * 32 if stored[0] == 0 else [0] * 32,
  }[bits]
  words = bits  # 32 inputs of an output, all of code 1
  tensors = {
    'a.qweight': np.tile(files.packed(np.ones((1, 32), int), bits).T, (1, len(meant))),
    'a.qzeros': np.uint32([stored]).view(np.int32),
    'a.scales': np.ones((1, len(meant)), np.float16),
  }
  assert tensors['a.qweight'].shape == (words, len(meant))
  settings = {'quant_method': 'gptq', 'bits': bits, 'group_size': 32}
  assert read_one(tmp_path, settings, tensors) == [[1 - zero] * 32 for zero in meant]


@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_gptq_versions_where_zero_points_reach_the_ends(bits, version, tmp_path):
  """Groups that are all above 0, or all below, say nothing about the version; the others do."""
  x = np.random.default_rng(0).normal(size=(128, 64))
  x[::8, :32], x[3::8, 32:] = np.abs(x[::8, :32]), -np.abs(x[3::8, 32:])
  label = 'gptq' if version == 2 else 'gptq_v2'
  write, settings = files.gptq(bits, symmetric=False, version=version, label=label)
  tensors, numbers = write('a', x)
  zeros = files.rounded(x, bits, 32, False)[2]
  assert zeros.min() == 0 and zeros.max() == 2**bits - 1
  if bits == 3 and version == 1:  # files of 3 bits take it from each code by itself
    tensors['a.qzeros'] = files.packed((zeros.T - 1) % 8, 3)
  if bits == 8:  # whose codes are too many for a mean of so few to be certain
    settings['checkpoint_format'] = label = 'gptq' if version == 1 else 'gptq_v2'
  found = read_one(tmp_path, settings, tensors)
  np.testing.assert_allclose(found, numbers, rtol=1e-6)


def test_gptq_of_3_bits_in_the_words_of_gptqmodel(tmp_path):
  """Zero points are those that its loader makes: it adds other numbers than ones to the words."""
  x = np.random.default_rng(0).normal(size=(64, 64))
  write, settings = files.gptq(3, symmetric=False, version=2, label='gptq')
  tensors, numbers = write('a', x)
  taken = np.uint32([0x24924924, 0x92492492, 0x49249249] * 2)
  tensors['a.qzeros'] = (tensors['a.qzeros'].view(np.uint32) - taken).view(np.int32)
  np.testing.assert_allclose(read_one(tmp_path, settings, tensors), numbers, rtol=1e-6)


def test_awq_by_hand(tmp_path):
  """Outputs 0 to 7 of an input are 0x75316420; so are zero points, less nothing."""
  word = np.int32([[0x75316420], [0x75316420]])
  scales = np.float16([[1, 1, 1, 1, 1, 1, 1, 2]])
  tensors = {'a.qweight': word, 'a.qzeros': np.int32([[0x11111111]]), 'a.scales': scales}
  found = read_one(tmp_path, {'quant_method': 'awq', 'bits': 4, 'group_size': 2}, tensors)
  assert found == [[x, x] for x in (-1, 0, 1, 2, 3, 4, 5, 12)]


def test_nf4_by_hand(tmp_path):
  """The first code of a byte is in its high bits. Bytes and maximum are those that bitsandbytes
  0.50.2 makes of [2, -2, 0, 1.125]: 15, 0, 7 and 13 (0.5626).
  """
  state = json.dumps({'quant_type': 'nf4', 'blocksize': 4, 'shape': [1, 4]}).encode()
  tensors = {
    'a.weight': np.uint8([[0xF0], [0x7D]]),
    'a.weight.absmax': np.float32([2]),
    'a.weight.quant_map': np.float32(files.NF4),
    'a.weight.quant_state.bitsandbytes__nf4': np.frombuffer(state, np.uint8),
  }
  found = read_one(tmp_path, {'quant_method': 'bitsandbytes', 'load_in_4bit': True}, tensors)
  assert found == [[2, -2, 0, 2 * np.float32(0.5626170039176941)]]


def test_mxfp4_by_hand(tmp_path):
  """The first code of a byte is in its low bits; 128 is a scale of 2."""
  blocks = np.uint8([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2).reshape(1, 1, 1, 16)
  tensors = {'a_blocks': blocks, 'a_scales': np.uint8([[[128]]])}
  found = read_one(tmp_path, {'quant_method': 'mxfp4'}, tensors, 'a')
  each = [0, 1, 2, 3, 4, 6, 8, 12]
  assert np.ravel(found).tolist() == (each + [-x for x in each]) * 2


def test_fp8_by_hand(tmp_path):
  """0x7e is 448, 0xb8 is -1; a scale for each square, the last of which is smaller."""
  codes = np.uint8([[0x7E, 0xB8, 0x38]]).view(ml_dtypes.float8_e4m3fn)
  tensors = {'a.weight': codes, 'a.weight_scale_inv': np.float32([[0.5, 3]])}
  settings = {'quant_method': 'fp8', 'weight_block_size': [2, 2]}
  assert read_one(tmp_path, settings, tensors) == [[224, -0.5, 3]]


def test_as_many_squares_of_fp8_as_outputs(tmp_path):
  """As DeepSeek-V3's o_proj, of [7168, 16384] in squares of 128; and a scale for each output of a
  file that says a block.
  """
  settings = {'quant_method': 'fp8', 'weight_block_size': [2, 2]}
  ones = np.ones((8, 4), ml_dtypes.float8_e4m3fn)
  scales = np.float32([[1, 2], [3, 4], [5, 6], [7, 8]])
  squares = {'a.weight': ones, 'a.weight_scale_inv': scales}
  expected = np.repeat(np.repeat(scales, 2, 0), 2, 1).tolist()
  assert read_one(tmp_path, settings, squares) == expected
  rows = {'a.weight': ones, 'a.weight_scale_inv': np.arange(8, dtype=np.float32)[:, None]}
  assert read_one(tmp_path, settings, rows) == [[n] * 4 for n in range(8)]


def test_zero_points_of_a_symmetric_group(tmp_path):
  """Zeros are kept by some writers, as bytes or in words; others would be lost."""
  weights = {'num_bits': 4, 'type': 'int', 'symmetric': True, 'group_size': 8}
  settings = files.compressed('pack-quantized', weights)
  matrix = {
    'a.weight_packed': files.packed(np.arange(16).reshape(2, 8), 4),
    'a.weight_scale': np.ones((2, 1), np.float32),
    'a.weight_shape': np.int64([2, 8]),
  }
  expected = [[n - 8 for n in range(8)], [*range(8)]]
  for zeros in (np.int8([[0], [0]]), files.packed(np.int32([[8, 8]]), 4)):
    found = read_one(tmp_path, settings, matrix | {'a.weight_zero_point': zeros})
    assert found == expected
  for zeros in (np.int8([[0], [3]]), files.packed(np.int32([[8, 9]]), 4)):
    with pytest.raises(ValueError, match='a.weight_zero_point has zero points that are not 0'):
      read_one(tmp_path, settings, matrix | {'a.weight_zero_point': zeros})
  order = {'a.weight_g_idx': np.int32([-1] * 8)}  # as compressed-tensors begins one
  assert read_one(tmp_path, settings, matrix | order) == expected


def going_out(config, *entries):
  """What a model of this config in codes goes out as; nothing is computed."""
  config = config.with_execution(stored=entries)
  family, made = families.family_of(config), functools.partial(transformer.init, config, 0)
  with jax.set_mesh(ours.MESH):
    model = jax.eval_shape(made)
  parts = checkpoint.parts_of(family, config)
  return outgoing(by_name(model), entries, parts, {}, 2**20)


NETWORK = ModelConfig(
  vocabulary=64, width=64, layers=2, heads=2, feed_forward=64, norm_epsilon=1e-5, max_length=32
)
# Whose first layer and second one are parameters of their own.
IN_TURN = dataclasses.replace(
  NETWORK,
  head_width=32,
  norm_offset=True,
  norm_placement='both',
  window=8,
  global_every=2,
  activation='gelu',
  embedding_scale=True,
  tie_embeddings=True,
  attention_softcap=50.0,
  logit_softcap=30.0,
)


@pytest.mark.parametrize(
  'entries, targets',
  [
    (
      ['stack.blocks.0.*=int8', '*.attention.*=int4:group=32', '*.down=keep', '*=fp8'],
      {r're:^model\.layers\.1\.self_attn\.q_proj$': None, 'model.layers.0.mlp.up_proj': 8},
    ),
    (
      ['stack.blocks.0.*=int4:group=32', '*=int4:group=32:asymmetric'],
      {'model.layers.0.mlp.up_proj': 4, 'model.layers.1.mlp.up_proj': 4},
    ),
    (
      ['*.attention.*=int8', '*=int4:group=32'],
      {r're:^model\.layers\.\d+\.mlp\.up_proj$': 4, 'model.layers.0.mlp.up_proj': None},
    ),
  ],
)
def test_a_target_is_of_one_scheme(entries, targets):
  """A module has one group's targets, and one that is none of them has none."""
  made = going_out(IN_TURN, *entries)
  groups = made.settings['config_groups'].values()
  named = {target: group['weights']['num_bits'] for group in groups for target in group['targets']}
  for target, bits in targets.items():
    assert named.get(target) == bits
  matched = set()
  for layer in (0, 1):
    for module in ('self_attn.q_proj', 'mlp.gate_proj', 'mlp.up_proj', 'mlp.down_proj'):
      module = f'model.layers.{layer}.{module}'
      those = [
        target
        for target in named
        if target == module or (target[:3] == 're:' and re.match(target[3:], module))
      ]
      assert len(those) == (module not in made.settings['ignore']), (module, those)
      matched.update(those)
  assert len(matched) >= 3


@pytest.mark.parametrize('scheme', ['2:4', '2:4+int8', 'int4:group=32:double', 'nf4:group=32'])
def test_schemes_without_a_form_are_said(scheme):
  with pytest.raises(ValueError, match=rf'lies in {re.escape(scheme)}, of which it has no form'):
    going_out(NETWORK, f'*={scheme}')


@pytest.mark.parametrize('scheme, kind', [('int8', 'int'), ('fp8', 'float')])
def test_activations_go_out_as_tokens_that_are_rounded(scheme, kind):
  made, plain = (going_out(NETWORK, f'*={scheme}{more}') for more in (':activations', ''))
  (group,), (other,) = (x.settings['config_groups'].values() for x in (made, plain))
  rounded = {'num_bits': 8, 'type': kind, 'symmetric': True, 'strategy': 'token', 'dynamic': True}
  assert group.pop('input_activations') == rounded and other.pop('input_activations') is None
  assert group == other and {*made.tensors} == {*plain.tensors}


# What does not fit together.


AT = 'model.layers.0.mlp.up_proj'
GONE = object()
DAMAGED = {
  'scales are gone': (
    'int4',
    f'{AT}.weight_scale',
    GONE,
    f'{AT}.weight_packed .* has no {AT}.weight_scale',
  ),
  'a shape is gone': ('int4', f'{AT}.weight_shape', GONE, f'has no {AT}.weight_shape'),
  'zero points are gone': (
    'int4 asymmetric',
    f'{AT}.weight_zero_point',
    GONE,
    f'has no {AT}.weight_zero_point',
  ),
  'scales of another shape': (
    'int4',
    f'{AT}.weight_scale',
    lambda x: x[:, :1],
    r'up_proj.weight_scale is \[96, 1\], .* makes it \[96, 2\]',
  ),
  'codes of another shape': (
    'int4',
    f'{AT}.weight_packed',
    lambda x: x[:, :-1],
    r'weight_packed is \[96, 7\], .*weight_shape=\[96, 64\] in 4 bits',
  ),
  'codes of another kind': (
    'int8',
    f'{AT}.weight',
    lambda x: x.astype(np.float32),
    f'{AT}.weight is F32, and should be I8',
  ),
  'a matrix that config.json has not': (
    'int8',
    f'{AT}.weight',
    lambda x: x[:, :-1],
    f'mis-shaped: {AT}.weight',
  ),
  'gptq without scales': ('gptq', f'{AT}.scales', GONE, f'{AT}.qweight .* has no {AT}.scales'),
  'gptq with other scales': ('gptq', f'{AT}.scales', lambda x: x[:, :-1], f'{AT}.scales is'),
  'gptq without zero points': ('gptq', f'{AT}.qzeros', GONE, f'has no {AT}.qzeros'),
  'gptq with groups that are none': (
    'gptq in act-order',
    f'{AT}.g_idx',
    lambda x: x + 2,
    f'{AT}.g_idx has groups 2 to 3',
  ),
  'gptq of other bits': (
    'gptq',
    f'{AT}.g_idx',
    lambda x: x[:-1],
    f'{AT}.qweight is .* no codes of the 63 inputs',
  ),
  'gptq with an index that is a number': (
    'gptq',
    f'{AT}.g_idx',
    lambda x: x[0],
    f'{AT}.qweight is .* no codes of the 0 inputs',
  ),
  'awq without scales': ('awq', f'{AT}.scales', GONE, f'{AT}.qweight .* has no {AT}.scales'),
  'awq with other zero points': ('awq', f'{AT}.qzeros', lambda x: x[:1], f'{AT}.qzeros is'),
  'nf4 without maxima': (
    'nf4',
    f'{AT}.weight.absmax',
    GONE,
    f'{AT}.weight .* has no {AT}.weight.absmax',
  ),
  'nf4 without its table': ('nf4', f'{AT}.weight.quant_map', GONE, 'has no .*quant_map'),
  'nf4 with a state that is none': (
    'nf4',
    f'{AT}.weight.quant_state.bitsandbytes__nf4',
    lambda x: x[:-9],
    'does not tell shape and blocksize',
  ),
  'nf4 cut short': ('nf4', f'{AT}.weight', lambda x: x[:-1], f'{AT}.weight is'),
  'fp8 without scales': (
    'fp8 of DeepSeek',
    'model.layers.0.self_attn.o_proj.weight_scale_inv',
    GONE,
    'o_proj.weight lies in codes, and has no',
  ),
  'mxfp4 without scales': (
    'mxfp4',
    'model.layers.0.mlp.experts.down_proj_scales',
    GONE,
    'down_proj_blocks .* has no .*down_proj_scales',
  ),
  'mxfp4 in other blocks': (
    'mxfp4',
    'model.layers.0.mlp.experts.down_proj_blocks',
    lambda x: x[..., :8],
    r'should be \[experts, outputs, inputs / 32, 16\]',
  ),
}


@pytest.mark.parametrize('name', DAMAGED)
def test_what_is_damaged_is_named(name, built, tmp_path):
  form, tensor, how, words = DAMAGED[name]
  tensors = everything(built(form) / 'codes')
  x = tensors.pop(tensor)
  if how is not GONE:
    tensors[tensor] = how(x)
  write(tmp_path, built(form), tensors)
  with pytest.raises(ValueError, match=words):
    load(tmp_path, mesh=ours.MESH)


SETTINGS = {
  'method': ('int4', {'quant_method': 'gtpq'}, "'gtpq' is unknown; did you mean 'gptq'"),
  'no object': ('int4', 4, 'must be an object'),
  'bits': ('gptq', {'bits': 5}, 'bits=5, which is not read; these are: 2, 3, 4, 8'),
  'marlin': ('gptq', {'checkpoint_format': 'marlin'}, "checkpoint_format='marlin'"),
  'gemv': ('awq', {'version': 'gemv'}, "version='gemv'"),
  'groups': ('awq', {'group_size': 48}, 'has 64 inputs, which groups of 48'),
  'format': ('int4', {'format': 'marlin-24'}, "format='marlin-24'"),
  'no groups': ('int4', {'config_groups': {}}, 'has no config_groups'),
  'no target': (
    'int4',
    {'config_groups': {'a': {'targets': ['re:.*down']}}},
    'has a target that is',
  ),
  'sparse': (
    'int4',
    {'sparsity_config': {'format': 'sparse-24-bitmask'}},
    'sparsity_config.format',
  ),
  'rotated': ('int4', {'transform_config': {'config_groups': {'u': 1}}}, 'transform_config'),
  'e5m2': ('fp8 of DeepSeek', {'fmt': 'e5m2'}, "fmt='e5m2'"),
  'squares': ('fp8 of DeepSeek', {'weight_block_size': 16}, 'must be two sizes'),
}


@pytest.mark.parametrize('name', SETTINGS)
def test_settings_that_are_not_read_are_named(name, built, tmp_path):
  form, settings, words = SETTINGS[name]
  path = built(form) / 'codes'
  hf = json.loads((path / 'config.json').read_text())
  hf[KEY] = hf[KEY] | settings if isinstance(settings, dict) else settings
  with pytest.raises((ValueError, NotImplementedError), match=words):
    QuantisedTensors(TensorFiles(path), hf[KEY])


def everything(directory):
  found = TensorFiles(directory)
  return {
    name: found.read(name, 0, tensor.shape[0]).reshape(tensor.shape)
    for name, tensor in found.tensors.items()
  }


def write(directory, source, tensors):
  shutil.copy(source / 'codes' / 'config.json', directory)
  files.write(directory, tensors)


def test_numbers_that_are_said_to_be_codes(built, tmp_path):
  write(tmp_path, built('gptq'), ours.tensors(built('gptq') / 'plain'))
  with pytest.raises(ValueError, match='quantised by gptq, and no tensor in the files is'):
    load(tmp_path)


@pytest.mark.slow
def test_memory_is_that_of_a_packed_matrix_and_a_piece(tmp_path, monkeypatch):
  """Of AWQ, whose matrices are read packed as a whole, and unpacked piece by piece."""
  rng, (D, F) = np.random.default_rng(0), (256, 2048)
  hf = LLAMA | {'hidden_size': D, 'intermediate_size': F, 'num_hidden_layers': 1}
  family, config = families.read(hf)
  tensors = {}
  for name, parts in checkpoint.parts_of(family, config).items():
    shape, module = parts[0].layout.shape, name.removesuffix('.weight')
    if not files.is_linear(name) or len(shape) == 1:
      tensors[name] = np.zeros(shape, np.float32)
      continue
    words = rng.integers(-(2**31), 2**31, (shape[1], shape[0] // 8)).astype(np.int32)
    scales = np.ones((shape[1] // 64, shape[0]), np.float16)
    tensors |= {f'{module}.qweight': words, f'{module}.scales': scales}
    tensors[f'{module}.qzeros'] = words[: len(scales)]
  settings = {'quant_method': 'awq', 'bits': 4, 'group_size': 64}
  (tmp_path / 'config.json').write_text(json.dumps(hf | {KEY: settings}))
  files.write(tmp_path, tensors)
  del tensors, words, scales

  piece, packed, whole, peaks = 2**13, D * F // 2, 4 * D * F, []
  fill = checkpoint._fill

  def measured(*arguments):
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    fill(*arguments)
    peaks.append(tracemalloc.get_traced_memory()[1] - before)

  monkeypatch.setattr(checkpoint, 'PIECE', piece)
  monkeypatch.setattr(checkpoint, '_fill', measured)
  for codes in ('none', 'exact'):
    load(tmp_path, codes)  # programs stay in memory
    peaks.clear()
    tracemalloc.start()
    load(tmp_path, codes)
    tracemalloc.stop()
    assert packed < max(peaks) < packed + 48 * piece < whole / 2, (codes, max(peaks))
