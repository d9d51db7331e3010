"""Does a model that was tuned on chats stop by itself, after what it was to say?"""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data.config import CleanConfig, SourceConfig, TokenizerConfig
from decode.generator import Generator
from objectives.sft import SFT
from tests.training.conftest import run_here, tiny

TEMPLATE = (
  '{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<end>{% endfor %}'
  '{% if add_generation_prompt %}a:{% endif %}'
)
WORDS = 'red green blue black white one two three four five'.split()


@pytest.fixture(scope='module')
def chats(tmp_path_factory):
  """50 of them, with answers of different lengths; and the config of a run that learns them by
  heart.
  """
  directory = tmp_path_factory.mktemp('chats')
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
  made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
  made.add_special_tokens(['<end>', '<pad>'])
  (directory / 'tokenizer').mkdir()
  made.save(str(directory / 'tokenizer' / 'tokenizer.json'))
  settings = {'eos_token': '<end>', 'pad_token': '<pad>', 'chat_template': TEMPLATE}
  (directory / 'tokenizer' / 'tokenizer_config.json').write_text(json.dumps(settings))
  draw = np.random.default_rng(0)
  rows = []
  for i in range(50):
    answer = ' '.join(draw.choice(WORDS, draw.integers(1, 6)))
    rows.append([('user', f'{i}?'), ('assistant', answer)])
  rows = [[{'role': role, 'content': text} for role, text in chat] for chat in rows]
  path = directory / 'chats.jsonl'
  path.write_text(''.join(json.dumps({'messages': chat}) + '\n' for chat in rows))
  source = SourceConfig(kind='jsonl', path=str(path), format='chat')
  made = tiny(
    model={'width': 64, 'vocabulary': 0, 'max_length': 128},
    data={
      'sources': (source,),
      'validation': (source,),
      'validation_fraction': 0.0,
      'clean': CleanConfig(anonymise=(), near_duplicates=0, exact_duplicates=False),
      'split': 'hash',
      'tokenizer': TokenizerConfig(kind='huggingface', path=str(directory / 'tokenizer')),
      'cache_dir': str(directory / 'cache'),
      'sequence_length': 128,
    },
    train={'steps': 150, 'save_every': 150, 'eval_every': 150},
    optimizer={'learning_rate': 0.01, 'schedule': 'linear', 'weight_decay': 0.0},
  )
  return rows, dataclasses.replace(made, objective=SFT())


def endings(workdir, rows):
  """How many chats are answered to the letter, and how many answers end themselves."""
  generator = Generator.load(workdir)
  asked = [generator.chat_ids(chat[:1]) for chat in rows]
  answers = generator(asked, max_new_tokens=32, temperature=0.0)
  right = sum(answer.text == chat[1]['content'] for answer, chat in zip(answers, rows, strict=True))
  return right, sum(answer.finish == 'stop' for answer in answers)


@pytest.mark.slow
@pytest.mark.long
def test_a_model_that_knows_fifty_chats_ends_all_answers(chats, tmp_path):
  rows, made = chats
  run_here(made, tmp_path / 'run')
  assert endings(tmp_path / 'run', rows) == (50, 50)
