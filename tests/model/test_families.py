"""Are the families read and written as transformers does? Its models' results, kept in files;
laws of config.json.

The files are written by tests/goldens/make.py;
tests/oracle/test_transformers.py compares with the models themselves.
"""

import dataclasses
import importlib.util
import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from model import checkpoint, families, params, transformer
from model.config import LatentConfig, ModelConfig, MoEConfig, RopeConfig
from model.execution import ExecutionConfig
from model.families import common
from model.families.layout import Layout, Source
from tests.goldens import ours, tiny

ROOT = pathlib.Path(__file__).parents[2]
GOLDENS = ROOT / 'tests' / 'goldens'
CASES = sorted(tiny.CASES)
# Those that differ most from each other; CI has the others among its slow tests.
QUICK = ('bert', 'gemma2', 'gpt2', 'llama', 'mixtral', 'qwen3', 't5')
HF = {name: json.loads(str(np.load(GOLDENS / f'{name}.npz')['config'])) for name in CASES}
GREEDY = (
  'gpt2',
  'gemma3',
  'gpt_oss',
  'deepseek_v2',
  't5_v1_1',
)  # a case of each kind of cache; tests/oracle compares all
PARAMETERS = {
  'llama3_8b': 8_030_261_248,
  'llama3_70b': 70_553_706_496,
  'qwen3_8b': 8_190_735_360,
  'gemma3_27b': 27_009_346_304,
  'mixtral_8x7b': 46_702_792_704,
  'qwen3_30b_a3b': 30_532_122_624,
  'deepseek_v3': 671_026_419_200,
  'flan_t5_xl': 2_849_757_184,
  'gpt2': 124_439_808,
}


def tensors_of(name: str) -> set[str]:
  """For T5, whose config.json does not tell: whether there is a head of its own."""
  return {'lm_head.weight'} if name == 't5_v1_1' else {'shared.weight'}


def read(name: str, **changes):
  return families.read(HF[name] | changes, tensors_of(name))


# What the models compute.


@pytest.mark.costly
@pytest.mark.parametrize(
  'name',
  [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in CASES],
)
def test_it_computes_what_transformers_computed(name, tmp_path):
  golden = np.load(GOLDENS / f'{name}.npz')
  hf = HF[name] | ({'tie_word_embeddings': False} if name == 't5_v1_1' else {})
  ours.build(hf, tmp_path / 'model')
  config, model = checkpoint.load(tmp_path / 'model', mesh=ours.MESH)
  if name in GREEDY:
    for row, expected in enumerate(golden['greedy']):
      np.testing.assert_array_equal(ours.generate(model, name, row, len(expected)), expected)

  total, (scores, pooled), gradients = ours.loss_and_gradients(model, name)
  for actual, expected in ((scores, golden['scores']), (pooled, golden['pooled'])):
    if expected.size:
      np.testing.assert_allclose(
        actual, expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max())
      )
  # A sum over logits of up to a hundred: other processors add in other orders.
  np.testing.assert_allclose(total, golden['loss'], rtol=3e-5)
  checkpoint.save(gradients, config, tmp_path / 'gradients')
  saved = ours.tensors(tmp_path / 'gradients')
  assert sorted(saved) == list(golden['names'])
  norms, products = (dict(zip(golden['names'], golden[what])) for what in ('norms', 'products'))

  # A difference of d in every direction shows as about d in one of them.
  def distance(name):
    return max(
      abs(np.linalg.norm(saved[name]) - norms[name]),
      abs(np.sum(saved[name] * tiny.direction(name, saved[name].shape)) - products[name]) / 3,
    )

  assert not ours.compare_gradients(saved, norms, distance, saved)


# Names and shapes.


