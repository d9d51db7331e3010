"""Is a run with soft tokens resumed, opened, asked and moved as what it was trained as?"""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

import convert
from data.config import CleanConfig, SourceConfig
from data.tokenizers import ByteTokenizer
from decode.bulk import complete
from decode.engine import Engine, Request, Sizes
from decode.generating import generating_model
from decode.generator import Generator
from decode.sampling import make_sampling
from model import soft, transformer
from model.adaptation import AdapterConfig
from model.config import ModelConfig
from model.tensorfiles import TensorFiles
from objectives.sft import SFT
from parallel.mesh import MeshConfig, make_mesh
from tests.training.conftest import run_here, tiny
from training import config as configs, state as states
from workdir import samples
from workdir.adapted import adapter_of
from workdir.checkpoint import Checkpoints
from workdir.frozen import begin
from workdir.open import open_run

PROMPT = AdapterConfig(kind='prompt', tokens=3)
PREFIX = dataclasses.replace(PROMPT, kind='prefix')
pytestmark = pytest.mark.slow
KINDS = pytest.mark.parametrize('adapter', [PROMPT, PREFIX], ids=['prompt', 'prefix'])
LENGTH = 32


def made(records, steps=4, adapter=None, base='', **parts):
  data = {
    'sources': (SourceConfig(kind='jsonl', path=str(records), format='completion'),),
    'validation_fraction': 0.2,
    'clean': CleanConfig(anonymise=(), near_duplicates=0),
    'split': 'hash',
    'cache_dir': str(records) + '.cache',
    'sequence_length': LENGTH,
  }
  train = {'steps': steps, 'save_every': 2, 'keep_last': 9}
  config = tiny(data=data, model={'max_length': LENGTH}, train=train | parts)
  objective = SFT()
  return dataclasses.replace(
    config, objective=objective, adapter=adapter or AdapterConfig(), init=str(base)
  )


@pytest.fixture(scope='module')
def records(tmp_path_factory):
  path = tmp_path_factory.mktemp('soft') / 'pairs.jsonl'
  rows = [
    {'prompt': chr(97 + i % 26), 'completion': chr(98 + i % 7) * (i % 9 + 1)} for i in range(60)
  ]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


@pytest.fixture(scope='module')
def base(records):
  directory = records.parent / 'base'
  run_here(made(records, 2), directory)
  return directory


@pytest.fixture(scope='module')
def tuned(records, base):
  """The runs of both kinds, trained when they are asked for."""

  @functools.cache
  def of(adapter):
    directory = base.parent / adapter.kind
    run_here(made(records, 4, adapter, base), directory)
    return directory

  return of


def kept(directory, step):
  checkpoints = Checkpoints(directory)
  record = checkpoints.record(step)
  return record, {
    name: shape for name, (shape, _) in record['leaves'].items() if name.startswith('models.')
  }


def scores(workdir):
  return Generator.load(workdir).score(['some words', 'ab'])


@KINDS
def test_a_checkpoint_holds_the_tokens_and_the_run_generates_with_them(base, tuned, adapter):
  run = tuned(adapter)
  record, leaves = kept(run, 4)
  assert record['references']['policy']['directory'] == str(base)
  expected = 3 * 32 if adapter is PROMPT else 3 * 2 * 2 * 2 * 8
  assert sum(np.prod(shape) for shape in leaves.values()) == expected
  assert {name.split('.')[1] for name in leaves} == {'adapter'}

  ours, plain = Generator.load(run), Generator.load(base)
  assert len(ours.plain.soft) == 3 and ours.context == LENGTH - 3 and not plain.plain.soft
  text = ours('ab', max_new_tokens=8, temperature=0.0)[0]
  assert text.prompt_ids == plain.encoded('ab')
  # Written token by token is read at once: a cache holds what stands in the soft tokens' places.
  read = ours.score([[*text.prompt_ids, *text.ids]])[0]
  np.testing.assert_allclose(text.logprobs, read[-len(text.ids) :], rtol=0, atol=1e-5)
  for a, b in zip(scores(run), scores(base), strict=True):
    assert np.abs(a - b).max() > 1e-3
  with pytest.raises(ValueError, match='29 tokens leaves no room .* less 3 soft tokens'):
    ours('a' * 28)


