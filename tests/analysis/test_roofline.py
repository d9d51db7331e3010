"""Is the predicted time between the roofline and what is reasonable, and does it add up?"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from analysis import hardware, roofline, schedule
from analysis.hlo import Module
from kernels import tuning
from kernels.attention import attention
from kernels.blocks import Blocks
from kernels.mask import Mask
from kernels.scoring import Scoring
from parallel.mesh import MeshConfig, make_mesh


def one(topology, name):
  """A mesh of one device of a topology, and its chip."""
  device = topology(name)[0]
  return make_mesh(MeshConfig(), [device]), hardware.of_device(device)


def product(mesh, size):
  x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
  with jax.set_mesh(mesh):
    return jax.jit(lambda x, y: x @ y).lower(x, x).compile().as_text()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('name', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'v4:2x2x1', 'tpu7x:2x2x1'])
def test_a_large_product_comes_close_to_the_peak(topology, name):
  """Clock, cores and peak of the table fit the compiler's own estimate:
  a wrong one of them shows as a factor.
  """
  mesh, chip = one(topology, name)
  found = roofline.predict(product(mesh, 4096), mesh, chip)
  assert found.bound == 'compute' and found.flops == 2 * 4096**3
  assert 0.75 < found.roofline['compute'] / found.seconds < 1.0


@pytest.mark.slow
def test_a_step_adds_up_and_keeps_above_its_roofline(tpu_step):
  found = roofline.predict(tpu_step.text, tpu_step.mesh, tpu_step.chip)
  assert found.seconds == pytest.approx(
    found.operations + found.kernels + found.copies + sum(found.exposed.values())
  )
  assert found.operations == pytest.approx(
    schedule.cycles(tpu_step.text) / tpu_step.chip.clock, rel=0.2
  )
  # One that waits for another to leave the link counts that time as its own,
  # so that only the sums compare.
  assert (
    min(found.exposed.values()) >= 0
    and sum(found.exposed.values()) <= sum(found.links.values()) * 1.001
  )
  assert found.seconds > found.roofline['compute'] and found.bound in found.roofline
  assert found.roofline['links fsdp'] == pytest.approx(
    sum(s for (_, axes), s in found.links.items() if axes == ('fsdp',))
  )


KERNEL = """HloModule m, is_scheduled=true
ENTRY %main (x: bf16[1024,1024]) -> bf16[1024,1024] {
  %x = bf16[1024,1024]{1,0} parameter(0)
  ROOT %my_kernel.1 = bf16[1024,1024]{1,0} custom-call(%x), \
custom_call_target="tpu_custom_call", backend_config={"custom_call_config":COST}
}
"""


@pytest.mark.parametrize(
  'cost, seconds',
  [
    ('"cost_estimate":{"flops":"197000000","transcendentals":"5","bytes_accessed":"1000"}', 1e-6),
    ('"cost_estimate":{"flops":"1","bytes_accessed":"819000"}', 1e-6),
    ('"body":"x"', 2 * 2**21 / 819e9),
  ],
)
def test_a_kernel_costs_what_it_declares(topology, cost, seconds):
  mesh, chip = one(topology, 'v5e:2x2')
  found = roofline.predict(KERNEL.replace('COST', '{%s}' % cost), mesh, chip)
  assert found.kernels == found.seconds == pytest.approx(seconds)
  assert bool(found.assumptions) == ('cost_estimate' not in cost)
  assert not found.assumptions or 'kernel my_kernel declares no cost' in found.assumptions[0]


@pytest.mark.parametrize('share', [0.5, 0.8, None])
def test_experts_take_what_share_of_the_matrix_unit_their_bundles_leave(
  topology, share, monkeypatch
):
  """Whatever derivative the kernel's name says that it is of; at the peak, said, where none is
  tabled.
  """
  asked = []
  monkeypatch.setattr(tuning, 'grouped_share', lambda *which: (asked.append(which), share)[1])
  mesh, chip = one(topology, 'v5e:2x2')
  cost = '{"cost_estimate":{"flops":"197000000","transcendentals":"5","bytes_accessed":"1000"}}'
  text = KERNEL.replace('my_kernel', 'transpose_jvp_grouped_rows__').replace('COST', cost)
  found = roofline.predict(text, mesh, chip)
  assert found.kernels == pytest.approx(1e-6 / (share or 1))
  assert ('TPU v5 lite', 'grouped_rows') in asked
  words = 'rows of a balanced routing' if share else 'no bundles are tabled'
  assert words in found.assumptions[0]


GROUPED = """HloModule m, is_scheduled=true
ENTRY %main (n: s32[9], x: ROWS[64,1024], w: MATRICES[4,1024,2048]) -> ROWS[64,2048] {
  %n = s32[9]{0} parameter(0)
  %x = ROWS[64,1024]{1,0} parameter(1)
  %w = MATRICES[4,1024,2048]{2,1,0} parameter(2)
  ROOT %grouped_forward.3 = ROWS[64,2048]{1,0} custom-call(%n, %x, %w), \
custom_call_target="tpu_custom_call", backend_config={"custom_call_config":\
{"cost_estimate":{"flops":"197000000","bytes_accessed":"1000"}}}
}
"""


@pytest.mark.parametrize(
  'rows, matrices, passes, made',
  [('bf16', 'bf16', 1, 0), ('bf16', 's8', 1, 2**23), ('f32', 'f32', 6, 0), ('f32', 's8', 6, 2**23)],
)
def test_experts_in_bytes_take_what_makes_numbers_of_them(
  topology, rows, matrices, passes, made, monkeypatch
):
  """Once of each number of all four matrices, besides the products; of f32 these are six."""
  monkeypatch.setattr(tuning, 'grouped_share', lambda *_: 0.5)
  monkeypatch.setattr(tuning, 'coded_bundles', lambda *_: 0.001)
  mesh, chip = one(topology, 'v5e:2x2')
  text = GROUPED.replace('ROWS', rows).replace('MATRICES', matrices)
  predicted = roofline.predict(text, mesh, chip)
  assert predicted.kernels == pytest.approx(passes * 2e-6 + made * 0.001 / chip.clock)


CODES = """HloModule m, is_scheduled=true
ENTRY %main (n: s32[2], x: bf16[2,16,1024], w: TYPE[1,512,2048], s: f32[1,8,2048]) -> \
bf16[2,16,2048] {
  %n = s32[2]{0} parameter(0)
  %x = bf16[2,16,1024]{2,1,0} parameter(1)
  %w = TYPE[1,512,2048]{2,1,0} parameter(2)
  %s = f32[1,8,2048]{2,1,0} parameter(3)
  ROOT %quantised_matmul.7 = bf16[2,16,2048]{2,1,0} custom-call(%n, %n, %x, %w, %s), \
custom_call_target="tpu_custom_call", backend_config={"custom_call_config":\
{"cost_estimate":{"flops":"1","bytes_accessed":"1000"}}}
}
"""


@pytest.mark.parametrize('kind, grid, numbers', [('u8', 'int4', 2**21), ('s8', 'int8', 2**20)])
@pytest.mark.parametrize('bundles', [0.5, None])
def test_numbers_of_codes_take_their_bundles(topology, kind, grid, numbers, bundles, monkeypatch):
  """For each of two blocks of rows; at the roofline of what is declared, said, where none are
  tabled.
  """
  asked = []
  monkeypatch.setattr(tuning, 'coded_bundles', lambda *which: (asked.append(which), bundles)[1])
  mesh, chip = one(topology, 'v5e:2x2')
  predicted = roofline.predict(CODES.replace('TYPE', kind), mesh, chip)
  expected = 2 * numbers * bundles / chip.clock if bundles else 1000 / 819e9
  assert predicted.kernels == pytest.approx(expected)
  assert ('TPU v5 lite', grid) in asked
  words = 'the bundles that make numbers' if bundles else f'products of {grid}: no bundles'
  assert words in predicted.assumptions[0]


CARRIED = """HloModule m, is_scheduled=true
%condition (state: (s32[], f32[1024], u32[])) -> pred[] {
  %state = (s32[], f32[1024]{0}, u32[]) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %end = s32[] constant(3)
  ROOT %less = pred[] compare(%n, %end), direction=LT
}
%body (state: (s32[], f32[1024], u32[])) -> (s32[], f32[1024], u32[]) {
  %state = (s32[], f32[1024]{0}, u32[]) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%n, %one)
  %there = f32[1024]{0} get-tuple-element(%state), index=1
  %context = u32[] get-tuple-element(%state), index=2
  ROOT %out = (s32[], f32[1024]{0}, u32[]) tuple(%next, %there, %context)
}
ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024]{0} parameter(0)
  %zero = s32[] constant(0)
  %copy-start = (f32[1024]{0:S(5)}, f32[1024]{0}, u32[]) copy-start(%x)
  %first = f32[1024]{0} get-tuple-element(%copy-start), index=1
  %second = u32[] get-tuple-element(%copy-start), index=2
  %carried = (s32[], f32[1024]{0}, u32[]) tuple(%zero, %first, %second)
  %loop = (s32[], f32[1024]{0}, u32[]) while(%carried), condition=%condition, body=%body
  %last = f32[1024]{0} get-tuple-element(%loop), index=1
  ROOT %copy-done = f32[1024]{0} copy-done(%last)
}
"""


def test_a_transfer_that_a_loop_carries_ends_behind_it(topology):
  """It goes on while the loop runs: of both the longer one counts."""
  mesh, chip = one(topology, 'v5e:2x2')
  found = roofline.predict(CARRIED, mesh, chip)
  assert (
    found.seconds == pytest.approx(max(4096 / roofline.HOST_BANDWIDTH, found.operations))
    and found.copies > 0
  )
  with pytest.raises(ValueError, match='copy-done in main ends nothing that was started there'):
    roofline.predict(
      CARRIED.replace('get-tuple-element(%loop), index=1', 'get-tuple-element(%loop), index=0'),
      mesh,
      chip,
    )


@pytest.fixture(scope='module')
def attend(topology):
  """Causal attention and its gradient of two key heads, compiled for a chip: (mesh, chip, text)."""

  @functools.cache
  def make(name, width, blocks=Blocks()):
    mesh, chip = one(topology, name)

    def shape(heads):
      return jax.ShapeDtypeStruct(
        (1, 2048, heads, width), jnp.bfloat16, sharding=NamedSharding(mesh, P())
      )

    def loss(*x):
      return (
        attention(*x, Scoring(), backend='pallas_tpu', blocks=blocks)[0].astype(jnp.float32).sum()
      )

    with jax.set_mesh(mesh), jax.default_matmul_precision('default'):
      return (
        mesh,
        chip,
        jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape(4), shape(2), shape(2)).compile().as_text(),
      )

  return make


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
  'name, kind, width, entry',
  [
    ('v6e:1x1', 'TPU v6 lite', 128, 128),
    ('v6e:1x1', 'TPU v6 lite', 96, 128),
    ('v5p:1x1x1', 'TPU v5', 128, 128),
  ],
)
def test_our_attention_takes_the_bundles_of_its_tiles(attend, name, kind, width, entry):
  """Of tiles that it has, not of all; v5p's two cores share the heads.
  Of other than tabled heads those of the next entry.
  """
  mesh, chip, text = attend(name, width)
  found, seconds = roofline.predict(text, mesh, chip), 0.0
  for direction, products in (('forward', 2), ('backward', 5)):
    step = tuning.lookup(kind, direction, entry)
    queries = step.rows // 2  # those of both heads of a key stand in one step
    pairs = 4 * int((Mask().blocks(2048, 2048, queries, step.keys) > 0).sum()) * queries * step.keys
    bundles = pairs / 2**20 * (step.whole + step.masked) / 2
    seconds += max(
      bundles / chip.clock / chip.cores,
      products * 2 * width * pairs / hardware.peak(chip, 'bfloat16'),
    )
  assert found.kernels == pytest.approx(seconds)
  assert any('half of which a mask cuts (2 x)' in line for line in found.assumptions)


@pytest.mark.slow
def test_attention_that_is_not_tabled_says_so(attend, monkeypatch):
  """Its products at the peak are all that is known."""
  mesh, chip, text = attend('v6e:1x1', 128)
  known = roofline.predict(text, mesh, chip)
  monkeypatch.setattr(tuning, 'lookup', lambda *_: None)
  found = roofline.predict(text, mesh, chip)
  assert (
    found.kernels == pytest.approx(found.roofline['compute'])
    and found.kernels < 0.7 * known.kernels
  )
  assert {line.partition(' attention')[0] for line in found.assumptions} == {'forward', 'backward'}
  assert all('128 wide: no bundles are tabled for a TPU v6e' in line for line in found.assumptions)


@pytest.mark.slow
def test_the_bundles_of_the_table_are_not_those_of_chosen_steps(attend):
  mesh, chip, text = attend('v6e:1x1', 128, Blocks(forward_queries=512, forward_keys=512))
  found = roofline.predict(text, mesh, chip)
  assert any(
    'forward attention in chosen steps of 512x512: no bundles are tabled for them' in line
    for line in found.assumptions
  )
  assert any(
    'attention kernels: the bundles of their tiles' in line and '(1 x)' in line
    for line in found.assumptions
  ), 'of backward'


def test_the_text_of_a_kernel_holds_its_cost(topology):
  """What Pallas is told as cost_estimate is found again in the compiled program."""
  from jax.experimental import pallas as pl

  mesh, chip = one(topology, 'v5e:2x2')

  def double(x_ref, o_ref):
    o_ref[...] = x_ref[...] * 2

  call = pl.pallas_call(
    double,
    out_shape=jax.ShapeDtypeStruct((256, 256), jnp.float32),
    cost_estimate=pl.CostEstimate(flops=123456, transcendentals=7, bytes_accessed=654321),
  )
  x = jax.ShapeDtypeStruct(
    (256, 256), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
  )
  module = Module(jax.jit(call).lower(x).compile().as_text())
  (kernel,) = [i for _, i, _ in module.walk() if i.kernel]
  assert roofline.declared(kernel) == (123456, 654321, 7)


def test_reading_a_slice_reads_a_slice():
  text = """HloModule m
