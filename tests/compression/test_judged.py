"""Are two runs judged alike: by their bytes, their speed, and what they would take elsewhere? And
is a judgement that was killed gone on with?
"""

import json
import math
import types

import jax
import pytest

import convert
from compression.kept import Kept
from data.tokenizers import ByteTokenizer
from decode.generator import Generator
from model import params, transformer
from model.config import ModelConfig, MoEConfig
from tests.model import laws
from workdir import judged

TEXT = 'A few words, to be read by both. ' * 2


class Written:
  """In the place of a Generator: what it was asked, and how fast it says that it was."""

  def __init__(self, name, asked, speeds):
    self.name, self._asked, self._speeds = name, asked, iter(speeds)
    generation = {'eos_token_id': [7, 9]}
    self.tokenizer = types.SimpleNamespace(eos=7, vocabulary=300, generation=generation)
    config = types.SimpleNamespace(max_length=16, encoder_layers=0, causal=True)
    self.model = types.SimpleNamespace(config=config)

  def encoded(self, text):
    return [*text.encode()]

  def __call__(self, prompts, **options):
    self._asked.append((self.name, options))
    self.report = types.SimpleNamespace(tokens_per_second=next(self._speeds))


def test_both_write_in_turn_and_nothing_ends_them():
  """The first round compiles, and of the others the best counts."""
  asked = []
  models = Written('a', asked, [9.0, 4.0, 5.0, 3.0]), Written('b', asked, [8.0, 5.0, 6.0, 7.0])
  assert judged._speeds(models, [1, 2], 16) == [5.0, 7.0]
  assert [name for name, _ in asked] == ['a', 'b'] * 4
  for _, options in asked:
    assert options['logit_bias'] == {7: -math.inf, 9: -math.inf}
    assert options['max_new_tokens'] == 14 and options['temperature'] == 0


def test_a_topology_without_a_compiler_costs_no_judgement(tmp_path, monkeypatch):
  """Nothing is read before it is refused, with one message; what does not fit is a figure."""
  monkeypatch.setattr(judged.Generator, 'load', lambda directory: Written(directory, [], []))
  config = types.SimpleNamespace(model=types.SimpleNamespace(max_length=16))
  monkeypatch.setattr(judged, 'config_of', lambda directory: config)
  monkeypatch.setattr(judged, '_sums', lambda *_: pytest.fail('texts are read'))
  (tmp_path / 'text').write_text(TEXT)

  def missing(*_, **__):
    raise ImportError('no compiler for tpu is installed; pip install it')

  monkeypatch.setattr('analysis.predicted.ms_per_token', missing)
  command = ['judge', 'a', 'b', f'--text={tmp_path}/text', '--topology=v5e:1x1']
  with pytest.raises(SystemExit, match='error: no compiler for tpu is installed; pip install it'):
    convert.main(command)

  answers = iter([jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 16.1G of 15.7G'), 2.5])

  def first_not(*_, **__):
    if isinstance(answer := next(answers), Exception):
      raise answer
    return answer

  monkeypatch.setattr('analysis.predicted.ms_per_token', first_not)
  assert judged._predicted(['a', 'b'], ['v5e:1x1']) == {'v5e:1x1': [None, 2.5]}


def pair(monkeypatch, config, one_device) -> dict[str, Generator]:
  """A model and what it is in bytes, which runs called so are taken to hold."""
  model = jax.jit(lambda: transformer.init(config, 0))()
  models = {
    name: Generator(model, ByteTokenizer(), one_device, weights)
    for name, weights in (('before', ''), ('after', 'int8'))
  }
  for name, generator in models.items():
    generator.identity = f'digest of {name}'
  monkeypatch.setattr(judged.Generator, 'load', lambda path: models[path.name])
  monkeypatch.setattr(judged, '_on_disk', lambda directory: 1)
  run = types.SimpleNamespace(model=config)
  monkeypatch.setattr(judged, 'config_of', lambda directory: run)
  return models


@pytest.mark.slow
def test_a_judgement_that_was_killed_goes_on_with_the_same_bits(tmp_path, one_device, monkeypatch):
  """Between texts and between layers; parts that are damaged, or of other texts, are judged anew,
  and that is said.
  """
  pair(
    monkeypatch,
    ModelConfig(**laws.TINY | {'vocabulary': 260, 'layers': 1, 'max_length': 16}),
    one_device,
  )
  monkeypatch.setattr(judged, '_speeds', lambda *_: [2.0, 3.0])
  texts = [tmp_path / f'text{i}' for i in range(6)]
  for i, path in enumerate(texts):
    path.write_text(f'{i} {TEXT}')
  after, lines, written = tmp_path / 'after', [], Kept.write
  after.mkdir()

  def run(limit=0):
    lines.clear()
    judged.judge(tmp_path / 'before', after, texts, limit, 8, [], lines.append)
    return {path.name: path.read_bytes() for path in sorted(after.iterdir())}

  def killed(last, limit=0):
    def write(self, name, part):
      written(self, name, part)
      if name == last:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
      patch.setattr(Kept, 'write', write)
      with pytest.raises(KeyboardInterrupt):
        run(limit)
    return sorted(path.stem for path in (after / judged.PARTS).glob('*.part'))

  killed('texts from 1 to 4', limit=4)
  whole = run()  # of other texts
  assert any('parts of other work' in line and 'done anew' in line for line in lines)
  assert not any('done before' in line for line in lines) and len(whole) == 3
  assert killed('texts from 1 to 4') == ['texts-from-1-to-4']
  assert len(killed('layer 0 alone')) == 4  # the head's, too
  path = after / judged.PARTS / 'texts-from-5-to-6.part'
  path.write_bytes(path.read_bytes()[:-1] + b'?')
  assert run() == whole and not (after / judged.PARTS).exists()
  assert f'NOTE: {path} is damaged; texts from 5 to 6 is done again' in lines
  before = 'texts from 1 to 4', 'the rest alone', 'layer 0 alone'
  assert [line for line in lines if 'before' in line] == [f'{name}: done before' for name in before]


@pytest.mark.slow
def test_bytes_in_memory_are_of_all_that_lies_there(tmp_path, one_device, monkeypatch, capsys):
  """All experts and the table that a head of its own leaves; a token reads a part of them."""
  moe = MoEConfig(experts=4, per_token=1, feed_forward=8)
  config = ModelConfig(**laws.TINY | {'vocabulary': 260, 'moe': moe, 'max_length': 64})
  models = pair(monkeypatch, config, one_device)
  monkeypatch.setattr('analysis.predicted.ms_per_token', lambda *_, **__: None)
  (tmp_path / 'text').write_text(TEXT)
  (tmp_path / 'after').mkdir()
  runs = tmp_path / 'before', tmp_path / 'after'
  values = judged.judge(*runs, [tmp_path / 'text'], 0, 0, ['v5e:1x1'], print)

  before, after = values['bytes in memory']
  model = models['before'].model
  assert before == 4 * params.count(model)
  assert after == sum(x.nbytes for x in jax.tree.leaves(models['after'].model)) < 0.7 * before
  table = model.embedding.tokens.size * 4
  experts = 4 * sum(p.size for name, p in params.by_name(model).items() if 'experts' in p.axes)
  assert values['bytes a token reads'][0] == before - table - experts * 3 / 4
  assert min(values['tokens a second here']) > 0
  assert json.loads((tmp_path / 'after/judged.json').read_text()) == values
  assert 'does not fit -> does not fit' in (tmp_path / 'after/judged.md').read_text()
  assert 'bytes a token reads' in capsys.readouterr().out
