"""Is the predicted time between the roofline and what is reasonable, and does it add up?"""
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from analysis import hardware, roofline, schedule
from analysis.hlo import Module
from parallel.mesh import MeshConfig, make_mesh


def one(topology, name):
  """A mesh of one device of a topology, and its chip."""
  device = topology(name)[0]
  chip = hardware.lookup(device.device_kind, device.num_cores if device.platform == 'tpu' else None)
  return make_mesh(MeshConfig(), [device]), chip


def product(mesh, size):
  x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
  with jax.set_mesh(mesh):
    return jax.jit(lambda x, y: x @ y).lower(x, x).compile().as_text()


@pytest.mark.parametrize('name', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', *(pytest.param(name, marks=pytest.mark.slow)
                                                                        for name in ('v4:2x2x1', 'tpu7x:2x2x1'))])
def test_a_large_product_comes_close_to_the_peak(topology, name):
  """Clock, cores and peak of the table fit the compiler's own estimate: a wrong one of them shows as a factor."""
  mesh, chip = one(topology, name)
  found = roofline.predict(product(mesh, 4096), mesh, chip)
  assert found.bound == 'compute' and found.flops == 2 * 4096**3
  assert 0.75 < found.roofline['compute'] / found.seconds < 1.0


def test_a_step_adds_up_and_keeps_above_its_roofline(tpu_step):
  found = roofline.predict(tpu_step.text, tpu_step.mesh, tpu_step.chip)
  assert found.seconds == pytest.approx(found.operations + found.kernels + found.copies + sum(found.exposed.values()))
  assert found.operations == pytest.approx(schedule.cycles(tpu_step.text) / tpu_step.chip.clock, rel=0.2)
  # One that waits for another to leave the link counts that time as its own, so that only the sums compare.
  assert min(found.exposed.values()) >= 0 and sum(found.exposed.values()) <= sum(found.links.values()) * 1.001
  assert found.seconds > found.roofline['compute'] and found.bound in found.roofline
  assert found.roofline['links fsdp'] == pytest.approx(sum(s for (_, axes), s in found.links.items() if axes == ('fsdp',)))


KERNEL = """HloModule m, is_scheduled=true
ENTRY %main (x: bf16[1024,1024]) -> bf16[1024,1024] {
  %x = bf16[1024,1024]{1,0} parameter(0)
  ROOT %my_kernel.1 = bf16[1024,1024]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":COST}
}
"""


@pytest.mark.parametrize('cost, seconds', [('"cost_estimate":{"flops":"197000000","transcendentals":"5","bytes_accessed":"1000"}', 1e-6),
                                           ('"cost_estimate":{"flops":"1","bytes_accessed":"819000"}', 1e-6),
                                           ('"body":"x"', 2 * 2**21 / 819e9)])
def test_a_kernel_costs_what_it_declares(topology, cost, seconds):
  mesh, chip = one(topology, 'v5e:2x2')
  found = roofline.predict(KERNEL.replace('COST', '{%s}' % cost), mesh, chip)
  assert found.kernels == found.seconds == pytest.approx(seconds)
  assert bool(found.assumptions) == ('cost_estimate' not in cost)
  assert not found.assumptions or 'kernel my_kernel declares no cost' in found.assumptions[0]


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
  assert found.seconds == pytest.approx(max(4096 / roofline.HOST_BANDWIDTH, found.operations)) and found.copies > 0
  with pytest.raises(ValueError, match='copy-done in main ends nothing that was started there'):
    roofline.predict(CARRIED.replace('get-tuple-element(%loop), index=1', 'get-tuple-element(%loop), index=0'), mesh, chip)


def test_attention_kernels_are_known_by_their_names(topology):
  """jax's splash declares nothing: forward two products over half of T x S pairs, for the keys four, for the queries three."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel, splash_attention_mask as masks
  mesh, chip = one(topology, 'v5e:2x2')
  T, N, H = 512, 2, 128
  run = kernel.make_splash_mha(masks.MultiHeadMask([masks.CausalMask((T, T))] * N), head_shards=1, q_seq_shards=1)
  x = jax.ShapeDtypeStruct((N, T, H), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(mesh.devices.flat[0]))
  loss = lambda q, k, v: run(q, k, v).astype(jnp.float32).sum()
  with jax.default_matmul_precision('default'):  # the kernel knows no other of bf16
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile().as_text()
  found = roofline.predict(text, mesh, chip)
  assert found.flops == (2 + 4 + 3) * N * H * T * T
  assert found.kernels == pytest.approx(found.flops / 0.7 / 197e12) and any('half of all pairs' in text for text in found.assumptions)


def test_the_text_of_a_kernel_holds_its_cost(topology):
  """What Pallas is told as cost_estimate is found again in the compiled program."""
  from jax.experimental import pallas as pl
  mesh, chip = one(topology, 'v5e:2x2')

  def double(x_ref, o_ref):
    o_ref[...] = x_ref[...] * 2
  call = pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct((256, 256), jnp.float32),
                        cost_estimate=pl.CostEstimate(flops=123456, transcendentals=0, bytes_accessed=654321))
  x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(mesh.devices.flat[0]))
  module = Module(jax.jit(call).lower(x).compile().as_text())
  (kernel,) = [i for _, i, _ in module.walk() if i.kernel]
  assert roofline.declared(kernel) == (123456, 654321)


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
  for name in 'abcd':  # read or written through a fusion, a fusion in a fusion, a scatter: a row, an index, a row
    assert roofline.traffic(module, 'main', module['main', name]) == 256 + 4 + 256, name
  on_chip = Module(re.sub(r'\{1,0\}', '{1,0:S(1)}', text))
  assert roofline.traffic(on_chip, 'main', on_chip['main', 'b']) == 4


@pytest.mark.slow
def test_a_gpu_step_is_predicted_from_the_roofline(compile_step):
  step = compile_step('h100:1x1x4')
  found = roofline.predict(step.text, step.mesh, step.chip)
  assert found.seconds >= max(found.roofline['compute'], found.roofline['memory']) and found.operations > 0
  assert {axes for _, axes in found.links} <= {('fsdp',), ('tensor',), ('fsdp', 'tensor')}
