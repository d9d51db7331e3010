"""Writes text: python generate.py --workdir=runs/tiny --prompt "def main(" --max_new_tokens=64
--temperature=0.8 --seed=1

From Python or Colab: `from generate import Generator; g = Generator.load('runs/tiny');
g('def main(', max_new_tokens=64)[0].text`.
"""

from parallel import hosts

if __name__ == '__main__':
  hosts.use_huge_pages()

import dataclasses
import json
import math
import os
import pathlib
import signal
import sys

from absl import app, flags, logging

import files
import names
from decode.constrain import Constraint
from decode.generator import Generator
from decode.request import INTERRUPTED
from decode.sampling import seed_of
from parallel.mesh import AXES, MeshConfig
from training import config as configs

WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of a run of train.py.', required=True)
CHECKPOINT = flags.DEFINE_string('checkpoint', 'last', "'last', 'best', or a step.")
MESH = flags.DEFINE_string(
  'mesh', 'data=1', "Over this machine's devices: sizes of axes, as in data=2,tensor=4."
)
WEIGHTS = flags.DEFINE_enum(
  'weights',
  '',
  ['', 'int8'],
  'int8: matrices of one byte a number, which is less exact and faster.',
)
PROMPT = flags.DEFINE_multi_string(
  'prompt', [''], 'Text to go on from; repeat the flag for several.'
)
PROMPTS = flags.DEFINE_string(
  'prompts',
  None,
  'A JSONL file, in each line a text, ids, {"prompt": either} or {"messages": [..]}.',
)
CHAT = flags.DEFINE_bool(
  'chat', False, "Each prompt is a user's message, put into the tokenizer's chat template."
)
STREAM = flags.DEFINE_bool(
  'stream',
  None,
  'Print text as it comes; the default, but with --output, --bench, --prompts, --num_samples, '
  '--logprobs and --beams.',
)
OUTPUT = flags.DEFINE_string(
  'output', None, 'Write all completions, with log-probabilities, to this JSONL file.'
)
BENCH = flags.DEFINE_bool(
  'bench',
  False,
  'Generate twice, and print how fast the second time was, and how fast without drafts.',
)
SCORE = flags.DEFINE_bool(
  'score',
  False,
  'Generate nothing; print, or write to --output, how likely the model finds each prompt.',
)
REGEX = flags.DEFINE_string('regex', None, 'Texts match this regular expression.')
SCHEMA = flags.DEFINE_string(
  'schema', None, 'Texts are JSON of this schema: a file, or the schema itself.'
)
DRAFT = flags.DEFINE_string(
  'draft', None, 'Directory of a run whose smaller model drafts, with the same tokenizer.'
)
EARLY = flags.DEFINE_enum(
  'early_stopping', 'no', ['no', 'yes', 'never'], 'Of a search: when it ends, see decode.beam.'
)
BIAS = flags.DEFINE_multi_string(
  'logit_bias', [], 'id:value, added to the logit of an id; -inf forbids it.'
)
STOP = flags.DEFINE_multi_string('stop', [], 'A text at which a completion ends, without it.')
STOP_IDS = flags.DEFINE_multi_integer('stop_id', [], 'An id at which a completion ends.')
# As they are in decode.generator.Options, whose defaults they have.
OPTIONS = {
  'max_new_tokens': flags.DEFINE_integer('max_new_tokens', 128, 'Tokens to generate at most.'),
  'temperature': flags.DEFINE_float('temperature', 1.0, 'Divides the logits; 0 is greedy.'),
  'top_k': flags.DEFINE_integer('top_k', 0, 'Only the k most likely tokens; 0 keeps all.'),
  'top_p': flags.DEFINE_float(
    'top_p', 1.0, 'Only the most likely tokens of this mass; 1 keeps all.'
  ),
  'min_p': flags.DEFINE_float(
    'min_p', 0.0, 'Only tokens at least this times as likely as the likeliest.'
  ),
  'repetition_penalty': flags.DEFINE_float(
    'repetition_penalty', 1.0, 'Above 1, tokens that were there are less likely.'
  ),
  'presence_penalty': flags.DEFINE_float(
    'presence_penalty', 0.0, 'Subtracted from logits of tokens that were generated.'
  ),
  'frequency_penalty': flags.DEFINE_float('frequency_penalty', 0.0, 'The same, for every time.'),
  'seed': flags.DEFINE_integer('seed', 0, 'Of the draws; the same seed gives the same text.'),
  'num_samples': flags.DEFINE_integer('num_samples', 1, 'Completions of each prompt.'),
  'logprobs': flags.DEFINE_integer(
    'logprobs', -1, 'Print, or write, log-probabilities, and so many alternatives of every token.'
  ),
  'chunk': flags.DEFINE_integer(
    'chunk', 16, 'Steps a call to the device, each a token, or more with drafts.'
  ),
  'beams': flags.DEFINE_integer(
    'beams',
    1,
    'Of a search for the likeliest texts, of which it writes num_samples; it draws nothing.',
  ),
  'length_penalty': flags.DEFINE_float(
    'length_penalty', 1.0, 'Of a search: above 0, longer texts score better.'
  ),
  'lookup': flags.DEFINE_integer(
    'lookup', 0, 'Draft what followed the last so many ids where they stood before; 0: do not.'
  ),
  'early_exit': flags.DEFINE_integer(
    'early_exit', 0, "Draft with so many of the model's layers; 0: do not."
  ),
  'draft_tokens': flags.DEFINE_integer('draft_tokens', 4, 'Drafted at a time.'),
  'cache_dtype': flags.DEFINE_string(
    'cache_dtype',
    '',
    'Of keys and values: float32, bfloat16, int8; default: as the model computes.',
  ),
}