@pytest.mark.parametrize('name', CASES)
def test_every_parameter_has_one_place(name):
  family, config = read(name)
  leaves = params.named_leaves(jax.eval_shape(lambda: transformer.init(config, 0)))
  parts = checkpoint.parts_of(family, config)
  assert {part.leaf for shares in parts.values() for part in shares} == leaves.keys()
  filled = {leaf: np.zeros(x.shape, np.int8) for leaf, x in leaves.items()}
  for shares in parts.values():
    entries = 0
    for part in shares:
      assert part.layout.shape == shares[0].layout.shape
      for start, stop in part.layout.chunks(100):
        at = tuple(slice(low, high) for low, high in part.region(start, stop))
        filled[part.leaf][at] += 1
        entries += filled[part.leaf][at].size
    assert entries == np.prod(shares[0].layout.shape)
  assert all((x == 1).all() for x in filled.values())


LENGTHS = dict(a=3, b=4, c=2, d=5)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=50)
def test_what_is_brought_here_and_sent_back_is_the_same(data):
  names = data.draw(st.permutations(list(LENGTHS)))[: data.draw(st.integers(1, 4))]
  cuts = sorted(data.draw(st.sets(st.integers(1, len(names)), max_size=len(names)))) + [len(names)]
  groups, start = [], 0
  for cut in cuts:
    groups += ['(' + ' '.join(names[start:cut]) + ')'] if cut > start else []
    start = cut
  taken = data.draw(st.sampled_from([None, *names]))
  order = data.draw(st.permutations(range(LENGTHS[taken]))) if taken else ()
  half = len(order) // 2
  here = data.draw(st.permutations(names))
  layouts = [
    Layout.of(
      Source(
        'x', f'{" ".join(groups)} -> {" ".join(here)}', (taken, tuple(part)) if taken else None
      ),
      LENGTHS,
    )
    for part in ((order[:half], order[half:]) if taken else ((),))
    if part or not taken
  ]
  theirs = np.random.default_rng(0).integers(0, 1000, layouts[0].shape)
  back = np.full_like(theirs, -1)
  for layout in layouts:
    for start, stop in layout.chunks(data.draw(st.integers(1, 200))):
      low, high = layout.rows(start, stop)
      brought = layout.bring(theirs[low:high])
      assert brought.shape == tuple(b - a for a, b in layout.region(start, stop))
      layout.send(brought, back[low:high])
  np.testing.assert_array_equal(back, theirs)


def test_layout_by_hand():
  layout = Layout.of(Source('x', '(N H) D -> D N H'), dict(N=2, H=3, D=4))
  x = np.arange(24).reshape(6, 4)
  assert layout.shape == (6, 4)
  assert layout.bring(x)[1, 1, 2] == x[1 * 3 + 2, 1]
  third = Layout.of(Source('x', 'D (3 N H) -> D N H', ('3', 1)), {'N': 2, 'H': 3, 'D': 4, '3': 3})
  x = np.arange(72).reshape(4, 18)
  np.testing.assert_array_equal(third.bring(x), x[:, 6:12].reshape(4, 2, 3))
  with pytest.raises(ValueError, match='different dimensions'):
    Layout.of(Source('x', 'D F -> D'), dict(D=1, F=1))


@pytest.mark.parametrize('name', PARAMETERS)
def test_architectures_have_their_published_number_of_parameters(name):
  path = ROOT / 'configs' / 'models' / f'{name}.py'
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config().model
  assert (
    sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: transformer.init(config, 0))))
    == PARAMETERS[name]
  )
  assert f'{PARAMETERS[name]:,}' in module.__doc__
  families.family_of(config)


def test_all_architectures_are_counted():
  assert {path.stem for path in (ROOT / 'configs' / 'models').glob('*.py')} == PARAMETERS.keys()


# config.json.


@pytest.mark.parametrize('name', CASES)
def test_config_json_reads_back(name):
  family, config = read(name)
  assert families.problems(config, family) == []
  assert families.family_of(config) is family
  training = dataclasses.replace(
    config.with_execution(dtype='bfloat16', remat='full', parameter_dtype='bfloat16'),
    init_scale=0.5,
  )
  assert families.family_of(training) is family


