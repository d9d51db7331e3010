"""Is what is shown of the data what is trained on?"""

import json
import types

from data import showing
from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from objectives.denoise import MaskedLM, SpanCorruption
from objectives.next_token import NextToken
from objectives.policy import GRPO
from objectives.seq2seq import Seq2Seq
from objectives.sft import SFT
from training.config import TrainConfig


def config(tmp_path, source, **fields):
  return DataConfig(
    sources=(source,),
    clean=CleanConfig(anonymise=(), near_duplicates=0),
    tokenizer=TokenizerConfig(kind='byte'),
    batch_size=2,
    cache_dir=str(tmp_path / 'cache'),
    **fields,
  )


def shown(objective, data, count=3, causal=True):
  prepared = objective.read(data, lambda line: None)
  model = types.SimpleNamespace(causal=causal)
  config = types.SimpleNamespace(objective=objective, data=data, model=model)
  return showing.examples(config, prepared, count)


def test_what_is_learned_of_a_record_is_green(tmp_path):
  path = tmp_path / 'pairs.jsonl'
  rows = [{'prompt': f'{i}+{i}=', 'completion': f'{2 * i}.'} for i in range(30)]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  source = SourceConfig(kind='jsonl', path=str(path), format='completion')
  text = shown(SFT(), config(tmp_path, source, sequence_length=16, validation_fraction=0.2))
  lines = text.split('\n')
  assert lines[0].startswith('--- example 1: ') and len(lines) == 6
  expected = {f'<s>{row["prompt"]}\x1b[32m{row["completion"]}</s>\x1b[0m' for row in rows}
  assert {*lines[1::2]} < expected


def test_a_source_is_shown_with_its_target_in_green(tmp_path):
  path = tmp_path / 'pairs.jsonl'
  rows = [{'source': f'{i} twice', 'target': f'{2 * i}.'} for i in range(30)]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  source = SourceConfig(kind='jsonl', path=str(path), format='pair')
  given = config(tmp_path, source, sequence_length=32, validation_fraction=0.2)
  text = shown(Seq2Seq(prefix='say: ', target_length=16), given)
  head, *examples = text.split('--- example ')
  assert not head and len(examples) == 3
  expected = {
    f'say: {row["source"]}</s>\n->\n<pad>\x1b[32m{row["target"]}</s>\x1b[0m' for row in rows
  }
  assert {example.partition('\n')[2].rstrip('\n') for example in examples} < expected
  assert examples[0].startswith('1: reading ')


def test_documents_and_noise_are_shown_too(tmp_path):
  for i in range(20):
    (tmp_path / f'{i}.txt').write_text(f'document number {i} of some words. ' * 6)
  source = SourceConfig(kind='text', path=str(tmp_path / '*.txt'))
  data = config(tmp_path, source, sequence_length=64, validation_fraction=0.2)
  text = shown(NextToken(), data)
  assert text.count('\x1b[32m') == 3 and 'document number' in text
  corrupted = shown(SpanCorruption(), data, 1)
  source, target = corrupted.split('\n->\n')
  assert '<extra_id_0>' in source and '\x1b[32m<extra_id_0>' in target
  masked = shown(MaskedLM(), data, 1, causal=False)
  assert masked.count('[MASK]') + masked.count('<mask>') > 2 and '\x1b[32m' in masked


def test_of_what_is_written_while_it_trains_prompts_are_shown(tmp_path):
  path = tmp_path / 'prompts.jsonl'
  path.write_text(''.join(json.dumps({'prompt': f'{i}+{i}='}) + '\n' for i in range(30)))
  source = SourceConfig(kind='jsonl', path=str(path), format='prompt')
  reward = ('configs/rewards/brackets.py',)
  objective = GRPO(reward=reward, max_new_tokens=4, group=2)
  data = config(tmp_path, source, sequence_length=24, validation_fraction=0.2)
  prepared = objective.read(data, lambda line: None)
  run = types.SimpleNamespace(objective=objective, data=data, train=TrainConfig())
  lines = showing.examples(run, prepared, 3).split('\n')
  assert [line.split(':')[0] for line in lines[::2]] == [f'--- prompt {n}' for n in (1, 2, 3)]
  assert all(line.removeprefix('<s>').endswith('=') for line in lines[1::2])
