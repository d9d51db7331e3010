"""Do the pages' commands of training, converting and planning run? (Those that generate:
tests/test_commands.py; those that measure are parsed, in tests/test_docs.py.)
"""

import contextlib
import json
import pathlib
import re
import shutil
import tomllib

import pytest

from tests import gguf_files, quantised_files
from tests.goldens import ours
from tests.model.test_model_checkpoint import LLAMA, write_tokenizer
from tests.test_commands import Process
from tests.test_docs import ON_TUNED, PAGES, ROOT, python_commands
from tests.test_docs_code import blocks
from workdir.checkpoint import Checkpoints

# Each in a fork: flags of a config read sys.argv once, and what takes long is to import JAX.
RUN_EACH = '''
import json, os, sys
from absl import app
import commands, convert, train
from training import overrides

def run(name, line):
  sys.argv = [name, *line]
  if name == 'train.py':
    commands.end(lambda: app.run(train.main, flags_parser=overrides.parsed))
  else:
    convert.main(line)

for name, line in json.loads(sys.argv[1]):
  print('$', name, *line, flush=True)
  child = os.fork()
  if not child:
    code = 0
    try:
      run(name, line)
    except SystemExit as end:
      code = end.code or 0
      if isinstance(code, str):
        print(code)
        code = 1
    sys.stdout.flush()
    os._exit(code)
  print('code', os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
'''
# Instead of hours: a few steps on a small text. The model is the page's, but for tiny.py's layers.
SHORT = (
  '--config.train.steps=2',
  '--config.train.eval_batches=1',
  '--config.optimizer.warmup_steps=1',
  '--config.data.cache_dir=HERE/cache',
  '--config.data.batch_size=8',
)
TEXT = (
  '--config.data.sources[0].kind=text',
  '--config.data.sources[0].path=HERE/input.txt',
  '--config.data.clean.near_duplicates=0.0',
  '--config.data.split=tail',
  '--config.data.sequence_length=32',
)
PPO = '--config=configs/ppo.py'
BESIDES = {
  'tiny': (*TEXT, '--config.data.tokenizer.vocabulary=512', '--config.model.layers=1'),
  'finetune': (*TEXT, '--config.optimizer.warmup_fraction=0.0'),
  'domain': (
    *TEXT,
    '--config.optimizer.warmup_fraction=0.0',
    '--config.data.sources[1].path=HERE/input.txt',
    '--config.data.clean.exact_duplicates=False',
  ),
  'span_corruption': (*TEXT, '--config.data.tokenizer.vocabulary=512', '--config.model.layers=1'),
  'mlm': (*TEXT, '--config.data.tokenizer.vocabulary=512', '--config.model.layers=1'),
  'shakespeare_char': TEXT,
  'demo': TEXT,
  'sft': (
    '--config.train.epochs=0',
    '--config.optimizer.warmup_fraction=0.0',
    '--config.data.sources[0].path=HERE/orders.jsonl',
    '--config.data.sequence_length=48',
  ),
  'prompt_tuning': ('--config.train.epochs=0', '--config.optimizer.warmup_fraction=0.0'),
  'seq2seq': ('--config.model.layers=1',),
  'reward': (
    '--config.train.epochs=0',
    '--config.optimizer.warmup_fraction=0.0',
    '--config.data.sequence_length=48',
    '--config.data.validation_fraction=0.3',
  ),
  'distil': (
    *TEXT,
    '--config.optimizer.warmup_fraction=0.0',
    '--config.data.clean.filters=none',
  ),
  **dict.fromkeys(('gkd', 'grpo', 'ppo'), ('--config.objective.max_new_tokens=8',)),
  **dict.fromkeys(
    ('dpo', 'kto'),
    (
      '--config.train.epochs=0',
      '--config.optimizer.warmup_fraction=0.0',
      '--config.data.sequence_length=48',
      '--config.data.validation_fraction=0.2',
    ),
  ),
  'classify': (
    '--config.train.epochs=0',
    '--config.optimizer.warmup_fraction=0.0',
    '--config.data.sequence_length=64',
  ),
}
# Of a model whose package of 93 MB tests/real imports, another one is in its place here: sizes of
# the pages, and those that it has.
SIZES = {
  'group=64': 'group=8',
  'heads=6,channels=1024': 'heads=2,channels=24',
  '--length=512': '--length=64',
}
CHAT = (
  '{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}'
  '{% if add_generation_prompt %}assistant: {% endif %}'
)


