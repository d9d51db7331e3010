"""Is a run with an adapter resumed, opened, merged and moved as what it was trained as?"""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

import convert
from data.tokenizers import ByteTokenizer
from decode.generator import Generator
from model import checkpoint, families, params
from model.adaptation import AdapterConfig
from tests.training.conftest import on, run_here, tiny
from training import config as configs, state as states
from workdir import samples
from workdir.adapted import beside, export_adapter, import_adapter, merge
from workdir.checkpoint import Checkpoints
from workdir.untrained import write_run

LORA = AdapterConfig(kind='lora', rank=2, alpha=64.0)


def adapted(corpus, base, steps=4, adapter=LORA, **parts):
  train = {'steps': steps, 'save_every': 2, 'keep_last': 9}
  made = on(corpus, train=train, **parts)
  return dataclasses.replace(made, adapter=adapter, init=str(base))


@pytest.fixture(scope='module')
def base(two_steps, tmp_path_factory):
  """A run whose model is adapted."""
  return shutil.copytree(two_steps, tmp_path_factory.mktemp('adapted') / 'base')


@pytest.fixture(scope='module')
def lora(corpus, base):
  directory = base.parent / 'lora'
  run_here(adapted(corpus, base), directory)
  return directory


def leaves(directory, step):
  """What a checkpoint holds, by name."""
  checkpoints = Checkpoints(directory)
  record = checkpoints.record(step)
  return record, {name: shape for name, (shape, _) in record['leaves'].items()}


def logprobs(workdir):
  generator = Generator.load(workdir)
  return generator.score(['some words', 'other ones'])


@pytest.fixture(scope='module')
def two_adapters(tmp_path_factory):
  """A run with an adapter, of which checkpoint 0 is all 1, and checkpoint 5 all 2."""
  directory = tmp_path_factory.mktemp('two_adapters')
  config = dataclasses.replace(tiny(), adapter=LORA, init='elsewhere')
  checkpoints = Checkpoints(directory)
  mesh = checkpoint.default_mesh(config.model)
  with jax.set_mesh(mesh):
    shapes = params.abstract(lambda: states.new_model(config, states.ADAPTER), mesh)
    for step, value in ((0, 1.0), (5, 2.0)):
      made = jax.tree.map(
        lambda x: jax.device_put(np.full(x.shape, value, x.dtype), x.sharding), shapes
      )
      checkpoints.save(step, {'models': {states.ADAPTER: made}}, {}, {}, donated=False)
  checkpoints.wait()
  configs.save(config, directory)
  return directory


@pytest.mark.slow
@pytest.mark.parametrize('name, step', [('0', 0), ('5', 5), ('last', 5)])
def test_the_checkpoint_that_is_named_is_taken(two_adapters, tmp_path, monkeypatch, name, step):
  """Also 0, which an import writes."""
  llama, written = families.FAMILIES['llama'], tmp_path / 'peft'
  written.mkdir()
  assert export_adapter(two_adapters, name, written, llama, print) == step

  def opened(config, checkpoints, step, target):
    raise InterruptedError(f'merged step {step}')

  monkeypatch.setattr('workdir.adapted.opened', opened)
  with pytest.raises(InterruptedError, match=f'merged step {step}'):
    merge(two_adapters, tmp_path / 'merged', name, False, print)


def test_an_adapter_that_has_only_begun_goes_nowhere(tmp_path):
  configs.save(dataclasses.replace(tiny(), adapter=LORA, init='elsewhere'), tmp_path / 'begun')
  configs.save(tiny(), tmp_path / 'base')
  for ask in (
    lambda: export_adapter(tmp_path / 'begun', 'last', tmp_path, None, print),
    lambda: beside({'begun': tmp_path / 'begun'}, tmp_path / 'base', tiny(), None, ''),
  ):
    with pytest.raises(FileNotFoundError, match='holds no checkpoint; train with train.py'):
      ask()


@pytest.mark.slow
def test_a_checkpoint_holds_the_adapter_and_names_the_base(base, lora):
  record, kept = leaves(lora, 4)
  assert {name.split('.')[1] for name in kept if name.startswith('models.')} == {'adapter'}
  assert record['references']['policy']['directory'] == str(base)
  sizes = [
    sum(np.prod(shape) for name, shape in leaves(run, step)[1].items())
    for run, step in ((base, 2), (lora, 4))
  ]
  assert sizes[1] < sizes[0] / 4


@pytest.mark.slow
def test_resumed_is_uninterrupted_bit_for_bit(corpus, base, lora, tmp_path):
  run_here(adapted(corpus, base, 2), tmp_path)
  run_here(adapted(corpus, base, 4), tmp_path)
  for name in sorted(leaves(lora, 4)[1]):
    if name.startswith('models.adapter'):
      ours, theirs = (
        Checkpoints(run).restore(
          4,
          {
            name: jax.ShapeDtypeStruct(
              leaves(lora, 4)[1][name],
              'float32',
              sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
            )
          },
          some=True,
        )
        for run in (tmp_path, lora)
      )
      np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.slow
