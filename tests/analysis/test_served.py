"""Is what is planned of a server what its engine compiles, and the size the largest that fits?"""

import types

import jax
import pytest

from analysis import served
from decode.engine import Engine
from decode.generating import generating
from decode.options import CHUNK
from model.config import ModelConfig
from parallel.mesh import MeshConfig, make_mesh

CONFIG = ModelConfig(vocabulary=264, width=32, layers=2, heads=4, kv_heads=2, feed_forward=64)


@pytest.mark.slow
def test_what_is_planned_is_what_an_engine_has():
  mesh, config = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]), generating(CONFIG)
  program, arrays, sizes = served.lowered(config, mesh, 4, 96, '', reads=True)
  engine = Engine(arrays['parameters'].config, mesh, sizes, vocabulary=config.V)

  def said(tree):
    return [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(tree)]

  assert said((arrays["rows' state"], arrays['cache'])) == said(
    (served.without_cache(engine.state), engine.state.cache)
  )
  # And they can be compiled here, with what an engine passes.
  assert program.compile().memory_analysis().alias_size_in_bytes > 0
  held, row = served.bytes_of(config, mesh, 96, '')
  pool = sum(x.nbytes for x in jax.tree.leaves(engine.state)) / 2
  assert held > 0 and 2 * row == pytest.approx(pool, rel=0.01)


def plans(weights, row, workspace, available, refused=0):
  """Of a device on which a plan of n rows peaks at weights + n * row + workspace."""
  tried = []

  def plan(mode, rows):
    tried.append((mode, rows))
    peak = weights + rows * row + workspace * (1 + (mode == 'read'))
    memory = None if refused and rows > refused else types.SimpleNamespace(peak=peak)
    fits = memory is not None and peak <= available
    return types.SimpleNamespace(fits=fits, memory=memory, seconds=1.0, tokens=128)

  return plan, tried


@pytest.mark.parametrize(
  'workspace, refused, rows', [(0, 0, 48), (100, 0, 40), (100, 30, 30), (4000, 0, 256)]
)
def test_as_many_rows_as_fit(monkeypatch, workspace, refused, rows):
  available = 1000 if workspace < 4000 else 20_000
  mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
  monkeypatch.setattr(served, 'bytes_of', lambda *_: (0, 40))  # of a row of each of 2 parts
  plan, tried = plans(0, 20, workspace, available, refused)
  made = served.serve(CONFIG, mesh, plan, available, 0, 96, '')
  assert made.rows == rows and made.rows % 2 == 0 and tried[-1] == ('read', rows)


def test_a_server_that_does_not_fit_is_refused_by_what_is_lacking(monkeypatch):
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  monkeypatch.setattr(served, 'bytes_of', lambda *_: (3e9, 5e8))
  plan, _ = plans(3e9, 5e8, 0, 2e9)
  with pytest.raises(ValueError, match='of 2.00 GB a device weights take 3.00, and a row of 96'):
    served.serve(CONFIG, mesh, plan, 2e9, 0, 96, '')


def test_times_follow_from_two_programs():
  write = types.SimpleNamespace(seconds=CHUNK * 0.01)
  read = types.SimpleNamespace(seconds=0.004, tokens=2 * 128)
  times = served.PlannedServer(write, read, rows=32, context=2048, parts=2).times()
  assert times['a token of every row'] == pytest.approx(0.01)
  assert times['first token, alone'] == pytest.approx(8 * 0.004 + 0.01)
  assert times['first token, among rows that write'] == pytest.approx(8 * (0.004 + 0.04) + 0.01)
  assert times['tokens/s, nothing to read'] == pytest.approx(3200)
  # 32 answers of 256 tokens: 256 steps, and 16 times the reads of two prompts.
  assert times['tokens/s'] == pytest.approx(32 * 256 / (2.56 + 16 * 8 * 0.004))
