"""Is the text of a model in codes that of the numbers that they stand for?"""

import jax
import numpy as np
import pytest

from data.tokenizers import ByteTokenizer
from decode.generator import Generator
from model import transformer
from model.config import ModelConfig
from model.weights.scheme import dequantised
from tests.model import laws

CONFIG = ModelConfig(**laws.TINY | {'vocabulary': 260, 'max_length': 64, 'layers': 1})
ONE, TWO = ['def main('], ['def main(', 'x = ']


@pytest.mark.parametrize(
  'scheme, prompts',
  [
    ('int4:group=8', ONE),
    pytest.param('nf4:group=8', ONE, marks=pytest.mark.slow),
    pytest.param('int4:group=8', TWO, marks=pytest.mark.slow),  # products are others than one row's
    pytest.param('nf4:group=8', TWO, marks=pytest.mark.slow),
  ],
)
def test_what_is_written_from_codes_is_what_their_numbers_write(one_device, scheme, prompts):
  model = jax.jit(lambda: transformer.init(CONFIG, 0))()
  coded, plain = (Generator(model, ByteTokenizer(), one_device, way) for way in (scheme, ''))
  plain.model = jax.jit(dequantised)(coded.model)
  actual, expected = (g(prompts, max_new_tokens=12, temperature=0.0) for g in (coded, plain))
  for one, other in zip(actual, expected, strict=True):
    assert one.ids == other.ids and len(set(one.ids)) > 2
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=5e-3)
  assert coded.report.read_bytes < 0.6 * plain.report.read_bytes
