"""Are collectives found, attributed to mesh axes, counted and measured;
and is what runs beside them told from what waits?
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from analysis import hardware, roofline, schedule
from analysis.hlo import Module
from parallel.mesh import MeshConfig, make_mesh


@pytest.fixture(scope='module')
def mesh():
  return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def compiled(function, mesh, specs, out, shape=(8, 16)):
  x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, specs))
  with jax.set_mesh(mesh):
    return (
      jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False))
      .lower(x)
      .compile()
      .as_text()
    )


SHARD = 4 * 8 * 16 // 4  # bytes of a device's part of [8, 16] f32 split four ways
CASES = {
  'all-reduce': (
    lambda x: jax.lax.psum(x, ('data', 'tensor')),
    ('data', 'tensor'),
    2 * SHARD * 3 // 4,
  ),
  'all-gather': (lambda x: jax.lax.all_gather(x, 'fsdp', tiled=True), ('fsdp',), SHARD),
  'reduce-scatter': (lambda x: jax.lax.psum_scatter(x, 'fsdp', tiled=True), ('fsdp',), SHARD // 2),
  'all-to-all': (
    lambda x: jax.lax.all_to_all(x, 'tensor', 1, 0, tiled=True),
    ('tensor',),
    SHARD // 2,
  ),
  'collective-permute': (
    lambda x: jax.lax.ppermute(x, 'tensor', [(0, 1), (1, 0)]),
    ('tensor',),
    SHARD,
  ),
}


@pytest.mark.parametrize('kind', CASES)
def test_kind_axes_and_bytes(kind, mesh):
  function, axes, nbytes = CASES[kind]
  (found,) = schedule.collectives(compiled(function, mesh, P('data', 'tensor'), P()), mesh)
  assert (found.kind, found.axes, found.nbytes, found.count) == (kind, axes, nbytes, 1)
  assert found.size == (4 if len(axes) == 2 else 2)


OPERANDS = 'bf16[32,256]{1,0}, bf16[64,256]{1,0}'
RESULTS = 'bf16[256,256]{1,0}, bf16[512,256]{1,0}'
COMBINED = f"""
HloModule m, is_scheduled=true, num_partitions=8

