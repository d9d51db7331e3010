"""Does transformers read the same model from a GGUF file? Logits, for types and architectures."""

import numpy as np
import pytest

from model import checkpoint
from tests import gguf_files
from tests.goldens import ours
from tests.model.test_model_checkpoint import LLAMA

pytestmark = pytest.mark.oracle
for _name in ('torch', 'transformers', 'gguf'):
  pytest.importorskip(_name, reason=f'{_name} is not installed')

WIDE = LLAMA | {'hidden_size': 256, 'intermediate_size': 256, 'num_hidden_layers': 2}
# Three types go round the matrices of a file.
MIXES = (
  ('F32', 'F16', 'BF16'),
  ('Q4_1', 'Q8_0', 'Q4_0'),
  ('Q5_0', 'Q5_1', 'Q4_1'),
  ('Q4_K', 'Q6_K', 'Q5_K'),
  ('Q2_K', 'Q3_K', 'Q8_0'),
)


def compare(hf, mix, directory):
  """Whether logits of a file are the same, of two rows of tokens."""
  import torch

  ours.build(hf, directory / 'hf')
  tensors = ours.tensors(directory / 'hf')
  matrices = [name for name, x in tensors.items() if x.ndim == 2]
  kinds = {name: mix[i % len(mix)] for i, name in enumerate(matrices)}
  (directory / 'file').mkdir()
  path = directory / 'file' / 'model.gguf'
  gguf_files.write(path, hf, tensors, kinds=kinds)
  theirs = gguf_files.theirs(path)
  tokens = np.random.default_rng(0).integers(0, hf['vocab_size'], (2, 24)).astype(np.int32)
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
  _, model = checkpoint.load(path, mesh=ours.MESH, dtype='float32')
  found = ours.scores(model, hf['model_type'], tokens=tokens)[0]
  np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize('mix', MIXES, ids='-'.join)
def test_every_type(mix, tmp_path):
  compare(WIDE, mix, tmp_path)


@pytest.mark.parametrize('kind, head', [('qwen2', 64), ('qwen3', 128)])
def test_every_architecture(kind, head, tmp_path):
  """transformers takes Qwen3's heads to be of 128, whatever the file says."""
  compare(WIDE | {'model_type': kind, 'head_dim': head}, ('F32', 'Q8_0', 'Q4_1'), tmp_path)


def test_a_tied_head(tmp_path):
  compare(WIDE | {'tie_word_embeddings': True}, ('Q8_0', 'Q4_1', 'F32'), tmp_path)
