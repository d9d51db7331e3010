"""What differs between versions of Mosaic GPU (jax 0.10.2 to 0.12), and between a GPU and its
interpreter? All of it is in here.

The interpreter (jax 0.12 and later) has no products whose left side is in registers, and none that
start from a value: they are done by jnp there, from the same memory.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Of what is along a product's rows, its columns.
LAYOUTS = ROWS, COLUMNS = [plgpu.Layout.WGMMA.reduce(axis) for axis in (1, 0)]
INTERPRETER = getattr(plgpu, 'InterpretGPUParams', None)


def kernel(
  body,
  name: str,
  out_type,
  scratch_types,
  blocks: int,
  warpgroups: int,
  cost: pl.CostEstimate,
  interpret,
):
  """A kernel of `blocks` thread blocks (axis 'block'), each of some warpgroups (axis 'warpgroup').

  interpret: False, True, or the interpreter's parameters. Not plgpu.kernel: in jax 0.10.2 it takes
  no arrays that are written in place.
  """
  if interpret and INTERPRETER is None:
    raise NotImplementedError(
      f'jax {jax.__version__} cannot interpret kernels of Mosaic GPU; '
      'use jax >= 0.12 or a Hopper GPU'
    )

  def scoped(*refs):
    pl.run_scoped(functools.partial(body, *refs), *scratch_types, collective_axes='warpgroup')

  mesh = plgpu.Mesh(
    grid=(blocks,), grid_names=('block',), num_threads=warpgroups, thread_name='warpgroup'
  )
  parameters = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
  )
  run = pl.kernel(
    scoped,
    out_type,
    mesh=mesh,
    compiler_params=parameters,
    name=name,
    cost_estimate=cost,
    interpret=INTERPRETER() if interpret is True else interpret,
  )

  # The compiled program shows neither a kernel's name nor its cost; analysis.roofline reads them in
  # the scope's.
  def named(*arguments):
    with jax.named_scope(
      f'{name} flops={cost.flops} bytes_accessed={cost.bytes_accessed} '
      f'transcendentals={cost.transcendentals} end'
    ):
      return run(*arguments)

  return named


def load(ref, layout):
  """A part of memory as registers with a layout."""
  return plgpu.load(
    *((ref, ()) if 'idx' in inspect.signature(plgpu.load).parameters else (ref,)),
    layout=layout,
    optimized=False,
  )


def tiled(shape, dtype, swizzle: int = 128):
  """Shared memory that products and TMA take: tiles of 8 rows and `swizzle` bytes."""
  columns = swizzle // jnp.dtype(dtype).itemsize
  return plgpu.SMEM(
    shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle))
  )


def filled(shape, layout=plgpu.Layout.WGMMA, value=0.0):
  """f32 registers."""
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def products(*operands, interpret, meanwhile=lambda: None):
  """acc + a @ b, f32, for each (acc, a, b), all started before any is waited for.

  acc: a value. a: a value or shared memory. b: shared memory. meanwhile: what is done while they
  run.
  """
  if interpret:

    def read(x):
      return x if isinstance(x, jax.Array) else x[...]

    done = [
      acc + jnp.dot(read(a).astype(jnp.float32), read(b).astype(jnp.float32), precision='highest')
      for acc, a, b in operands
    ]
    # Products read by way of the async proxy, as TMA writes; here memory was read otherwise.
    plgpu.commit_smem()
    meanwhile()
    return tuple(done)

  def run(refs):
    for ref, (_, a, b) in zip(refs, operands):
      plgpu.wgmma(ref, a, b)
    meanwhile()

  return pl.run_state(run)(tuple(plgpu.ACC.init(acc) for acc, _, _ in operands))


def add(value, held, target, *, interpret):
  """Adds f32 registers to main memory by way of shared memory; done when wait_smem_to_gmem says so.

  The interpreter does it at once.
  """
  if interpret:
    target[...] = target[...] + value
    return
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  held[...] = value
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(held, target, reduction_op='add')
