"""Are soft tokens of PEFT ours, and ours PEFT's? Equal logits, both ways, on several families."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import checkpoint, families, peft as files_of_peft, soft
from model.weights import read
from tests.goldens import ours, tiny

pytestmark = pytest.mark.oracle
torch = pytest.importorskip('torch', reason='torch is not installed')
peft = pytest.importorskip('peft', reason='peft is not installed')
safetensors = pytest.importorskip('safetensors.numpy', reason='safetensors is not installed')

P = 5
PROMPTS = ['llama', 'gemma3', 'gpt2', 'mistral', 't5']
PREFIXES = ['llama', 'qwen3', 'gpt2', 'mistral']
CASES = [('prompt', name) for name in PROMPTS] + [('prefix', name) for name in PREFIXES]


def theirs(kind, model, task, directory):
  """PEFT's model with soft tokens that are drawn, saved to a directory."""
  made = peft.PromptTuningConfig if kind == 'prompt' else peft.PrefixTuningConfig
  adapted = peft.get_peft_model(model, made(task_type=task, num_virtual_tokens=P)).eval()
  with torch.no_grad():
    for x in adapted.prompt_encoder.parameters():
      x.copy_(0.7 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
  adapted.save_pretrained(directory)
  return adapted


def logits_of(model, name, kind=''):
  """Of the tokens of the case, behind soft ones if there are any."""
  given = {what: torch.tensor(x).long() for what, x in tiny.inputs(name).items()}
  with torch.no_grad():
    if 'source' in given:
      ones = torch.ones_like(given['source'])
      inputs = {'input_ids': given['source'], 'decoder_input_ids': given['tokens']}
      return model(**inputs, attention_mask=ones).logits.numpy()
    tokens = given['tokens']
    found = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.numpy()
  # A prompt's own scores come first, a prefix has none.
  return found[:, P:] if kind == 'prompt' else found


def put_on(base, arrays):
  """Our model with the arrays of soft tokens."""

  def parameter(x):
    axes = (None,) * (2 if x.ndim == 2 else 3)
    return nnx.Param(jnp.asarray(x), axes=axes, kind='embedding', inputs=1, wide=False)

  return soft.applied(base, jax.tree.map(parameter, arrays))


@pytest.mark.parametrize('kind, name', CASES)
def test_theirs_is_ours_and_goes_back_as_it_was(kind, name, tmp_path):
  from tests.goldens import make

  model = make.build(name, tmp_path / 'hf')
  task = 'SEQ_2_SEQ_LM' if name == 't5' else 'CAUSAL_LM'
  config, base = checkpoint.load(tmp_path / 'hf', mesh=ours.MESH)
  before = logits_of(model, name)
  adapted = theirs(kind, model, task, tmp_path / 'peft')
  family = families.FAMILIES[families.TYPES[model.config.model_type]]
  settings, arrays = files_of_peft.read(tmp_path / 'peft', config, family)
  assert (settings.kind, settings.tokens) == (kind, P)

  given = {what: x for what, x in tiny.inputs(name).items() if what != 'targets'}
  with jax.set_mesh(ours.MESH):
    mine = put_on(base, arrays)
    virtual = np.int32([*read(mine.embedding.tokens).virtual])
    read_first = 'source' if name == 't5' else 'tokens'
    front = np.broadcast_to(virtual, (2, P))
    given[read_first] = np.concatenate([front, given[read_first]], 1)
    found, _ = ours.scores(mine, name, **given)
  found = found if name == 't5' else found[:, P:]
  expected = logits_of(adapted, name, kind)
  close(found, expected)
  assert np.abs(expected - before).max() > 1e-2

  back = tmp_path / 'back'
  back.mkdir()
  files_of_peft.write(back, arrays, settings, config, family)
  loaded = peft.PeftModel.from_pretrained(make.build(name, tmp_path / 'again'), back).eval()
  close(logits_of(loaded, name, kind), expected)
  one, other = (
    safetensors.load_file(directory / 'adapter_model.safetensors')['prompt_embeddings']
    for directory in (tmp_path / 'peft', back)
  )
  # Of an encoder-decoder PEFT keeps rows for its decoder, too, and reads them nowhere.
  assert one[:P].tobytes() == other.tobytes()
  assert len(one) == (2 * P if name == 't5' else P)


def close(found, expected):
  scale = max(1, np.abs(expected).max())
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)


def test_a_prefix_through_a_projection_is_what_came_out(tmp_path):
  from tests.goldens import make

  model = make.build('llama', tmp_path / 'hf')
  config, base = checkpoint.load(tmp_path / 'hf', mesh=ours.MESH)
  made = peft.PrefixTuningConfig(
    task_type='CAUSAL_LM', num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=8
  )
  adapted = peft.get_peft_model(model, made).eval()
  expected = logits_of(adapted, 'llama', 'prefix')
  adapted.save_pretrained(tmp_path / 'peft')
  assert json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())['prefix_projection']
  _, arrays = files_of_peft.read(tmp_path / 'peft', config, families.FAMILIES['llama'])
  with jax.set_mesh(ours.MESH):
    mine = put_on(base, arrays)
    front = np.broadcast_to(np.int32([*read(mine.embedding.tokens).virtual]), (2, P))
    tokens = np.concatenate([front, tiny.inputs('llama')['tokens']], 1)
    found, _ = ours.scores(mine, 'llama', tokens=tokens)
  close(found[:, P:], expected)
