"""What do our models compute? The counterparts of tests.goldens.make: scores,
loss, gradients, greedy tokens.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from decode.loop import Rules, decode_chunk, prefill
from decode.sampling import make_sampling
from model import checkpoint, families
from model.cache import init_cache
from model.loss import cross_entropy
from model.tensorfiles import TensorFiles, write
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh
from tests.goldens import tiny

MESH = make_mesh(MeshConfig(), jax.devices()[:1])


def build(hf: dict, directory: pathlib.Path) -> None:
  """Writes a checkpoint of a config.json, its weights drawn from their names."""
  family, config = families.read(hf)
  shapes = {
    name: parts[0].layout.shape for name, parts in checkpoint.parts_of(family, config).items()
  }
  directory.mkdir()
  write(directory, shapes, 'F32', lambda name: [tiny.weight(name, shapes[name])], 2**30)
  (directory / 'config.json').write_text(json.dumps(hf))


def put(x) -> jax.Array | None:
  """A [B, ...] array on the mesh in context."""
  with jax.set_mesh(MESH):  # which decides what a spec names
    return (
      None
      if x is None
      else jax.device_put(jnp.asarray(x), ax.spec('batch', *(None,) * (np.ndim(x) - 1)))
    )


def hidden(
  model,
  tokens,
  source=None,
  types=None,
  positions=None,
  segments=None,
  source_positions=None,
  source_segments=None,
):
  """Final hidden states."""
  others = {} if types is None else {'types': types}
  if source is not None:
    others = {
      'source': source,
      'source_positions': source_positions,
      'source_segments': source_segments,
    }
  return model(tokens, positions, segments, **others).hidden


@functools.partial(jax.jit, static_argnames='name')
def forward(model, name: str, given: dict):
  """Logits (of bert_pooled hidden states), and the pooler's output or None."""
  x = hidden(model, **given)
  return (x, model.pooler(x)) if name == 'bert_pooled' else (model.logits(x), None)


def scores(model, name: str, **given):
  """`forward` of numpy arrays, as numpy arrays."""
  with jax.set_mesh(MESH):
    found = forward(model, name, {what: put(x) for what, x in given.items()})
  return [None if x is None else np.asarray(x) for x in found]


@functools.partial(jax.jit, static_argnames='name')
@functools.partial(jax.value_and_grad, has_aux=True)
def _loss(model, name, given, targets):
  x = hidden(model, **given)
  if name == 'bert_pooled':
    pooled = model.pooler(x)
    return sum(
      (x * tiny.direction(what, x.shape)).sum() for what, x in (('hidden', x), ('pooled', pooled))
    ), (x, pooled)
  weights = jnp.ones_like(targets, jnp.float32)
  total, _ = cross_entropy(*model.scored(x), targets, weights, 0.0, model.config.logit_softcap)
  return total, (model.logits(x), None)


def loss_and_gradients(model, name: str):
  """The loss of a case, what `forward` gives, and a model of the loss's gradients."""
  given = {what: put(x) for what, x in tiny.inputs(name).items()}
  with jax.set_mesh(MESH):
    (total, found), gradients = _loss(
      model, name, {what: x for what, x in given.items() if what != 'targets'}, given['targets']
    )
  return total, found, gradients


def generate(model, name: str, row: int, new: int) -> np.ndarray:
  """The counterpart of tests.goldens.make.generate: the prompt in a longer bucket,
  tokens in two chunks.
  """
  given = tiny.inputs(name)
  tokens, source = np.zeros((1, 11), np.int32), None
  tokens[0, :8] = given['tokens'][row, :8]
  with jax.set_mesh(MESH):
    if 'source' in given:
      tokens[0, 0] = 0
      source = (
        put(given['source'][row : row + 1]),
        put(np.array([given['source'].shape[1]], np.int32)),
      )
    state = prefill(
      model,
      put(tokens),
      put(np.array([8], np.int32)),
      init_cache(model.config, 1, 32),
      put(np.array([8 + new], np.int32)),
      source,
    )
    rules, ids = (
      Rules(
        jax.tree.map(put, make_sampling(1, temperature=0.0)), put(np.full((1, 4), -1, np.int32))
      ),
      [],
    )
    for _ in range(2):
      state, chunk = decode_chunk(model, state, rules, steps=new // 2, pad=0)
      ids.append(np.asarray(chunk.ids)[0])
  return np.concatenate(ids)


def tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
  """All tensors of a checkpoint."""
  files = TensorFiles(directory)
  return {name: files.read(name, 0, tensor.shape[0]) for name, tensor in files.tensors.items()}


def compare_gradients(
  found: dict[str, np.ndarray], norms: dict[str, float], distance, names
) -> list[str]:
  """Names whose gradient is further than 1e-4 of its norm away; `distance(name)` is how far.

  Some gradients are zero (of a bias of keys that shifts all scores alike):
  there, rounding of the others is all there is.
  """
  least = 1e-3 * np.sqrt(sum(norm**2 for norm in norms.values()))
  errors = {name: distance(name) / max(norms[name], least) for name in names}
  return [
    f'{name}: {error:.1e} of a norm of {norms[name]:.1e}'
    for name, error in errors.items()
    if not error < 1e-4
  ]
