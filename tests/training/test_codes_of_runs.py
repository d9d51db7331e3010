"""Is a run in codes a run like others: opened, asked, adapted, merged and exported as the numbers
that its codes stand for? And is what is said of its cost true?
"""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

import convert
from compression import sensitivity
from compression.kept import Kept
from compression.quantise import quantised
from decode.generator import Generator
from model.adaptation import AdapterConfig
from model.params import named_leaves
from model.weights import read
from model.weights.scheme import dequantised
from parallel.mesh import MeshConfig
from tests.training.conftest import on, run_here
from workdir.judged import judge
from workdir.open import open_run

LORA = AdapterConfig(kind='lora', rank=2, alpha=64.0)
TEXTS = ['some words', 'other ones']


@pytest.fixture(scope='module')
def runs(two_steps, tmp_path_factory):
  """A run as numbers, and in codes of 4 bits."""
  directory = tmp_path_factory.mktemp('compressed')
  shutil.copytree(two_steps, directory / 'run')
  command = ['quantise', '--workdir', f'{directory}/run', '--to', f'{directory}/codes']
  convert.main([*command, '--scheme=int4:group=8', '--store=head*=int8', '--method=mse'])
  return directory


def scores(model):
  return model.score(TEXTS)


def alike(a, b, atol=1e-5):
  for one, other in zip(a, b, strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=atol)


@pytest.mark.slow
def test_it_generates_as_its_numbers(runs, capsys):
  coded = Generator.load(runs / 'codes')
  run, before = open_run(runs / 'codes'), open_run(runs / 'run')
  with jax.set_mesh(run.mesh):  # all at once, where quantise takes one layer after another
    entries = run.config.model.execution.stored
    whole = jax.jit(functools.partial(quantised, entries=entries, method='mse'))(before.model)
  pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(run.model), strict=True)
  assert all((a == b).all() for a, b in pairs)
  with jax.set_mesh(run.mesh):
    numbers = jax.jit(dequantised)(run.model)
  plain = Generator(numbers, run.tokenizer, run.mesh)
  # A head in bytes multiplies by digits on a CPU.
  alike(scores(coded), scores(plain), 1e-3)
  assert (
    max(np.abs(a - b).max() for a, b in zip(scores(coded), scores(Generator.load(runs / 'run'))))
    > 1e-3
  )
  sizes = [
    sum(x.nbytes for x in jax.tree.leaves(open_run(runs / name).model.stack))
    for name in ('run', 'codes')
  ]
  # 4 bits of 32, and a scale of 32 bits for 8 numbers; norms besides.
  assert 0.24 < sizes[1] / sizes[0] < 0.29
  mesh = Generator.load(runs / 'codes', mesh=MeshConfig(data=2, fsdp=2, tensor=2))
  alike(scores(mesh), scores(plain), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
  'scheme', ['int8:activations', pytest.param('fp8:activations', marks=pytest.mark.slow)]
)
def test_what_multiplies_codes_by_codes_is_opened_as_it_was_written(runs, tmp_path, scheme):
  """And so it scores: not as the numbers that its codes stand for, but near them."""
  command = ['quantise', '--workdir', f'{runs}/run', '--to', f'{tmp_path}/low']
  convert.main([*command, f'--scheme={scheme}', '--store=head*=int8'])
  run, before = open_run(tmp_path / 'low'), open_run(runs / 'run')
  entries = run.config.model.execution.stored
  assert entries == ('head*=int8', f'*={scheme}')
  with jax.set_mesh(run.mesh):
    made = jax.jit(functools.partial(quantised, entries=entries))(before.model)
    numbers = jax.jit(dequantised)(run.model)
  assert jax.tree.structure(made.stack) == jax.tree.structure(run.model.stack)
  assert all((a == b).all() for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(run.model)))
  found = scores(Generator.load(tmp_path / 'low'))
  plain = scores(Generator(numbers, run.tokenizer, run.mesh))
  alike(found, plain, 0.1)
  assert max(np.abs(a - b).max() for a, b in zip(found, plain)) > 1e-3


