"""Is cuDNN asked for what it honours and for nothing else, in the program that a GPU will run?
Compiled for an H100 that isn't here.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from analysis import aot
from kernels import cudnn
from kernels.attention import attention
from kernels.mask import Mask
from kernels.scoring import Scoring
from parallel import axes as ax
from parallel.mesh import AXES, MeshConfig, make_mesh

INDEX = np.arange(128, dtype=np.int32)[None]
SEGMENTS = {'query_segments': INDEX // 9, 'key_segments': INDEX // 9}
# Of cases: T, S, N, K, H, dtype, mask; and what is said against it.
BASE = (128, 128, 4, 2, 64, 'bfloat16', Mask())
CASES = {
  'causal': (BASE, ''),
  'full': ((*BASE[:6], Mask(causal=False)), ''),
  'window': ((*BASE[:6], Mask(window=9)), ''),
  'a window as long as the row': ((*BASE[:6], Mask(window=128)), ''),
  'other keys': ((128, 40, 4, 2, 64, 'bfloat16', Mask(causal=False)), ''),
  'float16': ((*BASE[:5], 'float16', Mask()), ''),
  'one head for all': ((128, 128, 4, 1, 64, 'bfloat16', Mask()), ''),
  'wide': ((128, 128, 2, 2, 256, 'bfloat16', Mask()), ''),
  'an odd length': ((77, 77, 2, 2, 64, 'bfloat16', Mask()), ''),
  'float32': ((*BASE[:5], 'float32', Mask()), 'float32, not bfloat16 or float16'),
  'too wide': (
    (128, 128, 2, 2, 264, 'bfloat16', Mask()),
    'heads 264 and 264 wide, not the same multiple of 8 up to 256',
  ),
  'uneven': ((128, 128, 2, 2, 36, 'bfloat16', Mask()), 'heads 36 and 36 wide'),
  'a window ahead': (
    (*BASE[:6], Mask(causal=False, window=9)),
    'a window that looks ahead as well',
  ),
  'segments': ((*BASE[:6], Mask(**SEGMENTS)), 'a mask with segments'),
  'positions': (
    (*BASE[:6], Mask(window=5, query_positions=INDEX, key_positions=INDEX)),
    'a mask with positions',
  ),
  'prefix': ((*BASE[:6], Mask(prefix=np.array([3], np.int32))), 'a mask with prefix'),
}


def gpu(kind: str) -> AbstractMesh:
  """A mesh of one device of this kind, which need be neither here nor known to a compiler."""
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform='cuda')
  return AbstractMesh(
    (1,) * len(AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES), abstract_device=device
  )


def shapes(T, S, N, K, H, dtype, mask=None, B=1, sharding=lambda heads: None):
  def heads(length, n, name):
    return jax.ShapeDtypeStruct((B, length, n, H), dtype, sharding=sharding(name))

  return heads(T, N, 'heads'), heads(S, K, 'kv_heads'), heads(S, K, 'kv_heads')


def compiled(case, mesh, B=1) -> str:
  """The program of attention and its gradients, through a jitted loop with remat as models
  have it.
  """
  with jax.set_mesh(mesh), jax.default_matmul_precision('default'):
    x = shapes(
      *case,
      B=B,
      sharding=lambda heads: jax.NamedSharding(
        mesh, ax.spec('batch', 'length', heads, 'head_width')
      ),
    )

    def loss(q, k, v):
      step = jax.checkpoint(
        lambda q, _: (attention(q, k, v, Scoring(case[6]), backend='xla')[0], None)
      )
      return jnp.sum(jax.lax.scan(step, q, length=2)[0], dtype=jnp.float32)

    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*x).compile().as_text()


def h100(name='h100:1x1x1', config=MeshConfig()):
  try:
    return make_mesh(config, aot.topology(name))
  except ImportError as error:
    pytest.skip(f'{name} cannot be compiled for: {error}')


def calls(text: str) -> list[str]:
  return re.findall(r'custom_call_target="__cudnn\$(\w+)"', text)


@pytest.mark.parametrize('name', CASES)
def test_what_is_refused_and_why(name):
  case, reason = CASES[name]
  with jax.sharding.use_abstract_mesh(gpu('NVIDIA H100 80GB HBM3')):
    assert cudnn.refusal(*shapes(*case), case[6]).startswith(reason) and bool(reason) == bool(
      cudnn.refusal(*shapes(*case), case[6])
    )
  assert cudnn.refusal(*shapes(*case), case[6]) == 'it is for GPUs, not a cpu'


def test_gpus_that_are_not_known_or_too_old_are_refused(monkeypatch):
  wide, narrow = shapes(*CASES['wide'][0]), shapes(*BASE)
  with jax.sharding.use_abstract_mesh(gpu('NVIDIA T1000')):
    assert 'compute capability (0,) is below (8, 0), or not known' in cudnn.refusal(*narrow, Mask())
  for capability, reason in (
    ((7, 5), 'compute capability (7, 5)'),
    ((8, 0), 'heads 256'),
    ((10, 0), 'heads 256'),
    ((9, 0), ''),
  ):
    monkeypatch.setitem(cudnn.ELSEWHERE, 'NVIDIA T1000', (capability, 91200))
    with jax.sharding.use_abstract_mesh(gpu('NVIDIA T1000')):
      assert reason in cudnn.refusal(*wide, Mask()) and bool(reason) == bool(
        cudnn.refusal(*wide, Mask())
      )


@pytest.mark.parametrize(
  'name', ['causal', 'full', 'window', 'other keys', 'wide', 'float32', 'segments', 'prefix']
)
def test_the_program_of_a_gpu_calls_cudnn_where_nothing_is_against_it(name):
  """Forward, again for the backward pass (remat), and backward, of the whole mask, and no scores of
  its own.
  """
  case, reason = CASES[name]
  T, S = case[:2]
  text = compiled(case, h100())
  assert sorted(set(calls(text))) == ([] if reason else ['fmhaSoftmax', 'fmhaSoftmaxBackward'])
  assert bool(re.search(rf'(f32|bf16)\[(1,)?\d+(,\d+)?,{T},{S}\]', text)) == bool(reason)
  if not reason:
    assert set(re.findall(r'"mask_type": ?"(\w+)"', text)) == {
      'CAUSAL' if case[6].causal else 'NO_MASK'
    }
    assert {int(n) for n in re.findall(r'"sliding_window_length": ?(\d+)', text)} == {
      case[6].window
    }


@pytest.mark.parametrize('axis_type', [AxisType.Explicit, AxisType.Auto], ids=str)
def test_each_device_calls_it_for_its_own_rows_and_heads(axis_type):
  try:
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), aot.topology('h100:1x1x4'), axis_type)
  except ImportError as error:
    pytest.skip(f'an H100 cannot be compiled for: {error}')
  with jax.set_mesh(mesh):

    def placed(heads):
      return jax.NamedSharding(mesh, ax.spec('batch', 'length', heads, 'head_width'))

    out, _ = jax.eval_shape(
      lambda *x: attention(*x, Scoring(), backend='xla'), *shapes(*BASE, B=4, sharding=placed)
    )
    assert axis_type == AxisType.Auto or out.sharding.spec == ax.spec(
      'batch', 'length', 'heads', 'head_width'
    ), "jax's own type says whole"
  text = compiled(BASE, mesh, B=4)
  assert set(calls(text)) == {'fmhaSoftmax', 'fmhaSoftmaxBackward'}
  assert {found.replace(' ', '') for found in re.findall(r'"dimensions": ?\[([^\]]*)\]', text)} == {
    '"2","2","128","128"'
  }
  assert not re.search(r'all-gather|all-to-all|collective-permute', text)


def test_what_is_answered_for_the_h100_is_what_it_is_compiled_for():
  ((kind, ((major, minor), version)),) = cudnn.ELSEWHERE.items()
  target = aot.GPUS['h100']
  assert f'device_description_str: "{kind}"' in target
  assert f'cuda_compute_capability {{ major: {major} }}' in target and minor == 0
  assert (
    f'dnn_version_info {{ major: {version // 10_000} minor: {version // 100 % 100} }}' in target
  )


def test_a_jax_that_asks_in_other_words_is_named(monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo as asking

  monkeypatch.delattr(asking, 'check_compute_capability')
  with pytest.raises(
    NotImplementedError,
    match=r"has no \['check_compute_capability'\].*model.execution.attention='blocked'",
  ):
    cudnn._answer((9, 0), 91200)


def test_a_window_of_the_whole_row_is_no_window():
  text = compiled(CASES['a window as long as the row'][0], h100())
  assert {int(n) for n in re.findall(r'"sliding_window_length": ?(\d+)', text)} == {0}


@pytest.mark.costly
@pytest.mark.parametrize(
  'name',
  ['causal', 'full', 'window', 'a window as long as the row', 'other keys', 'one head for all'],
)
def test_what_cudnn_is_asked_for_is_the_spec(name, monkeypatch):
  """jax's own implementation given cuDNN's arguments, on a mesh, beside the oracle: values and
  gradients.
  """
  case, run = CASES[name][0], jax.nn.dot_product_attention

  def stand_in(*x, implementation, **options):
    assert implementation == 'cudnn'
    return run(*x, implementation='xla', **options)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', stand_in)
  monkeypatch.setattr(cudnn, 'refusal', lambda *_: '')
  monkeypatch.setattr(cudnn, '_answer', lambda *_: None)
  monkeypatch.setattr(cudnn, '_kind', lambda: next(iter(cudnn.ELSEWHERE)))
  T, S, N, K, H, _, mask = case

  def draw(*shape):
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), jnp.float32)

  arrays, weights = [draw(2, T, N, H), draw(2, S, K, H), draw(2, S, K, H)], draw(2, T, N, H)

  def gradients(backend):
    return jax.jit(
      jax.value_and_grad(
        lambda *x: jnp.sum(attention(*x, Scoring(mask, scale=0.3), backend=backend)[0] * weights),
        (0, 1, 2),
      )
    )

  expected = gradients('reference')(*arrays)
  with jax.set_mesh(
    make_mesh(
      MeshConfig(data=1, fsdp=2, tensor=1 if K == 1 else 2), jax.devices()[: 2 if K == 1 else 4]
    )
  ):
    weights = jax.device_put(weights, ax.spec('batch', 'length', 'heads', None))
    placed = [
      jax.device_put(x, ax.spec('batch', 'length', heads, None))
      for x, heads in zip(arrays, ('heads', 'kv_heads', 'kv_heads'))
    ]
    found = gradients('xla')(*placed)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)
