"""Does ModelConfig refuse what is impossible, and resolve what is left open?"""
import dataclasses

import pytest

from model.config import CHOICES, ModelConfig
from model.layers import ACTIVATIONS
from parallel.remat import POLICIES


@pytest.mark.parametrize('fields, words', [
    ({'width': 30, 'heads': 4}, r'model.width=30 is not divisible by model.heads=4; set model.head_width'),
    ({'heads': 6, 'kv_heads': 4, 'head_width': 8}, r'heads=6 is not divisible by model.kv_heads=4; .* \[1, 2, 3, 6\]'),
    ({'head_width': 5}, r'head width 5 is odd'),
    ({'width': 0}, r'model.width=0 must be at least 1'),
    ({'layers': -1}, r'model.layers=-1 must be at least 1'),
    ({'window': -1}, r'model.window=-1 must be 0'),
    ({'attention_softcap': -2.0}, r'model.attention_softcap=-2.0 must be 0 \(none\) or positive'),
    ({'norm_epsilon': 0.0}, r'model.norm_epsilon=0.0 must be positive'),
    ({'rope_base': float('nan')}, r'model.rope_base=nan must be positive'),
    ({'norm': 'rns'}, r"model.norm='rns' is unknown; did you mean 'rms'\? Known: rms, layer"),
    ({'remat': 'dot'}, r"model.remat='dot' is unknown; did you mean 'dots'"),
])
def test_impossible_values_raise(fields, words):
  with pytest.raises(ValueError, match=words):
    ModelConfig(**fields)


def test_open_sizes_are_resolved():
  config = ModelConfig(width=96, heads=6)
  assert (config.H, config.K, config.G, config.F) == (16, 6, 1, 256)
  assert dataclasses.replace(config, gated=False).F == 384
  assert ModelConfig(width=96, heads=6, kv_heads=2, head_width=32, feed_forward=100).F == 100
  assert ModelConfig(position='none', head_width=5).H == 5
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.width = 1


def test_choices_are_what_the_modules_know():
  from kernels.attention import HONOURS
  assert set(CHOICES['activation']) == set(ACTIVATIONS)
  assert set(CHOICES['remat']) == set(POLICIES)
  assert set(CHOICES['attention']) == {'auto', *HONOURS}