ROPES = st.one_of(
  st.fixed_dictionaries(
    {'rope_type': st.just('default'), 'rope_theta': st.sampled_from([1e4, 5e5])}
  ),
  st.fixed_dictionaries(
    {
      'rope_type': st.just('linear'),
      'rope_theta': st.just(1e4),
      'factor': st.sampled_from([2.0, 8]),
    }
  ),
  st.fixed_dictionaries(
    {
      'rope_type': st.just('llama3'),
      'factor': st.just(8.0),
      'low_freq_factor': st.just(1.0),
      'rope_theta': st.just(5e5),
      'high_freq_factor': st.sampled_from([4, 5.0]),
    },
    optional={'original_max_position_embeddings': st.just(16)},
  ),
  st.fixed_dictionaries(
    {'rope_type': st.just('yarn'), 'factor': st.sampled_from([4.0, 40])},
    optional={
      'rope_theta': st.just(1e4),
      'original_max_position_embeddings': st.just(16),
      'attention_factor': st.sampled_from([1.0, 1.3]),
      'truncate': st.booleans(),
      'mscale': st.sampled_from([0.707, 1]),
      'mscale_all_dim': st.sampled_from([0.707, 1.0]),
      'beta_fast': st.just(31),
      'beta_slow': st.just(2.0),
    },
  ),
)
CHANGES = {  # key -> values that a family takes; other families' configs are left alone
  'tie_word_embeddings': (
    st.booleans(),
    'llama mistral qwen2 qwen3 gemma2 gemma3 gpt2 gpt_oss mixtral qwen3_moe deepseek_v3 t5',
  ),
  'rope_parameters': (
    ROPES,
    'llama mistral qwen2 qwen3 gemma2 gpt_oss mixtral qwen3_moe deepseek_v2 deepseek_v3',
  ),
  'num_hidden_layers': (st.integers(2, 9), 'llama mistral mixtral deepseek_v3 bert'),
  'sliding_window': (
    st.one_of(st.none(), st.integers(1, 9)),
    'mistral mixtral gemma2 gemma3 gpt_oss',
  ),
  'hidden_act': (
    st.sampled_from(['silu', 'gelu', 'gelu_pytorch_tanh', 'gelu_new', 'relu', 'swish']),
    'llama qwen3 bert mixtral',
  ),
  'norm_topk_prob': (st.booleans(), 'qwen3_moe deepseek_v3'),
  'mlp_only_layers': (st.sampled_from([[], [1], [0, 1], None]), 'qwen3_moe'),
  'q_lora_rank': (st.sampled_from([None, 12]), 'deepseek_v2 deepseek_v3'),
  'routed_scaling_factor': (st.sampled_from([1, 2.5]), 'deepseek_v2 deepseek_v3'),
  'topk_method': (st.sampled_from(['greedy', 'group_limited_greedy']), 'deepseek_v2'),
  'attn_logit_softcapping': (st.sampled_from([None, 50]), 'gemma2'),
  'query_pre_attn_scalar': (st.integers(1, 300), 'gemma2 gemma3'),
  'relative_attention_max_distance': (st.integers(20, 200), 't5'),
}


@hypothesis.given(st.sampled_from(CASES), st.data())
@hypothesis.settings(max_examples=200)
def test_every_config_that_can_be_read_reads_back(name, data):
  changes = {
    key: data.draw(values, label=key)
    for key, (values, among) in CHANGES.items()
    if name in among.split() and data.draw(st.booleans())
  }
  family, config = families.read(HF[name] | changes)
  assert families.problems(config, family) == []


