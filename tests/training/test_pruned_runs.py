"""Is a pruned run one like others: with as many numbers as asked, on any mesh, exported, trained on
with its zeros, and finished after a kill?
"""

import dataclasses
import json
import shutil
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from compression import bounded
from compression.bounded import QualityBound
from data.config import DataConfig
from data.tokenizers import ByteTokenizer
from decode.generator import Generator
from model import transformer
from model.adaptation import AdapterConfig
from model.config import ModelConfig
from model.params import named_leaves
from model.weights import read
from model.weights.sparse import Sparse
from parallel.mesh import MeshConfig
from tests.model import laws
from tests.training.conftest import assert_same, on, run_here
from training import overrides
from training.config import Config
from workdir import bounded_codes, pruned, smaller
from workdir.checkpoint import Checkpoints
from workdir.open import open_run
from workdir.prune_request import PruneRequest
from workdir.untrained import write_run

TEXTS = ['some words', 'other ones']


def matrices(run) -> dict:
  flat = jax.tree_util.tree_leaves_with_path(run.model, is_leaf=lambda x: hasattr(x, 'get_value'))
  named = {jax.tree_util.keystr(path, simple=True, separator='.'): p for path, p in flat}
  return {name: p for name, p in named.items() if '.blocks.' in name and p.kind == 'matrix'}


def prune(runs, name, *options):
  target = runs / name
  if not target.exists():
    convert.main(['prune', '--workdir', f'{runs}/run', '--to', f'{target}', *options])
  return open_run(target)


@pytest.fixture(scope='module')
def runs(corpus, tmp_path_factory):
  directory = tmp_path_factory.mktemp('pruned')
  train = {'steps': 4, 'save_every': 2, 'keep_last': 9}
  run_here(on(corpus, train=train, optimizer={'prune': '0.3:end=4:every=1'}), directory / 'run')
  return directory


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_loses_numbers_goes_on_bit_for_bit(runs, corpus, tmp_path):
  shutil.copytree(runs / 'run', tmp_path / 'run')
  last = Checkpoints(tmp_path / 'run').directory / '00000004'
  shutil.rmtree(last)
  train = {'steps': 4, 'save_every': 2, 'keep_last': 9}
  run_here(on(corpus, train=train, optimizer={'prune': '0.3:end=4:every=1'}), tmp_path / 'run')
  assert_same(open_run(tmp_path / 'run').model, open_run(runs / 'run').model)
  for p in matrices(open_run(runs / 'run')).values():
    zeros = (np.asarray(p[...]) == 0).reshape(p.shape[0], -1)
    assert (zeros.sum(1) == round(0.3 * zeros.shape[1])).all()


@pytest.mark.slow
@pytest.mark.long
def test_groups_are_stored_packed_and_read_so(runs, corpus):
  """By what adds least on the run's own rows; on a mesh, and as its numbers exported."""
  made = prune(runs, 'groups', '--scheme=2:4', '--method=wanda', '--samples=8')
  for name, p in matrices(made).items():
    weight = read(p)
    assert isinstance(weight, Sparse) and weight.pattern == (2, 4), name
  scores = Generator.load(runs / 'groups').score(TEXTS)
  mesh = Generator.load(runs / 'groups', mesh=MeshConfig(data=2, fsdp=2, tensor=2)).score(TEXTS)
  convert.main(['export', '--workdir', f'{runs}/groups', '--to', f'{runs}/theirs'])
  convert.main(['import', '--from', f'{runs}/theirs', '--workdir', f'{runs}/back'])
  for a, b, c in zip(scores, mesh, Generator.load(runs / 'back').score(TEXTS), strict=True):
    np.testing.assert_allclose(b, a, atol=1e-5)
    np.testing.assert_allclose(c, a, atol=1e-5)
  said = json.loads((runs / 'groups' / 'compressed.json').read_text())
  assert said['method'] == 'wanda' and said['calibration']['samples'] == 8