def typed(*names: str) -> list[tuple[str, list[str]]]:
  """The commands of the pages that can be run as they stand, once each, in order: whose, its
  arguments.
  """
  lines = dict.fromkeys((name, tuple(line)) for name, line in python_commands() if name in names)
  placeholder = re.compile(r'\.\.|(^|=)[A-Z][A-Z:_]*$')
  return [(name, [*line]) for name, line in lines if not any(map(placeholder.search, line))]


def here(line: list[str], directory: pathlib.Path) -> list[str]:
  """With this directory in the place of the person's own."""
  lines = (
    'orders|dates|docstrings|tasks|spell|ask|said|pairs|judged|sums|answers|beside|mixed|mixed.out'
    '|calibration'
  )
  names = rf'input\.txt|({lines})\.jsonl|(sentiment|banking_train|banking_test)\.csv'
  places = re.compile(rf'(?<![\w/])(?=(runs|path/to)/|{names})')
  return [places.sub(f'{directory}/', part).replace('HERE', str(directory)) for part in line]


def prepared(directory: pathlib.Path) -> None:
  """Writes what a person brings."""
  (directory / 'input.txt').write_text('\n\n'.join(page.read_text() for page in PAGES))
  hf = directory / 'path' / 'to' / 'hf_dir'
  hf.parent.mkdir(parents=True)
  config = LLAMA | {'vocab_size': 300}
  ours.build(config, hf)
  write_tokenizer(hf)
  (hf / 'tokenizer_config.json').write_text(
    json.dumps({'eos_token': '<end>', 'chat_template': CHAT})
  )
  pairs = [[f'{i} and {i}?', f'{2 * i}'] for i in range(150)]
  chats = [
    {'messages': [{'role': r, 'content': c} for r, c in zip(('user', 'assistant'), pair)]}
    for pair in pairs
  ]
  (directory / 'orders.jsonl').write_text(''.join(json.dumps(chat) + '\n' for chat in chats))
  (directory / 'dates.jsonl').write_text(
    ''.join(json.dumps({'source': q, 'target': a}) + '\n' for q, a in pairs)
  )
  for name in ('docstrings', 'tasks', 'spell'):
    (directory / f'{name}.jsonl').write_text(
      ''.join(json.dumps({'prompt': q, 'completion': a}) + '\n' for q, a in pairs)
    )
  with contextlib.chdir(directory):  # of sums that are asked, judged and preferred
    (code,) = [code for _, code in blocks('alignment')]
    exec(code, {})
  # What `generate.py --output` writes of runs/large, which is asked after it is trained.
  (directory / 'said.jsonl').write_text(
    ''.join(json.dumps({'prompt': q, 'text': a}) + '\n' for q, a in pairs)
  )
  labelled = [f'number {i} is it,{("positive", "negative")[i % 2]}' for i in range(150)]
  (directory / 'sentiment.csv').write_text('\n'.join(['text,label', *labelled]) + '\n')
  words = tomllib.loads((ROOT / 'configs/templates/banking.toml').read_text())['words']
  asked = [f'number {i} is it,{label}' for i, label in enumerate([*words] * 15)]
  for name, rows in (('train', asked[:100]), ('test', asked[100:])):
    (directory / f'banking_{name}.csv').write_text('\n'.join(['text,label', *rows]) + '\n')
  texts = [{'text': f'{question} {answer}. ' * 20} for question, answer in pairs]
  for path in (hf.parent / 'answers.jsonl', directory / 'calibration.jsonl'):
    path.write_text(''.join(json.dumps(text) + '\n' for text in texts))
  gguf_files.write(hf.parent / 'model.gguf', config, ours.tensors(hf))
  shutil.copytree(hf, directory / 'plain')
  quantised_files.in_codes(
    directory / 'plain', hf.parent / 'codes_dir', quantised_files.gptq(4, 16)
  )


