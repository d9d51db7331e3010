"""Are the numbers of a run those of its text? Counted by hand from files, and not compared with
another run, in which the same mistake would be.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from data.compressors import compression_baselines
from data.config import SourceConfig
from data.prepare import prepare
from model import flops, transformer
from model.params import abstract
from objectives.next_token import NextToken
from parallel.mesh import MeshConfig, make_mesh
from tests.training.conftest import T, initial_model, run_here, tiny
from training.evaluation import verdict_of
from training.program import make_program
from workdir.metrics import read_metrics

BOS, EOS, FIRST = 1, 2, 3  # of the byte tokenizer, whose id of a byte is that many above it


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  """Of short texts, whose characters, bytes and tokens are different numbers."""
  where = tmp_path_factory.mktemp('texts')
  draw = np.random.default_rng(5)
  texts = [''.join(draw.choice(list('ab \u20ac\u00e9'), draw.integers(1, 12))) for _ in range(90)]
  lines = ''.join(json.dumps({'text': f'{i} {text}'}) + '\n' for i, text in enumerate(texts))
  (where / 'texts.jsonl').write_text(lines)
  source = SourceConfig(kind='jsonl', path=str(where / 'texts.jsonl'), text_field='text')
  config = tiny(
    data={
      'sources': (source,),
      'cache_dir': str(where / 'cache'),
      'split': 'hash',
      'validation_fraction': 0.3,
    },
    train={'steps': 2, 'eval_every': 2, 'eval_batches': 1, 'save_every': 2},
  )
  # Which is of training alone: what is judged has none.
  return dataclasses.replace(config, objective=NextToken(z_loss=0.5))


@pytest.fixture(scope='module')
def prepared(config):
  return prepare(config.data, log=lambda _: None)


def pieces(text):
  """Token ids of a document as rows have them: inputs and targets, of at most T."""
  ids = [BOS, *(FIRST + byte for byte in text.encode()), EOS]
  for start in range(0, len(ids) - 1, T):
    yield ids[:-1][start : start + T], ids[1:][start : start + T]


def nats(model, texts):
  """-log p of every target, each piece a row of its own; and how many these are."""
  rows = [piece for text in texts for piece in pieces(text)]
  # Filled up behind, where causal attention does not look.
  tokens, targets = (
    np.array([piece[side] + [0] * (T - len(piece[side])) for piece in rows]) for side in (0, 1)
  )
  counted = np.arange(T) < np.array([len(piece[0]) for piece in rows])[:, None]
  logits = np.asarray(model.logits(model(jnp.asarray(tokens)).hidden), np.float64)
  shifted = logits - logits.max(2, keepdims=True)
  logs = shifted - np.log(np.exp(shifted).sum(2, keepdims=True))
  picked = np.take_along_axis(logs, targets[..., None], 2)[..., 0]
  return -picked[counted].sum(), counted.sum()


@pytest.mark.slow
def test_bits_per_byte_are_bits_of_bytes(config, prepared, one_device):
  """Nats over ln 2 over the UTF-8 bytes of the held-out texts, neither their tokens nor their
  characters; of a part of the rows, in proportion.
  """
  shapes = abstract(lambda: transformer.init(config.model, 0), one_device)
  leaves = map(jnp.asarray, initial_model(config.model, 0))
  model = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
  feed = train.fed(config, prepared, one_device)
  evaluate = train.make_evaluate(config, prepared, feed.put)
  texts = list(prepared.validation_documents())
  total, tokens = nats(model, texts)
  size = sum(len(text.encode()) for text in texts)
  assert len({sum(map(len, texts)), size, tokens}) == 3

  found = evaluate({'policy': model})
  assert found['validation_loss'] == pytest.approx(total / tokens, rel=1e-5)
  assert found['bits_per_byte'] == pytest.approx(total / math.log(2) / size, rel=1e-5)
  part = evaluate({'policy': model}, 1)
  at_the_end = evaluate({'policy': model}, go_on=True)
  # In the middle of a run nothing waits for compressors.
  assert at_the_end == found | {
    f'{name}_bits_per_byte': x for name, x in compression_baselines(texts).items()
  }
  first = next(iter(config.objective.validation_batches(prepared, config.data, feed.put.rows)))
  alone = evaluate({'policy': model}, 10**6)
  assert alone['validation_loss'] == found['validation_loss']
  inputs = jnp.asarray(first.tokens), jnp.asarray(first.positions), jnp.asarray(first.segments)
  logs = jax.nn.log_softmax(model.logits(model(*inputs).hidden))
  picked = np.take_along_axis(np.asarray(logs), first.targets[..., None], 2)[..., 0]
  mean = -(picked * first.weights).sum() / first.weights.sum()
  assert part['validation_loss'] == pytest.approx(mean, rel=1e-5)
  ratio = found['bits_per_byte'] / found['validation_loss']
  assert part['bits_per_byte'] / part['validation_loss'] == pytest.approx(ratio, rel=1e-5)
  assert part['validation_loss'] != found['validation_loss']


@pytest.fixture(scope='module')
def several(config, tmp_path_factory):
  """Long texts and short ones, each a source that is held out; the config of both, prepared."""
  texts = {'long': [f'{i} aab' * 5 for i in range(9)], 'short': [f'b{i}' for i in range(90)]}
  held_out = []
  for name, own in texts.items():
    path = tmp_path_factory.mktemp('several') / name / 'a.jsonl'
    path.parent.mkdir()
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in own))
    pattern = str(path.with_name('*.jsonl'))
    held_out.append(SourceConfig(kind='jsonl', path=pattern, text_field='text'))
  data = dataclasses.replace(config.data, validation=tuple(held_out), validation_fraction=0.0)
  config = dataclasses.replace(config, data=data)
  return texts, config, prepare(config.data, log=lambda _: None)


def test_bits_are_of_the_bytes_of_what_was_read(several):
  """A part of the validation holds as much of each source, and not as much as the whole does."""
  texts, config, prepared = several
  size = {name: sum(map(len, own)) for name, own in texts.items()}
  tokens = {name: size[name] + len(own) for name, own in texts.items()}

  def bits(shares):
    read = {name: np.float32(share * tokens[name]) for name, share in shares.items()}
    sums = {name: {'nll': 2 * n, 'tokens': n} for name, n in read.items()}
    return verdict_of(config.objective, prepared, sums)

  for shares in ({'long': 1, 'short': 1}, {'long': 0.25, 'short': 0.75}):
    said = bits(shares)
    nats, read = (sum(of[name] * share for name, share in shares.items()) for of in (tokens, size))
    assert said['bits_per_byte'] == pytest.approx(2 * nats / math.log(2) / read, rel=1e-6)
    for name in texts:
      ratio = 2 * tokens[name] / size[name] / math.log(2)
      assert said[f'bits_per_byte/{name}'] == pytest.approx(ratio, rel=1e-6)
  assert bits({'long': 1, 'short': 1})['bits_per_byte'] < 0.97 * said['bits_per_byte']
  assert prepared.bytes_of({'': sum(tokens.values())}) == sum(size.values())


@pytest.mark.slow
def test_each_source_is_judged_by_its_own_texts(several, one_device):
  """What is held out of several sources: the nats of each one's texts, in no batch with others',
  from the first batches on; and of all together by their tokens.
  """
  texts, config, prepared = several
  shapes = abstract(lambda: transformer.init(config.model, 0), one_device)
  leaves = map(jnp.asarray, initial_model(config.model, 0))
  model = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
  feed = train.fed(config, prepared, one_device)
  evaluate = train.make_evaluate(config, prepared, feed.put)
  sums = [nats(model, own) for own in texts.values()]

  of_all = evaluate({'policy': model})
  for name, (total, tokens) in zip(texts, sums, strict=True):
    assert of_all[f'validation_loss/{name}'] == pytest.approx(total / tokens, rel=1e-5)
  total, tokens = np.sum(sums, 0)
  assert of_all['validation_loss'] == pytest.approx(total / tokens, rel=1e-5)
  assert of_all['validation_loss/long'] != pytest.approx(of_all['validation_loss'], rel=1e-3)
  size = sum(len(text) for own in texts.values() for text in own)
  assert of_all['bits_per_byte'] == pytest.approx(total / math.log(2) / size, rel=1e-5)
  first_two = evaluate({'policy': model}, 2)
  assert first_two.keys() >= {'validation_loss/long', 'validation_loss/short'}
  assert evaluate({'policy': model}, 1) == first_two, 'one of each, however few are asked for'
  assert evaluate({'policy': model}, go_on=True).items() >= of_all.items()


def test_flops_are_of_documents_as_long_as_they_are(config, prepared, one_device):
  """Attention reaches back within a document, which is shorter than a row: of a training token the
  piece that it stands in, counted from the texts.
  """
  held_out = set(prepared.validation_documents())
  with open(config.data.sources[0].path) as file:
    texts = [json.loads(line)['text'] for line in file]
  lengths = [len(x) for text in texts if text not in held_out for x, _ in pieces(text)]
  length = sum(n * n for n in lengths) / sum(lengths)
  assert length < 0.9 * T
  cost = train.costs(config, make_program(config)[0], prepared)
  expected = flops.train_flops_per_token(config.model, T, length)
  assert cost.flops_per_token == pytest.approx(expected, rel=1e-9)
  assert expected < 0.995 * flops.train_flops_per_token(config.model, T)


@pytest.mark.slow
def test_what_a_run_says_of_tokens_and_bytes_is_counted(config, prepared, tmp_path):
  """The tokens of two steps are those with a target, padding left out, and what is reported at the
  end is of all held-out rows.
  """
  run_here(config, tmp_path)
  lines = read_metrics(tmp_path / 'metrics.jsonl')
  loader = train.fed(config, prepared, make_mesh(MeshConfig(), jax.devices()[:1])).batches
  seen = [int((loader.take(None).segments > 0).sum()) for _ in range(2)]
  assert sum(seen) < 2 * config.data.batch_size * T
  assert [line['tokens'] for line in lines if 'loss' in line] == [seen[0], sum(seen)]
  assert [line['predicted_tokens'] for line in lines if 'loss' in line] == seen
  texts = list(prepared.validation_documents())
  size, tokens = (sum(len(text.encode()) + more for text in texts) for more in (0, 1))
  last = lines[-1]
  ratio = last['bits_per_byte'] / last['validation_loss']
  assert ratio == pytest.approx(tokens / size / math.log(2), rel=1e-5)
  report = (tmp_path / 'report.md').read_text()
  assert f'**{last["bits_per_byte"]:.3f}**' in report
  assert f'| Tokens | {sum(seen)} |' in report
