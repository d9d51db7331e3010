"""Do rows of a table that are no ids change nothing? Not the loss, not a text, not an export; and
are tables that devices cannot share refused where the model is made?
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from data.batch import Batch
from decode.engine import Engine, Sizes
from decode.generator import Generator
from model import checkpoint, loss, params, transformer
from model.config import ModelConfig
from objectives.next_token import summed_loss
from parallel.mesh import MeshConfig, make_mesh
from tests.goldens import ours
from tests.model.test_model_checkpoint import LLAMA, write_tokenizer
from training import config as configs

V = 301  # as odd as GPT-2's 50,257
TINY = ModelConfig(vocabulary=V, width=16, layers=2, heads=2, feed_forward=24, max_length=32)
KINDS = {
  'plain': TINY,
  'tied': dataclasses.replace(TINY, tie_embeddings=True, logit_softcap=5.0),
  'mlm': dataclasses.replace(TINY, head='mlm', tie_embeddings=True, biases='all'),
}


def mesh_of(**sizes):
  sizes = {'data': 1} | sizes
  return make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])


def made(config):
  return jax.jit(transformer.init, static_argnums=(0, 1))(config, 0)


def poisoned(model, plain):
  """The model of padded tables with the other's values, and 50 where a row is no id."""

  def fill(padded, x):
    rows = [(0, a - b) for a, b in zip(padded.shape, x.shape)]
    return jnp.pad(x, rows, constant_values=50)

  leaves = map(fill, jax.tree.leaves(model), jax.tree.leaves(plain))
  return jax.tree.unflatten(jax.tree.structure(model), leaves)


def batch():
  draw = np.random.default_rng(0)
  tokens, targets = (jnp.asarray(draw.integers(0, V, (2, 9)), jnp.int32) for _ in range(2))
  ones = jnp.ones((2, 9), jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9))
  values = dict(tokens=tokens, targets=targets, weights=ones.astype(jnp.float32))
  return Batch(**values, segments=ones, positions=positions)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_padded_rows_are_in_no_loss_and_get_no_gradient(kind):
  config = KINDS[kind]
  padded = dataclasses.replace(config, vocabulary_multiple=128)
  assert (padded.table_rows, padded.vocabulary_limit, config.vocabulary_limit) == (384, V, 0)
  run = jax.jit(jax.value_and_grad(lambda model: summed_loss(model, batch(), 1e-3), has_aux=True))
  with jax.set_mesh(mesh_of()):
    plain = made(config)
    (expected, sums), wanted = run(plain)
    (found, seen), gradients = run(poisoned(made(padded), plain))
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  for name in sums:
    np.testing.assert_allclose(seen[name], sums[name], rtol=1e-6)
  for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
    inside = tuple(slice(0, n) for n in y.shape)
    np.testing.assert_allclose(x[inside], y, rtol=1e-4, atol=1e-5)
    assert not np.asarray(x[y.shape[0] :]).any(), 'rows that are no ids'


@pytest.mark.slow
def test_a_loss_that_has_them_is_found(monkeypatch):
  """The planted fault: without the limit, 83 more rows are in the normaliser."""
  plain_loss = loss.cross_entropy
  monkeypatch.setattr(loss, 'cross_entropy', lambda *given, vocabulary: plain_loss(*given))
  with pytest.raises(AssertionError):
    test_padded_rows_are_in_no_loss_and_get_no_gradient('plain')


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
  """hf/, of 301 ids of which the tokenizer has 257, and run/."""
  directory = tmp_path_factory.mktemp('odd')
  ours.build(LLAMA | {'vocab_size': V}, directory / 'hf')
  write_tokenizer(directory / 'hf')
  convert.main(['import', '--from', str(directory / 'hf'), '--workdir', str(directory / 'run')])
  return directory


@pytest.mark.slow
def test_an_import_is_padded_and_its_export_is_not(imported, tmp_path, capsys):
  config = configs.load(imported / 'run').model
  assert (config.V, config.table_rows) == (V, 384)
  convert.main(['export', '--workdir', str(imported / 'run'), '--to', str(tmp_path / 'out')])
  before, after = (ours.tensors(path) for path in (imported / 'hf', tmp_path / 'out'))
  assert before.keys() == after.keys()
  for name, x in before.items():
    assert x.tobytes() == after[name].tobytes() and x.shape == after[name].shape
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['vocab_size'] == V
  sizes = []
  for path in ('hf', 'run'):
    convert.main(['inspect', str(imported / path)])
    sizes.append(capsys.readouterr().out.split(' parameters')[0].split()[-1])
  assert sizes[0] == sizes[1], 'rows that are no ids are no parameters of the model'