def shortened(line: list[str]) -> list[str]:
  """A command of training, of few steps and short rows."""
  config = next(part.removeprefix('--config=') for part in line if '--config=' in part)
  # What a page asks for twice as many steps goes on from what ran before.
  line = [part.replace('.steps=400', '.steps=4') for part in line]
  line = [part.replace('sequence_length=256', 'sequence_length=48') for part in line]
  line = [re.sub('sequence_length=(128|96)', 'sequence_length=32', part) for part in line]
  line = [part.replace('max_new_tokens=24', 'max_new_tokens=8') for part in line]
  line = [part.replace('begin=100:end=400', 'begin=0:end=2:every=1') for part in line]
  line = [part for part in line if not re.search(r'epochs=|steps=(0|22|60|120|200)$', part)]
  # Instead of the standard library.
  line = [part.replace('[1].kind=stdlib', '[1].kind=text') for part in line]
  line = [f'{part}input.txt' if part.endswith('[1].path=') else part for part in line]
  short = [*SHORT, *BESIDES[pathlib.Path(config).stem]]
  return line + [part for part in short if part.split('=')[0] not in ' '.join(line)]


def ran(directory: pathlib.Path) -> list[tuple]:
  """Trains and converts as the pages do: each command, with what it printed, its code behind it."""
  lines = []
  # What other pages begin with is there first, and what begins with another page's run comes last;
  # rewards have a scale once they are judged, which is further below.
  every = sorted(
    (each for each in typed('train.py', 'convert.py') if each[1][0] != PPO),
    key=lambda each: ('smollm2' not in each[1], '--config.init=runs/tuned' in each[1]),
  )
  demo = ['--config=tiny', '--workdir=runs/demo', '--config.data.sequence_length=48']
  every.insert(0, ('train.py', demo))  # for `make demo`
  for name, line in every:
    line = shortened(line) if name == 'train.py' else line
    line = ['path/to/hf_dir' if part == 'smollm2' else part for part in line]
    for size, smaller in SIZES.items() if name == 'convert.py' else ():
      line = [part.replace(size, smaller) for part in line]
    lines.append((name, here(line, directory)))
  said = []
  # A process of each few: none lives longer than it may (tests/test_commands.py).
  for first in range(0, len(lines), 4):
    part = lines[first : first + 4]
    done = Process(directory, '-c', RUN_EACH, json.dumps(part)).end()
    said += done.out.split('$ ')[1:]
    failed = [each for each in said if not each.endswith('code 0\n')]
    errors = re.findall('.*error: .*', done.error)
    assert done.code == 0 and not failed, '\n'.join([*failed, *errors])
    assert 'Traceback' not in done.error, done.error
  return list(zip(lines, said, strict=True))


@pytest.mark.slow
@pytest.mark.long
def test_commands_of_the_pages_run(tmp_path):
  prepared(tmp_path)
  each = ran(tmp_path)
  kinds = [line[0] for (_, line), _ in each if not line[0].startswith('--')]
  assert {*kinds} == {
    'import',
    'export',
    'inspect',
    'judge',
    'merge',
    'prune',
    'quantise',
    'rebase',
    'seal',
  }
  check_promises(tmp_path, each)
  check_what_was_tuned(tmp_path)