@pytest.mark.slow
def test_a_kill_between_layers_changes_nothing(runs, monkeypatch):
  """Another process finds the first layer done, and finishes as one that was not killed."""
  from compression.kept import Kept

  options = '--scheme=0.5', '--method=sparsegpt', '--samples=8', '--keep=*.o'
  whole = prune(runs, 'whole', *options)
  written = Kept.write

  def killed(self, name, layer):
    written(self, name, layer)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(Kept, 'write', killed)
    with pytest.raises(KeyboardInterrupt):
      prune(runs, 'killed', *options)
  assert not (runs / 'killed').exists() and (runs / '.killed.layers').exists()
  lines = []
  monkeypatch.setattr(smaller, '_log', lines.append)
  again = prune(runs, 'killed', *options)
  assert 'layer 0: done before' in lines and not (runs / '.killed.layers').exists()
  assert_same(again.model, whole.model)
  for name, p in matrices(whole).items():
    share = (np.asarray(p[...]) == 0).reshape(p.shape[0], -1).mean(1)
    assert (share < 0.35 if name.endswith('.o') else share == 0.5).all(), name


@pytest.mark.slow
def test_what_begins_with_it_keeps_its_zeros(runs, corpus, tmp_path, monkeypatch):
  """Whatever its config says of pruning; and is refused as an adapter's."""
  before = matrices(prune(runs, 'half', '--scheme=0.5', '--scope=global'))
  total = sum((np.asarray(p[...]) == 0).sum() for p in before.values())
  assert total == round(0.5 * sum(np.asarray(p[...]).size for p in before.values()))
  config = dataclasses.replace(on(corpus, train={'steps': 2}), init=str(runs / 'half'))
  begun = overrides._begun(config, str(runs / 'half'))
  assert begun['optimizer'].prune == 'kept'
  assert overrides._begun(config, str(runs / 'half'), adapted='lora')['optimizer'].prune == ''
  run_here(dataclasses.replace(config, **begun), tmp_path / 'tuned')
  after = matrices(open_run(tmp_path / 'tuned'))
  for name, p in before.items():
    gone = np.asarray(p[...]) == 0
    assert (np.asarray(after[name][...])[gone] == 0).all()
    assert (np.asarray(after[name][...])[~gone] != np.asarray(p[...])[~gone]).mean() > 0.9


@pytest.mark.slow
@pytest.mark.long
def test_an_adapter_is_trained_on_groups(runs, corpus, tmp_path):
  """The base stays bit for bit, and tokens that it writes are another model's."""
  base = prune(runs, 'groups', '--scheme=2:4', '--method=wanda', '--samples=8')
  before = {name: np.asarray(x) for name, x in named_leaves(base.model).items()}
  config = dataclasses.replace(
    on(corpus, train={'steps': 3, 'save_every': 3}),
    model=base.config.model,
    adapter=AdapterConfig(kind='lora', rank=2, alpha=64.0),
    init=str(runs / 'groups'),
  )
  run_here(config, tmp_path / 'lora')
  after = named_leaves(open_run(runs / 'groups').model)
  assert all((np.asarray(after[name]) == x).all() for name, x in before.items())
  tuned, plain = (Generator.load(path) for path in (tmp_path / 'lora', runs / 'groups'))
  assert np.abs(tuned.score(TEXTS)[0] - plain.score(TEXTS)[0]).max() > 1e-2
  (one,) = plain(['some'], max_new_tokens=6, temperature=0.0)
  assert len(one.ids) == 6 and np.isfinite(one.logprobs).all()


@pytest.mark.slow
@pytest.mark.long
def test_layers_heads_and_channels_by_calibration(runs):
  made = prune(runs, 'parts', '--scheme=heads=2,channels=24,layers=1', '--method=wanda')
  config = made.config.model
  assert (config.N, config.K, config.F, config.L) == (2, 1, 24, 1)
  assert np.isfinite(Generator.load(runs / 'parts').score(TEXTS)[0]).all()


@pytest.mark.slow
@pytest.mark.long
def test_as_much_goes_as_a_bound_lets(runs, monkeypatch):
  """By magnitude, each try is said; what is found holds on held-out texts, too."""
  lines = []
  monkeypatch.setattr(smaller, '_log', lines.append)
  monkeypatch.setattr('workdir.bounded_codes.HELD_OUT', 2)
  prune(runs, 'bounded', '--max_kl=0.01', '--samples=8')
  tries = [line for line in lines if 'on calibration' in line]
  assert 5 < len(tries) < 15 and any('holds' in line for line in tries)
  assert any('holds, on held-out texts' in line for line in lines)
  share = json.loads((runs / 'bounded' / 'compressed.json').read_text())['share']
  assert 0.3 <= share < 0.9


