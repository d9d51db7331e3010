"""Does transformers load what is left of a model, in its smaller shapes, and compute the same?"""

import numpy as np
import pytest

from compression import structured
from model import checkpoint
from tests.model import laws

pytestmark = pytest.mark.oracle
torch = pytest.importorskip('torch', reason='torch is not installed')
transformers = pytest.importorskip('transformers', reason='transformers is not installed')


@pytest.mark.parametrize('kv_heads', [2, 4])
def test_a_smaller_model_is_one_of_theirs(kv_heads, one_device, tmp_path):
  config = laws.make_config('llama', layers=4, kv_heads=kv_heads)
  small = structured.smaller(config, {'heads': 2, 'channels': 10, 'layers': 2})
  layers = structured.left(config, small, [0.4, 0.3, 0.2, 0.1])
  model = laws.make_model(config)
  made = structured.joined(structured.by_magnitude(model, small), small, layers, one_device)
  checkpoint.save(made, small, tmp_path / 'small')
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'small', dtype='float32')
  assert (theirs.config.num_attention_heads, theirs.config.intermediate_size) == (2, 10)
  assert theirs.config.num_hidden_layers == len(theirs.model.layers) == 2
  tokens = laws.tokens_of(config, 2, 9)
  expected = theirs(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.detach().numpy()
  found = laws.forward()(made, tokens)
  np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))