def check_promises(directory: pathlib.Path, each: list[tuple]) -> None:
  """What the commands are said to write is there."""
  runs = directory / 'runs'
  assert {path.name for path in runs.iterdir()} == {
    'asked',
    'demo',
    'docstrings',
    'int4',
    'theirs',
    'numbers',
    'q4_1',
    'qlora',
    'dpo',
    'dpo-stored',
    'grpo',
    'kto',
    'own',
    'large',
    'small',
    'stored',
    'student',
    'plays',
    'pupil',
    'reward',
    'tasks',
    'spell',
    'shared',
    'tiny',
    'tuned',
    'llama',
    'smollm2',
    'orders',
    'lora',
    'answers',
    'classifier',
    'head',
    'mlm',
    'span_corruption',
    'dates',
    'merged',
    'again',
    'banking',
    'first',
    'docs',
    'gptq',
    'grpo-t5',
    'groups',
    'half',
    'mixed',
    'mixed-bits',
    'narrow',
    'recovered',
    'recovered-lora',
    'thin',
    'within-kl',
    'within-perplexity',
    'assistant',
    'shakespeare',
  }
  assert Checkpoints(runs / 'tiny').latest() == 4, 'the same directory goes on'
  assert (runs / 'tuned' / 'report.md').exists()
  assert (directory / 'path' / 'to' / 'out' / 'model.safetensors').exists()
  assert any('the run goes on' in said or 'going on from' in said for _, said in each)


def check_what_was_tuned(directory: pathlib.Path) -> None:
  """Adapters write side by side, soft tokens are read, and classifiers are judged, as typed."""
  asked = [{'messages': [{'role': 'user', 'content': '3?'}], 'adapter': 'orders'}]
  asked += [{'prompt': '3?', 'adapter': name} for name in ('again', '')]
  (directory / 'mixed.jsonl').write_text(''.join(json.dumps(each) + '\n' for each in asked))
  (directory / 'ask.jsonl').write_text('"3 and 3?"\n"4"\n')
  lines = [(name, line) for name, line in typed('generate.py') if ON_TUNED & {*line}]
  of_no_file = ['--config=configs/classify.py', '--shots=0,4']
  # Those with a word in front read what a person brings, and have tests of their own.
  flags = [each for each in typed('evaluate.py') if each[1][0].startswith('--')]
  lines += [each for each in flags if each[1][1:] != of_no_file]
  assert len(lines) == 11
  for name, line in lines:
    done = Process(directory, name, *here(line, directory)).end()
    assert done.code == 0 and 'Traceback' not in done.error, (line, done.error, done.out)
  (ppo,) = [line for _, line in typed('train.py') if line[0] == PPO]
  done = Process(directory, 'train.py', *here(shortened(ppo), directory)).end()
  assert done.code == 0 and (directory / 'runs' / 'ppo' / 'rollouts.jsonl').exists(), done.error
  assert len((directory / 'mixed.out.jsonl').read_text().splitlines()) == 3
  assert json.loads((directory / 'said.jsonl').read_text().splitlines()[0])['prompt'] == '3 and 3?'
  ours, beside = ((directory / f'{name}.jsonl').read_text() for name in ('answers', 'beside'))
  assert len(ours.splitlines()) == len(beside.splitlines()) == 2
  texts = [[json.loads(line)['text'] for line in each.splitlines()] for each in (ours, beside)]
  assert texts[0] == texts[1], 'soft tokens beside their model are those of their run'
  for run in ('smollm2', 'classifier', 'head', 'banking', 'reward'):
    assert (directory / 'runs' / run / 'evaluation').is_dir()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('line', [line for _, line in typed('plan.py')], ids=' '.join)
def test_commands_of_planning_run(line, tmp_path, topology):
  """Of two layers; with all of them, docs/plans.md has what they say."""
  topology(next(part.removeprefix('--topology=') for part in line if '--topology=' in part))
  done = Process(tmp_path, 'plan.py', *line, '--config.model.layers=2').end()
  assert done.code == 0 and 'Traceback' not in done.error, done.error
  assert 'GB' in done.out, done.out
