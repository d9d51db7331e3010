"""What has an engine room for, and what is a row of it asked for?"""

import dataclasses
from collections.abc import Sequence

from decode.constrain import Constraint
from decode.loop import idle_sampling
from decode.options import CHUNK, TABLE
from decode.sampling import Sampling
from model.cache import APPEND
from model.config import ModelConfig
from model.weights import adapters
from parallel import axes as ax

SHORTEST = 32  # tokens of a text that is read at once; each length is four times another
LONGER = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What an engine has room for; each is part of the shape of its programs.

  Attributes:
    rows: B, requests that are in it at a time.
    capacity: tokens that a row holds at most, prompt and new ones.
    read_rows: J, rows that are read together; 0: one of each part of the mesh.
    read_tokens: C, tokens of each of them that are read together. last_tokens: the last part of a
      prompt, where it has at most so many, is read by a program of as many; 0: by that of C.
    steps: tokens of each row that a call of `decode` makes at most.
    bias: ids that a request may have a bias for. ends: ids that may end it.
    states, classes: of the automaton that the constraints of all rows share (decode.constrain).
    alternatives: likeliest ids that a call of `decode` gives where it is asked for any.
    cache_dtype: of keys and values; default: as the model computes.
    adapters: on the weights (model.weights.adapters), of which each row may have one.
    block: tokens of a prompt that are shared together with whoever begins with the same
      (decode.prefixes); a multiple of read_tokens. 0: nothing is shared.
    pages: of `block` tokens each, in which all rows' tokens lie (decode.paged); 0: every row has
      room for its capacity. host_pages: for which there is room on the host besides, where rows
      wait.
    source: tokens that the encoder of an encoder-decoder reads of a request at most; 0: there is no
      encoder. Of what it has read nothing is shared but among samples of one text.
    lookup: every step drafts what followed the last `lookup` tokens where the row has had them
      before (decode.drafted); 0: nothing drafts. draft_tokens: how many it drafts.

  Raises ValueError where one of them is no size.
  """

  rows: int = 8
  capacity: int = 2048
  read_rows: int = 0
  read_tokens: int = APPEND
  last_tokens: int = 0
  steps: int = CHUNK
  bias: int = 300
  ends: int = 8
  states: int = 4096
  classes: int = 256
  alternatives: int = 0
  cache_dtype: str = ''
  adapters: int = 0
  block: int = 0
  pages: int = 0
  host_pages: int = 0
  source: int = 0
  lookup: int = 0
  draft_tokens: int = TABLE['draft_tokens'].default

  def __post_init__(self):
    may_be_none = ('read_rows', 'bias', 'alternatives', 'adapters', 'block', 'lookup', 'pages')
    may_be_none += ('host_pages', 'source', 'last_tokens')
    for field in dataclasses.fields(self):
      value, least = getattr(self, field.name), 0 if field.name in may_be_none else 1
      if field.type is int and value < least:
        raise ValueError(f'{field.name}={value} of an engine must be at least {least}')
    if self.last_tokens >= self.read_tokens:
      raise ValueError(
        f'last_tokens={self.last_tokens} of an engine must be below read_tokens='
        f'{self.read_tokens}: a last part that is no shorter needs no program of its own; give 0'
      )
    if self.last_tokens and self.source:
      raise ValueError(
        f'last_tokens={self.last_tokens} of an engine with a source of {self.source} tokens, which '
        'is read as a whole; give 0'
      )
    if self.block % self.read_tokens:
      raise ValueError(
        f'block={self.block} of an engine must be a multiple of read_tokens={self.read_tokens}, so '
        'that what comes behind a block is read in the same parts as if nothing were there'
      )
    if self.pages and not self.block:
      raise ValueError(
        f'pages={self.pages} of an engine are of block=0 tokens; give a block, such as 128'
      )
    if self.host_pages and not self.pages:
      raise ValueError(
        f'host_pages={self.host_pages} of an engine without pages, in which no row ever waits; '
        'give pages, too'
      )

    if self.lookup and self.draft_tokens >= self.read_tokens:
      raise ValueError(
        f'draft_tokens={self.draft_tokens} of an engine must be below read_tokens='
        f'{self.read_tokens}: rings of slots have no room for more at once; draft fewer'
      )

  def within(self, positions: int) -> 'Sizes':
    """No more tokens are read at once than a model has positions for (0: any number)."""
    if not 0 < positions < self.read_tokens:
      return self
    last = self.last_tokens if self.last_tokens < positions else 0
    return dataclasses.replace(self, read_tokens=positions, last_tokens=last)


@dataclasses.dataclass(frozen=True)
class Use:
  """Of an engine's memory.

  Attributes:
    tokens, room: for which it is in use, and for which there is some, on the device.
    preempted: how often a row had to wait for others' sake.
  """

  tokens: int = 0
  room: int = 0
  preempted: int = 0


@dataclasses.dataclass(frozen=True)
class Request:
  """What one row is asked for.

  Attributes:
    prompt: ids, at least one: what the decoder reads. source: what the encoder of an
      encoder-decoder reads.
    max_new_tokens: how many to write at most.
    sampling: of one row, as decode.sampling.make_sampling(1, ..) gives it.
    ends: ids that end the row, and belong to it.
    constraint: what it keeps to, or None.
    adapter: 0 for the model itself, or i for its i-th adapter (model.weights.bank.Bank.index).
    salt: what is read is shared with others of the same salt only (Sizes.block).
  """

  prompt: Sequence[int]
  max_new_tokens: int
  sampling: Sampling
  ends: Sequence[int] = ()
  constraint: Constraint | None = None
  adapter: int = 0
  salt: str = ''
  source: Sequence[int] = ()

  @property
  def tokens(self) -> int:
    """Of the text that is read for it."""
    return len(self.source or self.prompt)


def idle_request(bias: int) -> Request:
  """What asks for nothing, in the shapes of what does."""
  return Request([0], 1, idle_sampling(1, bias))


def lengths_to(capacity: int) -> list[int]:
  """Of texts that are read at once, of which each is by the least that holds it."""
  lengths = [SHORTEST]
  while lengths[-1] < capacity:
    lengths.append(lengths[-1] * LONGER)
  return [*lengths[:-1], capacity]


def check(config: ModelConfig, sizes: Sizes) -> None:
  """Raises as Engine says; with the mesh in context."""
  parts = ax.size('batch')
  for name in ('rows', 'read_rows'):
    value = getattr(sizes, name)
    if value % parts:
      raise ValueError(
        f'{name}={value} do not split over the {parts} parts of the mesh (data x fsdp x expert); '
        'make it a multiple'
      )
  if sizes.pages:
    _check_pages(sizes, parts)
  if sizes.read_rows > sizes.rows:
    raise ValueError(f'read_rows={sizes.read_rows} of rows={sizes.rows}: read at most all of them')
  if bool(config.encoder_layers) != bool(sizes.source):
    raise ValueError(
      f'source={sizes.source} of an engine for model.encoder_layers={config.encoder_layers}: give '
      'how many tokens an encoder reads at most, and none without one'
    )
  if config.max_length and sizes.source > config.max_length:
    raise ValueError(
      f'source={sizes.source} of an engine passes model.max_length={config.max_length}; give less'
    )
  if ax.size('layers') > 1:
    raise NotImplementedError(
      f'an engine over mesh.stage={ax.size("layers")}: stages write all rows of a cache at once; '
      'use a mesh without stages, or decode.generator.Generator'
    )
  if config.moe.experts and config.moe.dispatch == 'capacity':
    raise ValueError(
      "model.moe.dispatch='capacity' drops tokens for want of room, which depends on who else is "
      "there; use 'dropless', as decode.generating.generating does"
    )


def _check_pages(sizes: Sizes, parts: int) -> None:
  least = -(-sizes.capacity // sizes.block)
  if sizes.pages % parts or sizes.host_pages % parts:
    raise ValueError(
      f'pages={sizes.pages} and host_pages={sizes.host_pages} do not split over the {parts} parts '
      'of the mesh (data x fsdp x expert); make them multiples'
    )
  if sizes.pages // parts < least:
    raise ValueError(
      f'pages={sizes.pages} of {sizes.block} tokens do not hold a row of '
      f'capacity={sizes.capacity} on each of {parts} parts of the mesh; give at least '
      f'{least * parts}, or a smaller capacity'
    )
  if ax.size('slots') > 1:
    raise NotImplementedError(
      f'pages over mesh.context={ax.size("slots")}: a page is whole on every device of a part; use '
      'pages=0, or a mesh without context'
    )


def check_weights(weights, sizes: Sizes) -> None:
  """Raises ValueError for weights with another number of adapters."""
  if adapters(weights) != sizes.adapters:
    raise ValueError(
      f'weights with {adapters(weights)} adapters in an engine for {sizes.adapters} '
      '(Sizes.adapters): make both for as many'
    )


def check_request(request: Request, sizes: Sizes, vocabulary: int, virtual: range) -> None:
  """Raises ValueError for a request that no row could take. virtual: ids of soft tokens."""
  prompt, new = request.prompt, request.max_new_tokens
  if len(prompt) < 1 or new < 1:
    raise ValueError(
      f'a prompt of {len(prompt)} tokens and max_new_tokens={new}: both must be at least 1'
    )
  if len(prompt) >= sizes.capacity:
    raise ValueError(
      f'a prompt of {len(prompt)} tokens leaves no room for new ones in '
      f'capacity={sizes.capacity} of a row; shorten the prompt'
    )
  _check_source(request, sizes)
  ids = (*prompt, *request.source)
  wrong = [i for i in ids if not 0 <= i < vocabulary and i not in virtual]
  if wrong:
    soft = virtual and f' and, of soft tokens, [{virtual[0]}, {virtual.stop})'
    raise ValueError(f'a prompt has the id {wrong[0]}; ids are in [0, {vocabulary}){soft or ""}')
  if len(request.ends) > sizes.ends:
    raise ValueError(f'{len(request.ends)} ids end a row, of at most {sizes.ends}; give fewer')
  if request.sampling.seed.shape != (1,):
    raise ValueError(
      f'a request is one row, and its sampling is of {request.sampling.seed.shape}; make it with '
      'make_sampling(1, ..)'
    )
  if not 0 <= request.adapter <= sizes.adapters:
    raise ValueError(
      f'adapter={request.adapter} of a request must be in [0, {sizes.adapters}] '
      '(Sizes.adapters); 0 is none'
    )
  request.sampling.bias.padded(sizes.bias)  # raises for more


def _check_source(request: Request, sizes: Sizes) -> None:
  source = len(request.source)
  if bool(source) != bool(sizes.source):
    raise ValueError(
      f'a source of {source} tokens, in an engine for at most source={sizes.source}: an '
      'encoder-decoder reads one, and no other model does'
    )
  if source > sizes.source:
    raise ValueError(
      f'a source of {source} tokens, of at most {sizes.source} that the encoder reads; shorten it'
    )
  if source and len(request.prompt) > sizes.read_tokens:
    raise ValueError(
      f'{len(request.prompt)} tokens begin what a decoder writes, and are read with its source: of '
      f'at most read_tokens={sizes.read_tokens}; give fewer'
    )
