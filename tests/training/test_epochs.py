"""Are epochs of several sources those of each, or refused?"""

import collections
import types

import jax
import pytest

import train
from data.loader import row_sequence
from data.tokenizers import ByteTokenizer
from parallel.mesh import MeshConfig, make_mesh
from tests.training.conftest import tiny


class Rows:
  """A source of which the number of its rows, its weight and its name matter."""

  def __init__(self, name: str, rows: int, weight: float):
    self.name, self._rows, self.weight = name, rows, weight

  def __len__(self):
    return self._rows


def read(monkeypatch, tmp_path, *sources, epochs=2.0):
  """What train.py makes of a run of these sources, and what it says."""
  rows, lines = sum(map(len, sources)), []
  prepared = types.SimpleNamespace(train=sources, rows=rows, tokenizer=ByteTokenizer(), key='a-16')
  monkeypatch.setattr(train.program, 'read', lambda *_: prepared)
  config = tiny(train={'steps': 0, 'epochs': epochs}, data={'batch_size': 4})
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  _, config = train.read(config, tmp_path, mesh, False, lines.append)
  return prepared, config, lines


def test_weights_in_proportion_to_rows_make_an_epoch_of_each(monkeypatch, tmp_path):
  sources = Rows('small', 30, 1.0), Rows('large', 90, 3.0)
  prepared, config, lines = read(monkeypatch, tmp_path, *sources)
  sequence = row_sequence(prepared, config.data)
  drawn = [sequence[i] for i in range(config.train.steps * config.data.batch_size)]
  counts = collections.Counter(drawn)
  assert len(counts) == 120 and set(counts.values()) == {2}
  assert lines == [
    'train.epochs=2 of 120 rows: 60 steps; passes: 2 of small (30 rows, weight 1), 2 of large '
    '(90 rows, weight 3)'
  ]


def test_near_proportions_are_said(monkeypatch, tmp_path):
  _, _, lines = read(monkeypatch, tmp_path, Rows('a', 100, 1.0), Rows('b', 108, 1.0))
  assert '2.08 of a (100 rows' in lines[0] and '1.93 of b (108 rows' in lines[0]


def test_weights_that_make_no_epoch_of_any_are_refused(monkeypatch, tmp_path):
  """The first one would be gone through 184 times, and 18% of the second."""
  sources = Rows('new', 1_000, 1.0), Rows('replayed', 100_000, 0.1)
  words = (
    r'train.epochs=2 of 101,000 rows: 50,500 steps.*184 of new \(1,000 rows, weight 1\), 0.184 of '
    r'replayed \(100,000 rows, weight 0.1\).*train.steps=50500.*in proportion to their rows: 1, 100'
  )
  with pytest.raises(ValueError, match=words):
    read(monkeypatch, tmp_path, *sources)


def test_one_source_and_prompts_need_no_weights(monkeypatch, tmp_path):
  _, _, lines = read(monkeypatch, tmp_path, Rows('a', 100, 0.3))
  assert lines == ['train.epochs=2 of 100 rows: 50 steps']
  _, _, lines = read(monkeypatch, tmp_path, *(PromptLike() for _ in range(8)))
  assert lines == ['train.epochs=2 of 8 rows: 4 steps']


class PromptLike:
  """A prompt has no weight."""

  def __len__(self):
    return 1
