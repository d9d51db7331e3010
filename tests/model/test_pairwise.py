"""Is a model in codes the model of their numbers: every format in every family, on one device and
on a mesh of three axes?

A model has each of its kinds of matrices in another format, and the mesh's others than the one
device's: so a case covers a family with all formats, and the fast ones every format with every
family, every format with both meshes, and every family with both. The others turn formats by one
kind each: all of them are the product.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from compression.quantise import quantised
from kernels import quantised_matmul
from model import params, transformer
from model.weights.scheme import parsed, rule_of
from parallel.mesh import MeshConfig, make_mesh
from tests.model.test_codes import MESH, plain
from tests.model.test_weights import config_of, everything

FAMILIES = 'llama', 'qwen3_moe', 'deepseek_v3', 't5', 'gemma2', 'bert'
FORMATS = (
  'int8',
  'int8:group=2:asymmetric',
  'int4:group=2',
  'int4:group=2:asymmetric:double',
  'nf4:group=2:double',
  'mxfp4:group=2',
  'fp8',
  'fp8:tensor',
  'fp8:block=2',
)
SPARSE = '2:4', '2:4+int4:group=2'  # of `up`, which has room for it on every mesh
HALF = 5


def one_layer(family: str):
  """Its config with one layer, of those with experts: programs are compiled sooner."""
  config = config_of(family)
  moe = dataclasses.replace(config.moe, first=0, every=1)
  return dataclasses.replace(
    config, layers=1, encoder_layers=min(1, config.encoder_layers), moe=moe
  )


def drawn(config, mesh):
  """A model of numbers, drawn on the host: a program that draws takes as long to compile as one
  that multiplies.
  """
  draw = np.random.default_rng(0)
  with jax.set_mesh(mesh):
    target = params.abstract(functools.partial(transformer.init, config, 0), mesh)

  def one(p):
    x = draw.normal(float(p.kind == 'vector'), 0.2, p.shape).astype(np.float32)
    return p.replace(jax.device_put(x, p.get_value().sharding))

  return jax.tree.map(one, target, is_leaf=params.is_param)


@functools.cache
def kinds_of(family: str) -> tuple[str, ...]:
  """Patterns of a family's kinds of matrices, but up."""
  model = jax.eval_shape(functools.partial(transformer.init, one_layer(family), 0))
  rules, kinds = parsed(['*=int8']), {}
  for name, p in params.by_name(model).items():
    if rule_of(name, p, rules) and not name.endswith('.up'):
      place = name.split('.')
      kinds['*.' + '.'.join(place[3:]) if 'blocks' in place else name] = None
  return (*kinds, 'head*')


def entries_of(family: str, turn: int) -> tuple[str, ...]:
  """What each kind is stored in, from the turn-th format on."""
  kinds = kinds_of(family)
  places = {kind: FORMATS[(turn + n) % len(FORMATS)] for n, kind in enumerate(kinds)}
  return (f'*.up={SPARSE[turn % 2]}', *(f'{kind}={scheme}' for kind, scheme in places.items()))


def turns(case: int, turn: int) -> tuple[int, int]:
  """Where formats begin on one device, and on the mesh; of families by turns."""
  first, second = (0, HALF) if case % 2 == 0 else (HALF, 0)
  return first + turn, second + turn


def test_every_pair_is_in_a_fast_case():
  """And all formats stand in every family, and on both."""
  of_family = {family: set() for family in FAMILIES}
  of_mesh = [set(), set()]
  for case, family in enumerate(FAMILIES):
    for place, turn in enumerate(turns(case, 0)):
      schemes = {entry.split('=', 1)[1] for entry in entries_of(family, turn)}
      of_family[family] |= schemes
      of_mesh[place] |= schemes
  for covered in (*of_family.values(), *of_mesh):
    assert covered == {*FORMATS, *SPARSE}


@pytest.mark.parametrize(
  'family, turn',
  [
    *((family, 0) for family in FAMILIES),
    *(
      pytest.param(family, turn, marks=[pytest.mark.slow, pytest.mark.long])
      for family in FAMILIES
      for turn in range(1, len(FORMATS))
    ),
  ],
)
def test_codes_compute_what_their_numbers_do(family, turn, monkeypatch):
  monkeypatch.setattr(quantised_matmul, 'FEW', 0)  # digits are rounded: see test_weights
  run = everything()
  alone = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  meshes = alone, make_mesh(MeshConfig(**MESH), jax.devices())
  for mesh, begin in zip(meshes, turns(FAMILIES.index(family), turn)):
    entries = entries_of(family, begin)
    with jax.set_mesh(mesh):
      made = jax.jit(functools.partial(quantised, entries=entries))(drawn(one_layer(family), mesh))
      found, numbers = run(made), jax.device_get(jax.jit(plain)(made))
    with jax.set_mesh(alone):
      wanted = run(jax.device_put(numbers, alone.devices.item()))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()), err_msg=str(entries))