ENTRY %main (a: bf16[32,256], b: bf16[64,256]) -> bf16[256,256] {{
  %a = bf16[32,256]{{1,0}} parameter(0)
  %b = bf16[64,256]{{1,0}} parameter(1)
  %start = (({OPERANDS}), ({RESULTS})) all-gather-start(%a, %b), channel_id=1, \
replica_groups={{{{0,1,2,3,4,5,6,7}}}}, dimensions={{0}}, use_global_device_ids=true
  %done = ({RESULTS}) all-gather-done(%start)
  ROOT %first = bf16[256,256]{{1,0}} get-tuple-element(%done), index=0
}}
"""


def test_gathers_that_are_one_count_together():
  """XLA for GPUs starts several at once: operands in a tuple, and results in another."""
  (found,) = schedule.collectives(COMBINED, make_mesh(MeshConfig(fsdp=8)))
  assert (found.kind, found.axes) == ('all-gather', ('fsdp',))
  assert found.nbytes == 2 * (256 + 512) * 256 * 7 // 8


def test_a_collective_in_a_loop_counts_as_often_as_it_runs(mesh):
  def step(x, _):
    return (jax.lax.psum(x, 'fsdp') / 2, None)

  text = compiled(
    lambda x: jax.lax.scan(lambda x, _: jax.lax.scan(step, x, None, length=3), x, None, length=5)[
      0
    ],
    mesh,
    P('data'),
    P('data'),
  )
  (found,) = schedule.collectives(text, mesh)
  assert found.count == 15 and found.total == 15 * 4 * 4 * 16
  assert (found.kind, found.axes) == ('all-reduce', ('fsdp',))


WAYS = {  # the groups of `tensor` in a mesh of data 2 x fsdp 2 x tensor 2, then those of `fsdp`
  'tensor': (
    'replica_groups={{0,1},{2,3},{4,5},{6,7}}',
    'replica_groups=[4,2]<=[8]',
    "replica_groups=mesh['a'=4,'b'=2] {'b'}",
    "replica_groups=mesh['b'=2,'a'=4], device_ids=([4,2]T(1,0)) {'b'}",
    "replica_groups=mesh['a'=8] {'a':(4)2}",
  ),
  'fsdp': (
    'replica_groups={{0,2},{1,3},{4,6},{5,7}}',
    'replica_groups=[4,2]<=[2,2,2]T(0,2,1)',
    "replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}",
    "replica_groups=mesh['a'=8,'b'=1] {'a':(2)2}",
  ),
}


@pytest.mark.parametrize('axis', WAYS)
def test_every_way_to_write_groups_is_read(axis, mesh):
  wanted = {tuple(sorted(group)) for group in schedule.groups(WAYS[axis][0], 8)}
  for text in WAYS[axis]:
    found = schedule.groups(f', channel_id=1, {text}, use_global_device_ids=true', 8)
    assert {tuple(sorted(group)) for group in found} == wanted, text
    assert all(schedule.axes_of(group, mesh) == (axis,) for group in found)
  assert schedule.groups('replica_groups={}', 4) == [(0, 1, 2, 3)]
  with pytest.raises(ValueError, match='replica groups in an unknown form'):
    schedule.groups("replica_groups=mesh['a'=8] {'a':x}", 8)


# Two MB gathered by four: 1.5 MB on the wire. libtpu's chain: a start,
# a product that carries it on, the fusion that ends it.
CHAIN = """HloModule m, is_scheduled=true
%start (p: bf16[256,1024]) -> (bf16[256,1024], bf16[1024,1024], u32[]) {
  %p = bf16[256,1024]{1,0} parameter(0)
  %all-gather.1 = bf16[1024,1024]{1,0} all-gather(%p), channel_id=7, \
replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true
  ROOT %c = (bf16[256,1024]{1,0}, bf16[1024,1024]{1,0}, u32[]) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}
%async_collective_fusion.3 (p.1: bf16[256,1024], q: bf16[1024,1024]) -> \
(f32[8], bf16[256,1024], bf16[1024,1024]) {
  %p.1 = bf16[256,1024]{1,0} parameter(0)
  %q = bf16[1024,1024]{1,0} parameter(1)
  %all-gather.2 = bf16[1024,1024]{1,0} all-gather(%p.1), channel_id=7, \
replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true
  %zero = f32[8]{0} constant({...})
  ROOT %t = (f32[8]{0}, bf16[256,1024]{1,0}, bf16[1024,1024]{1,0}) tuple(%zero, %p.1, %all-gather.2)
}
%done (p.2: bf16[256,1024], q.2: bf16[1024,1024]) -> bf16[1024,1024] {
  %p.2 = bf16[256,1024]{1,0} parameter(0)
  %q.2 = bf16[1024,1024]{1,0} parameter(1)
  %all-gather.3 = bf16[1024,1024]{1,0} all-gather(%p.2), channel_id=7, \
replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true
  ROOT %c.2 = bf16[1024,1024]{1,0} custom-call(%p.2, %q.2, %all-gather.3), \
custom_call_target="AsyncCollectiveDone"
}
ENTRY %main (x: bf16[256,1024]) -> bf16[1024,1024] {
  %x = bf16[256,1024]{1,0} parameter(0)
  %acs = (bf16[256,1024]{1,0}, bf16[1024,1024]{1,0}, u32[]) fusion(%x), kind=kCustom, calls=%start
  %a = bf16[256,1024]{1,0} get-tuple-element(%acs), index=0
  %b = bf16[1024,1024]{1,0} get-tuple-element(%acs), index=1
  %work = (f32[8]{0}, bf16[256,1024]{1,0}, bf16[1024,1024]{1,0}) fusion(%a, %b), kind=kOutput, \
calls=%async_collective_fusion.3, BACKEND
  %c = bf16[256,1024]{1,0} get-tuple-element(%work), index=1
  %d = bf16[1024,1024]{1,0} get-tuple-element(%work), index=2
  ROOT %acd = bf16[1024,1024]{1,0} fusion(%c, %d), kind=kCustom, calls=%done
}
"""
CHIP = hardware.lookup('TPU v5 lite')
# The same on a SparseCore, in two rings, beside a product.
CALLED = """HloModule m, is_scheduled=true
%called (p: bf16[256,1024], token: token[]) -> bf16[1024,1024] {
  %token = token[] parameter(1)
  %p = bf16[256,1024]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[1024,1024]{1,0} all-gather(%p), channel_id=7, \
replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true, \
backend_config={"device_type":"DEVICE_TYPE_SPARSECORE","collective_offload_config":\
{"color_strategies":[{"phase_rings":[{"ring_type":"CW"}]},{"phase_rings":[{"ring_type":"CCW"}]}]}}
}, execution_thread="sparsecore"