def test_it_generates_as_what_it_is_merged_into(base, lora, tmp_path, capsys):
  convert.main(['merge', '--workdir', str(lora), '--to', str(tmp_path / 'merged')])
  assert 'its adapter merged' in capsys.readouterr().out
  merged = configs.load(tmp_path / 'merged')
  assert not merged.adapter.kind and not merged.init
  ours, theirs, before = (logprobs(run) for run in (lora, tmp_path / 'merged', base))
  for a, b, c in zip(ours, theirs, before, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert np.abs(np.array(a) - np.array(c)).max() > 1e-3
  with pytest.raises(SystemExit, match='has no adapter'):
    convert.main(['merge', '--workdir', str(base), '--to', str(tmp_path / 'other')])


@pytest.mark.slow
def test_runs_on_one_base_are_asked_side_by_side(base, lora, tmp_path, capsys):
  texts, which = ['some words', 'other ones', 'some words'], ['', 'b', 'a']
  generator = Generator.load(base, adapters={'a': lora, 'b': str(lora)})
  for text, name, scores in zip(texts, which, generator.score(texts, adapter=which), strict=True):
    (expected,) = Generator.load(lora if name else base).score(text)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
  other = [Generator.load(base, weights=weights) for weights in ('', 'int8')]
  identities = [each.identity for each in (generator, *other)]
  assert all(identities) and len(set(identities)) == 3
  with pytest.raises(ValueError, match="'b': .*base has none .adapter.kind is empty."):
    Generator.load(base, adapters={'b': base})
  with pytest.raises(ValueError, match='lora holds an adapter itself; give the run that it lies'):
    Generator.load(lora, adapters={'a': lora})
  convert.main(['merge', '--workdir', str(lora), '--to', str(tmp_path / 'merged')])
  with pytest.raises(ValueError, match='is another one than .*merged has at step 0'):
    Generator.load(tmp_path / 'merged', adapters={'a': lora})
  copy = tmp_path / 'copy'
  shutil.copytree(lora, copy)
  (copy / 'generation_config.json').write_text('{"eos_token_id": 7}')
  with pytest.raises(ValueError, match='generation_config.json was changed since checkpoint 4'):
    Generator.load(base, adapters={'a': copy})
  convert.main(['seal', '--workdir', str(copy)])
  with pytest.raises(ValueError, match='generation_config.json is not what .*, and end, in one'):
    Generator.load(base, adapters={'a': copy})


@pytest.mark.slow
def test_an_adapter_on_bytes_goes_beside_others_on_bytes(corpus, base, lora, tmp_path):
  run_here(adapted(corpus, base, adapter=dataclasses.replace(LORA, base='int8')), tmp_path)
  with pytest.raises(ValueError, match="'b' was trained on a base in int8 .*--weights=int8"):
    Generator.load(base, adapters={'a': lora, 'b': tmp_path})
  generator = Generator.load(base, weights='int8', adapters={'a': lora, 'b': tmp_path})
  (scores,) = generator.score('some words', adapter='b')
  np.testing.assert_allclose(scores, logprobs(tmp_path)[0], rtol=0, atol=2e-3)


@pytest.mark.slow
def test_an_adapter_is_no_model_to_begin_with(corpus, lora, tmp_path):
  with pytest.raises(SystemExit, match='holds an adapter and not a model: merge them first'):
    run_here(adapted(corpus, lora), tmp_path)


@pytest.mark.slow
def test_a_base_that_moved_is_told_and_another_one_refused(base, lora, tmp_path, capsys):
  copy, moved = tmp_path / 'lora', tmp_path / 'moved'
  shutil.copytree(lora, copy)
  expected = logprobs(lora)
  base.rename(moved)
  try:
    with pytest.raises(ValueError, match='where it was moved, say where it is: .* rebase'):
      Generator.load(copy)
    convert.main(['rebase', '--workdir', str(copy), '--base', str(moved)])
    for a, b in zip(logprobs(copy), expected, strict=True):
      np.testing.assert_array_equal(a, b)
  finally:
    moved.rename(base)
  with pytest.raises(SystemExit, match='which is not what it was'):
    convert.main(['rebase', '--workdir', str(copy), '--base', str(lora)])
  with pytest.raises(SystemExit, match='has no adapter, and lies on no other'):
    convert.main(['rebase', '--workdir', str(base), '--base', str(lora)])


@pytest.mark.slow
@pytest.mark.parametrize('kept', ['', 'int8'])
def test_samples_on_the_way_are_of_the_adapted_model(corpus, base, tmp_path, kept):
  adapter = dataclasses.replace(LORA, base=kept)
  made = adapted(corpus, base, adapter=adapter)
  train = dataclasses.replace(made.train, sample_every=4, sample_prompts=('ab', 'The '))
  run_here(dataclasses.replace(made, train=train), tmp_path)
  written = [sample.text for sample in samples.read(tmp_path)]
  ours, theirs = (
    [completion.text for completion in Generator.load(run)(['ab', 'The '], **samples.OPTIONS)]
    for run in (tmp_path, base)
  )
  assert written == ours != theirs


@pytest.mark.slow
def test_an_adapter_that_was_imported_is_trained_on(corpus, base, lora, tmp_path):
  out, again = str(tmp_path / 'out'), tmp_path / 'again'
  convert.main(['export', '--workdir', str(lora), '--to', out])
  convert.main(['import', '--from', out, '--workdir', str(again), '--base', str(base)])
  for a, b in zip(logprobs(again), logprobs(lora), strict=True):
    np.testing.assert_array_equal(a, b)
  settings = configs.load(again).adapter
  assert settings.targets == tuple(sorted(settings.targets)) and settings.rank == LORA.rank
  run_here(adapted(corpus, base, steps=2, adapter=settings), again)
  record, kept = leaves(again, 2)
  assert record['references']['policy']['directory'] == str(base)
  assert {name.split('.')[1] for name in kept if name.startswith('models.')} == {'adapter'}
  for a, b in zip(logprobs(again), logprobs(lora), strict=True):
    assert np.abs(a - b).max() > 1e-4


@pytest.mark.slow
def test_a_base_in_bytes_is_merged_where_that_is_meant(corpus, base, tmp_path, capsys):
  small = dataclasses.replace(LORA, base='int8')
  run_here(adapted(corpus, base, adapter=small), tmp_path / 'small')
  merge = ['merge', '--workdir', str(tmp_path / 'small'), '--to', str(tmp_path / 'merged')]
  with pytest.raises(SystemExit, match='adapter.base.*--dequantise writes the numbers'):
    convert.main(merge)
  convert.main([*merge, '--dequantise'])
  for a, b in zip(logprobs(tmp_path / 'small'), logprobs(tmp_path / 'merged'), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.fixture
def begun(tmp_path):
  """Runs base and lora, whose arrays are never read, and a directory that holds an adapter."""
  (tmp_path / 'peft').mkdir()
  (tmp_path / 'peft' / 'adapter_config.json').write_text('{}')
  for name, adapter in (('base', AdapterConfig()), ('lora', LORA)):
    ByteTokenizer().save(tmp_path / name / 'tokenizer')
    config = dataclasses.replace(tiny(), adapter=adapter, init='elsewhere' if adapter.kind else '')
    write_run(tmp_path / name, config, {'model': {'x': np.zeros(2)}}, lambda _: None)
  return tmp_path


def test_a_tokenizer_that_was_changed_is_no_part_of_what_is_made(begun):
  for name in ('base', 'lora'):
    (begun / name / 'tokenizer' / 'tokenizer.json').write_text('{"kind": "char"}')
  for ask in (
    lambda: merge(begun / 'lora', begun / 'out', 'last', False, print),
    lambda: import_adapter(begun / 'peft', begun / 'base', begun / 'out', None, print),
  ):
    with pytest.raises(ValueError, match='tokenizer was changed since checkpoint 0 was written'):
      ask()
  assert not (begun / 'out').exists()


@pytest.mark.parametrize(
  'option', ['--dtype=bfloat16', '--tokenizer=none', '--dequantise', '--ignore=x', '--ignore_key=x']
)
def test_options_that_an_adapter_has_no_use_for_are_refused(begun, option):
  command = ['import', '--from', f'{begun}/peft', '--workdir', f'{begun}/out']
  name = option.partition('=')[0]
  with pytest.raises(SystemExit, match=f'error: {name}: .*peft holds an adapter.*leave that out'):
    convert.main([*command, '--base', f'{begun}/base', option])


def test_numbers_are_not_made_numbers(begun):
  command = ['merge', '--workdir', f'{begun}/lora', '--to', f'{begun}/out', '--dequantise']
  with pytest.raises(SystemExit, match='--dequantise is of a base in bytes.*leave it out'):
    convert.main(command)


def test_a_checkpoint_that_is_damaged_is_not_exported(begun, monkeypatch):
  """Though it is asked for by its step, and another one is the last."""
  checkpoints = Checkpoints(begun / 'base')
  checkpoints.save(1, {'model': {'x': np.zeros(2)}}, {}, {}, donated=False)
  checkpoints.wait()
  monkeypatch.setattr(Checkpoints, 'problems', lambda _, step: ['it was cut'] * (step == 0))
  command = ['export', '--workdir', f'{begun}/base', '--to', f'{begun}/out', '--checkpoint=0']
  with pytest.raises(SystemExit, match='checkpoint 0 is damaged: it was cut'):
    convert.main(command)
