"""Is what a run is said to have read what its loader gave it, and nothing else?"""

import json
import random

import numpy as np
import pytest

from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from data.loader import train_loader
from data.prepare import prepare
from evaluation.memorisation import PARTS
from evaluation.passages import Cut
from model.config import ModelConfig
from tests.test_commands import Process
from training.config import Config, TrainConfig
from workdir import card, memorised
from workdir.trained import Trained, _answer

CUT = Cut(prompt=8, new=8, limit=40)


@pytest.fixture(scope='module')
def half_read(tmp_path_factory):
  """(what a run has read after some batches, ids of all rows that it got)."""
  where = tmp_path_factory.mktemp('read')
  draw = random.Random(0)
  texts = [
    ''.join(draw.choices('abcdefgh ', k=draw.choice([5, 30, 120]))) + f' {i}' for i in range(300)
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


def test_of_an_answer_what_is_learned_is_to_be_written():
  ids, scored = [1, 70, 71, 72, 80, 81, 82, 2], np.array([0, 0, 0, 0, 1, 1, 1, 1], bool)
  passage = _answer('here', ids, scored, Cut(prompt=5, new=3))
  assert (passage.prompt, passage.behind, passage.learned) == ((1, 70, 71, 72), (80, 81, 82), 4)
  assert _answer('here', ids, scored, Cut(prompt=2, new=3)) is None  # the prompt is longer
  assert _answer('here', ids, scored, Cut(prompt=5, new=5)) is None  # the answer is shorter
  assert _answer('here', ids, scored & False, Cut(prompt=5, new=3)) is None


CONFIG = '''
from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from model.config import ModelConfig
from training.config import Config, TrainConfig


def get_config():
  return Config(
    model=ModelConfig(width=16, layers=1, heads=2, feed_forward=32),
    data=DataConfig(
      sources=(SourceConfig(kind='jsonl', path='DIRECTORY/a.jsonl', text_field='text'),),
      tokenizer=TokenizerConfig(kind='byte'),
      clean=CleanConfig(near_duplicates=0.0, anonymise=()),
      sequence_length=64,
      batch_size=4,
      validation_fraction=0.3,
      cache_dir='DIRECTORY/cache',
    ),
    train=TrainConfig(steps=9, log_every=3),
  )
'''


@pytest.mark.slow
def test_the_commands_run_and_say_what_cannot_be_asked(tmp_path, capsys):
  """Of a run of train.py: what it has kept, its card with that in it, and a person's words in it
  afterwards.
  """
  draw = random.Random(0)
  words = [f'{a}{b}' for a in 'abcdefgh' for b in 'ijklmnop']
  texts = [' '.join(draw.choices(words, k=20)) for _ in range(120)]
  (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  (tmp_path / 'config.py').write_text(CONFIG.replace('DIRECTORY', str(tmp_path)))
  run = tmp_path / 'run'
  done = Process(tmp_path, 'train.py', f'--config={tmp_path}/config.py', f'--workdir={run}').end()
  assert done.code == 0, done.error

  memorised.main([f'--workdir={run}', '--prompt=12', '--new=30', '--words=8', '--limit=16'])
  said = capsys.readouterr().out
  assert said.count('not beyond the control') == 2 and 'rows that were read' in said
  values = json.loads((run / 'evaluation' / 'memorisation.json').read_text())
  assert values['run']['step'] == 9 and set(values['findings']) == set(PARTS)
  lines = [json.loads(x) for x in (run / 'evaluation' / 'memorisation.jsonl').open()]
  assert len(lines) == values['sides']['members']['n'] + values['sides']['control']['n']

  card.main([str(run), '--watts=100', '--co2=0.4'])
  path = run / 'MODEL_CARD.md'
  text = path.read_text()
  for told in ('0.4 kg CO2 per kWh', 'not beyond the control', 'Read | 120 documents'):
    assert told in text
  path.write_text(text.replace('*To be filled.* Where it fails', 'It knows no grammar. It fails'))
  card.main([str(run)])
  assert 'It knows no grammar.' in path.read_text() and '100 W a chip' in path.read_text()
  path.write_text(path.read_text().replace('120 documents', '999 documents'))
  with pytest.raises(SystemExit, match="the block 'data' was changed by hand"):
    card.main([str(run)])

  capsys.readouterr()
  for flags, told in (
    (['--prompt=60'], '--prompt=60 and --new=50 tokens, and one that begins a text, pass'),
    ([f'--training={tmp_path}/a.jsonl'], 'and no --control'),
    (
      [f'--training={tmp_path}/a.jsonl', f'--control={tmp_path}/a.jsonl', '--new=9', '--prompt=9'],
      'a.jsonl is in --training and in --control',
    ),
    (['--parts=extract'], "--parts='extract' is unknown; did you mean 'extraction'"),
  ):
    with pytest.raises(SystemExit) as error:
      memorised.main([f'--workdir={run}', *flags])
    assert told in str(error.value)

  # What is there of another checkpoint is not written over.
  values['run']['digest'] = 'd'
  (run / 'evaluation' / 'memorisation.json').write_text(json.dumps(values))
  with pytest.raises(SystemExit, match="run.digest was 'd' and is .*give another --output"):
    memorised.main([f'--workdir={run}', '--prompt=12', '--new=30', '--limit=16'])