@pytest.mark.parametrize(
  'name, changes, named',
  [
    ('llama', {'rope_parameters': {'rope_type': 'dynamic', 'factor': 2.0}}, "rope_type='dynamic'"),
    (
      'llama',
      {'rope_parameters': None, 'rope_scaling': {'type': 'longrope', 'factor': 2.0}},
      "rope_type='longrope'",
    ),
    (
      'llama',
      {'rope_parameters': {'rope_type': 'default', 'partial_rotary_factor': 0.5}},
      'partial_rotary_factor=0.5',
    ),
    ('llama', {'rope_parameters': {'rope_type': 'linear', 'factor': 2.0, 'warp': 1}}, "'warp'"),
    ('llama', {'rope_parameters': {'rope_type': 'linear'}}, "'factor'"),
    ('llama', {'hidden_act': 'mish'}, "'mish'"),
    ('llama', {'attention_bias': True}, 'attention_bias=True'),
    ('llama', {'quantization_config': {'quant_method': 'fp8'}}, 'quantization_config'),
    ('llama', {'sliding_windows': 4}, "sliding_windows=4.*--ignore_key=sliding_windows"),
    ('mistral', {'sliding_windw': 4}, "did you mean 'sliding_window'"),
    ('qwen3', {'attention_bias': True}, 'attention_bias=True'),
    (
      'qwen2',
      {
        'use_sliding_window': True,
        'sliding_window': 4,
        'max_window_layers': 1,
        'layer_types': None,
      },
      'layer_types=',
    ),
    ('gemma2', {'use_bidirectional_attention': True}, 'use_bidirectional_attention=True'),
    ('gemma3', {'layer_types': ['full_attention'] * 2 + ['sliding_attention'] * 6}, 'layer_types='),
    ('gemma3', {'layer_types': ['chunked_attention'] * 8}, 'layer_types='),
    (
      'gemma3',
      {'rope_parameters': {'sliding_attention': {'rope_type': 'linear', 'factor': 2.0}}},
      'sliding_attention',
    ),
    ('gpt_oss', {'swiglu_limit': 5.0}, 'swiglu_limit=5.0'),
    ('gpt_oss', {'attention_bias': False}, 'attention_bias=False'),
    (
      'qwen3_moe',
      {'mlp_only_layers': [3], 'decoder_sparse_step': 1, 'num_hidden_layers': 6},
      'mlp_only_layers=.*3',
    ),
    ('deepseek_v3', {'scoring_func': 'softmax'}, "scoring_func='softmax'"),
    ('deepseek_v3', {'rms_norm_eps': 1e-5}, 'rms_norm_eps=1e-05'),
    ('deepseek_v3', {'rope_interleave': False}, 'rope_interleave=False'),
    ('deepseek_v2', {'topk_method': 'noaux_tc'}, "topk_method='noaux_tc'"),
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx=True'),
    ('gpt2', {'add_cross_attention': True}, 'add_cross_attention=True'),
    ('t5', {'feed_forward_proj': 'mish', 'dense_act_fn': 'mish'}, "'mish'"),
    ('t5', {'dense_act_fn': 'silu'}, "dense_act_fn='silu'"),
    ('bert', {'position_embedding_type': 'relative_key'}, "position_embedding_type='relative_key'"),
    ('bert', {'architectures': ['BertForQuestionAnswering']}, 'BertForQuestionAnswering'),
    ('bert', {'is_decoder': True}, 'is_decoder=True'),
    ('llama', {'model_type': 'llama4'}, "did you mean 'llama'"),
  ],
)
def test_what_is_not_supported_is_named(name, changes, named):
  with pytest.raises((ValueError, NotImplementedError), match=named):
    families.read(HF[name] | changes)


@pytest.mark.parametrize('name', CASES)
def test_no_key_is_ignored(name):
  with pytest.raises(ValueError, match='brand_new_key=1'):
    read(name, brand_new_key=1)
  family, config = families.read(
    HF[name] | {'brand_new_key': 1}, tensors_of(name), ignore=('brand_new_key',)
  )
  assert config == read(name)[1]


def test_a_missing_size_is_named():
  with pytest.raises(ValueError, match="no 'hidden_size'"):
    families.read({key: value for key, value in HF['llama'].items() if key != 'hidden_size'})


