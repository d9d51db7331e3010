"""Is a checkpoint in codes the model of the numbers that they stand for, kept as codes or not, and
is one that is damaged named?
"""

import numpy as np
import pytest

from model import checkpoint, filled
from model.weights import read
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


# hf, form, what is kept, words about what is not.
FORMS = {
  'compressed-tensors int4': (LLAMA, files.pack_quantized(), ('*=int4:group=32',), ''),
  'asymmetric': (
    LLAMA,
    files.pack_quantized(symmetric=False),
    ('*=int4:group=32:asymmetric',),
    '',
  ),
  '3 bits of an output': (
    LLAMA,
    files.pack_quantized(3, 0),
    ('stack.blocks.*.feed_forward.down=int4:group=96', '*=int4:group=64'),
    '',
  ),
  'packed bytes': (LLAMA, files.pack_quantized(8), ('*=int8:group=32',), ''),
  'int8': (LLAMA, files.int_quantized(), ('*=int8',), 'stay numbers: results are'),
  'int8 of a tensor': (
    LLAMA,
    files.int_quantized('tensor', form='naive-quantized'),
    ('*=int8',),
    '',
  ),
  'int8 asymmetric': (LLAMA, files.int_quantized(symmetric=False), ('*=int8:asymmetric',), ''),
  'fp8': (LLAMA, files.float_quantized(), ('*=fp8',), 'rounds to fp8'),
  'fp8 of a tensor': (LLAMA, files.float_quantized('tensor'), ('*=fp8:tensor',), ''),
  'fp8 in squares': (LLAMA, files.float_quantized('block', (32, 32)), ('*=fp8:block=32',), ''),
  'gptq': (LLAMA, files.gptq(), ('*=int4:group=32',), ''),
  'gptq, experts': (
    MOE,
    files.gptq(symmetric=False, version=2),
    ('*=int4:group=32:asymmetric',),
    '',
  ),
  'gptq of 3 bits': (LLAMA, files.gptq(3, version=2, label='gptq_v2'), ('*=int4:group=32',), ''),
  'gptq, act-order': (LLAMA, files.gptq(order=shuffled), (), r'g_idx .* \(desc_act\)'),
  'awq': (LLAMA, files.awq(), ('*=int4:group=32:asymmetric',), ''),
  'nf4': (LLAMA, files.bnb4(), ('*=nf4:group=32',), ''),
  'nf4 of T5': (T5, files.bnb4(nested=True), ('*=nf4:group=32',), ''),
  'nf4 across rows': (
    LLAMA,
    files.bnb4(size=64),
    ('stack.blocks.*.feed_forward.down=keep', '*=nf4:group=64'),
    'blocks of 64 cross its rows of 96',
  ),
  'fp4': (LLAMA, files.bnb4('fp4'), (), 'codes of a table of its own'),
  'LLM.int8 of BERT': (BERT, files.int8(), ('*=int8',), 'stay numbers'),
  'fp8 of DeepSeek': (DEEPSEEK, files.fp8(16), None, ''),
  'mxfp4': (GPT_OSS, files.mxfp4(), None, ''),
}


def weights(model):
  """Numbers of a model's parameters, by name."""
  return {name: np.asarray(read(p).numbers('float32')) for name, p in filled.params(model).items()}


def same(model, other):
  expected, found = weights(other), weights(model)
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(found[name], x, err_msg=name)


def load(directory, codes='exact', mesh=ours.MESH, **options):
  lines = []
  config, model = checkpoint.load(directory, mesh=mesh, codes=codes, log=lines.append, **options)
  return config, model, '\n'.join(lines)


@pytest.mark.parametrize('name', FORMS)
def test_codes_stand_for_the_same_numbers(name, tmp_path):
  hf, form, kept, words = FORMS[name]
  files.build(hf, tmp_path, form)
  _, plain = checkpoint.load(tmp_path / 'plain', mesh=ours.MESH)
  config, model, lines = load(tmp_path / 'codes')
  print(config.execution.stored, lines)
  if kept is not None:
    assert config.execution.stored == kept
  same(model, plain)
  config, numbers, _ = load(tmp_path / 'codes', 'none')
  assert not config.execution.stored
  same(numbers, plain)
