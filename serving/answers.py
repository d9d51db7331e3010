"""How does what comes of a request reach a client of OpenAI's? As one object when all of it is
there, or in pieces as it comes; both say the same.

`index` is of a choice: sample i of prompt p is p * n + i.
"""

import codecs
import dataclasses
import math
import time
import uuid
from collections.abc import Iterator, Sequence

from data import generation
from data.tokenizer import Tokenizer
from decode.scorer import PromptScores
from serving import call as calls
from serving.call import Event
from serving.fields import Denied
from serving.parts import ChatParts, Parted
from serving.ticket import Ticket
from serving.wire import AskedCall

LEAST = -9999.0  # stands for what JSON has no number for
ScoredToken = tuple[int, float, Sequence[tuple[int, float]]]


@dataclasses.dataclass
class AnsweredChoice:
  """What has come of one sample so far.

  Attributes:
    text: of a chat only what is for who asked; beside it reasoning, and calls of tools. parted:
      tells them apart, where it has to be done.
    tokens: of an answer that does not stream, (id, log-probability, alternatives) of each: what is
      said of them is made at the end, for it takes many times the memory.
    offset: characters of all its tokens, behind the prompt where that is echoed.
    begun: whether anything was said of it. at: when its last tokens came.
  """

  parted: Parted | None = None
  text: str = ''
  reasoning: str = ''
  called: list[dict] = dataclasses.field(default_factory=list)
  ids: list[int] = dataclasses.field(default_factory=list)
  tokens: list[ScoredToken] = dataclasses.field(default_factory=list)
  last: Event | None = None
  offset: int = 0
  begun: bool = False
  at: float | None = None
  decoder: codecs.IncrementalDecoder = dataclasses.field(
    default_factory=lambda: codecs.getincrementaldecoder('utf-8')(errors='replace')
  )