%f (p: f32[100,64], n: s32[]) -> f32[1,64] {
  %p = f32[100,64]{1,0} parameter(0)
  %n = s32[] parameter(1)
  ROOT %s = f32[1,64]{1,0} dynamic-slice(%p, %n, %n), dynamic_slice_sizes={1,64}
}
%g (p.1: f32[100,64], u: f32[1,64], n.1: s32[]) -> f32[100,64] {
  %p.1 = f32[100,64]{1,0} parameter(0)
  %u = f32[1,64]{1,0} parameter(1)
  %n.1 = s32[] parameter(2)
  ROOT %w = f32[100,64]{1,0} dynamic-update-slice(%p.1, %u, %n.1, %n.1)
}
%h (p.2: f32[100,64], n.3: s32[]) -> f32[1,64] {
  %p.2 = f32[100,64]{1,0} parameter(0)
  %n.3 = s32[] parameter(1)
  %v = f32[100,64]{1,0} bitcast(%p.2)
  ROOT %inner = f32[1,64]{1,0} fusion(%v, %n.3), kind=kLoop, calls=%f
}
%sum (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  ROOT %r = f32[] parameter(1)
}
%k (p.3: f32[100,64], u.3: f32[1,64], n.4: s32[]) -> f32[100,64] {
  %p.3 = f32[100,64]{1,0} parameter(0)
  %u.3 = f32[1,64]{1,0} parameter(1)
  %n.4 = s32[] parameter(2)
  ROOT %s.3 = f32[100,64]{1,0} scatter(%p.3, %n.4, %u.3), to_apply=%sum
}
ENTRY %main (x: f32[100,64], n.2: s32[]) -> f32[100,64] {
  %x = f32[100,64]{1,0} parameter(0)
  %n.2 = s32[] parameter(1)
  %a = f32[1,64]{1,0} fusion(%x, %n.2), kind=kLoop, calls=%f
  %c = f32[1,64]{1,0} fusion(%x, %n.2), kind=kLoop, calls=%h
  %d = f32[100,64]{1,0} fusion(%x, %a, %n.2), kind=kLoop, calls=%k
  ROOT %b = f32[100,64]{1,0} fusion(%x, %a, %n.2), kind=kLoop, calls=%g
}
"""
  module = Module(text)
  # Read or written through a fusion, a fusion in a fusion, a scatter: a row, an index, a row
  for name in 'abcd':
    assert roofline.traffic(module, 'main', module['main', name]) == 256 + 4 + 256, name
  on_chip = Module(re.sub(r'\{1,0\}', '{1,0:S(1)}', text))
  assert roofline.traffic(on_chip, 'main', on_chip['main', 'b']) == 4


@pytest.mark.slow
def test_a_gpu_step_is_predicted_from_the_roofline(compile_step):
  step = compile_step('h100:1x1x4')
  found = roofline.predict(step.text, step.mesh, step.chip)
  assert (
    found.seconds >= max(found.roofline['compute'], found.roofline['memory'])
    and found.operations > 0
  )
  assert {axes for _, axes in found.links} <= {('fsdp',), ('tensor',), ('fsdp', 'tensor')}


@pytest.mark.parametrize(
  'mask, pairs',
  [
    ({}, 512 * 513 / 2),
    ({'window': 100}, 512 * (100 - 100 * 99 / 1024)),
    ({'causal': False}, 512 * 512),
  ],
  ids=str,
)
def test_cudnn_computes_the_pairs_that_its_mask_leaves(topology, mask, pairs):
  """Backend xla on an H100: forward two products of each pair, backward five."""
  from kernels.attention import attention
  from kernels.mask import Mask
  from kernels.scoring import Scoring

  mesh, chip = one(topology, 'h100:1x1x1')
  B, T, N, H = 2, 512, 4, 128
  with jax.set_mesh(mesh):
    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16, sharding=NamedSharding(mesh, P()))

    def loss(*x):
      return jnp.sum(attention(*x, Scoring(Mask(**mask)), backend='xla')[0], dtype=jnp.float32)

    found = roofline.predict(
      jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().as_text(), mesh, chip
    )
  assert found.flops == pytest.approx((2 + 5) * 2 * B * N * H * pairs)
  assert found.seconds > found.flops / 989.4e12 / roofline.CUDNN_EFFICIENCY
  assert any(
    text.startswith('cuDNN attention: the pairs that its mask leaves, at 52% of the peak')
    for text in found.assumptions
  )


@pytest.mark.parametrize('mask, tiles', [(Mask(causal=False), 16 * 16), (Mask(), 16 * 17 // 2)])
def test_our_attention_on_a_gpu_computes_the_blocks_that_its_mask_leaves(topology, mask, tiles):
  """Forward two products of blocks of 128 x 128, backward five of 64 x 128; at a share of the peak
  that was not measured, and says so.
  """
  mesh, chip = one(topology, 'h100:1x1x1')
  x = jax.ShapeDtypeStruct((1, 2048, 4, 128), jnp.bfloat16, sharding=NamedSharding(mesh, P()))

  def loss(*x):
    return attention(*x, Scoring(mask), backend='pallas_gpu')[0].astype(jnp.float32).sum()

  with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().as_text()
  found = roofline.predict(text, mesh, chip)
  narrow = 16 * 32 if not mask.causal else 16 * 17
  flops = 2 * 128 * 4 * (2 * tiles * 128 * 128 + 5 * narrow * 64 * 128)
  assert found.kernels == pytest.approx(
    flops / (hardware.peak(chip, 'bfloat16') * roofline.FLASH_EFFICIENCY)
  )
  assert any('our attention kernels at 52% of the peak' in line for line in found.assumptions)