def test_old_and_new_spellings_of_rotary_positions_are_the_same():
  written = HF['llama'] | {
    'rope_parameters': {
      'rope_type': 'yarn',
      'rope_theta': 5e5,
      'factor': 4.0,
      'original_max_position_embeddings': 16,
    }
  }
  old = {key: value for key, value in HF['llama'].items() if key != 'rope_parameters'} | {
    'rope_theta': 500_000,
    'rope_scaling': {'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 16},
  }
  assert families.read(written) == families.read(old)
  written, old = (
    HF['gemma3'],
    {
      key: value
      for key, value in HF['gemma3'].items()
      if key not in ('rope_parameters', 'layer_types')
    }
    | {
      'rope_theta': 1_000_000,
      'rope_local_base_freq': 10_000,
      'rope_scaling': {'rope_type': 'linear', 'factor': 8.0},
    },
  )
  assert families.read(written) == families.read(old)


@pytest.mark.parametrize('name', ['llama', 'gemma3', 'deepseek_v3', 'gpt_oss'])
def test_two_names_of_one_thing_say_the_same(name):
  """transformers takes rope_scaling, where there is one, and drops what stands in the new key."""
  stretched = {'rope_type': 'linear', 'factor': 8.0}
  both = HF[name] | {'rope_parameters': stretched}
  assert families.read(both | {'rope_scaling': {'type': 'linear', 'factor': 8.0}})
  assert families.read(both | {'rope_scaling': None}) == families.read(both)
  other = both | {'rope_scaling': {'type': 'yarn', 'factor': 4.0}}
  with pytest.raises(ValueError, match='rope_parameters=.*and rope_scaling=.*--ignore_key=rope_s'):
    families.read(other)
  assert families.read(other, ignore=('rope_scaling',)) == families.read(both)


def test_rotary_parameters_that_are_null_are_none():
  """Then transformers stretches gpt-oss's by YaRN, as where there is no key."""
  without = {key: value for key, value in HF['gpt_oss'].items() if key != 'rope_parameters'}
  config = families.read(without)[1]
  assert config.rope.scaling == 'yarn' and config.rope.factor == 32 and config.rope.base == 150_000
  for null in ({'rope_parameters': None}, {'rope_scaling': None}):
    assert families.read(without | null)[1] == config


def test_two_numbers_of_experts_are_no_number():
  with pytest.raises(ValueError, match='num_local_experts=8 and num_experts=9'):
    families.read(HF['mixtral'] | {'num_local_experts': 8, 'num_experts': 9})


def test_a_text_model_with_a_vision_tower_is_read_as_the_text_model():
  text = {
    'model_type': 'gemma3_text',
    'hidden_size': 2560,
    'intermediate_size': 10_240,
    'num_hidden_layers': 34,
    'sliding_window': 1024,
    'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
  }
  whole = {
    'model_type': 'gemma3',
    'text_config': text,
    'vision_config': {},
    'mm_tokens_per_image': 256,
    'boi_token_index': 255_999,
    'eoi_token_index': 256_000,
    'image_token_index': 262_144,
    'tie_word_embeddings': True,
  }
  _, config = families.read(whole)
  assert (config.V, config.D, config.H, config.window, config.global_every) == (
    262_208,
    2560,
    256,
    1024,
    6,
  )
  assert config.rope == RopeConfig(base=1e6, local_base=1e4, scaling='linear', factor=8.0)
  # A key is looked at, and can be left out, wherever it stands.
  for odd in (whole | {'new': 1}, whole | {'text_config': text | {'new': 1}}):
    with pytest.raises(ValueError, match='new=1.*--ignore_key=new'):
      families.read(odd)
    assert families.read(odd, ignore=('new',))[1] == config
  with pytest.raises(NotImplementedError, match='quantization_config='):
    families.read(whole | {'quantization_config': {'bits': 4}})


@pytest.mark.parametrize(
  'config, named',
  [
    (ModelConfig(vocabulary=8, max_length=8, norm='layer'), "norm='layer'"),
    (ModelConfig(vocabulary=8, max_length=8, activation='relu2', gated=False), 'gated=False'),
    (ModelConfig(vocabulary=8, max_length=8, sinks=True), 'sinks=True'),
    (ModelConfig(vocabulary=8, max_length=8, logit_scale=0.5), 'logit_scale=0.5'),
    (
      ModelConfig(
        vocabulary=8, max_length=8, moe=MoEConfig(experts=4, z_loss=0.1, shared_feed_forward=8)
      ),
      'shared_feed_forward=8',
    ),
    (ModelConfig(vocabulary=8), 'max_length=0'),
  ],
)
def test_what_no_family_expresses_is_named(config, named):
  with pytest.raises(ValueError, match=named):
    families.family_of(
      config, 'llama' if 'experts' not in named and 'shared' not in named else 'mixtral'
    )
  with pytest.raises(ValueError, match='the nearest, cannot express'):
    families.family_of(config)


@pytest.mark.parametrize(
  'name, keys',
  [
    ('llama', {'is_llama_config': True, 'rope_interleaved': False, 'is_encoder_decoder': False}),
    ('qwen2', {'use_mrope': False}),
    ('gemma2', {'sliding_window_size': 4096}),
    ('gpt2', {'n_special': 0, 'predict_special_tokens': True}),
  ],
)
def test_keys_of_published_configs_that_say_nothing_are_no_errors(name, keys):
  assert families.read(HF[name] | keys) == families.read(HF[name])
  off = {key for key, value in keys.items() if value is False}
  for key in off:
    with pytest.raises(NotImplementedError, match=f'{key}=True'):
      families.read(HF[name] | {key: True})


def test_only_what_would_help_is_suggested():
  """A key that is not looked at, or is another word, is no help."""
  for key in ('embedding_size', 'use_caches'):
    with pytest.raises(ValueError, match='nothing is known of') as error:
      families.read(HF['llama'] | {key: 1})
    assert 'did you mean' not in str(error.value)


def test_the_family_can_be_chosen():
  config = ModelConfig(vocabulary=8, max_length=8)
  assert [families.family_of(config, name).TYPES[0] for name in ('', 'mistral')] == [
    'llama',
    'mistral',
  ]
  with pytest.raises(ValueError, match='did you mean'):
    families.family_of(config, 'mistrall')


def test_canonical_configs_differ_where_the_model_does():
  config = ModelConfig(vocabulary=8, max_length=8, window=4, global_every=2)
  same = [
    dict(kv_heads=4),
    dict(head_width=64),
    dict(execution=ExecutionConfig(dtype='bfloat16')),
    dict(attention_scale=64**-0.5),
    dict(relative_buckets=64),
  ]
  other = [
    dict(window=5),
    dict(global_every=3),
    dict(kv_heads=2),
    dict(head_width=32),
    dict(attention_scale=0.5),
    dict(sinks=True),
    dict(rope=RopeConfig(base=5.0)),
    dict(rope=RopeConfig(local_base=5.0)),
    dict(tie_embeddings=True),
    dict(max_length=9),
    dict(moe=MoEConfig(experts=2)),
    dict(latent=LatentConfig(width=8, rope_width=4), window=0, global_every=0),
  ]

  def canonical(changes):
    return common.canonical(dataclasses.replace(config, **changes))

  assert all(canonical(changes) == canonical({}) for changes in same)
  assert all(canonical(changes) != canonical({}) for changes in other)
  # Of a relative position no table has rows: how long a text may be is the data's choice.
  relative = dict(position='relative', window=0, global_every=0)
  assert canonical(relative) == canonical(relative | dict(max_length=9))


@pytest.mark.parametrize('name', ['gemma2', 'gemma3', 'gpt_oss'])
def test_a_model_whose_layers_all_see_all_names_a_window_all_the_same(name):
  """transformers builds the mask of a window before it asks whether a layer has one."""
  hf = HF[name] | {'layer_types': ['full_attention'] * HF[name]['num_hidden_layers']}
  family, config = families.read(hf)
  written = family.to_hf(config)
  assert config.window == 0 and written['sliding_window'] > 0
  assert family.config(written).window == 0


def test_gemma_3_has_no_soft_cap_of_scores():
  with pytest.raises(NotImplementedError, match='attn_logit_softcapping=50.0'):
    families.read(HF['gemma3'] | {'attn_logit_softcapping': 50.0})