def test_a_bound_is_met_by_the_largest_number():
  """Of a cost that is the share squared; held-out texts that cost more take some of it back."""
  lines, bound = [], QualityBound('kl', 0.25)

  def search(*costs):
    said = '{}%'.format
    return bounded.search(lambda n: n / 100, costs, bound, 95, said, lines.append)

  assert search(lambda x: x**2, lambda x: 1.3 * x**2) == (43, 0.43) and 1.3 * 0.44**2 > 0.25
  assert lines[0] == '48%: KL 0.2304 of 0.25 nats a token: holds, on calibration'
  assert '50%: KL 0.3250 of 0.25 nats a token: too much, on held-out texts' in lines
  assert search(lambda x: x**2, lambda x: x**2) == (50, 0.5)
  with pytest.raises(ValueError, match='nothing that was tried, from 1% on'):
    search(lambda x: 1.0, lambda x: 0.0)
  assert QualityBound.parse('', '2%') == QualityBound('perplexity_increase', 0.02)
  over = QualityBound('perplexity_increase', 0.02).said(0.03)
  assert over == 'perplexity +3.00% of +2.00%: too much'


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TableModel:
  """Whose hidden state is a row of the table that scores it."""

  table: Any

  @property
  def config(self):
    return types.SimpleNamespace(logit_softcap=0.0)

  def __call__(self, tokens, positions, segments):
    return types.SimpleNamespace(hidden=self.table[tokens])

  def scored(self, x):
    return x, self.table


@pytest.mark.parametrize(
  'bound', [QualityBound('kl', 0.05), QualityBound('perplexity_increase', 9)]
)
def test_a_model_of_nan_is_within_no_bound(bound, one_device):
  """Its cost is no number, and what is searched goes on below it, or says which try it was."""
  model = TableModel(jnp.arange(2048.0).reshape(512, 4) / 2048)  # as many as a CPU vectorises
  batches = bounded.rows_of([[1, 2, 3, 4, 5]], 1, 8)
  cost = bounded.cost_on(model, batches, bound, 512)
  broken = jax.tree.map(lambda x: x * np.nan, model)
  assert cost(model) == 0 and np.isnan(cost(broken))
  lines = []

  def search(nan_from):
    made = [model] * (nan_from - 1) + [broken] * (4 - nan_from)
    return bounded.search(
      lambda n: made[n - 1], [cost, cost], bound, 3, '{} parts'.format, lines.append
    )

  assert search(3)[0] == 2
  assert f'3 parts: {bound.name} is NaN, no number: too much, on calibration' in lines
  with pytest.raises(ValueError, match=f'keeps {bound.name} within .*; of 1 parts it is NaN'):
    search(1)


@pytest.mark.slow
@pytest.mark.long
def test_as_many_bits_as_a_bound_asks(runs, monkeypatch):
  """Between all in 8 bits and all in 4: kinds of matrices that cost least have 4."""
  lines = []
  monkeypatch.setattr(smaller, '_log', lines.append)
  monkeypatch.setattr('workdir.bounded_codes.HELD_OUT', 2)
  monkeypatch.setattr('workdir.bounded_codes.LOW', 'int4:group=8')
  command = ['quantise', '--workdir', f'{runs}/run', '--to', f'{runs}/bits', '--samples=8']
  convert.main([*command, '--max_kl=1e-4'])
  stored = open_run(runs / 'bits').config.model.execution.stored
  low = [entry for entry in stored if entry.endswith('=int4:group=8')]
  alone = [line for line in lines if ' alone' in line]
  assert stored[-1] == '*=int8' and 0 < len(low) < len(alone) == 7
  assert any('holds, on held-out texts' in line for line in lines)


@pytest.mark.parametrize(
  'options, words',
  [
    (['--scheme=0.5', '--max_kl=1'], 'give one, as 2:4 or 0.5'),
    ([], 'give one, as 2:4 or 0.5'),
    (['--scheme=2:5x'], 'no N:M, as 2:4'),
    (['--scheme=0.5+int8'], 'prune first, and quantise'),
    (['--scheme=heads=2', '--scope=row'], 'leave those out'),
    (['--scheme=2:4', '--scope=row'], 'is of groups'),
    (['--scheme=0.5', '--scope=global', '--method=wanda'], 'use layer or row'),
    (['--scheme=0.5', '--method=wanad'], "did you mean 'wanda'"),
    (['--max_kl=x'], 'a number above 0'),
  ],
)
def test_what_means_nothing_is_one_line(options, words):
  with pytest.raises(SystemExit, match=words):
    convert.main(['prune', '--workdir=nowhere', '--to=nowhere2', *options])


