"""Are logits of codes, theirs and ours, the same in transformers, by its own libraries?"""

import dataclasses

import jax
import numpy as np
import pytest

from compression.quantise import quantised
from model import checkpoint
from tests import quantised_files as files
from tests.goldens import ours
from tests.model.test_quantised_files import FORMS, GPT_OSS, LLAMA

pytestmark = pytest.mark.oracle
for _name in ('torch', 'transformers', 'compressed_tensors'):
  pytest.importorskip(_name, reason=f'{_name} is not installed')

TOKENS = np.random.default_rng(0).integers(0, 67, (2, 24)).astype(np.int32)


def theirs(directory, **options):
  import torch
  import transformers

  load = transformers.AutoModelForCausalLM.from_pretrained
  model = load(directory, dtype=torch.float32, **options).eval()
  with torch.no_grad():
    return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def equal(model, name, expected):
  found = ours.scores(model, name, tokens=TOKENS)[0]
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


SCHEMES = {
  'int8': ['*=int8'],
  'int4 asymmetric': ['*=int4:group=32:asymmetric'],
  'fp8 in squares': ['*=fp8:block=32'],
  'several, and the head': ['head*=int8', '*.down=int8:group=32', '*.q=keep', '*=int4:group=16'],
}


@pytest.mark.parametrize('name', SCHEMES)
def test_transformers_loads_our_codes(name, tmp_path):
  """Zero points in int32 it cannot load as codes, and makes numbers of them as it loads."""
  import transformers

  hf = LLAMA | {'tie_word_embeddings': name == 'several, and the head'}
  ours.build(hf, tmp_path / 'hf')
  config, model = checkpoint.load(tmp_path / 'hf', mesh=ours.MESH)
  config = config.with_execution(stored=tuple(SCHEMES[name]))
  with jax.set_mesh(ours.MESH):
    model = quantised(model, SCHEMES[name])
  if model.head.tokens is not None:
    config = dataclasses.replace(config, tie_embeddings=False)
  checkpoint.save(model, config, tmp_path / 'out', form='compressed-tensors')
  options = {}
  if name == 'int4 asymmetric':
    options['quantization_config'] = transformers.CompressedTensorsConfig(dequantize=True)
  _, numbers = checkpoint.load(tmp_path / 'out', mesh=ours.MESH, codes='none')
  equal(numbers, 'llama', theirs(tmp_path / 'out', **options))


@pytest.mark.parametrize('name', ['Mxfp4Config', 'FineGrainedFP8Config'])
def test_codes_are_what_transformers_makes_of_them(name, tmp_path):
  """Of squares that are not whole, as DeepSeek's own have, it makes an error."""
  import transformers

  hf, form = {'Mxfp4Config': (GPT_OSS, files.mxfp4())}.get(name, (LLAMA, files.fp8(32)))
  files.build(hf, tmp_path, form)
  config = getattr(transformers, name)(dequantize=True)
  expected = theirs(tmp_path / 'codes', quantization_config=config)
  _, model = checkpoint.load(tmp_path / 'codes', mesh=ours.MESH)
  equal(model, hf['model_type'], expected)


@pytest.mark.parametrize('name', ['fp8 of DeepSeek', 'gptq of experts'])
def test_codes_are_the_model_of_their_numbers(name, tmp_path):
  """Of what it does not read itself, transformers is given the numbers."""
  files.build(FORMS[name][0], tmp_path, FORMS[name][1])
  _, model = checkpoint.load(tmp_path / 'codes', mesh=ours.MESH)
  equal(model, FORMS[name][0]['model_type'], theirs(tmp_path / 'plain'))
