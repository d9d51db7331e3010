"""Writes text:

  python generate.py --workdir=runs/tiny --prompt "def main(" --temperature=0.8 --seed=1

From Python or Colab:

  from generate import Generator
  g = Generator.load('runs/tiny')
  g('def main(', max_new_tokens=64)[0].text

What a call may ask for, from either, is in docs/options.md.
"""

from parallel import hosts

if __name__ == '__main__':
  hosts.use_huge_pages()
  hosts.leave_at_signals()

import dataclasses
import itertools
import json
import math
import pathlib
import sys

from absl import app, flags, logging

import commands
import files
import names
from decode.constrain import Constraint
from decode.defaults import model_defaults
from decode.generator import Generator
from decode.options import COMMAND, DRAFTERS, DRAWING, TABLE
from decode.request import FAILED, INTERRUPTED
from decode.sampling import seed_of
from decode.table import TYPES, Option
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


def define(option: Option) -> flags.FlagHolder:
  """The flag of an option, with its default and help."""
  if option.choices is not None:
    (default,) = (name for name, value in option.choices.items() if value == option.default)
    return flags.DEFINE_enum(option.name, default, [*option.choices], option.help)
  makers = {
    'float': flags.DEFINE_float,
    'integer': flags.DEFINE_integer,
    'string': flags.DEFINE_string,
    'multi_string': flags.DEFINE_multi_string,
    'multi_integer': flags.DEFINE_multi_integer,
  }
  return makers[option.flag](option.name, option.default, option.help)


OPTIONS = {row.name: define(row) for row in (*TABLE.values(), *COMMAND) if row.flag}
# Those whose values are read as they are; the others are put together in `options_of`.
PLAIN = [name for name, row in TABLE.items() if row.type in TYPES]


def read_prompts(path: str) -> list[tuple[str, str | list]]:
  """Prompts of a JSONL file, each behind its place.

  Raises ValueError for a file that cannot be read, and for a line that is no prompt.
  """
  try:
    # Other ends of lines, such as U+2028, may stand in a text.
    lines = pathlib.Path(path).read_bytes().split(b'\n')
  except OSError as error:
    raise ValueError(
      f'--prompts={path}: {error.strerror}; give a file of a JSON text or object in each line'
    ) from error

  prompts = []
  for number, line in enumerate(lines, 1):
    place = f'{path}:{number}'
    try:
      if line.strip():
        prompts.append((place, prompt_of(json.loads(line.decode('utf-8-sig')))))
    except (json.JSONDecodeError, RecursionError) as error:
      raise ValueError(f'{place}: not JSON ({error})') from error
    except UnicodeDecodeError as error:
      raise ValueError(
        f'{place}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8'
      ) from error
    except ValueError as error:
      raise ValueError(f'{place}: {error}') from error
  if not prompts:
    raise ValueError(f'{path} holds no prompt')
  return prompts


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
  """A text or ids for the generator.

  Raises ValueError, with the prompt's place, for what the model cannot read.
  """
  try:
    if is_chat(prompt) and SCORE.value:
      raise ValueError(
        'messages with --score, which is of a text or of ids; give these, or leave out --score'
      )
    if is_chat(prompt) or CHAT.value:
      message = {'role': 'user', 'content': prompt}
      return generator.chat_ids([message] if isinstance(prompt, str) else prompt)
    generator.encoded(prompt)
    return prompt
  except ValueError as error:
    raise ValueError(f'{place}: {error}') from error


