"""What is a command asked for? Prompts of a JSONL file or of a pipe, and examples before them.

Whatever is no prompt is refused with its place: the file, and the line.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

import files
import names

STDIN = '-'
# Between examples, and before the prompt: so a text that goes on like them can end there.
BETWEEN = '\n\n'


def read_prompts(path: str) -> list[tuple[str, str | list]]:
  """Prompts of a JSONL file, each behind its place; of what is piped in where the path is '-'.

  Raises ValueError for a file that cannot be read, and for a line that is no prompt.
  """
  return [(place, prompt) for place, prompt, _ in read_asked(path)]


def read_asked(path: str) -> list[tuple[str, str | list, str | None]]:
  """The same, each with the name of the adapter that its line asks for; None where it says nothing
  of one.
  """
  asked = [
    (place, _judged(place, prompt_of, given), _judged(place, adapter_of, given))
    for place, given in _lines('prompts', path)
  ]
  if not asked:
    raise ValueError(f'{_named(path)} holds no prompt')
  return asked


def piped() -> str:
  """The text that is piped in, but for an end of line behind it (`echo` writes one); '' where a
  terminal is, or nothing.

  Raises ValueError for what is not UTF-8.
  """
  if sys.stdin is None or sys.stdin.isatty():
    return ''
  text = _in_utf8('stdin', sys.stdin.buffer.read(), 'pipe in UTF-8')
  return text.removesuffix('\n').removesuffix('\r')


def prompt_of(given) -> str | list:
  """A text, ids or messages, by what a line of a JSONL file holds.

  Raises ValueError for anything else.
  """
  if isinstance(given, dict):
    for key in given:
      names.check('key', key, ('prompt', 'messages', 'adapter'))
    asked = {key: given[key] for key in ('prompt', 'messages') if given.get(key) is not None}
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


def adapter_of(given) -> str | None:
  """The adapter that a line of a JSONL file names, '' for the model without any; None where it says
  nothing of it.

  Raises ValueError for what is no name.
  """
  name = given.get('adapter') if isinstance(given, dict) else None
  if name is not None and not isinstance(name, str):
    raise ValueError(f'adapter={name!r} must be the name of one that was loaded, or ""')
  return name


def named_runs(texts: Sequence[str]) -> dict[str, str]:
  """Directories by name, of name=DIR each (--adapters). Raises ValueError for what is something
  else.
  """
  runs = {}
  for text in texts:
    name, _, directory = text.partition('=')
    if not name or not directory:
      raise ValueError(f'--adapters: {text!r} is no name=DIR, as in orders=runs/orders')
    if name in runs:
      raise ValueError(f'--adapters: two are called {name!r}; give each a name of its own')
    files.check_local('--adapters', directory)
    runs[name] = directory
  return runs


def check_adapters(
  asked: Sequence[tuple[str, str | list, str | None]], runs: Sequence[str]
) -> None:
  """Raises ValueError, naming the place, for a line that asks for an adapter that is not one of
  `runs`: before a model is loaded, which takes time.
  """
  for place, _, name in asked:
    if name and not runs:
      raise ValueError(
        f'{place}: adapter={name!r}, and no adapters were loaded; give its run, as in '
        f'--adapters={name}=runs/{name}'
      )
    if name:
      _judged(place, lambda name: names.check('adapter', name, runs), name)


def is_chat(prompt) -> bool:
  """Whether a prompt is messages, and neither a text nor ids."""
  return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) for m in prompt)


def read_examples(path: str, shots: int | None = None) -> list[tuple[str, str]]:
  """The first examples of a JSONL file, each a prompt and the text that goes on from it; all of
  them for None.

  Raises ValueError for a file that cannot be read, a line that is no example, and for more
  examples than there are.
  """
  examples = [_judged(place, _example, given) for place, given in _lines('examples', path)]
  if not examples:
    raise ValueError(f'{_named(path)} holds no example; add lines of {{"prompt": .., "text": ..}}')
  if shots is not None and shots > len(examples):
    raise ValueError(
      f'--shots={shots} of {_named(path)}, which holds {len(examples)} examples; ask for fewer, or '
      'add lines'
    )
  return examples[:shots]


def with_examples(examples: Sequence[tuple[str, str]], prompt: str | list, chat: bool):
  """The prompt behind examples: of a text, each with its text and an empty line; of a chat, a turn
  of the user and one of the assistant each, behind what the system says.

  Raises ValueError for ids, behind which a text has no place.
  """
  if not examples:
    return prompt
  if is_chat(prompt) or chat and isinstance(prompt, str):
    messages = [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt
    turns = [
      {'role': role, 'content': content}
      for pair in examples
      for role, content in zip(('user', 'assistant'), pair)
    ]
    begin = next((i for i, each in enumerate(messages) if each.get('role') != 'system'), 0)
    return [*messages[:begin], *turns, *messages[begin:]]
  if not isinstance(prompt, str):
    raise ValueError('ids with --examples, which are texts; give a text, or leave out --examples')
  return ''.join(f'{before}{text}{BETWEEN}' for before, text in examples) + prompt


def _example(given) -> tuple[str, str]:
  form = '{"prompt": "2 + 2 =", "text": " 4"}'
  if not isinstance(given, dict):
    raise ValueError(f'{str(given)[:60]!r} is no example; give {form}')
  for key in given:
    names.check('key', key, ('prompt', 'text'))
  pair = given.get('prompt'), given.get('text')
  if not all(isinstance(part, str) for part in pair):
    raise ValueError(f'{str(given)[:60]!r} must have two texts, as in {form}')
  return pair


def _judged(place, judge, given):
  try:
    return judge(given)
  except ValueError as error:
    raise ValueError(f'{place}: {error}') from error


def _named(path: str) -> str:
  return 'stdin' if path == STDIN else path


def _lines(flag: str, path: str) -> list[tuple[str, object]]:
  """What the lines of a JSONL file hold, each behind its place.

  Raises ValueError for a file that cannot be read, and for a line that is not JSON.
  """
  try:
    content = _bytes_of(path)
  except OSError as error:
    raise ValueError(
      f'--{flag}={path}: {error.strerror}; give a file of a JSON text or object in each line'
    ) from error

  values = []
  # Other ends of lines, such as U+2028, may stand in a text.
  for number, line in enumerate(content.split(b'\n'), 1):
    place = f'{_named(path)}:{number}'
    if line.strip():
      values.append((place, _json(place, line)))
  return values


def _bytes_of(path: str) -> bytes:
  if path != STDIN:
    return pathlib.Path(path).read_bytes()
  return b'' if sys.stdin is None else sys.stdin.buffer.read()


def _json(place: str, line: bytes) -> object:
  text = _in_utf8(place, line, 'save the file as UTF-8')
  try:
    return json.loads(text)
  except (json.JSONDecodeError, RecursionError) as error:
    raise ValueError(f'{place}: not JSON ({error})') from error
  except ValueError as error:  # a number of thousands of digits
    raise ValueError(f'{place}: {error}') from error


def _in_utf8(place: str, content: bytes, remedy: str) -> str:
  try:
    return content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{place}: not UTF-8 ({error.reason} at byte {error.start}); {remedy}'
    ) from error
