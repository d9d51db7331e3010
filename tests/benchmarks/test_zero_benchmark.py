"""Is the memory table that of the state which training really has,
and is the formula beside it the same account?
"""

import json

import jax
import pytest

from benchmarks import zero
from model.config import ModelConfig
from model.execution import ExecutionConfig

MODEL = ModelConfig(
  vocabulary=512,
  width=1024,
  layers=8,
  heads=4,
  head_width=256,
  feed_forward=2048,
  max_length=128,
  execution=ExecutionConfig(dtype='bfloat16'),
)


@pytest.mark.costly
@pytest.mark.parametrize('way', zero.WAYS)
def test_the_formula_is_the_real_state(way):
  """Of 4 chips: every part within 3%, activations within 10%
  (positions and angles are not in the formula).
  """
  config = zero.setting(MODEL, 4, **zero.WAYS[way])
  state = zero.measure(config, 4)
  for part, expected in zero.formula(config, 4, state.count).items():
    assert state.parts[part] == pytest.approx(
      expected, rel=0.1 if part == 'activations' else 0.03, abs=64
    ), part
  assert state.host == pytest.approx(8 * state.count / 4 if 'offload' in way else 0, rel=1e-3)
  assert state.chip == sum(state.parts.values())


def test_state_between_steps_is_split_over_more_chips():
  few, many = (zero.measure(zero.setting(MODEL, chips), chips).parts for chips in (2, 8))
  for part in ('parameters', 'optimizer', 'gradients'):
    assert few[part] == pytest.approx(4 * many[part], rel=0.01)


def test_a_model_that_does_not_split_is_refused():
  with pytest.raises(ValueError, match='model.width=1024'):
    zero.measure(zero.setting(MODEL, 3), 3)


@pytest.mark.slow
def test_the_command(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(zero, 'MODELS', {'small': MODEL})
  found = zero.main(['--chips', '4', '--json', str(tmp_path / 'z.json')])
  assert json.loads((tmp_path / 'z.json').read_text())['results'] == found
  assert (
    list(found['small']) == list(zero.WAYS)
    and found['small']['ZeRO-1']['chip'] > found['small']['ZeRO-3']['chip']
  )
  assert 'by formula' in capsys.readouterr().out
  with pytest.raises(SystemExit):
    zero.main(['--chips', '3'])
  assert '--chips=3: small' in capsys.readouterr().err


def test_the_sizes_are_those_of_their_names():
  billions = [
    jax.eval_shape(lambda model=model: zero.transformer.init(model, 0))
    for model in zero.MODELS.values()
  ]
  assert [round(zero.params.count(model) / 1e9, 1) for model in billions] == [
    0.1,
    1.6,
    6.7,
    70.6,
    174.6,
  ]
