"""How does a conversation become the text that a chat model was trained on?

A template is a Jinja program that comes with the tokenizer. It is another's code, so it runs in
Jinja's sandbox and sees nothing but JSON data. What it renders holds the names of control tokens:
encode it with `tokenizer.encode(text, special=True)`.
"""

import datetime
import json
import re
import secrets
from collections.abc import Mapping, Sequence

import names
from data.tokenizer import CUT, Tokenizer

REASONING = ('reasoning_content', 'thinking', 'reasoning')
# The day that templates have in prepared data and in what a task asks (strftime_now), whenever that
# is: one key is the same bytes. Llama 3's have it where they are told no other.
PREPARED_DAY = datetime.datetime(2024, 7, 26)
_NONCE = secrets.token_hex(16)  # no message can hold what can't be guessed
_OPEN, _CLOSE = f'<{_NONCE}', f'{_NONCE}>'


class ChatTemplate:
  """A template in the dialect of transformers' apply_chat_template,
  with its {% generation %} blocks.

  Args:
    source: the Jinja text.
    variables: what it may name besides messages, such as bos_token.
    day: what the template takes for today; None: what is.

  Attributes:
    marks_generation: whether {% generation %} blocks tell what the assistant wrote,
      see `render_with_spans`.
    reads: names of the variables that it reads.

  Raises:
    ValueError: source is '' or no valid template.
  """

  def __init__(
    self,
    source: str,
    variables: Mapping[str, object] | None = None,
    day: datetime.datetime | None = None,
  ):
    import jinja2.meta

    if not source.strip():
      raise ValueError('the chat template is empty: give its Jinja text')
    self.source, self.variables = source, dict(variables or {})
    environment = _environment(day)
    try:
      self._template = environment.from_string(source)
      self.reads = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
    except jinja2.TemplateSyntaxError as error:
      raise ValueError(f'line {error.lineno} of the chat template: {error.message}') from error
    except (RecursionError, ValueError, SyntaxError, MemoryError) as error:
      # Nested beyond a stack (Jinja's, or that of Python's compiler); a number of too many digits.
      raise ValueError(f'the chat template can\'t be read: {error}') from error
    self.marks_generation = environment.marks_generation

  @classmethod
  def of(
    cls, tokenizer: Tokenizer, name: str = 'default', day: datetime.datetime | None = None
  ) -> 'ChatTemplate':
    """A tokenizer's own template, by name where it has several; day: as of the constructor.
    Raises ValueError where there is none of that name.
    """
    if not tokenizer.chat_templates:
      raise ValueError(
        f'this {tokenizer.kind!r} tokenizer has no chat template (the model may be a base model): '
        'put a chat_template.jinja beside its tokenizer.json, or make one by ChatTemplate(source)'
      )
    names.check('chat template', name, tokenizer.chat_templates)
    return cls(tokenizer.chat_templates[name], tokenizer.special_tokens, day)

  def render(
    self, messages: Sequence[Mapping], *, add_generation_prompt: bool = False, **variables
  ) -> str:
    """The conversation as text.

    Args:
      messages: [{'role': 'user', 'content': 'Hello'}, ...]; content is text or a list of parts, and
        may be missing beside 'tool_calls'. Other keys are the template's matter; None counts as
        missing, as in transformers.
      add_generation_prompt: end with what opens the assistant's turn.
      **variables: for the template (tools, documents, enable_thinking, ...),
      before those of the constructor.

    Raises:
      ValueError: messages of another form; data that is not JSON; the template refuses, or fails.
    """
    return self._render(messages, add_generation_prompt, variables)[0]

  def render_with_spans(
    self, messages: Sequence[Mapping], **options
  ) -> tuple[str, list[tuple[int, int]]]:
    """The text, and [begin, end) in characters of each part of it that the assistant wrote.
    Arguments as for `render`.

    Raises:
      ValueError: as `render`, and where the template has no {% generation %} block,
        so that nobody trains on nothing.
    """
    if not self.marks_generation:
      raise ValueError(
        'this chat template has no {% generation %} blocks, so it does not tell what the assistant '
        "wrote; put them around the assistant's content"
      )
    return self._render(messages, options.pop('add_generation_prompt', False), options)

  def _render(
    self, messages, add_generation_prompt: bool, variables: dict
  ) -> tuple[str, list[tuple[int, int]]]:
    data = _plain(
      {'tools': None, 'documents': None}
      | self.variables
      | variables
      | {'messages': _checked(messages), 'add_generation_prompt': add_generation_prompt}
    )
    try:
      return _spans(self._template.render(data))
    except Exception as error:  # a template can fail in any way that a program can
      raise ValueError(
        f'the chat template failed on these {len(messages)} messages: {type(error).__name__}: '
        f'{error}'
      ) from error


