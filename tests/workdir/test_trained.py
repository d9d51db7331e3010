"""Is what a run is said to have read what its loader gave it, and nothing else?"""

import json
import random

import numpy as np
import pytest

from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from data.loader import train_loader
from data.prepare import prepare
from evaluation.passages import Cut
from model.config import ModelConfig
from training.config import Config, TrainConfig
from workdir.trained import Trained

CUT = Cut(prompt=8, new=8, limit=40)


@pytest.fixture(scope='module')
def half_read(tmp_path_factory):
  """(what a run has read after some batches, ids of all rows that it got)."""
  where = tmp_path_factory.mktemp('read')
  draw = random.Random(0)
  texts = [
    ''.join(draw.choices('abcdefgh ', k=draw.choice([5, 30, 40]))) + f' {i}' for i in range(300)
  ]
  (where / 'a.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  data = DataConfig(
    sources=(SourceConfig(kind='jsonl', path=f'{where}/a.jsonl', text_field='text'),),
    tokenizer=TokenizerConfig(kind='byte'),
    clean=CleanConfig(near_duplicates=0.0, anonymise=()),
    sequence_length=48,
    batch_size=4,
    validation_fraction=0.3,
    cache_dir=str(where / 'cache'),
  )
  config = Config(
    model=ModelConfig(vocabulary=260, width=16, layers=1, heads=2, max_length=48),
    data=data,
    train=TrainConfig(steps=9),
  )
  prepared = prepare(data, log=lambda line: None)
  loader = train_loader(prepared, data)
  batches = [next(loader) for _ in range(9)]
  loader.close()
  rows = [row.tobytes() for batch in batches for row in np.asarray(batch.tokens)]
  return Trained(prepared, config, loader.state()['examples']), rows, texts


def test_members_are_rows_that_were_read_and_the_control_is_held_out(half_read):
  run, rows, texts = half_read
  members, control = run.members(CUT), run.control(CUT)
  assert len(members) == members.documents > 10 and len(control) == control.documents > 10
  for passage in members:
    assert any(np.array(passage.ids[:-1], np.int32).tobytes() in row for row in rows)
    assert passage.prompt[0] == run.prepared.tokenizer.bos and len(passage.prompt) == 9
  decode = run.prepared.tokenizer.decode
  held_out = [*run.prepared.validation_documents()]
  for passage in control:
    assert sum(text.startswith(decode(passage.ids)) for text in held_out) == 1
  beginnings = {decode(passage.ids) for passage in control}
  assert not beginnings & {decode(passage.ids) for passage in members}
  # Of what was not read yet there are others, none of which is a member.
  every = run._replace(examples=run.prepared.rows)
  assert len({p.digest for p in every.members(Cut(8, 8, 400))}) > 1.5 * len(
    run.members(Cut(8, 8, 400))
  )
  assert {*run.texts()} | {*held_out} == {text for text in texts}


def test_short_documents_are_said(half_read):
  run, _, _ = half_read
  with pytest.raises(ValueError, match=r'36 rows that were read: none of \d+ pieces has 60 tokens'):
    run.members(Cut(30, 30, 10))
