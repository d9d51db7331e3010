"""Do bytes take the links that they have to, and as many of them as share one?"""

import dataclasses

import numpy as np
import pytest

from analysis import hardware, schedule
from tests.analysis.test_schedule import CHIP, fake_mesh


@pytest.mark.parametrize(
  'side, shift, links',
  # A ring of 16, a line of 4 and its wrap, which goes back where nothing else does.
  [(16, 1, 1), (16, 4, 4), (16, 12, 4), (16, 8, 4), (4, 1, 1), (4, 2, 2), (4, 3, 1)],
)
def test_a_permute_takes_its_busiest_link(side, shift, links):
  """All of a row shift at once: with a gap between, each link carries as many of them."""
  mesh = fake_mesh(np.ndindex(side, side), (side, side))
  pairs = tuple((n, (n + shift) % side) for n in range(side))
  permute = schedule.Collective(
    'collective-permute', ('tensor',), 2, 1, 2**20, True, '', pairs[0], 0, pairs
  )
  seconds, far = schedule.Links(mesh, CHIP).seconds(permute)
  assert seconds == pytest.approx(links * 2**20 / 50e9) and far == 0.0
  # Along both dimensions one after the other: the corner is turned on links of its own.
  corner = dataclasses.replace(permute, pairs=((0, side + 1),), group=(0, side + 1))
  assert schedule.Links(mesh, CHIP).seconds(corner)[0] == pytest.approx(2**20 / 50e9)


def test_between_nodes_all_of_an_all_to_all_crosses():
  """Of 32 parts that a GPU has 24 are for other nodes, whoever else is in its own."""
  nodes = fake_mesh([(0, 0, 0)] * 32, (4, 8), platform='gpu')
  for n, device in enumerate(nodes.devices.flat):
    device.process_index = n // 8
  chip = hardware.lookup('NVIDIA H100 80GB HBM3')
  sent = schedule.sent('all-to-all', 2**30, 2**30, 32)
  group = tuple(range(32))
  exchange = schedule.Collective('all-to-all', ('expert',), 32, 1, sent, False, '', group)
  near, far = schedule.Links(nodes, chip).seconds(exchange)
  assert far == pytest.approx(2**30 * 24 / 32 / 50e9)
  assert near == pytest.approx(2**30 * 7 / 8 / 450e9)
  # What is gathered is the same for all of a node: each fetches a part.
  gather = dataclasses.replace(exchange, kind='all-gather')
  assert schedule.Links(nodes, chip).seconds(gather)[1] == pytest.approx(far / 8)
