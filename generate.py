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

import contextlib
import dataclasses
import importlib
import itertools
import json
import math
import pathlib
import sys

from absl import app, flags, logging

import commands
import files
import names
from decode import opening
from decode.console import Console
from decode.constrain import Constraint
from decode.conversation import Conversation
from decode.defaults import model_defaults
from decode.generator import Generator
from decode.options import COMMAND, DRAFTERS, DRAWING, TABLE
from decode.prompts import (
  check_adapters,
  is_chat,
  named_runs,
  piped,
  read_asked,
  read_examples,
  with_examples,
)
from decode.request import FAILED, INTERRUPTED
from decode.results import GrowingFile, progress_bar
from decode.sampling import seed_of
from decode.table import TYPES, Option
from parallel.flag import mesh_of
from training import config as configs

WORKDIR, CHECKPOINT, MESH, WEIGHTS = opening.define()
ADAPTERS = flags.DEFINE_list(
  'adapters',
  [],
  'name=DIR,..: runs that trained an adapter on this one, low-rank or soft tokens; --adapter, or '
  '"adapter" in a line of --prompts, says which writes a text.',
)
PROMPT = flags.DEFINE_multi_string(
  'prompt', [''], 'Text to go on from; repeat the flag for several.'
)
PROMPTS = flags.DEFINE_string(
  'prompts',
  None,
  'A JSONL file, in each line a text, ids, {"prompt": either} or {"messages": [..]}, perhaps with '
  '"adapter"; - is stdin.',
)
CHAT = flags.DEFINE_bool(
  'chat',
  False,
  "Each prompt is a user's message, put into the tokenizer's chat template; without any, at a "
  'terminal, a conversation begins.',
)
INTERACTIVE = flags.DEFINE_bool(
  'interactive', False, 'A conversation at a terminal without a template: one text that goes on.'
)
BATCH_SIZE = flags.DEFINE_integer(
  'batch_size',
  None,
  'Prompts that are generated side by side; results are written as they come. Default: all.',
  lower_bound=1,
)
EXAMPLES = flags.DEFINE_string(
  'examples',
  None,
  'A JSONL file, in each line {"prompt": .., "text": ..}, which stand before each prompt.',
)
SHOTS = flags.DEFINE_integer(
  'shots', None, 'So many of the examples, the first ones; default: all.', lower_bound=0
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


ANSWER = 1024  # new tokens of an answer in a chat at most, where nothing else is said
OPTIONS = {row.name: define(row) for row in (*TABLE.values(), *COMMAND) if row.flag}
# Those whose values are read as they are; the others are put together in `options_of`.
PLAIN = [name for name, row in TABLE.items() if row.type in TYPES]


def readable(generator: Generator, place: str, prompt: str | list, examples) -> str | list:
  """A text or ids for the generator, behind examples.

  Raises ValueError, with the prompt's place, for what the model cannot read.
  """
  try:
    if is_chat(prompt) and SCORE.value:
      raise ValueError(
        'messages with --score, which is of a text or of ids; give these, or leave out --score'
      )
    prompt = with_examples(examples, prompt, CHAT.value)
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
  for flag in (WORKDIR, OPTIONS['draft'], OUTPUT, PROMPTS, EXAMPLES):
    buckets = flag is WORKDIR or flag is OPTIONS['draft']
    files.check_local(f'--{flag.name}', flag.value or '', buckets)
  if PROMPTS.value is not None and PROMPT.value != ['']:
    raise ValueError('--prompt and --prompts: give one of the two')

  def given(*flags):
    return [f'--{flag.name}' for flag in flags if flag.present and flag.value is not False]

  options = [flag for name, flag in OPTIONS.items() if name != 'adapter']
  generating = (CHAT, STREAM, BENCH, INTERACTIVE, BATCH_SIZE, EXAMPLES, *options)
  if SCORE.value and (unused := given(*generating)):
    raise ValueError(
      f'--score with {", ".join(unused)}: it generates nothing; leave them out, or --score'
    )
  logprobs = [OPTIONS['logprobs']] if OPTIONS['logprobs'].value >= 0 else []
  if STREAM.value and (unused := given(OUTPUT, BENCH, BATCH_SIZE, *logprobs)):
    raise ValueError(
      f'--stream with {", ".join(unused)}: it prints text alone, as it comes; leave them out, or '
      'give --nostream'
    )
  if BENCH.value and BATCH_SIZE.value is not None:
    raise ValueError('--bench with --batch_size: it times one call; leave out one of the two')
  if SHOTS.value is not None and EXAMPLES.value is None:
    raise ValueError(f'--shots={SHOTS.value} without --examples; give a file of them')
  if INTERACTIVE.value and CHAT.value:
    raise ValueError('--interactive is --chat without a template; give one of the two')
  if INTERACTIVE.value and not converses():
    raise ValueError(
      '--interactive is a conversation at a terminal, without --prompt and --prompts; leave it out'
    )
  unused = given(OUTPUT, BENCH, BATCH_SIZE, EXAMPLES, STREAM, *logprobs)
  if converses() and unused:
    raise ValueError(
      f'{", ".join(unused)} of a conversation, which prints text alone, as it comes; leave them '
      'out, or give --prompt'
    )
  if OUTPUT.value is not None:
    try:
      files.check_writable(OUTPUT.value)
    except OSError as error:
      raise ValueError(
        f'--output={OUTPUT.value}: {error.strerror}; give a file that can be written'
      ) from error


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
  if asked['beams'] > 1 and 'stop' in options and not OPTIONS['stop'].present:
    left.append(f'stop_strings={options["stop"]!r}, by which a search does not end')
  of_search = {*DRAWING, 'stop'} if asked['beams'] > 1 else set()
  options = {
    name: value
    for name, value in options.items()
    if not OPTIONS[name].present and name not in of_search
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


def score(generator: Generator, prompts, adapter: list[str]) -> None:
  """Prints, or writes, how likely the model finds the prompts, of their own first token on."""
  scores = generator.score(prompts, adapter=adapter)
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
  print(f'{prompt}{behind(generator)}{completion.text}', flush=True)
  if OPTIONS['logprobs'].value < 0:
    return
  others = completion.alternatives or [[]] * len(completion.ids)
  for id_, raw, processed, also in zip(
    completion.ids, completion.logprobs, completion.processed, others
  ):
    likely = '  '.join(f'{shown([i])!r} {value:.3f}' for i, value in also)
    print(f"  {shown([id_])!r:>12} {raw:8.3f} (drawn at {processed:.3f})  {likely}")


def behind(generator: Generator) -> str:
  """What stands between a prompt and its text, which does not go on from what an encoder reads."""
  return '\n' if generator.model.config.encoder_layers else ''


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


def asked() -> list[tuple[str, str | list, str | None]]:
  """Prompts of the command line, of a file, or of a pipe, each behind its place, with the adapter
  that a file's line names.
  """
  if PROMPTS.value is not None:
    return read_asked(PROMPTS.value)
  if PROMPT.present:
    return [(f'--prompt={text[:40]!r}', text, None) for text in PROMPT.value]
  return [('stdin', piped(), None)]


def converses() -> bool:
  """Whether a person is there to talk, and has asked for that."""
  alone = not PROMPT.present and PROMPTS.value is None
  at_terminal = sys.stdin is not None and sys.stdin.isatty()
  return (CHAT.value or INTERACTIVE.value) and not SCORE.value and alone and at_terminal


def converse(generator: Generator) -> None:
  """Talks, until the person ends it."""
  options = options_of(generator)
  says = OPTIONS['max_new_tokens'].present
  if OPTIONS['defaults'].value == 'model':
    says = says or 'max_new_tokens' in model_defaults(generator.tokenizer.generation)[0]
  if CHAT.value and not says:
    # An answer ends itself, and Ctrl-C stops it.
    options['max_new_tokens'] = ANSWER
  # Lines are edited, and earlier ones come back by the arrow keys, where Python has it.
  with contextlib.suppress(ImportError):
    importlib.import_module('readline')
  Console(Conversation(generator, chat=not INTERACTIVE.value, **options)).run()


def run() -> None:
  """What the flags ask for."""
  check_flags()
  hosts.cache_compilations(pathlib.Path(configs.load(WORKDIR.value).data.cache_dir) / 'xla')
  talks = converses()
  given = [] if talks else asked()
  examples = [] if EXAMPLES.value is None else read_examples(EXAMPLES.value, SHOTS.value)
  adapters = named_runs(ADAPTERS.value)
  check_adapters([*given, ('--adapter', '', OPTIONS['adapter'].value)], [*adapters])
  generator = Generator.load(
    WORKDIR.value, CHECKPOINT.value, mesh_of(MESH.value), WEIGHTS.value, adapters
  )
  prompts = [readable(generator, place, prompt, examples) for place, prompt, _ in given]
  default = OPTIONS['adapter'].value
  adapter = [default if name is None else name for _, _, name in given]

  if talks:
    converse(generator)
    return
  if SCORE.value:
    score(generator, prompts, adapter)
    return
  options = options_of(generator) | {'adapter': adapter}
  if streams(options):
    stream(generator, given, prompts, options)
    return
  completions = complete(generator, prompts, options)
  say_ended(completion.note for completion in completions)
  if interrupted(completions):
    raise KeyboardInterrupt
  failed = [completion for completion in completions if completion.finish == FAILED]
  if failed:
    # Those that have not are printed, or written, by now.
    reasons = '; '.join(completion.error for completion in failed)
    raise ValueError(f'{len(failed)} of {len(completions)} texts ended early: {reasons}')


def complete(generator: Generator, prompts, options: dict) -> list:
  """Completions, which are printed or written; in batches as they come."""
  if BATCH_SIZE.value is not None:
    return in_batches(generator, prompts, options)
  completions = generator(prompts, **options)
  if BENCH.value and not interrupted(completions):
    bench(generator, prompts, options)
  if OUTPUT.value is not None:
    write('completions', [dataclasses.asdict(completion) for completion in completions])
  elif not BENCH.value:
    for completion in completions:
      show(generator, completion)
  return completions


def in_batches(generator: Generator, prompts, options: dict) -> list:
  """The same of --batch_size prompts at a time; what is returned has no more than their ends."""
  ends, size = [], BATCH_SIZE.value
  batches = generator.in_batches(prompts, size, **options)
  # A bar would stand in the midst of texts that are printed on the same screen.
  shown = OUTPUT.value is not None or not sys.stdout.isatty()
  bar = progress_bar(len(prompts)) if shown else contextlib.nullcontext()
  with contextlib.closing(GrowingFile(OUTPUT.value)) as file, bar as moved:
    for batch in batches:
      if OUTPUT.value is not None:
        file.add(dataclasses.asdict(completion) for completion in batch)
      else:
        for completion in batch:
          show(generator, completion)
      ends += [completion.end for completion in batch]
      if moved:
        rate = generator.report.tokens_per_second if generator.report else math.nan
        moved(size, '' if math.isnan(rate) else f'{rate:.0f} tok/s')
  if OUTPUT.value is not None:
    print(f'wrote {len(ends)} completions to {OUTPUT.value}')
  return ends


def streams(options: dict) -> bool:
  """Whether text is printed as it comes."""
  if STREAM.value is not None:
    return STREAM.value
  several = options['num_samples'] > 1 or options['beams'] > 1 or PROMPTS.value is not None
  more = OUTPUT.value is not None or BENCH.value or options['logprobs'] >= 0
  more = more or BATCH_SIZE.value is not None
  return not several and not more


def stream(generator: Generator, given, prompts, options: dict) -> None:
  """Prints each prompt, as it was given, and its text as it comes."""
  # All of them begin before the first is printed: bad options raise then.
  streamed = [
    generator.stream(prompt, **options | {'seed': seed_of(options['seed'], i), 'adapter': adapter})
    for i, (prompt, adapter) in enumerate(zip(prompts, options['adapter'], strict=True))
  ]
  for (_, prompt, _), pieces in zip(given, streamed, strict=True):
    # The first piece before its prompt is shown: what is logged while programs are made would else
    # stand in the midst of the text.
    pieces = iter(pieces)
    first = next(pieces, '')
    print(prompt, end='\n' if CHAT.value else behind(generator), flush=True)
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
