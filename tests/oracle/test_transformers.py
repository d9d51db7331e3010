"""Does the decoder compute what HF transformers computes? Logits and every gradient, all weights re-initialised.

Default initialisation hides faults (norms are 1, biases 0), so every parameter is drawn anew.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import params, transformer
from model.config import ModelConfig
from model.loss import cross_entropy

pytestmark = pytest.mark.oracle
V, D, L, N, F, B, T = 61, 32, 3, 4, 48, 2, 24


def llama():
  """A tiny Llama, ours and theirs, and what each of our parameters is called there (Linear weights are [out, in])."""
  import transformers
  theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
      vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=N, num_key_value_heads=2, intermediate_size=F,
      max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False))
  ours = ModelConfig(vocabulary=V, width=D, layers=L, heads=N, kv_heads=2, feed_forward=F, max_length=64)
  linear = lambda x: np.swapaxes(x, -1, -2)
  heads = lambda n: lambda x: linear(x).reshape(L, D, n, D // N)
  block = {'attention_norm.scale': ('input_layernorm.weight', None), 'feed_forward_norm.scale': ('post_attention_layernorm.weight', None),
           'attention.q': ('self_attn.q_proj.weight', heads(N)), 'attention.k': ('self_attn.k_proj.weight', heads(2)),
           'attention.v': ('self_attn.v_proj.weight', heads(2)),
           'attention.o': ('self_attn.o_proj.weight', lambda x: linear(x).reshape(L, N, D // N, D)),
           'feed_forward.gate': ('mlp.gate_proj.weight', linear), 'feed_forward.up': ('mlp.up_proj.weight', linear),
           'feed_forward.down': ('mlp.down_proj.weight', linear)}
  names = {f'blocks.{name}': (f'model.layers.*.{other}', change) for name, (other, change) in block.items()}
  return ours, theirs, names | {'embedding': ('model.embed_tokens.weight', None), 'final_norm.scale': ('model.norm.weight', None),
                                'head': ('lm_head.weight', None)}


def gpt2():
  """A tiny GPT-2 (Conv1D weights are [in, out]; q, k and v lie side by side)."""
  import transformers
  theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
      vocab_size=V, n_embd=D, n_layer=L, n_head=N, n_inner=F, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
  ours = ModelConfig(vocabulary=V, width=D, layers=L, heads=N, feed_forward=F, max_length=64, gated=False, activation='gelu', norm='layer',
                     position='learned', biases=True, tie_embeddings=True)
  third = lambda i: lambda x: np.split(x, 3, -1)[i].reshape(*x.shape[:-1], N, D // N)
  block = {'attention_norm.scale': ('ln_1.weight', None), 'attention_norm.bias': ('ln_1.bias', None),
           'feed_forward_norm.scale': ('ln_2.weight', None), 'feed_forward_norm.bias': ('ln_2.bias', None),
           'attention.o': ('attn.c_proj.weight', lambda x: x.reshape(L, N, D // N, D)), 'attention.o_bias': ('attn.c_proj.bias', None),
           'feed_forward.up': ('mlp.c_fc.weight', None), 'feed_forward.up_bias': ('mlp.c_fc.bias', None),
           'feed_forward.down': ('mlp.c_proj.weight', None), 'feed_forward.down_bias': ('mlp.c_proj.bias', None)}
  for i, letter in enumerate('qkv'):
    block |= {f'attention.{letter}': ('attn.c_attn.weight', third(i)), f'attention.{letter}_bias': ('attn.c_attn.bias', third(i))}
  names = {f'blocks.{name}': (f'transformer.h.*.{other}', change) for name, (other, change) in block.items()}
  return ours, theirs, names | {'embedding': ('transformer.wte.weight', None), 'positions': ('transformer.wpe.weight', None),
                                'final_norm.scale': ('transformer.ln_f.weight', None), 'final_norm.bias': ('transformer.ln_f.bias', None)}


def read(tensors, names):
  """Our parameters, or their gradients, from a dict of theirs."""
  found = {}
  for name, (other, change) in names.items():
    stacked = '*' in other
    x = np.stack([tensors[other.replace('*', str(i))] for i in range(L)]) if stacked else tensors[other]
    found[name] = change(x) if change else x
  return found


@pytest.mark.parametrize('family', [llama, gpt2])
def test_logits_loss_and_gradients_are_those_of_transformers(family, one_device):
  import torch
  config, theirs, names = family()
  torch.manual_seed(0)
  with torch.no_grad():
    for name, p in theirs.named_parameters():
      p.copy_(torch.randn(p.shape) * 0.3 + (1.0 if 'norm' in name or 'ln_' in name else 0.0))
  values = read({name: p.detach().numpy() for name, p in theirs.named_parameters()}, names)
  leaves = jax.tree_util.tree_leaves_with_path(transformer.init(config, 0))
  keys = [jax.tree_util.keystr(path, simple=True, separator='.').removesuffix('.value') for path, _ in leaves]
  assert set(keys) == set(values)
  model = jax.tree.unflatten(jax.tree.structure(transformer.init(config, 0)),
                             [jax.device_put(values[key], leaf.sharding) for key, (_, leaf) in zip(keys, leaves)])
  for key, (_, leaf) in zip(keys, leaves):
    assert values[key].shape == leaf.shape, key

  tokens = np.random.default_rng(0).integers(0, V, (B, T + 1))
  expected = theirs(input_ids=torch.tensor(tokens[:, :-1])).logits
  nll = torch.nn.functional.cross_entropy(expected.reshape(-1, V), torch.tensor(tokens[:, 1:]).reshape(-1), reduction='sum')
  nll.backward()
  gradients = read({name: p.grad.numpy() for name, p in theirs.named_parameters()}, names)

  inputs, targets = (jnp.asarray(x, jnp.int32) for x in (tokens[:, :-1], tokens[:, 1:]))
  put = lambda x: jax.device_put(x, jax.NamedSharding(one_device, jax.P(('data', 'fsdp'), None)))
  inputs, targets = put(inputs), put(targets)

  def loss(model):
    x, _ = model(inputs)
    return cross_entropy(x, params.use(model.output_embedding, config.dtype), targets)[0], model.logits(x)
  (total, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(model)
  scale = np.abs(expected.detach().numpy()).max()
  np.testing.assert_allclose(logits, expected.detach().numpy(), atol=2e-5 * max(1, scale))
  np.testing.assert_allclose(total, nll.item(), rtol=1e-5)
  # Without rotary positions a key bias shifts all scores of a query alike: its gradient is zero, and rounding is all there is.
  least = 1e-3 * np.sqrt(sum(np.sum(np.square(g)) for g in gradients.values()))
  for key, g in zip(keys, jax.tree.leaves(grads)):
    error = np.linalg.norm(np.asarray(g) - gradients[key]) / max(np.linalg.norm(gradients[key]), least)
    assert error < 1e-4, (key, error)
