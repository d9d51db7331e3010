"""Do the families compute what transformers computes? Logits, loss, gradients, packed and padded
rows, greedy tokens.

Default initialisation hides faults (norms are 1, biases 0), so every weight is drawn anew.
Sequences pass every window.
"""

import functools
import json
import pathlib
import tempfile

import numpy as np
import pytest

from model import checkpoint, families
from tests.goldens import ours, tiny

pytestmark = pytest.mark.oracle
pytest.importorskip('torch', reason='torch is not installed')
pytest.importorskip('transformers', reason='transformers is not installed')

CASES = sorted(tiny.CASES)
CAUSAL = [name for name in CASES if not name.startswith('bert')]
LENGTHS = (9, 10, 5)  # of the documents of a packed row


@functools.lru_cache(maxsize=2)
def case(name: str):
  """Their model, our config and model, and the directory that both were read from."""
  from tests.goldens import make

  directory = pathlib.Path(_HOME.name) / name
  theirs = make.build(name, directory)
  config, model = checkpoint.load(directory, mesh=ours.MESH)
  return theirs, config, model, directory


_HOME = tempfile.TemporaryDirectory()


def assert_close(found, expected):
  found, expected = np.asarray(found), expected.detach().numpy()
  np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))


def pairs(name):
  """Inputs without targets."""
  return {what: x for what, x in tiny.inputs(name).items() if what != 'targets'}


@pytest.mark.parametrize('name', CASES)
def test_logits(name):
  from tests.goldens import make

  theirs, _, model, _ = case(name)
  (expected, expected_pooled), (found, pooled) = (
    make.forward(theirs, **pairs(name)),
    ours.scores(model, name, **pairs(name)),
  )
  assert_close(found, expected)
  assert (pooled is None) == (expected_pooled is None)
  if pooled is not None:
    assert_close(pooled, expected_pooled)


@pytest.mark.parametrize('name', CASES)
def test_keys_that_are_not_there_are_what_transformers_takes(name):
  title, arguments = tiny.CASES[name]
  _, _, _, directory = case(name)
  hf = json.loads((directory / 'config.json').read_text())
  short = {key: value for key, value in arguments.items()} | {
    'model_type': hf['model_type'],
    'architectures': [title],
  }
  if name == 't5_v1_1':  # the file does not tell that the head is not tied
    hf['tie_word_embeddings'] = False
  assert families.read(short)[1] == families.read(hf)[1]


@pytest.mark.parametrize('name', CASES)
def test_packed_documents_do_not_see_each_other(name):
  from tests.goldens import make

  theirs, _, model, _ = case(name)
  given = pairs(name)
  segments = np.repeat(np.arange(1, len(LENGTHS) + 1, dtype=np.int32), LENGTHS)[None].repeat(2, 0)
  positions = np.concatenate([np.arange(n, dtype=np.int32) for n in LENGTHS])[None].repeat(2, 0)
  packed = given | {'segments': segments, 'positions': positions}
  cuts = {}
  if 'source' in given:
    cuts = {1: slice(0, 7), 2: slice(7, 12), 3: slice(12, 19)}
    packed['source_segments'] = np.concatenate(
      [np.full((2, cut.stop - cut.start), n, np.int32) for n, cut in cuts.items()], 1
    )
    packed['source_positions'] = np.concatenate(
      [np.arange(cut.stop - cut.start, dtype=np.int32)[None].repeat(2, 0) for cut in cuts.values()],
      1,
    )
  found, _ = ours.scores(model, name, **packed)
  for n in range(1, len(LENGTHS) + 1):
    where = segments[0] == n
    alone = {what: x[:, cuts[n]] if what == 'source' else x[:, where] for what, x in given.items()}
    expected, _ = make.forward(theirs, **alone)
    assert_close(found[:, where], expected)