def check_flags() -> None:
  """Raises ValueError for flags that do not go together, and for an output that could not be
  written, before anything takes time.
  """
  for flag in (WORKDIR, OPTIONS['draft'], OUTPUT, PROMPTS):
    files.check_local(f'--{flag.name}', flag.value or '')
  if PROMPTS.value is not None and PROMPT.value != ['']:
    raise ValueError('--prompt and --prompts: give one of the two')

  def given(*flags):
    return [f'--{flag.name}' for flag in flags if flag.present and flag.value is not False]

  if SCORE.value and (unused := given(CHAT, STREAM, BENCH, *OPTIONS.values())):
    raise ValueError(
      f'--score with {", ".join(unused)}: it generates nothing; leave them out, or --score'
    )
  logprobs = [OPTIONS['logprobs']] if OPTIONS['logprobs'].value >= 0 else []
  if STREAM.value and (unused := given(OUTPUT, BENCH, *logprobs)):
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
  """What the flags ask for, as decode.options.Options has it."""
  asked = {name: flag.value for name, flag in OPTIONS.items()}
  if asked['defaults'] == 'model':
    asked |= defaults_of(generator, asked)
  options = {name: asked[name] for name in PLAIN}
  options['stop'] = [*asked['stop'], *asked['stop_id']]
  options['early_stopping'] = TABLE['early_stopping'].choices[asked['early_stopping']]
  if asked['draft']:
    mesh = mesh_of(MESH.value)
    options['draft'] = Generator.load(asked['draft'], mesh=mesh, weights=WEIGHTS.value)
  if asked['logit_bias']:
    options['logit_bias'] = bias_of(asked['logit_bias'])
  if asked['regex'] is not None or asked['schema'] is not None:
    schema = asked['schema']
    if schema is not None and not schema.lstrip().startswith('{'):
      schema = pathlib.Path(schema)
    options['constraint'] = Constraint(generator.tokenizer, regex=asked['regex'], schema=schema)
  return options


def defaults_of(generator: Generator, asked: dict) -> dict:
  """Options of the model's generation_config.json, which are printed, but for those that are asked
  for, and for what a search does not do.
  """
  options, left = model_defaults(generator.tokenizer.generation)
  options = {
    name: value
    for name, value in options.items()
    if not OPTIONS[name].present and not (asked['beams'] > 1 and name in DRAWING)
  }
  shown = ', '.join(f'{name}={value}' for name, value in options.items()) or 'none'
  print(f'defaults of the model: {shown}', file=sys.stderr)
  if left:
    print(f'NOTE: of generation_config.json, not taken: {", ".join(left)}', file=sys.stderr)
  return options


def bias_of(texts: list[str]) -> dict[int, float]:
  """What is added to which ids, of id:value each. Raises ValueError for what is something else."""
  pairs = [text.rpartition(':') for text in texts]
  try:
    return {int(id_): float(value) for id_, _, value in pairs}
  except ValueError as error:
    raise ValueError(f'--logit_bias={texts}: give id:value, as in --logit_bias=13:-inf') from error


def score(generator: Generator, prompts) -> None:
  """Prints, or writes, how likely the model finds the prompts, of their own first token on."""
  scores = generator.score(prompts)
  if OUTPUT.value is not None:
    lines = [
      {'prompt': prompt, 'ids': generator.encoded(prompt), 'logprobs': logprobs.tolist()}
      for prompt, logprobs in zip(prompts, scores)
    ]
    write('scores', lines)
    return
  for prompt, logprobs in zip(prompts, scores):
    nats, size = -float(logprobs.sum()), len(prompt.encode()) if isinstance(prompt, str) else 0
    per_byte = f', {nats / math.log(2) / size:.4f} bits per byte' if size else ''
    shown = prompt if len(prompt) <= 60 else f'{prompt[:60]}...'
    print(f'{nats:.4f} nats, {len(logprobs)} tokens{per_byte}: {shown!r}')


def write(kind: str, lines: list[dict]) -> None:
  """Writes one JSON object a line to the output."""
  texts = [json.dumps(line, ensure_ascii=False) for line in lines]
  files.replace(OUTPUT.value, ''.join(f'{text}\n' for text in texts))
  print(f'wrote {len(lines)} {kind} to {OUTPUT.value}')


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