def quoted(messages, tokenizer: Tokenizer):
  """The same messages, in which names of the tokenizer's control tokens are text, in names of
  objects, too: where what a template makes of them is encoded with special=True, they are spelled
  out, and end no turn.
  """
  if not hasattr(tokenizer, 'control_names'):
    return messages  # of a kind whose control tokens text can't name
  try:
    return _quoted(messages, tokenizer.control_names)
  except RecursionError as error:
    raise ValueError(f'a chat template sees JSON data only: {error}') from error


def _quoted(value, pattern: re.Pattern):
  if isinstance(value, str):
    return pattern.sub(lambda match: f'{match[0][0]}{CUT}{match[0][1:]}', value)
  if isinstance(value, Mapping):
    return {
      _quoted(key, pattern) if isinstance(key, str) else key: _quoted(each, pattern)
      for key, each in value.items()
    }
  if isinstance(value, (list, tuple)):
    return [_quoted(each, pattern) for each in value]
  return value


def _checked(messages: Sequence[Mapping]) -> list[dict]:
  """Messages without their None values. Raises ValueError that says which one has another form."""
  form = "; give [{'role': 'user', 'content': 'Hello'}, ...]"
  if not isinstance(messages, (list, tuple)) or not messages:
    raise ValueError(f'messages={messages!r} must be a list of at least one message' + form)
  checked = []
  for i, message in enumerate(messages):
    if not isinstance(message, Mapping):
      raise ValueError(
        f'messages[{i}]={message!r} is {type(message).__name__}, not a mapping' + form
      )
    message = {key: value for key, value in message.items() if value is not None}
    # Of one thing: templates read one of these names or another, as in transformers.
    thought = next((message[key] for key in REASONING if key in message), None)
    if thought is not None:
      message = {'thinking': thought, **message, 'reasoning_content': thought}
    if not isinstance(message.get('role'), str):
      raise ValueError(f'messages[{i}] has role={message.get("role")!r}, which is no text' + form)
    if not isinstance(message.get('content'), (str, list)) and (
      'content' in message or 'tool_calls' not in message
    ):
      raise ValueError(
        f'messages[{i}] has content={message.get("content")!r}, neither text nor a list of parts'
        + form
      )
    checked.append(message)
  return checked


def _plain(data: dict) -> dict:
  """A copy in JSON's types only: the methods of richer objects are a way out of the sandbox."""
  try:
    return json.loads(json.dumps(data))
  except (TypeError, ValueError, RecursionError) as error:
    raise ValueError(f'a chat template sees JSON data only: {error}') from error


def _spans(marked: str) -> tuple[str, list[tuple[int, int]]]:
  """Takes the marks out of a text; what stood between them are the spans,
  in order of their ends.
  """
  text = ''
  begins, spans = [], []
  for piece in re.split(f'({_OPEN}|{_CLOSE})', marked):
    if piece == _OPEN:
      begins.append(len(text))
    elif piece == _CLOSE:
      spans.append((begins.pop(), len(text)))
    else:
      text += piece
  return text, spans


def _environment(day: datetime.datetime | None):
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}: what the assistant wrote, between marks."""

    tags = {'generation'}

    def parse(self, parser):
      self.environment.marks_generation = True
      line = next(parser.stream).lineno
      body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
      return jinja2.nodes.CallBlock(self.call_method('_mark'), [], [], body).set_lineno(line)

    def _mark(self, caller):
      return f'{_OPEN}{caller()}{_CLOSE}'

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own escapes <, > and & for HTML.
    return json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
  )
  environment.marks_generation = False
  environment.filters['tojson'] = tojson
  environment.globals |= {
    'raise_exception': raise_exception,
    'strftime_now': lambda format: (day or datetime.datetime.now()).strftime(format),
  }
  return environment