def untrained(tmp_path, **sizes):
  """The options that name a run of a small model, whose arrays are never read."""
  model = ModelConfig(**laws.TINY | {'vocabulary': 300} | sizes)
  config = Config(model=model, data=DataConfig(sequence_length=16))
  ByteTokenizer().save(tmp_path / 'run' / 'tokenizer')
  write_run(tmp_path / 'run', config, {'model': {'x': np.zeros(2)}}, lambda _: None)
  return f'--workdir={tmp_path}/run', f'--to={tmp_path}/smaller'


@pytest.mark.parametrize('scheme', ['--scheme=0.5', '--scheme=2:4', '--max_kl=0.1'])
def test_a_pattern_that_keeps_nothing_is_said(scheme, tmp_path):
  options = untrained(tmp_path)
  with pytest.raises(SystemExit, match=r'--keep=\*.dwon holds of no matrix: none has such a name'):
    convert.main(['prune', *options, scheme, '--keep=*.down', '--keep=*.dwon'])
  assert not (tmp_path / 'smaller').exists()


@pytest.mark.parametrize(
  'sizes', [{'encoder_layers': 1, 'position': 'relative'}, {'causal': False}]
)
@pytest.mark.parametrize('command', ['prune', 'quantise'])
def test_a_bound_is_of_decoders(command, sizes, tmp_path):
  options = untrained(tmp_path, **sizes)
  with pytest.raises(SystemExit, match='as by a decoder; give --scheme'):
    convert.main([command, *options, '--max_kl=0.1'])


def test_an_order_is_refused_before_a_bound_is_searched(tmp_path):
  with pytest.raises(SystemExit, match='--act_order is of --method=gptq, by which no bound'):
    convert.main(['quantise', *untrained(tmp_path), '--max_kl=0.1', '--act_order'])


def test_what_4_bits_do_not_fit_stays_in_8(one_device):
  """And is said; groups of 64 fill the 128 inputs of all but `down`, which has 96."""
  config = ModelConfig(**laws.TINY | {'width': 128, 'feed_forward': 96})
  lines, model = [], jax.eval_shape(lambda: transformer.init(config, 0))
  kinds = bounded_codes._in_low(model, lines.append)
  assert kinds.keys() == {f'attention.{x}' for x in 'qkvo'} | {
    'feed_forward.gate',
    'feed_forward.up',
  }
  (line,) = lines
  assert line.startswith('feed_forward.down stays int8: blocks of 64 do not divide the 96 numbers')


def test_shared_layers_are_told_of_what_prunes_them(one_device):
  config = ModelConfig(**laws.TINY | {'shared_layers': 2})
  model = jax.eval_shape(lambda: transformer.init(config, 0))
  asked = PruneRequest('0.5', 'wanda')
  rows = bounded.rows_of([[1, 2, 3]], 1, 8)
  with pytest.raises(NotImplementedError, match='use --method=magnitude, without calibration'):
    pruned.thinned(model, asked, rows, None, print)


def test_what_4_bits_do_not_fit_is_in_8_where_all_others_are_in_4(tmp_path, monkeypatch):
  """As is what they do: of a bound that lets all of them be low, an entry is left for the rest."""
  run, _ = untrained(tmp_path, width=128, feed_forward=96)
  for name, stub in {
    'rows_of': lambda *_: ([], {}),
    'costs_of': lambda *_: [lambda _: 0.0] * 2,
    'quantised': lambda model, **_: model,
  }.items():
    monkeypatch.setattr(bounded_codes, name, stub)
  monkeypatch.setattr(Checkpoints, 'model', lambda *_: jnp.zeros(()))
  bound, log = QualityBound.parse('0.1', ''), lambda _: None
  stored = bounded_codes.entries(run.partition('=')[2], 'last', 'rtn', bound, None, log)
  assert len(stored) == 7 and stored[-1] == '*=int8'
  assert not any('down' in entry for entry in stored)
