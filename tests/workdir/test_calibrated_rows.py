"""Are rows of calibration the tokens of their texts, each once, in an order that the seed says?"""

import json

import numpy as np
import pytest

from data.config import DataConfig
from data.tokenizers import ByteTokenizer
from model.config import ModelConfig
from training.config import Config
from workdir.calibrated import Calibration, rows
from workdir.untrained import write_run

TEXTS = ['abcdefghijkl', 'mno', 'pqrstuvw']


@pytest.fixture
def run(tmp_path):
  """A directory, as an import leaves it, and a file of texts."""
  write_run(tmp_path / 'run', Config(), {'model': {'x': np.zeros(2)}}, print)
  file = tmp_path / 'texts.jsonl'
  file.write_text('\n'.join(json.dumps({'text': text}) for text in TEXTS))
  return tmp_path / 'run', str(file)


def made(run, config=Config(), **choices):
  calibration = Calibration(file=run[1], length=6, **choices)
  return rows(run[0], config, 'last', ByteTokenizer(), calibration, print)


def test_every_token_stands_in_a_row_once(run, capsys):
  tokenizer, found = ByteTokenizer(), made(run, samples=9)
  tokens = np.concatenate([batch.tokens[batch.segments > 0] for batch in found.batches])
  wanted = [[tokenizer.bos, *tokenizer.encode(text), tokenizer.eos] for text in TEXTS]
  assert sorted(tokens) == sorted(sum(wanted, []))
  assert 'there is text for no more' in capsys.readouterr().out
  for batch in found.batches:
    for segments, positions, ids in zip(batch.segments, batch.positions, batch.tokens):
      for segment in set(segments) - {0}:
        at = np.flatnonzero(segments == segment)
        assert (np.diff(at) == 1).all() and positions[at].tolist() == [*range(len(at))]
        assert any(str(ids[at].tolist())[1:-1] in str(text) for text in wanted), 'a part of one'
  assert found.described['tokens'] == len(tokens) and found.described['length'] == 6


def test_a_seed_says_which(run):
  one, again, other = (made(run, samples=2, seed=seed) for seed in (1, 1, 2))
  assert one.described == again.described != other.described
  assert one.described['samples'] == 2 and one.described['tokens'] == 12


def test_an_encoder_decoder_reads_one_half_and_writes_the_other(run):
  config = Config(model=ModelConfig(encoder_layers=1, position='relative'))
  (batch,) = made(run, config, samples=4).batches
  tokenizer = ByteTokenizer()
  assert (batch.tokens[:, 0][batch.segments[:, 0] > 0] == tokenizer.bos).all()
  ends = batch.source_segments.sum(1) - 1
  assert {int(row[end]) for row, end in zip(batch.source, ends) if end >= 0} == {tokenizer.eos}


def test_what_cannot_be_is_said(run):
  with pytest.raises(ValueError, match="--calibrate_format='chta' is unknown"):
    Calibration(format='chta')
  with pytest.raises(ValueError, match="'texts.txt' is no .jsonl file"):
    Calibration(file='texts.txt', format='chat')
  with pytest.raises(ValueError, match='--samples=0 must be at least 1'):
    Calibration(samples=0)
  with pytest.raises(ValueError, match='--length=6 passes model.max_length=4'):
    data = DataConfig(sequence_length=4)
    made(run, Config(model=ModelConfig(max_length=4), data=data))
