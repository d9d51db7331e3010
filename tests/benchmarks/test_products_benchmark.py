"""Are forms of products measured in turns, and each by what it takes once it is compiled?"""

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