def read_prompts(path: str) -> list[tuple[str, str | list]]:
  """Prompts of a JSONL file, each behind its place. Raises ValueError for a file that cannot be
  read, and for a line that is no prompt.
  """
  try:
    # other ends of lines, such as U+2028, may stand in a text
    lines = pathlib.Path(path).read_bytes().split(b'\n')
  except OSError as error:
    raise ValueError(
      f'--prompts={path}: {error.strerror}; give a file of a JSON text or object in each line'
    ) from error
  found = []
  for number, line in enumerate(lines, 1):
    place = f'{path}:{number}'
    try:
      if line.strip():
        found.append((place, prompt_of(json.loads(line.decode()))))
    except json.JSONDecodeError as error:
      raise ValueError(f'{place}: not JSON ({error})') from error
    except UnicodeDecodeError as error:
      raise ValueError(
        f'{place}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8'
      ) from error
    except ValueError as error:
      raise ValueError(f'{place}: {error}') from error
  if not found:
    raise ValueError(f'{path} holds no prompt')
  return found


def prompt_of(given) -> str | list:
  """A text, ids or messages, by what a line of a JSONL file holds.
  Raises ValueError for anything else.
  """
  if isinstance(given, dict):
    for key in given:
      names.check('key', key, ('prompt', 'messages'))
    asked = {key: value for key, value in given.items() if value is not None}
    if len(asked) != 1:
      raise ValueError(
        f'{"both" if asked else "neither"} of "prompt" and "messages"; give one of the two'
      )
    if 'messages' in asked and not is_chat(asked['messages']):
      raise ValueError(
        f'messages={str(asked["messages"])[:60]!r} must be a list of objects with "role" and '
        '"content"'
      )
    (given,) = asked.values()
  if not isinstance(given, (str, list)):
    raise ValueError(
      f'{str(given)[:60]!r} is neither a text nor an object with "prompt" or "messages"'
    )
  return given


