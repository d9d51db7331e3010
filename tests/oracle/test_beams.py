"""Does beam search find what transformers' generate(num_beams=..) finds? Token for token, with its
scores.
"""

import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode import beam
from decode.loop import Rules, prefill
from decode.sampling import make_sampling
from model import checkpoint
from model.cache import init_cache
from tests.goldens import ours, tiny

pytestmark = pytest.mark.oracle
pytest.importorskip('torch', reason='torch is not installed')
pytest.importorskip('transformers', reason='transformers is not installed')

BEAMS, NEW = 4, 10
_HOME = tempfile.TemporaryDirectory()


@functools.lru_cache(maxsize=2)
def case(name):
  """Their model and ours."""
  from tests.goldens import make

  directory = pathlib.Path(_HOME.name) / name
  theirs = make.build(name, directory)
  return theirs, checkpoint.load(directory, mesh=ours.MESH)[1]


def prompts(name):
  """Two prompts of different lengths, and, of an encoder-decoder, their sources, the second one
  shorter.
  """
  given = tiny.inputs(name)
  if 'source' in given:
    return [[0], [0]], given['source'], np.array([given['source'].shape[1], 11])
  return [given['tokens'][0, :8].tolist(), given['tokens'][1, :5].tolist()], None, None


def expected(name, texts, ends, **options):
  """[(score, ids)] of each prompt, by transformers, both in one batch."""
  import torch

  theirs, _ = case(name)
  lines, source, counts = prompts(name)

  def put(x):
    return torch.tensor(np.asarray(x, np.int64))

  width = max(map(len, lines))
  if source is None:
    given = {
      'input_ids': put([[0] * (width - len(line)) + line for line in lines]),
      'attention_mask': put([[0] * (width - len(line)) + [1] * len(line) for line in lines]),
    }
  else:
    given = {
      'input_ids': put(source),
      'attention_mask': put(np.arange(source.shape[1])[None] < counts[:, None]),
    }
  out = theirs.generate(
    **given,
    num_beams=BEAMS,
    num_return_sequences=texts,
    do_sample=False,
    max_new_tokens=NEW,
    eos_token_id=list(ends) or None,
    pad_token_id=0,
    return_dict_in_generate=True,
    output_scores=True,
    **options,
  )
  rows = [row[width:].tolist() for row in out.sequences]

  def cut(row):
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row)) + 1]

  found = list(zip(out.sequences_scores.tolist(), map(cut, rows)))
  return [found[i : i + texts] for i in range(0, len(found), texts)]


@functools.cache
def ends(name):
  """Three ids that some beams reach, early and late."""
  (_, first), (_, second) = expected(name, 2, ())[0]
  return tuple(dict.fromkeys((second[2], first[5], first[8])))


def found(name, texts, ends, length_penalty=1.0, early_stopping=False, repetition_penalty=1.0):
  """The same by us."""
  _, model = case(name)
  lines, source, counts = prompts(name)
  tokens, put = np.zeros((2, 8), np.int32), ours.put
  for row, line in zip(tokens, lines):
    row[: len(line)] = line
  lengths = np.array([len(line) for line in lines], np.int32)
  if source is not None:
    source = put(source), put(counts.astype(np.int32))
  with jax.set_mesh(ours.MESH):
    state = prefill(
      model,
      put(tokens),
      put(lengths),
      init_cache(model.config, 2, 24, '', 1),
      put(lengths + NEW),
      source,
    )
    state = beam.begin(
      state,
      put(np.full(2, length_penalty, np.float32)),
      put(np.full(2, beam.EARLY[early_stopping], np.int32)),
      beams=BEAMS,
      room=NEW,
    )
    table = np.full((2 * BEAMS, 3), -1, np.int32)
    table[:, : len(ends)] = ends
    sampling = make_sampling(2 * BEAMS, repetition_penalty=repetition_penalty)
    state, going = beam.search(
      model, state, Rules(jax.tree.map(put, sampling), put(table)), jnp.int32(NEW)
    )
    scores, chunk = jax.tree.map(np.asarray, beam.best(state))
  assert not np.asarray(going).any()
  return [
    [
      (scores[p, i], row.ids[row.real].tolist())
      for i in range(texts)
      for row in [jax.tree.map(lambda x: x[p * BEAMS + i], chunk)]
    ]
    for p in range(2)
  ]


def check(name, texts, ends, **options):
  wanted, got = expected(name, texts, ends, **options), found(name, texts, ends, **options)
  assert [[ids for _, ids in one] for one in got] == [[ids for _, ids in one] for one in wanted]
  np.testing.assert_allclose(
    [[score for score, _ in one] for one in got],
    [[score for score, _ in one] for one in wanted],
    rtol=1e-5,
    atol=1e-5,
  )
  return wanted


@pytest.mark.parametrize('early_stopping', [False, True, 'never'])
@pytest.mark.parametrize('length_penalty', [0.5, 1.0, 2.0, -0.5])
@pytest.mark.parametrize('name', ['llama', 't5'])
def test_length_penalty_and_early_stopping(name, length_penalty, early_stopping):
  check(name, 3, ends(name), length_penalty=length_penalty, early_stopping=early_stopping)


@pytest.mark.parametrize('name', ['llama', 't5'])
def test_ends_and_numbers_of_texts(name):
  every = [
    check(name, texts, of)
    for texts, of in ((1, ()), (BEAMS, ()), (2, ends(name)[:1]), (BEAMS, ends(name)))
  ]
  assert len({len(ids) for one in every[-1] for _, ids in one}) > 1, (
    'nothing ends before its time: too dull to tell anything'
  )


@pytest.mark.parametrize('name', ['gemma3', 'gpt_oss', 'deepseek_v3'])
def test_rings_sinks_latent_attention_and_experts(name):
  check(name, 3, ends(name), length_penalty=0.7)


@pytest.mark.parametrize('name', ['llama', 't5'])
def test_penalties_are_on_log_probabilities(name):
  assert check(name, 2, ends(name), repetition_penalty=1.7) != check(name, 2, ends(name))