%double (p.1: bf16[256,1024]) -> bf16[256,1024] {
  %p.1 = bf16[256,1024]{1,0} parameter(0)
  ROOT %d = bf16[256,1024]{1,0} add(%p.1, %p.1)
}

ENTRY %main (x: bf16[256,1024]) -> bf16[1024,1024] {
  %x = bf16[256,1024]{1,0} parameter(0)
  %ready = token[] custom-call(), custom_call_target="PrepareAsyncCallDone"
  %begin = ((bf16[256,1024]{1,0}, token[]), bf16[1024,1024]{1,0}) call-start(%x, %ready), \
async_execution_thread="sparsecore", to_apply=%called
  %work = bf16[256,1024]{1,0} fusion(%x), kind=kLoop, calls=%double, BACKEND
  ROOT %end = bf16[1024,1024]{1,0} call-done(%begin)
}
"""


@pytest.mark.parametrize('cycles, exposed', [(1500, 14.728e-6), (15000, 5.728e-6), (150_000, 0.0)])
def test_a_chain_of_fusions_is_one_collective_beside_its_work(cycles, exposed):
  mesh = make_mesh(MeshConfig(fsdp=4, data=1), jax.devices()[:4])
  text = CHAIN.replace(
    'BACKEND', f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
  )
  (found,) = schedule.collectives(text, mesh)
  assert (found.kind, found.started, found.nbytes, found.axes) == (
    'all-gather',
    True,
    2**21 * 3 // 4,
    ('fsdp',),
  )
  assert schedule.cycles(text) == cycles
  walk = roofline._Walk(Module(text), mesh, CHIP, 'bfloat16')
  walk.tpu, walk.links = True, Fixed(100e9)
  sums = walk.run('main')
  assert sums['exposed', 'all-gather', ('fsdp',)] == pytest.approx(exposed, abs=1e-9)
  assert sums['time'] == pytest.approx(max(cycles / 1.5e9, 2**21 * 3 / 4 / 100e9))


@pytest.mark.parametrize('cycles', [0, 6000, 60_000])
def test_a_sparse_cores_collective_takes_its_rings(cycles):
  """Two of them: two links of 50 GB/s one way, where a TensorCore would use the torus."""
  mesh = make_mesh(MeshConfig(fsdp=4, data=1), jax.devices()[:4])
  text = CALLED.replace(
    'BACKEND', f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
  )
  (found,) = schedule.collectives(text, mesh)
  assert (found.kind, found.started, found.nbytes, found.rings, found.count) == (
    'all-gather',
    True,
    2**21 * 3 // 4,
    2,
    1,
  )
  walk = roofline._Walk(Module(text), mesh, CHIP, 'bfloat16')
  walk.tpu = True
  sums, work = walk.run('main'), cycles / 1.5e9
  key, takes = ('all-gather', ('fsdp',)), 2**21 * 3 / 4 / 100e9
  assert sums['links', *key] == pytest.approx(takes)
  assert sums['exposed', *key] == pytest.approx(max(0, takes - work)) and sums['copies'] == 0
  assert sums['between', *key] == pytest.approx(work)
  assert sums['time'] == pytest.approx(max(takes, work))
  assert any('collectives on the SparseCore' in text for text in walk.assumptions)


class Fixed:
  """Links of one speed."""

  def __init__(self, bandwidth):
    self.bandwidth = bandwidth

  def seconds(self, c):
    return c.nbytes / self.bandwidth, 0.0


def fake_mesh(coords, shape, **of_device):
  """A mesh of made-up TPU devices at these places of a torus."""
  devices = [
    type(
      'Device',
      (),
      dict(coords=list(place), slice_index=0, process_index=0, platform='tpu') | of_device,
    )()
    for place in coords
  ]
  return type(
    'Mesh',
    (),
    dict(devices=np.array(devices, object).reshape(shape), axis_names=('fsdp', 'tensor')),
  )()


def test_links_are_those_of_the_torus_that_a_group_spans():
  chip = hardware.lookup('TPU v5p')  # three dimensions of two links, 100 GB/s each way on each
  torus = fake_mesh(np.ndindex(4, 4, 4), (16, 4))
  links = schedule.Links(torus, chip)
  ring, whole, part = tuple(range(4)), tuple(range(64)), (0, 1)
  assert links.bandwidth(ring) == pytest.approx(200e9) and links.bandwidth(whole) == pytest.approx(
    600e9
  )
  assert links.bandwidth(part) == pytest.approx(100e9)  # half a ring is a line
  # A diagonal: two dimensions, shared with the other diagonal
  assert links.bandwidth((0, 5)) == pytest.approx(100e9)
  line = schedule.Links(fake_mesh(np.ndindex(2, 2, 2), (4, 2)), chip)
  assert line.bandwidth((0, 1)) == pytest.approx(100e9) and line.bandwidth(
    tuple(range(8))
  ) == pytest.approx(300e9)
  flat = schedule.Links(fake_mesh(np.ndindex(16, 16), (16, 16)), CHIP)
  assert flat.bandwidth(tuple(range(16))) == pytest.approx(100e9)


def crossing(coords, groups, chip, sides, nbytes):
  """Seconds, at least, of all-to-alls that run in all groups at once: over every cut of the torus
  in two, the bytes that have to cross it one way, by the links that do.
  """
  link, most = chip.interconnect / 2 / (2 * chip.torus), 0.0
  for dimension, side in enumerate(sides):
    rows = math.prod(sides) // side
    for begin, end in itertools.combinations(range(side + 1), 2):
      inside = (coords[:, dimension] >= begin) & (coords[:, dimension] < end)
      if inside.all():
        continue
      pairs = sum(inside[group].sum() * (~inside[group]).sum() for group in groups)
      wrapped = side % chip.wraps == 0
      ends = 2 if wrapped else (begin > 0) + (end < side)
      most = max(most, pairs * nbytes / len(groups[0]) / (rows * ends * link))
  return most


@pytest.mark.parametrize('axes', [(0,), (1,), (0, 1)])
@pytest.mark.parametrize(
  'kind, sides, shape',
  [
    ('TPU v5e', (4, 4), (4, 4)),
    ('TPU v5e', (4, 8), (8, 4)),
    ('TPU v5e', (16, 16), (16, 16)),
    ('TPU v5e', (16, 16), (8, 32)),
    ('TPU v6e', (8, 8), (2, 32)),
    ('TPU v5p', (2, 2, 4), (4, 4)),
    ('TPU v5p', (4, 4, 4), (8, 8)),
    ('TPU v5p', (4, 4, 8), (16, 8)),
    ('TPU v5p', (8, 8, 8), (8, 64)),
  ],
)
def test_no_all_to_all_beats_what_crosses_a_cut(kind, sides, shape, axes):
  chip = hardware.lookup(kind)
  coords = np.array(list(np.ndindex(*sides)))
  links = schedule.Links(fake_mesh(coords.tolist(), shape), chip)
  numbers = np.moveaxis(np.arange(len(coords)).reshape(shape), axes, range(-len(axes), 0))
  groups = numbers.reshape(-1, math.prod(shape[axis] for axis in axes))
  size, nbytes = groups.shape[1], 2**30
  sent = schedule.sent('all-to-all', nbytes, nbytes, size)
  bound = crossing(coords, groups, chip, sides, nbytes)
  for group in groups:
    exchange = schedule.Collective('all-to-all', ('fsdp',), size, 1, sent, False, '', tuple(group))
    assert links.seconds(exchange)[0] >= bound * (1 - 1e-6)


def test_an_all_to_all_of_a_ring_is_what_crosses_its_middle():
  # Of 16 chips in a ring, 16 x / 4 cross the middle one way, over two links of 50 GB/s.
  flat = schedule.Links(fake_mesh(np.ndindex(16, 16), (16, 16)), CHIP)
  sent = schedule.sent('all-to-all', 2**30, 2**30, 16)
  ring = schedule.Collective('all-to-all', ('tensor',), 16, 1, sent, False, '', tuple(range(16)))
  assert flat.seconds(ring) == (pytest.approx(16 * 2**30 / 8 / 50e9), 0.0)
  # What members pass on is not bound by it.
  gather = dataclasses.replace(ring, kind='all-gather')
  assert flat.seconds(gather)[0] == pytest.approx(sent / 100e9)


def test_a_permute_has_all_its_pairs(mesh):
  function, *_ = CASES['collective-permute']
  (found,) = schedule.collectives(compiled(function, mesh, P('data', 'tensor'), P()), mesh)
  assert {frozenset(pair) for pair in found.pairs} == {frozenset((n, n + 1)) for n in (0, 2, 4, 6)}


def test_between_slices_a_member_exchanges_its_part_or_it_raises():
  mesh = fake_mesh([*np.ndindex(2, 2)] * 2, (4, 2))
  for n, device in enumerate(mesh.devices.flat):
    device.slice_index = n // 4

  def reduce(group, nbytes):
    return schedule.Collective('all-reduce', ('fsdp',), len(group), 1, nbytes, False, '', group)

  links = schedule.Links(mesh, CHIP)
  whole = 1e9  # an all-reduce of a GB: 2 x 7/8 of it is sent in all
  near, far = links.seconds(
    reduce(tuple(range(8)), schedule.sent('all-reduce', int(whole), int(whole), 8))
  )
  assert near == pytest.approx(2 * whole * 3 / 4 / 100e9) and far == pytest.approx(
    2 * whole / 2 / 4 / 3.125e9
  )
  assert links.seconds(reduce((0, 4), int(whole))) == (0.0, pytest.approx(whole / 3.125e9))
  assert links.seconds(reduce((0, 1), int(whole)))[1] == 0
  with pytest.raises(
    ValueError, match='no bandwidth between slices is tabled for a TPU v4; add it'
  ):
    schedule.Links(mesh, hardware.lookup('TPU v4')).seconds(reduce((0, 4), 8))


def test_between_slices_a_program_sends_and_receives(topology):
  """What libtpu makes of a mean over `data` and a shift of `stage`,
  which cross slices, and of a sum over fsdp, which does not.
  """
  mesh = make_mesh(MeshConfig(data=2, stage=2, fsdp=2, tensor=2), topology('4*v5e:2x2'))

  def exchange(x):
    total = jax.lax.psum(x, 'fsdp') + jax.lax.ppermute(x, 'stage', [(0, 1), (1, 0)])
    return total @ total, jax.lax.psum(x, 'data')

  text = compiled(
    exchange,
    mesh,
    P(('data', 'stage', 'fsdp', 'tensor')),
    P(('data', 'stage', 'fsdp', 'tensor')),
    (16 * 1024, 1024),
  )
  found = {(c.kind, c.axes): c for c in schedule.collectives(text, mesh)}
  assert {key: c.nbytes for key, c in found.items()} == dict.fromkeys(
    [('all-reduce', ('data',)), ('all-reduce', ('fsdp',)), ('collective-permute', ('stage',))],
    4 * 1024**2,
  )
  assert all(
    len({mesh.devices.flat[n].slice_index for n in c.group}) == (1 if 'fsdp' in c.axes else 2)
    for c in found.values()
  )
  predicted = roofline.predict(text, mesh, CHIP, 'float32')
  assert (
    predicted.roofline['network data']
    == predicted.roofline['network stage']
    == pytest.approx(4 * 1024**2 / CHIP.network)
  )
  assert predicted.seconds >= 2 * 4 * 1024**2 / CHIP.network


def test_every_slice_may_take_part(mesh):
  """The short form of an exchange between all slices, and the devices that are meant."""
  devices = [
    type(
      'Device', (), {'id': 100_000 * (n // 4 + 1) + n % 4, 'slice_index': n // 4, 'platform': 'tpu'}
    )()
    for n in range(8)
  ]
  slices = type(
    'Mesh',
    (),
    {'devices': np.array(devices, object).reshape(2, 4), 'axis_names': ('data', 'fsdp'), 'size': 8},
  )()
  send = (
    'HloModule m\n\nENTRY %main (x: f32[1024]) -> token[] {\n'
    '  %x = f32[1024]{0} parameter(0)\n'
    '  %t = token[] after-all()\n'
    '  ROOT %send.1 = (f32[1024]{0}, u32[], token[]) send(%x, %t), is_host_transfer=true, '
    'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_megascale_target="TARGET",_xla_megascale_transfer_type="TYPE"}\n}\n'
  )
  for target, kind in (
    ('{1:2}x{0:3}', 'all-reduce'),
    ('{1,2}x{0:3}', 'all-reduce'),
    ('{{100000,200000},{100001,200001}}', 'all-gather'),
  ):
    (found,) = schedule.collectives(
      send.replace('TARGET', target).replace('TYPE', kind.upper().replace('-', '_')), slices
    )
    assert (found.kind, found.axes, found.group, found.nbytes) == (kind, ('data',), (0, 4), 4096)
  with pytest.raises(ValueError, match="kind of transfer between slices='one' is unknown"):
    schedule.collectives(send.replace('TARGET', '{1,2}x{0:3}').replace('TYPE', 'ONE'), slices)


@pytest.mark.slow
def test_a_step_on_a_tpu_moves_what_its_sharding_says(tpu_step):
  """Weights are gathered over fsdp; over tensor activations are gathered, and summed and dealt out;
  nothing moves over an axis of size 1.
  """
  found = schedule.collectives(tpu_step.text, tpu_step.mesh)
  assert ('all-gather', ('fsdp',)) in {(c.kind, c.axes) for c in found}
  assert {axis for c in found for axis in c.axes} == {'fsdp', 'tensor'}
  # Megatron with sequence parallelism: of every layer, [B, T, D] is gathered before attention and
  # before the feed-forward, and reduce-scattered after each; backward the same.
  # A ring of 2 sends half of it.
  model, T = tpu_step.config.model, tpu_step.config.data.sequence_length
  # Bytes of a device's activations, bf16
  half = 2 * tpu_step.config.data.batch_size // 2 * T * model.D // 2
  for kind in ('all-gather', 'reduce-scatter'):
    assert (
      sum(c.total for c in found if c.kind == kind and c.axes == ('tensor',) and c.nbytes == half)
      >= 4 * model.L * half
    ), kind
