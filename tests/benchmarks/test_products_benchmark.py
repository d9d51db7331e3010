"""Are forms of products measured in turns, and each by what it takes once it is compiled?"""

import numpy as np
import pytest

from benchmarks import products


def test_the_first_turn_counts_nowhere():
  turns, now = [], [0.0]

  def run(name, seconds):
    turns.append(name)
    now[0] += seconds if turns.count(name) > 1 else 100

  runs = {name: lambda name=name, x=x: run(name, x) for name, x in (('a', 0.25), ('b', 0.5))}
  assert products.in_turns(runs, 3, lambda: now[0]) == {'a': 250, 'b': 500}
  assert turns == ['a', 'b'] * 4


def test_every_form_is_measured(monkeypatch):
  monkeypatch.setattr(products, 'BYTES', 1)
  made = products.products(8, 16, 3)
  assert {'inputs in front', 'outputs in front', products.OURS} <= made.keys()
  assert all(each > 0 for each in made.values())


def test_large_products_are_counted_and_multiplied_as_training_does(monkeypatch):
  draw = np.random.default_rng(0)
  x, w, dy = (draw.standard_normal(shape) for shape in ((5, 3), (3, 4), (5, 4)))
  given = {'x': x, 'w': w, 'dy': dy}
  wanted = {
    'x w': np.einsum('tk,kn->tn', x, w),
    'dy w.T': np.einsum('tn,kn->tk', dy, w),
    'x.T dy': np.einsum('tk,tn->kn', x, dy),
  }
  for name, (left, right, form) in products.TRAINED.items():
    np.testing.assert_allclose(form(given[left], given[right]), wanted[name])

  monkeypatch.setattr(products, 'in_turns', lambda runs, _: {name: 2.0 for name in runs})
  made = products.large(8, 16, 1000)
  assert {*made} == {*wanted} and {*products.LIBRARIES} <= {*made['x w']}
  # 2 x 1000 x 8 x 16 operations in 2 ms.
  assert all(rate == pytest.approx(0.128) for rates in made.values() for rate in rates.values())