@pytest.mark.parametrize('name', CASES)
def test_padding_is_not_seen(name):
  from tests.goldens import make

  theirs, _, model, _ = case(name)
  given, mask = pairs(name), (np.arange(24)[None] < [[24], [15]]).astype(np.int32)
  padded, others = given | {'segments': mask}, {'mask': mask}
  if 'source' in given:
    padded['source_segments'] = others['source_mask'] = (np.arange(19)[None] < [[11], [19]]).astype(
      np.int32
    )
  found, _ = ours.scores(model, name, **padded)
  expected, _ = make.forward(theirs, **given, **others)
  assert_close(found[mask == 1], expected[mask == 1])


@pytest.mark.parametrize('name, pooling', [('bert', 'mean'), ('bert', 'first'), ('llama', 'last')])
def test_pooled_states(name, pooling):
  """As decode.embedder has them, of texts of unlike lengths side by side."""
  import torch

  from data.tokenizers import ByteTokenizer
  from decode.embedder import Embedder
  from decode.generator import Generator

  theirs, _, model, _ = case(name)
  tokens = tiny.inputs(name)['tokens'][0]
  texts = [tokens.tolist(), tokens[:5].tolist()]
  made = Generator(model, ByteTokenizer(), ours.MESH)
  job = Embedder(made, pooling, 32)(texts, made.plain)
  while True:
    try:
      next(job)
    except StopIteration as end:
      found = end.value
      break
  for vector, text in zip(found, texts, strict=True):
    with torch.no_grad():
      states = theirs.base_model(input_ids=torch.tensor([text])).last_hidden_state[0]
    at = {'first': 0, 'last': -1}
    assert_close(vector, states.mean(0) if pooling == 'mean' else states[at[pooling]])


@pytest.mark.parametrize('name', CAUSAL)
def test_greedy_tokens(name):
  from tests.goldens import make

  theirs, _, model, _ = case(name)
  for row in range(2):
    np.testing.assert_array_equal(
      ours.generate(model, name, row, make.NEW_TOKENS), make.generate(theirs, name, row)
    )


@pytest.mark.parametrize('name', CASES)
def test_export_is_the_same_to_the_bit_and_loads_in_transformers(name, tmp_path):
  import torch

  from tests.goldens import make

  theirs, config, model, directory = case(name)
  checkpoint.save(model, config, tmp_path / 'out', shard_bytes=40_000)
  before, after = ours.tensors(directory), ours.tensors(tmp_path / 'out')
  assert before.keys() == after.keys()
  for tensor in before:
    np.testing.assert_array_equal(before[tensor], after[tensor], err_msg=tensor)
  again = make.load(name, tmp_path / 'out')
  for one, other in zip(
    make.forward(theirs, **pairs(name)), make.forward(again, **pairs(name)), strict=True
  ):
    assert (one is None) == (other is None)
    assert one is None or torch.equal(one, other)


@pytest.mark.parametrize('name', CASES)
def test_loss_and_every_gradient(name, tmp_path):
  from tests.goldens import make

  _, _, model, _ = case(name)
  theirs = make.build(
    name, tmp_path / 'model'
  )  # its own: what follows writes gradients over the weights
  scores, pooled = make.forward(theirs, **pairs(name))
  expected = make.loss(name, scores, pooled, tiny.inputs(name)['targets'])
  expected.backward()
  make.save_gradients(theirs, tmp_path / 'theirs')
  total, _, gradients = ours.loss_and_gradients(model, name)
  # Of a dozen labels: one last digit of f32 more or less in each logit, by the processor.
  np.testing.assert_allclose(total, expected.item(), rtol=3e-5)
  checkpoint.save(gradients, model.config, tmp_path / 'ours')
  found, wanted = ours.tensors(tmp_path / 'ours'), ours.tensors(tmp_path / 'theirs')
  wrong = ours.compare_gradients(
    found,
    {name: np.linalg.norm(x) for name, x in wanted.items()},
    lambda name: np.linalg.norm(found[name] - wanted[name]),
    wanted,
  )
  assert not wrong