@pytest.mark.long
@KINDS
def test_samples_drafts_beams_and_sessions_have_them(tuned, adapter):
  g = Generator.load(tuned(adapter))
  options = {'max_new_tokens': 9, 'temperature': 0.9, 'seed': 3}
  several = g(['ab', 'c'], num_samples=2, **options)
  alone = [g(row.prompt, **options | {'seed': row.seed})[0] for row in several]
  assert [row.ids for row in several] == [row.ids for row in alone]

  plain = g('abab', max_new_tokens=12, temperature=0.0)[0]
  for how in ({'lookup': 2}, {'early_exit': 1}, {'beams': 1}):
    again = g('abab', max_new_tokens=12, temperature=0.0, **how)[0]
    assert again.ids == plain.ids, how
  assert g('abab', max_new_tokens=4, beams=2)[0].ids
  with pytest.raises(ValueError, match='reads soft tokens before every text'):
    g('abab', draft=g)

  session = g.session()
  assert session.capacity == LENGTH - 3
  first = session('ab', max_new_tokens=5, temperature=0.0)
  assert first.ids == g('ab', max_new_tokens=5, temperature=0.0)[0].ids
  session.append('cd').truncate(len(session.ids) - 1)
  expected = g(list(session.ids), max_new_tokens=4, temperature=0.0)[0].ids
  assert session.fork()(max_new_tokens=4, temperature=0.0).ids == expected
  assert session(max_new_tokens=4, temperature=0.0).ids == expected
  full = session(max_new_tokens=99, temperature=0.0)
  assert len(session.ids) == session.capacity and 'less 3 soft tokens' in full.note


@pytest.mark.long
@KINDS
def test_it_generates_the_same_on_a_mesh_and_in_bytes_nearly(tuned, adapter):
  run = tuned(adapter)
  expected = scores(run)
  for mesh in (MeshConfig(data=2, tensor=2), MeshConfig(data=1, stage=2)):
    spread = Generator.load(run, mesh=mesh)
    for a, b in zip(spread.score(['some words', 'ab']), expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    ours, theirs = (
      g(['ab', 'cd'], max_new_tokens=6, temperature=0.0) for g in (spread, Generator.load(run))
    )
    assert [row.ids for row in ours] == [row.ids for row in theirs]
  for a, b in zip(
    Generator.load(run, weights='int8').score(['some words', 'ab']), expected, strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=0, atol=0.1)


def test_rows_of_several_prompts_are_each_alone(base, tuned):
  """One engine, one batch, three adapters and none: the bytes of each are its own."""
  plain, runs = open_run(base), [tuned(PREFIX), tuned(PROMPT)]
  with jax.set_mesh(plain.mesh):
    model, ranges = soft.together(plain.model, [*map(_adapter, runs)])
    weights = jax.jit(generating_model)(model)
  sizes = Sizes(rows=4, capacity=LENGTH, read_tokens=8, steps=4)
  engine = Engine(
    weights.config,
    plain.mesh,
    sizes,
    vocabulary=plain.tokenizer.vocabulary,
    virtual=sum(map(len, ranges)),
  )
  ids = [1, 100, 101, 102]

  def asked(front):
    return Request([*front, *ids], 8, make_sampling(1, temperature=0.0), ends=())

  fronts = [*ranges, (), ranges[0]]
  texts = dict(complete(engine, weights, [asked(front) for front in fronts]))
  for i, run in enumerate([*runs, base]):
    ended = len(ids) + len(texts[i].ids)
    expected = Generator.load(run).score([[*ids, *texts[i].ids]])[0]
    np.testing.assert_allclose(texts[i].raw, expected[len(ids) - 1 : ended], rtol=0, atol=1e-5)
  assert texts[0].raw[0] == texts[3].raw[0] and len({text.raw[0] for text in texts.values()}) == 3
  # The same rows, each alone in the engine: bit for bit.
  for i, front in enumerate(fronts):
    ((_, only),) = complete(engine, weights, [asked(front)])
    assert only.ids == texts[i].ids and only.raw == texts[i].raw
  with pytest.raises(ValueError, match=r'of soft tokens, \[264, 270\)'):
    engine.join(0, Request([270], 1, make_sampling(1)))


def test_runs_on_one_base_are_asked_side_by_side(base, tuned):
  runs = {'prefix': tuned(PREFIX), 'prompt': str(tuned(PROMPT))}
  together = Generator.load(base, adapters=runs)
  texts, which = ['some words', 'ab', 'some words'], ['prompt', '', 'prefix']
  for text, name, ours in zip(texts, which, together.score(texts, adapter=which), strict=True):
    (theirs,) = Generator.load(runs.get(name, base)).score(text)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=name)
  assert together.adapters['prompt'].context == LENGTH - 3 and together.context == LENGTH
  with pytest.raises(ValueError, match='prompt holds an adapter itself; give the run that it lies'):
    Generator.load(tuned(PROMPT), adapters=runs)