@pytest.mark.slow
def test_that_an_import_is_padded_is_said_with_what_changes_it(imported, tmp_path, capsys):
  command = ['import', '--from', str(imported / 'hf'), '--workdir']
  convert.main([*command, str(tmp_path / 'padded')])
  (said,) = [line for line in capsys.readouterr().out.splitlines() if 'rows' in line]
  for part in ('384 rows', '301 ids', 'model.vocabulary_multiple', '--vocabulary_multiple=1'):
    assert part in said
  convert.main([*command, str(tmp_path / 'plain'), '--vocabulary_multiple=1'])
  assert 'rows' not in capsys.readouterr().out
  assert configs.load(tmp_path / 'plain').model.table_rows == V
  with pytest.raises(SystemExit, match='error: model.vocabulary_multiple=0 must be'):
    convert.main([*command, str(tmp_path / 'none'), '--vocabulary_multiple=0'])


@pytest.mark.slow
@pytest.mark.long
def test_an_odd_vocabulary_generates_on_devices_that_share_it(imported):
  several = Generator.load(imported / 'run', mesh=MeshConfig(data=2, tensor=2))
  alone = Generator.load(imported / 'run')
  for options in (dict(seed=3), dict(temperature=0.0, lookup=1), dict(beams=2)):
    options |= dict(max_new_tokens=8)
    found, expected = (g(['def f(', 'x'], **options) for g in (several, alone))
    assert [c.ids for c in found] == [c.ids for c in expected]
    assert all(i < 257 for c in found for i in c.ids)
  for one, other in zip(several.score(['def f(']), alone.score(['def f(']), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
  assert alone.session().append('abc')(max_new_tokens=4).ids
  engine = Engine(alone.model.config, alone.mesh, Sizes(rows=1, capacity=32))
  engine.compile(alone.model)


@pytest.mark.slow
def test_log_probabilities_of_a_padded_import_are_those_of_the_checkpoint(imported):
  """All 301 ids are in the law of the unpadded model, and no others in the padded one's."""
  config, plain = checkpoint.load(imported / 'hf', mesh=mesh_of())
  tokens = jnp.asarray(np.arange(12)[None], jnp.int32)
  generator = Generator.load(imported / 'run')
  with jax.set_mesh(generator.mesh):
    expected = plain.logits(plain(tokens).hidden)
    found = generator.model.logits(generator.model(tokens).hidden)
  np.testing.assert_allclose(found[..., :V], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  'changes, sizes, words',
  [
    ({}, dict(tensor=2), r'model\.vocabulary=301 .* mesh\.tensor=2 .*vocabulary_multiple 2,'),
    (dict(vocabulary_multiple=2), dict(tensor=4), r'model\.vocabulary=301 .* mesh\.tensor=4'),
    (
      dict(vocabulary_multiple=8),
      dict(tensor=4),
      r'model\.heads=2 does not split over mesh\.tensor=4; make it a multiple, or the axis smaller',
    ),
    ({}, dict(fsdp=3), r'model\.width=16 does not split over mesh\.fsdp=3; make it'),
  ],
)
def test_what_a_mesh_does_not_split_is_refused_before_it_is_loaded(
  tmp_path, changes, sizes, words, monkeypatch
):
  from data.config import DataConfig
  from workdir import open as opening

  model = dataclasses.replace(TINY, **changes)
  config = configs.Config(model=model, data=DataConfig(sequence_length=32))
  configs.save(config, tmp_path)
  monkeypatch.setattr(opening.Checkpoints, 'model', lambda *_: pytest.fail('it was read'))
  with pytest.raises(ValueError, match=words):
    Generator.load(tmp_path, mesh=MeshConfig(data=1, **sizes))
  mesh = mesh_of(**sizes)
  with pytest.raises(ValueError, match=words):
    Engine(model, mesh, Sizes(rows=mesh.shape['fsdp'], capacity=32))
  with pytest.raises(ValueError, match=words):
    model.check_parameters(dict(mesh.shape))


def test_rows_are_counted():
  with jax.set_mesh(mesh_of()):
    model = jax.eval_shape(lambda: transformer.init(TINY, 0))
  assert convert._count(model, TINY) == params.count(model)