def say_ended(notes) -> None:
  """Says on stderr of which texts a limit was the end that nobody asked for."""
  notes = [note for note in notes if note]
  if notes:
    several = '' if len(notes) == 1 else f' ({len(notes)} texts ended so; of the first:)'
    print(f'NOTE:{several} {notes[0]}', file=sys.stderr)


def interrupted(completions) -> bool:
  """Whether Ctrl-C has ended them."""
  return any(completion.finish == INTERRUPTED for completion in completions)


def bench(generator: Generator, prompts, options: dict) -> None:
  """Prints how fast a call is whose programs are compiled, and what its drafts gain."""

  def report_of(**changed):
    if interrupted(generator(prompts, **options | changed)):
      raise KeyboardInterrupt
    return generator.report

  report = report_of()
  print(report)
  if report.drafted and not math.isnan(report.ms_per_token):
    without = {name: TABLE[name].default for name in (*DRAFTERS, 'draft_tokens')}
    plain = min((report_of(**without) for _ in range(2)), key=lambda plain: plain.seconds)
    print(
      f'without drafts {plain.tokens_per_second:.1f} tokens/s: they gain '
      f'{report.tokens_per_second / plain.tokens_per_second:.2f}x'
    )


def run() -> None:
  """What the flags ask for."""
  check_flags()
  hosts.cache_compilations(pathlib.Path(configs.load(WORKDIR.value).data.cache_dir) / 'xla')
  if PROMPTS.value is None:
    given = [(f'--prompt={text[:40]!r}', text) for text in PROMPT.value]
  else:
    given = read_prompts(PROMPTS.value)
  generator = Generator.load(WORKDIR.value, CHECKPOINT.value, mesh_of(MESH.value), WEIGHTS.value)
  prompts = [readable(generator, place, prompt) for place, prompt in given]

  if SCORE.value:
    score(generator, prompts)
    return
  options = options_of(generator)
  if streams(options):
    stream(generator, given, prompts, options)
    return
  completions = generator(prompts, **options)
  if BENCH.value and not interrupted(completions):
    bench(generator, prompts, options)
  if OUTPUT.value is not None:
    write('completions', [dataclasses.asdict(completion) for completion in completions])
  elif not BENCH.value:
    for completion in completions:
      show(generator, completion)
  say_ended(completion.note for completion in completions)
  if interrupted(completions):
    raise KeyboardInterrupt
  failed = [completion for completion in completions if completion.finish == FAILED]
  if failed:
    # Those that have not are printed, or written, by now.
    reasons = '; '.join(completion.error for completion in failed)
    raise ValueError(f'{len(failed)} of {len(completions)} texts ended early: {reasons}')


def streams(options: dict) -> bool:
  """Whether text is printed as it comes."""
  if STREAM.value is not None:
    return STREAM.value
  several = options['num_samples'] > 1 or options['beams'] > 1 or PROMPTS.value is not None
  more = OUTPUT.value is not None or BENCH.value or options['logprobs'] >= 0
  return not several and not more


def stream(generator: Generator, given, prompts, options: dict) -> None:
  """Prints each prompt, as it was given, and its text as it comes."""
  # All of them begin before the first is printed: bad options raise then.
  streamed = [
    generator.stream(prompt, **options | {'seed': seed_of(options['seed'], i)})
    for i, prompt in enumerate(prompts)
  ]
  for (_, prompt), pieces in zip(given, streamed, strict=True):
    # The first piece before its prompt is shown: what is logged while programs are made would else
    # stand in the midst of the text.
    pieces = iter(pieces)
    first = next(pieces, '')
    print(prompt, end='\n' if CHAT.value else '', flush=True)
    for piece in itertools.chain([first], pieces):
      print(piece, end='', flush=True)
    print(flush=True)
    say_ended(generator.report.notes)


def main(arguments):
  names.only_flags(arguments, '--prompt="def main("')
  logging.set_verbosity(logging.WARNING)
  with commands.mendable(FloatingPointError, ImportError):
    run()


if __name__ == '__main__':
  hosts.heed_interrupts()
  commands.end(lambda: app.run(main))