def is_chat(prompt) -> bool:
  """Whether a prompt is messages, and neither a text nor ids."""
  return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def readable(generator: Generator, place: str, prompt: str | list) -> str | list:
  """A text or ids for the generator. Raises ValueError, with the prompt's place,
  for what the model cannot read.
  """
  try:
    if is_chat(prompt) and SCORE.value:
      raise ValueError(
        'messages with --score, which is of a text or of ids; give these, or leave out --score'
      )
    if is_chat(prompt) or CHAT.value:
      return generator.chat_ids(
        [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt
      )
    generator.encoded(prompt)
    return prompt
  except ValueError as error:
    raise ValueError(f'{place}: {error}') from error


def check_flags() -> None:
  """Raises ValueError for flags that do not go together,
  and for an output that could not be written, before anything takes time.
  """
  if PROMPTS.value is not None and PROMPT.value != ['']:
    raise ValueError('--prompt and --prompts: give one of the two')

  def given(flags):
    return [f'--{flag.name}' for flag in flags if flag.present and flag.value is not False]

  if SCORE.value and (
    unused := given(
      (CHAT, STREAM, BENCH, REGEX, SCHEMA, DRAFT, EARLY, BIAS, STOP, STOP_IDS, *OPTIONS.values())
    )
  ):
    raise ValueError(
      f'--score with {", ".join(unused)}: it generates nothing; leave them out, or --score'
    )
  if STREAM.value and (
    unused := given(
      (OUTPUT, BENCH, *([OPTIONS['logprobs']] if OPTIONS['logprobs'].value >= 0 else []))
    )
  ):
    raise ValueError(
      f'--stream with {", ".join(unused)}: it prints text alone, as it comes; leave them out, or '
      'give --nostream'
    )
  if OUTPUT.value is not None:
    try:
      files.check_writable(OUTPUT.value)
    except OSError as error:
      raise ValueError(
        f'--output={OUTPUT.value}: {error.strerror}; give a file that can be written'
      ) from error


def mesh_of(text: str) -> MeshConfig:
  """The mesh that a flag names, as in data=2,tensor=4."""
  sizes = {'data': 1}
  for part in filter(None, text.split(',')):
    axis, _, size = part.partition('=')
    names.check('mesh axis', axis, AXES)
    if not size.lstrip('-').isdigit():
      raise ValueError(f'--mesh: {part!r} is no axis=size')
    sizes[axis] = int(size)
  return MeshConfig(**sizes)


def options_of(generator: Generator) -> dict:
  """What the flags ask for, but for what no one gave."""
  found = {name: flag.value for name, flag in OPTIONS.items()}
  if STOP.value or STOP_IDS.value:
    found['stop'] = [*STOP.value, *STOP_IDS.value]
  if DRAFT.value:
    found['draft'] = Generator.load(DRAFT.value, mesh=mesh_of(MESH.value), weights=WEIGHTS.value)
  if EARLY.present:
    found['early_stopping'] = {'no': False, 'yes': True, 'never': 'never'}[EARLY.value]
  if BIAS.value:
    pairs = [text.rpartition(':') for text in BIAS.value]
    try:
      found['logit_bias'] = {int(id_): float(value) for id_, _, value in pairs}
    except ValueError as error:
      raise ValueError(
        f'--logit_bias={BIAS.value}: give id:value, as in --logit_bias=13:-inf'
      ) from error
  if REGEX.value is not None or SCHEMA.value is not None:
    schema = SCHEMA.value
    if schema is not None and not schema.lstrip().startswith('{'):
      schema = pathlib.Path(schema)
    found['constraint'] = Constraint(generator.tokenizer, regex=REGEX.value, schema=schema)
  return found


def score(generator: Generator, prompts) -> None:
  """Prints, or writes, how likely the model finds the prompts, of their own first token on."""
  scores = generator.score(prompts)
  if OUTPUT.value is not None:
    return write(
      'scores',
      [
        {'prompt': prompt, 'ids': generator.encoded(prompt), 'logprobs': found.tolist()}
        for prompt, found in zip(prompts, scores)
      ],
    )
  for prompt, found in zip(prompts, scores):
    nats, size = -float(found.sum()), len(prompt.encode()) if isinstance(prompt, str) else 0
    per_byte = f', {nats / math.log(2) / size:.4f} bits per byte' if size else ''
    print(
      f'{nats:.4f} nats, {len(found)} tokens{per_byte}: '
      f'{prompt if len(prompt) <= 60 else f"{prompt[:60]}..."!r}'
    )


def write(what: str, found: list[dict]) -> None:
  """Writes one JSON object a line to the output."""
  files.replace(OUTPUT.value, ''.join(f'{json.dumps(one, ensure_ascii=False)}\n' for one in found))
  print(f'wrote {len(found)} {what} to {OUTPUT.value}')


def show(generator: Generator, completion) -> None:
  """Prints a completion and what is known of its tokens."""

  def shown(ids):
    return generator.tokenizer.decode_bytes(ids).decode('utf-8', errors='replace')

  prompt = completion.prompt if isinstance(completion.prompt, str) else shown(completion.prompt)
  print(f'{prompt}{completion.text}', flush=True)
  if OPTIONS['logprobs'].value < 0:
    return
  others = completion.alternatives or [[]] * len(completion.ids)
  for id_, raw, processed, also in zip(
    completion.ids, completion.logprobs, completion.processed, others
  ):
    likely = '  '.join(f'{shown([i])!r} {value:.3f}' for i, value in also)
    print(f"  {shown([id_])!r:>12} {raw:8.3f} (drawn at {processed:.3f})  {likely}")


def interrupted(completions) -> bool:
  """Whether Ctrl-C has ended them."""
  return any(completion.finish == INTERRUPTED for completion in completions)


def bench(generator: Generator, prompts, options: dict) -> None:
  """Prints how fast a call is whose programs are compiled, and what its drafts gain."""

  def run(**changed):
    if interrupted(generator(prompts, **options | changed)):
      raise KeyboardInterrupt
    return generator.report

  report = run()
  print(report)
  if report.drafted and not math.isnan(report.ms_per_token):
    without = dict(draft=None, lookup=0, early_exit=0, draft_tokens=OPTIONS['draft_tokens'].default)
    plain = min((run(**without) for _ in range(2)), key=lambda plain: plain.seconds)
    print(
      f'without drafts {plain.tokens_per_second:.1f} tokens/s: they gain '
      f'{report.tokens_per_second / plain.tokens_per_second:.2f}x'
    )


def run() -> None:
  """What the flags ask for."""
  check_flags()
  hosts.cache_compilations(pathlib.Path(configs.load(WORKDIR.value).data.cache_dir) / 'xla')
  given = (
    [(f'--prompt={text[:40]!r}', text) for text in PROMPT.value]
    if PROMPTS.value is None
    else read_prompts(PROMPTS.value)
  )
  generator = Generator.load(WORKDIR.value, CHECKPOINT.value, mesh_of(MESH.value), WEIGHTS.value)
  prompts = [readable(generator, place, prompt) for place, prompt in given]
  if SCORE.value:
    return score(generator, prompts)
  options = options_of(generator)
  others = (
    OUTPUT.value is not None,
    BENCH.value,
    PROMPTS.value is not None,
    options['num_samples'] > 1,
    options['beams'] > 1,
  )
  streams = not any(others) and options['logprobs'] < 0 if STREAM.value is None else STREAM.value
  if streams:
    pieces = [
      generator.stream(prompt, **options | {'seed': seed_of(options['seed'], i)})
      for i, prompt in enumerate(prompts)
    ]
    for (_, prompt), parts in zip(given, pieces, strict=True):
      print(prompt, end='\n' if CHAT.value else '', flush=True)
      for piece in parts:
        print(piece, end='', flush=True)
      print(flush=True)
    return
  found = generator(prompts, **options)
  if BENCH.value and not interrupted(found):
    bench(generator, prompts, options)
  if OUTPUT.value is not None:
    write('completions', [dataclasses.asdict(completion) for completion in found])
  elif not BENCH.value:
    for completion in found:
      show(generator, completion)
  if interrupted(found):
    raise KeyboardInterrupt


def main(arguments):
  names.only_flags(arguments, '--prompt="def main("')
  logging.set_verbosity(logging.WARNING)
  try:
    run()
  except (OSError, ValueError, FloatingPointError, ImportError, NotImplementedError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  hosts.heed_interrupts()
  try:
    app.run(main)
  except KeyboardInterrupt:
    sys.stdout.flush()
    print('\ninterrupted', file=sys.stderr, flush=True)
    # at an orderly exit, threads that load or compile would have their say
    os._exit(128 + signal.SIGINT)