def test_what_an_encoder_reads_has_less_room_by_them(one_device):
  network = ModelConfig(
    vocabulary=259, width=16, heads=2, layers=1, encoder_layers=1, max_length=16, feed_forward=16
  )
  with jax.set_mesh(one_device):
    model = transformer.init(network, 0)
    model = soft.applied(model, soft.new(model, PROMPT, jax.random.key(0)))
  with pytest.raises(ValueError, match='14 tokens passes model.max_length=16 less 3 soft tokens'):
    Generator(model, ByteTokenizer(), one_device)('x' * 13)


def _adapter(run):
  config, checkpoints = configs.load(run), Checkpoints(run)
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    return adapter_of(config, checkpoints, 4)


@KINDS
def test_resumed_is_uninterrupted_and_a_moved_base_is_told(records, base, tuned, adapter, tmp_path):
  again = tmp_path / 'again'
  for steps in (2, 4):
    run_here(made(records, steps, adapter, base), again)
  for a, b in zip(jax.tree.leaves(_adapter(again)), jax.tree.leaves(_adapter(tuned(adapter)))):
    np.testing.assert_array_equal(a, b)
  expected, moved = scores(again), tmp_path / 'moved'
  base.rename(moved)
  try:
    convert.main(['rebase', '--workdir', str(again), '--base', str(moved)])
    for a, b in zip(scores(again), expected, strict=True):
      np.testing.assert_array_equal(a, b)
  finally:
    moved.rename(base)


@KINDS
def test_it_goes_to_peft_and_back_byte_for_byte(records, base, tuned, adapter, tmp_path, capsys):
  run, out, again = str(tuned(adapter)), str(tmp_path / 'out'), tmp_path / 'again'
  convert.main(['export', '--workdir', run, '--to', out])
  convert.main(['import', '--from', out, '--workdir', str(again), '--base', str(base)])
  convert.main(['export', '--workdir', str(again), '--to', str(tmp_path / 'back')])
  tensors = [
    (directory / 'adapter_model.safetensors').read_bytes()
    for directory in (tmp_path / 'out', tmp_path / 'back')
  ]
  assert tensors[0] == tensors[1]
  shape = TensorFiles(tmp_path / 'out', 'adapter_model.safetensors').tensors['prompt_embeddings']
  assert shape.shape == ((3, 32) if adapter is PROMPT else (3, 2 * 2 * 2 * 8))
  for a, b in zip(scores(again), scores(run), strict=True):
    np.testing.assert_array_equal(a, b)
  # What was imported is trained on.
  run_here(made(records, 2, configs.load(again).adapter, base), again)
  assert any(np.abs(a - b).max() > 1e-5 for a, b in zip(scores(again), scores(run), strict=True))

  convert.main(['inspect', str(run)])
  assert f"an adapter of kind '{adapter.kind}' on {base}" in capsys.readouterr().out
  with pytest.raises(SystemExit, match='they are no sum with its matrices'):
    convert.main(['merge', '--workdir', run, '--to', str(tmp_path / 'merged')])
  with pytest.raises(SystemExit, match='begin with the one that reads them'):
    run_here(made(records, 2, adapter, run), tmp_path / 'other')


@pytest.mark.parametrize('in_bytes', ['', 'int8'])
@KINDS
def test_samples_on_the_way_are_of_the_run(records, base, adapter, in_bytes, tmp_path):
  adapter = dataclasses.replace(adapter, base=in_bytes, initial='text', text='abcd')
  parts = {'sample_every': 4, 'sample_prompts': ('ab', 'The ')}
  run_here(made(records, 4, adapter, base, **parts), tmp_path / 'run')
  written = [sample.text for sample in samples.read(tmp_path / 'run')]
  ours = Generator.load(tmp_path / 'run')(['ab', 'The '], **samples.OPTIONS)
  assert written == [completion.text for completion in ours]


def test_it_begins_as_its_text(records, base, tmp_path):
  """At step 0 the run is the base with the text before its own: 'abc', as three bytes."""
  adapter = dataclasses.replace(PROMPT, initial='text', text='abc')
  config = made(records, 1, adapter, base)
  with jax.set_mesh(Generator.load(base).mesh):
    models, _ = begin(config, lambda line: None)
  table = np.asarray(models['policy'].embedding.tokens[...])
  rows = np.asarray(models[states.ADAPTER][soft.TABLE]['soft'][...])
  np.testing.assert_array_equal(rows, table[[100, 101, 102]])