@pytest.mark.slow
def test_an_adapter_is_trained_on_it_and_merged(corpus, runs, tmp_path):
  """QLoRA: the base is kept where it is, bit for bit, and the sum is one of numbers."""
  before = {n: np.asarray(x) for n, x in named_leaves(open_run(runs / 'codes').model).items()}
  config = dataclasses.replace(
    on(corpus, train={'steps': 3, 'save_every': 2}),
    model=open_run(runs / 'codes').config.model,
    adapter=LORA,
    init=str(runs / 'codes'),
  )
  run_here(config, tmp_path / 'lora')
  after = named_leaves(open_run(runs / 'codes').model)
  assert all((np.asarray(after[name]) == x).all() for name, x in before.items())
  merge = ['merge', '--workdir', f'{tmp_path}/lora', '--to', f'{tmp_path}/merged']
  with pytest.raises(SystemExit, match='--dequantise writes the numbers'):
    convert.main(merge)
  convert.main([*merge, '--dequantise'])
  tuned = scores(Generator.load(tmp_path / 'lora'))
  alike(tuned, scores(Generator.load(tmp_path / 'merged')), 1e-3)
  assert np.abs(tuned[0] - scores(Generator.load(runs / 'codes'))[0]).max() > 1e-2


@pytest.mark.slow
def test_a_method_looks_at_the_runs_own_rows_and_goes_on_where_it_was_killed(
  runs, tmp_path, capsys, monkeypatch
):
  """What was kept of it is as if nothing had been; what it was made by stands in the run."""
  command = ['quantise', '--workdir', f'{runs}/run', '--scheme=int4:group=8', '--method=gptq']
  command += ['--samples=16', '--to']
  convert.main([*command, f'{tmp_path}/whole'])
  said = capsys.readouterr().out
  assert 'training rows of' in said and 'layer 1 of 2: done' in said
  facts = json.loads((tmp_path / 'whole/compressed.json').read_text())
  assert facts['method'] == 'gptq' and facts['calibration']['samples'] == 16
  write = Kept.write

  def killed(self, name, layer):
    if name == 'layer 1':
      raise KeyboardInterrupt
    write(self, name, layer)

  with monkeypatch.context() as patch:
    patch.setattr(Kept, 'write', killed)
    with pytest.raises(KeyboardInterrupt):
      convert.main([*command, f'{tmp_path}/again'])
  assert (tmp_path / '.again.layers/layer-0.part').exists()
  with pytest.raises(SystemExit, match='parts of other work'):
    convert.main([*command, f'{tmp_path}/again', '--seed=1'])
  convert.main([*command, f'{tmp_path}/again'])
  assert 'layer 0: done before' in capsys.readouterr().out
  assert not (tmp_path / '.again.layers').exists()
  models = [named_leaves(open_run(tmp_path / name).model) for name in ('whole', 'again')]
  assert all((np.asarray(x) == models[1][name]).all() for name, x in models[0].items())


@pytest.mark.slow
def test_records_are_calibrated_by_as_the_template_has_them(runs, tmp_path, capsys):
  texts = tmp_path / 'texts.jsonl'
  texts.write_text('\n'.join(json.dumps({'text': f'some words {i}'}) for i in range(30)))
  command = ['quantise', '--workdir', f'{runs}/run', '--scheme=int8', '--method=smoothquant']
  command += ['--length=16', '--calibrate', str(texts), '--to', f'{tmp_path}/smooth']
  convert.main([*command, '--samples=40'])
  said = capsys.readouterr().out
  assert 'no place for scales, rounded as they are: stack.blocks.0.attention.o' in said
  assert 'NOTE: 40 rows were asked for, and there is text for no more' in said
  alike(scores(Generator.load(tmp_path / 'smooth')), scores(Generator.load(runs / 'run')), 0.05)
  records = tmp_path / 'records.jsonl'
  turns = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
  records.write_text(json.dumps({'messages': turns}))
  command[-3:-1] = [str(records), '--to']
  with pytest.raises(SystemExit, match='messages need a chat template'):
    convert.main([*command[:-1], f'{tmp_path}/chat'])


@pytest.mark.slow
def test_codes_that_are_damaged_are_not_read(runs, tmp_path):
  shutil.copytree(runs / 'codes', tmp_path / 'codes')
  place = tmp_path / 'codes/checkpoints'
  largest = max(
    (path for path in place.rglob('*') if path.is_file()), key=lambda p: p.stat().st_size
  )
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  with pytest.raises((ValueError, FileNotFoundError), match='damaged|whole|changed'):
    open_run(tmp_path / 'codes')


