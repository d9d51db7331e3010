"""Does ModelConfig refuse what is impossible, and resolve what is left open?"""

import dataclasses

import pytest

from kernels.blocks import Blocks
from model.config import CHOICES, Kind, LatentConfig, ModelConfig, MoEConfig, RopeConfig
from model.execution import ExecutionConfig
from model.layers import ACTIVATIONS


@pytest.mark.parametrize(
  'fields, words',
  [
    (
      {'width': 30, 'heads': 4},
      r'model.width=30 is not divisible by model.heads=4; set model.head_width',
    ),
    (
      {'heads': 6, 'kv_heads': 4, 'head_width': 8},
      r'heads=6 is not divisible by model.kv_heads=4; .* \[1, 2, 3, 6\]',
    ),
    ({'head_width': 5}, r'head width 5 is odd'),
    ({'width': 0}, r'model.width=0 must be at least 1'),
    ({'layers': -1}, r'model.layers=-1 must be at least 1'),
    ({'window': -1}, r'model.window=-1 must be at least 0'),
    ({'attention_softcap': -2.0}, r'model.attention_softcap=-2.0 must be at least 0'),
    ({'norm_epsilon': 0.0}, r'model.norm_epsilon=0.0 must be positive'),
    ({'norm': 'rns'}, r"model.norm='rns' is unknown; did you mean 'rms'\? Known: rms, layer"),
  ],
)
def test_impossible_values_raise(fields, words):
  with pytest.raises(ValueError, match=words):
    ModelConfig(**fields)


@pytest.mark.parametrize(
  'make, words',
  [
    (
      lambda: ExecutionConfig(remat='dot'),
      r"model.execution.remat='dot' is unknown; did you mean 'dots'",
    ),
    (lambda: RopeConfig(base=float('nan')), r'model.rope.base=nan must be positive'),
    (
      lambda: RopeConfig(scaling='dynamic'),
      r"model.rope.scaling='dynamic' is unknown.*Known: none, linear, llama3, yarn",
    ),
    (
      lambda: RopeConfig(scaling='yarn', factor=2.0),
      r"scaling='yarn' needs model.rope.original_length",
    ),
    (
      lambda: RopeConfig(scaling='llama3', original_length=9, low=4.0),
      r'model.rope.low=4.0 must be below model.rope.high=4.0',
    ),
    (lambda: LatentConfig(width=4, rope_width=3), r'model.latent.rope_width=3 must be even'),
    (
      lambda: ModelConfig(latent=LatentConfig(width=4, rope_width=2), qk_norm=True),
      r'latent attention works with rotary positions',
    ),
    (lambda: MoEConfig(experts=6, groups=4), r'model.moe.groups=4 must divide model.moe.experts=6'),
    (
      lambda: MoEConfig(experts=4, per_token=3, groups=2),
      r'model.moe.per_token=3 passes the 2 experts',
    ),
    (
      lambda: MoEConfig(experts=4, bias_rate=0.1),
      r'moves a bias that is not there; set model.moe.selection_bias=True',
    ),
    (
      lambda: ModelConfig(moe=MoEConfig(experts=4, first=9)),
      r'model.moe.first=9 leaves none of 4 layers',
    ),
    (
      lambda: ModelConfig(moe=MoEConfig(experts=4), encoder_layers=1),
      r'encoder-decoder has no experts',
    ),
    (lambda: ModelConfig(global_every=2), r'set model.window'),
    (lambda: ModelConfig(activation='clamped_silu', gated=False), r'works on a gate'),
  ],
)
def test_impossible_combinations_raise(make, words):
  with pytest.raises(ValueError, match=words):
    make()