class HttpAnswer:
  """Of one request.

  Attributes:
    id: that no other answer has. scores: of each prompt, where they are asked for.
  """

  def __init__(self, asked: AskedCall, tickets: Sequence[Ticket], tokenizer: Tokenizer):
    self._asked, self._tickets, self._tokenizer = asked, tickets, tokenizer
    self.id = f'{"chatcmpl" if asked.chat else "cmpl"}-{uuid.uuid4().hex}'
    self._created = int(time.time())
    self.scores: list[PromptScores] = []
    self._names = {i: name for name, i in tokenizer.control_ids().items()}
    self._ends = generation.ends(tokenizer)
    self._choices: dict[int, AnsweredChoice] = {}
    for p, ticket in enumerate(tickets):
      for sample in ticket.call.samples:
        self._choices[self.index(p, sample)] = AnsweredChoice(
          parted=None if asked.manner is None else Parted(asked.manner),
          offset=len(self._echoed(p)),
        )

  def index(self, prompt: int, sample: int) -> int:
    """Of the choice."""
    return prompt * self._asked.calls[0].options.num_samples + sample

  def since(self, prompt: int, event: Event) -> float | None:
    """When the last tokens before an event's came, of its sample; None for the first."""
    choice = self._choices[self.index(prompt, event.sample)]
    before = choice.at
    if event.ids:
      choice.at = event.at
    return before

  def add(self, prompt: int, event: Event) -> Iterator[dict]:
    """Takes an event of a prompt; the pieces that say it to a client that streams."""
    index = self.index(prompt, event.sample)
    choice = self._choices[index]
    tokens = scored(event) if self._asked.logprobs >= 0 else []
    choice.ids += event.ids
    said = ChatParts(content=event.text)
    if choice.parted is not None:
      said = choice.parted.add(event.text, last=bool(event.finish))
    called_before = len(choice.called)
    choice.text += said.content
    choice.reasoning += said.reasoning
    choice.called += said.calls
    if event.finish:
      choice.last = event
    if not self._asked.stream:
      choice.tokens += tokens
      return
    logprobs = self._logprobs(choice, tokens) if self._asked.logprobs >= 0 else None
    if not choice.begun:
      choice.begun = True
      yield from self._opening(prompt, index)
    if said != ChatParts() or event.finish or logprobs or (self._asked.ids and event.ids):
      yield self._piece(index, choice, said, called_before, event, logprobs)

  def whole(self) -> dict:
    """All of it, in one."""
    said = self._head('chat.completion' if self._asked.chat else 'text_completion')
    choices = []
    for p, ticket in enumerate(self._tickets):
      for sample in ticket.call.samples:
        choices.append(self._choice(p, self.index(p, sample)))
    said |= {'choices': choices, 'usage': self.usage()}
    if self._asked.chat and self._asked.prompt_logprobs >= 0:
      said['prompt_logprobs'] = self._prompt_logprobs(0)
    return said

  def usage(self) -> dict:
    """Tokens of all prompts and choices."""
    usages = [ticket.usage for ticket in self._tickets]
    prompt, new = sum(u.prompt for u in usages), sum(u.completion for u in usages)
    return {
      'prompt_tokens': prompt,
      'completion_tokens': new,
      'total_tokens': prompt + new,
      'prompt_tokens_details': {'cached_tokens': sum(u.cached for u in usages)},
    }

  def last(self) -> dict:
    """The piece that has the usage, behind all others."""
    return self._head(self._kind()) | {'choices': [], 'usage': self.usage()}

  @property
  def written(self) -> list[str]:
    """What has come of each choice, with the marks of its parts."""
    return [self._tokenizer.decode(choice.ids) for choice in self._choices.values()]

  @property
  def finishes(self) -> list[str]:
    """Why choices ended, those that have."""
    return [choice.last.finish for choice in self._choices.values() if choice.last is not None]

  def _kind(self) -> str:
    return 'chat.completion.chunk' if self._asked.chat else 'text_completion'

  def _head(self, kind: str) -> dict:
    return {
      'id': self.id,
      'object': kind,
      'created': self._created,
      'model': self._asked.model,
      'seed': self._asked.seed,
    }

  def _echoed(self, prompt: int) -> str:
    if not self._asked.echo:
      return ''
    given = self._asked.calls[prompt].prompt
    return given if isinstance(given, str) else self._tokenizer.decode(given)

  def _opening(self, prompt: int, index: int) -> Iterator[dict]:
    """What stands before a choice's text."""
    choice: dict = {'index': index, 'finish_reason': None, 'logprobs': None}
    if self._asked.chat:
      choice['delta'] = {'role': 'assistant', 'content': ''}
    else:
      choice['text'] = self._echoed(prompt)
      if echoed := self._echoed_logprobs(prompt):
        choice['logprobs'] = self._shaped(echoed)
    if self._asked.ids:
      choice['prompt_token_ids'] = self._prompt_ids(prompt)
    if self._asked.chat or self._asked.echo or self._asked.ids:
      yield self._head(self._kind()) | {'choices': [choice]} | self._no_usage()

  def _no_usage(self) -> dict:
    return {'usage': None} if self._asked.include_usage else {}

  def _piece(self, index, choice, new: ChatParts, called_before: int, event, logprobs) -> dict:
    """new: what has come, with calls behind those that there were before."""
    said: dict = {'index': index}
    if self._asked.chat:
      delta = {'reasoning_content': new.reasoning, 'content': new.content}
      delta['tool_calls'] = [{'index': called_before + i, **c} for i, c in enumerate(new.calls)]
      said['delta'] = {name: value for name, value in delta.items() if value}
    else:
      said['text'] = new.content
    said['logprobs'] = None if logprobs is None else self._shaped(logprobs)
    said |= self._end(event, choice.called)
    if self._asked.ids:
      said['token_ids'] = list(event.ids)
    return self._head(self._kind()) | {'choices': [said]} | self._no_usage()

  def _choice(self, prompt: int, index: int) -> dict:
    choice = self._choices[index]
    said: dict = {'index': index}
    if self._asked.chat:
      # Where there is something else instead, there is no content.
      content = choice.text or (None if choice.called or choice.reasoning else '')
      message: dict = {'role': 'assistant', 'content': content, 'refusal': None}
      if choice.reasoning:
        message['reasoning_content'] = choice.reasoning
      if choice.called:
        message['tool_calls'] = choice.called
      said['message'] = message
    else:
      said['text'] = self._echoed(prompt) + choice.text
      if self._asked.prompt_logprobs >= 0:
        said['prompt_logprobs'] = self._prompt_logprobs(prompt)
    tokens = self._echoed_logprobs(prompt) + self._logprobs(choice, choice.tokens)
    said['logprobs'] = None if self._asked.logprobs < 0 else self._shaped(tokens)
    said |= self._end(choice.last, choice.called)
    if self._asked.ids:
      said |= {'token_ids': choice.ids, 'prompt_token_ids': self._prompt_ids(prompt)}
    return said

  def _prompt_ids(self, prompt: int) -> list[int]:
    return self._tickets[prompt].prompt

  def _end(self, event: Event, called: Sequence) -> dict:
    """finish_reason, and what else is known of it. OpenAI has a word for two ends; of the others
    stop_reason says which it was, and of a stop which: none, where the model has ended by itself.
    """
    if not event.finish:
      return {'finish_reason': None}
    if event.finish == calls.STOPPED:
      own = event.stopped_by in self._ends and not self._asked.calls[0].ignore_end
      said = {'finish_reason': 'stop', 'stop_reason': None if own else event.stopped_by}
    elif event.finish == calls.LENGTH:
      said = {'finish_reason': 'length', 'stop_reason': None}
    else:
      said = {'finish_reason': 'length', 'stop_reason': event.finish}
    if called and event.finish == calls.STOPPED:
      said['finish_reason'] = 'tool_calls'
    return said | ({'note': event.note} if event.note else {})

  def _logprobs(self, choice: AnsweredChoice, tokens: Sequence[ScoredToken]) -> list[dict]:
    """Of each token, behind those before, what is known of it."""
    said = []
    for i, value, likeliest in tokens:
      one = self._token(i, value) | {'offset': choice.offset}
      # Characters are counted where they begin; those of a half one when it is whole.
      choice.offset += len(choice.decoder.decode(self._tokenizer.decode_bytes([i])))
      said.append(one | {'top_logprobs': [self._token(*each) for each in likeliest]})
    return said

  def _echoed_logprobs(self, prompt: int) -> list[dict]:
    """Of the prompt's tokens, as of others; the first one has none."""
    if not (self._asked.echo and self._asked.logprobs >= 0):
      return []
    scores, said, offset = self.scores[prompt], [], 0
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
    for place, i in enumerate(self._prompt_ids(prompt)):
      value = scores.logprobs[place - 1] if place else 0.0
      likeliest = scores.alternatives[place - 1][: self._asked.logprobs] if place else ()
      one = self._token(i, value) | {'offset': offset}
      offset += len(decoder.decode(self._tokenizer.decode_bytes([i])))
      said.append(one | {'top_logprobs': [self._token(*each) for each in likeliest]})
    said[0] |= {'logprob': None, 'top_logprobs': None}
    return said

  def _prompt_logprobs(self, prompt: int) -> list[dict | None]:
    """As vLLM has them: of each id but the first its own, and the likeliest, by their ids."""
    scores, said = self.scores[prompt], [None]
    for place, i in enumerate(self._prompt_ids(prompt)[1:]):
      likeliest = scores.alternatives[place][: self._asked.prompt_logprobs]
      each = {i: (scores.logprobs[place], scores.ranks[place])}
      for rank, (other, value) in enumerate(likeliest, 1):
        each.setdefault(other, (value, rank))
      said.append({str(i): self._ranked(i, *known) for i, known in each.items()})
    return said

  def _ranked(self, i: int, value: float, rank: int) -> dict:
    token = self._token(i, value)
    return {'logprob': token['logprob'], 'rank': rank, 'decoded_token': token['token']}

  def _token(self, i: int, value: float) -> dict:
    written = self._tokenizer.decode_bytes([i])
    text = written.decode('utf-8', errors='replace') if written else self._names.get(i, '')
    value = value if math.isfinite(value) else LEAST
    return {'token': text, 'logprob': value, 'bytes': list(written)}

  def _shaped(self, tokens: Sequence[dict]) -> dict:
    """As a chat's answer has them, or a completion's."""
    if self._asked.chat:
      return {'content': [{k: v for k, v in each.items() if k != 'offset'} for each in tokens]}
    return {
      'tokens': [_name(each) for each in tokens],
      'token_logprobs': [each['logprob'] for each in tokens],
      'top_logprobs': [*map(_likeliest, tokens)] if self._asked.logprobs else None,
      'text_offset': [each['offset'] for each in tokens],
    }


def scored(event: Event) -> list[ScoredToken]:
  """The tokens of an event."""
  others = event.alternatives or ((),) * len(event.ids)
  return [*zip(event.ids, event.logprobs, others, strict=True)]


def _name(token: dict) -> str:
  """Of a token in a completion's answer, which has no bytes: half a character is spelled out."""
  try:
    bytes(token['bytes']).decode()
  except UnicodeDecodeError:
    return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in token['bytes'])
  return token['token']


def _likeliest(token: dict) -> dict[str, float] | None:
  """Of a token in a completion's answer, its alternatives by their names, and itself."""
  if token['top_logprobs'] is None:
    return None
  values = {_name(other): other['logprob'] for other in token['top_logprobs']}
  values.setdefault(_name(token), token['logprob'])
  return values


def failure(event: Event) -> Denied:
  """What is said of a sample that has failed."""
  kind = event.error.kind if event.error is not None else calls.BROKEN
  status = {calls.INVALID: 400, calls.SLOW: 408, calls.GONE: 503}.get(kind, 500)
  return Denied(event.error.message if event.error else 'it has failed', status=status, code=kind)
