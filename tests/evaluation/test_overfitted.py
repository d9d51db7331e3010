"""Is a model that was overfitted on purpose told to have forgotten, and an unchanged one to have
kept everything?
"""

import json
import random

import jax
import pytest

from decode.generator import Generator
from evaluation import compare, page, running
from evaluation.examples import Manner
from evaluation.task import MultipleChoice, Task
from parallel.mesh import MeshConfig, make_mesh
from tests.evaluation.test_memorisation import TOKENIZER, learned, new_model

WORDS = ('sun', 'fog', 'elm', 'owl')
DRAW = random.Random(0)
# What it knows first, and what it is tuned for: of each question one of the words, by no rule.
KNOWN, TARGET = (
  [{'q': f'{letter}{i:02}', 'words': WORDS, 'a': DRAW.randrange(4)} for i in range(n)]
  for letter, n in (('k', 40), ('t', 4))
)


def texts(rows) -> list[str]:
  return [f'{row["q"]} {row["words"][row["a"]]}' for row in rows]


def task(rows) -> Task:
  kind = MultipleChoice('words', 'a', normalise='sum')
  return Task(kind, lambda: iter(rows), prompt='{{ q }}')


@pytest.mark.slow
def test_who_was_overfitted_has_forgotten_and_who_is_unchanged_nothing(tmp_path, capsys):
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    before, _ = learned(new_model(), texts(KNOWN), 300)
    after, _ = learned(before, texts(TARGET), 100, 0.03, 0.03)
  for name, model in (('before', before), ('again', before), ('after', after)):
    asked = {'known': task(KNOWN), 'target': task(TARGET)}
    (tmp_path / name).mkdir()
    of = Generator(model, TOKENIZER, mesh), asked, [0], Manner(), {'workdir': name}
    _, failed = running.evaluate(*of, tmp_path / name, lambda line: None)
    assert not failed
    page.write(tmp_path / name, {'workdir': name}, {})

  def compared(name: str) -> dict[str, dict]:
    compare.main([str(tmp_path / 'before'), str(tmp_path / name), '--target=target'])
    values = json.loads((tmp_path / name / compare.VALUES).read_text())
    return {each['task']: each for each in values['after'][str(tmp_path / name)]}

  changed = compared('after')
  assert changed['known-0']['before'] > 0.9 and changed['target-0']['after'] == 1
  assert changed['known-0']['corrected']['high'] < 0.8
  assert changed['known-0']['verdict'] == 'WARNING: below 80%'
  assert 'known-0: WARNING: below 80%: retention' in capsys.readouterr().out
  kept = compared('again')['known-0']
  assert kept['verdict'] == 'kept' and 'WARNING' not in capsys.readouterr().out
  for retention in (kept['retention'], kept['corrected']):
    assert retention['value'] == retention['low'] == retention['high'] == 1