@pytest.mark.slow
def test_what_it_is_not_for_is_said(corpus, runs, tmp_path):
  command = ['quantise', '--to', f'{tmp_path}/x', '--workdir']
  with pytest.raises(SystemExit, match='is in codes already'):
    convert.main([*command, f'{runs}/codes', '--scheme=int8'])
  with pytest.raises(SystemExit, match='blocks of 48 do not divide the 32'):
    convert.main([*command, f'{runs}/run', '--scheme=int8:group=48'])
  with pytest.raises(SystemExit, match="--method='gpqt' is unknown"):
    convert.main([*command, f'{runs}/run', '--scheme=int8', '--method=gpqt'])
  with pytest.raises(SystemExit, match='--method=mse looks at no text'):
    convert.main([*command, f'{runs}/run', '--scheme=int8', '--method=mse', '--samples=4'])
  few = ['--method=gptq', '--samples=1', '--length=16']
  with pytest.raises(SystemExit, match='16 tokens .* fewer than the 32 inputs of stack.blocks.0'):
    convert.main([*command, f'{runs}/run', '--scheme=int8', *few])
  assert not (tmp_path / 'x').exists()
  coded = open_run(runs / 'codes').config.model
  config = dataclasses.replace(on(corpus), model=coded, init=str(runs / 'codes'))
  with pytest.raises((ValueError, SystemExit), match='train an adapter on it'):
    run_here(config, tmp_path / 'trained')


@pytest.mark.parametrize(
  'limit, by_layer, words',
  [(-1, 0, 'limit=-1 must be at least 0'), (4, 1, 'by_layer=1 must be 0'), (4, -8, 'by_layer=-8')],
)
def test_numbers_that_no_judge_takes_are_refused(limit, by_layer, words):
  with pytest.raises(ValueError, match=words):
    judge('nowhere', 'nowhere', [], limit, by_layer, [], print)


@pytest.fixture(scope='module')
def models(runs):
  return [open_run(runs / name).model for name in ('run', 'codes')]


@pytest.mark.slow
def test_distances_are_those_of_the_matrices(models):
  original, smaller = models
  errors = jax.device_get(jax.jit(sensitivity.distances)(original, smaller))
  before = named_leaves(original)
  q = np.asarray(before['stack.blocks.0.attention.q'], np.float64)
  made = np.asarray(read(smaller.stack.blocks[0].attention.q).numbers('float32'), np.float64)
  expected = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(q, made, strict=True)]
  np.testing.assert_allclose(errors['stack.blocks.0.attention.q'], expected, rtol=1e-5)

  places = sensitivity.places(original, errors)
  kinds = {place.kind for place in places}
  assert {'attention.q', 'head.tokens'} <= kinds and not any('norm' in kind for kind in kinds)
  assert {place.layer for place in places} == {-1, *range(original.config.L)}


@pytest.mark.slow
def test_exchanged_is_one_or_the_other(models):
  """All of them, none of them, and one layer of one matrix."""
  original, smaller = models
  errors = jax.device_get(jax.jit(sensitivity.distances)(original, smaller))

  def made(fill, place=None):
    chosen = {name: np.full(len(each), fill) for name, each in errors.items()}
    if place:
      chosen[place.name][place.index] = True
    return jax.jit(sensitivity.distances)(
      original, jax.jit(sensitivity.exchanged)(original, smaller, chosen)
    )

  for name, each in made(False).items():
    assert not np.any(each), name
  for name, each in made(True).items():
    np.testing.assert_allclose(each, errors[name], rtol=1e-5, err_msg=name)
  place = sensitivity.places(original, errors)[-1]
  for name, each in made(False, place).items():
    assert np.flatnonzero(each).tolist() == ([place.index] if name == place.name else []), name


@pytest.mark.slow
@pytest.mark.long
def test_the_page(runs, tmp_path, capsys):
  text = tmp_path / 'text'
  text.write_text('A few words, to be read by both. ' * 8)
  command = ['judge', f'{runs}/run', f'{runs}/codes', f'--text={text}']
  convert.main([*command, '--by_layer=24'])
  values = json.loads((runs / 'codes' / 'judged.json').read_text())
  weights, alone = values['by layer'].values()
  assert len(weights) == len(alone) and all(each['value'] >= 0 for each in alone)
  page = (runs / 'codes' / 'judged.md').read_text()
  assert 'does not say whether the smaller model will do' in page and 'judged.png' in page
  assert (runs / 'codes' / 'judged.png').read_bytes().startswith(b'\x89PNG')
  assert page.count('KL, nats a token') == 1

  # A run beside itself has lost nothing, exactly.
  same = judge(runs / 'run', runs / 'run', [str(text)], 0, 0, [], print)
  assert same['figures']['KL, nats a token']['value'] == 0
  assert same['by layer'] == {"|W - W'| / |W|": []}