def test_a_backend_that_cannot_honour_the_architecture_is_refused():
  with pytest.raises(
    NotImplementedError,
    match=r"'xla' does not honour \['softcap'\]; "
    r"these do: \['reference', 'blocked', 'pallas_tpu'\]",
  ):
    ModelConfig(execution=ExecutionConfig(attention='xla'), attention_softcap=2.0)
  with pytest.raises(
    ValueError,
    match=r"model.execution.attention='splash' is unknown.*"
    r'Known: auto, reference, blocked, pallas_tpu, pallas_gpu, xla',
  ):
    ModelConfig(execution=ExecutionConfig(attention='splash'))
  ModelConfig(execution=ExecutionConfig(attention='blocked'), attention_softcap=2.0)


def test_blocks_that_the_backend_has_not_for_such_heads_are_refused():
  ModelConfig(
    execution=ExecutionConfig(
      attention='pallas_tpu', attention_blocks=Blocks(forward_queries=512, backward_keys=256)
    )
  )
  with pytest.raises(
    NotImplementedError,
    match=r"model.execution.attention='auto' is no backend whose blocks can be chosen; "
    r"set it to one of \['pallas_tpu', 'pallas_gpu'\]",
  ):
    ModelConfig(execution=ExecutionConfig(attention_blocks=Blocks(forward_keys=256)))
  gpu = dict(
    execution=ExecutionConfig(
      attention='pallas_gpu', dtype='bfloat16', attention_blocks=Blocks(forward_keys=128)
    )
  )
  ModelConfig(head_width=128, **gpu)
  with pytest.raises(
    ValueError,
    match=r'model.execution.attention_blocks.forward_keys=128: '
    r'backend pallas_gpu has \[64\] for heads 192 wide',
  ):
    ModelConfig(head_width=128, latent=LatentConfig(width=64, rope_width=64), **gpu)


@pytest.mark.parametrize(
  'fields, stacks',
  [
    ({}, [('g', 4)]),
    ({'window': 3}, [('l', 4)]),
    ({'window': 3, 'global_every': 2}, [('lg', 2)]),
    ({'window': 3, 'global_every': 6, 'layers': 62}, [('lllllg', 10), ('l', 2)]),
    ({'window': 3, 'global_every': 9}, [('l', 4)]),
    ({'moe': MoEConfig(experts=4, first=1)}, [('g', 1), ('G', 3)]),
    ({'moe': MoEConfig(experts=4, first=1, every=2), 'layers': 6}, [('gG', 3)]),
    ({'moe': MoEConfig(experts=4, first=3), 'layers': 61}, [('g', 3), ('G', 58)]),
    ({'moe': MoEConfig(experts=4), 'window': 3, 'global_every': 2}, [('LG', 2)]),
    (
      {'moe': MoEConfig(experts=4, every=2), 'window': 3, 'global_every': 3, 'layers': 13},
      [('LlGlLg', 2), ('L', 1)],
    ),
  ],
)
def test_layers_are_few_scans_over_repeating_periods(fields, stacks):
  """Letters: l sees a window, g all; capital ones have experts."""
  config = ModelConfig(**fields)

  def letter(kind):
    return ('L' if kind.moe else 'l') if kind.window else ('G' if kind.moe else 'g')

  assert [(''.join(map(letter, kinds)), repeats) for kinds, repeats in config.stacks] == stacks
  assert sum((kinds * repeats for kinds, repeats in config.stacks), ()) == config.kinds
  assert all(isinstance(kind, Kind) for kind in config.kinds) and len(config.kinds) == config.L


def test_open_sizes_are_resolved():
  config = ModelConfig(width=96, heads=6)
  assert (config.H, config.K, config.G, config.F) == (16, 6, 1, 256)
  assert dataclasses.replace(config, gated=False).F == 384
  assert ModelConfig(width=96, heads=6, kv_heads=2, head_width=32, feed_forward=100).F == 100
  assert ModelConfig(position='none', head_width=5).H == 5
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.width = 1


def test_choices_are_what_the_modules_know():
  assert set(CHOICES['activation']) == {*ACTIVATIONS, 'clamped_silu'}
