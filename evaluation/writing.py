"""What does a model write behind prompts, however many there are? Rows of one engine, which prompts
join as others end; over pipeline stages batches of the generator.
"""

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator, Sequence

import jax

from data import generation
from decode.bulk import Written, complete, samples
from decode.engine import Engine, Request, Sizes
from decode.generator import Generator
from decode.loaded import bucket
from decode.request import FAILED, INTERRUPTED, LENGTH, STOPPED
from decode.sampling import make_sampling, seed_of
from decode.text import TextStream
from evaluation.journal import JournalPart, nothing_kept
from evaluation.task import Generate
from model.weights import adapters
from parallel import axes as ax

ROWS, EVEN = 64, 16  # that are written side by side, at most; fewer are a multiple
HELD = 2**15  # tokens that these hold together, at most, but for a row that is longer
# Tokens of a prompt that are read at a time, at most, and in a task of longer prompts at least; and
# how many more a call could read in the time that it takes for itself.
READ, PART, CALL = 256, 32, 128
BATCH = 16  # answers of a batch, over stages


@dataclasses.dataclass(frozen=True)
class Reply:
  """A text. finish: 'stop', 'length', or 'failed' where the model's scores were not finite."""

  text: str
  finish: str


def answers(
  model: Generator, prompts: Sequence[Sequence[int]], kind: Generate, seed: int, first: int = 0
) -> Iterator[list[Reply]]:
  """Of each prompt from the first one on, in order, so many as the kind asks for. What is written
  depends on a prompt, its number, and all prompts' lengths; over stages on which are in a batch
  with it, too: begin at a multiple of `together`. Ctrl-C raises KeyboardInterrupt.
  """
  if _stages(model):
    yield from _in_batches(model, prompts, kind, seed, first)
    return
  yield from _continuous(model, prompts, kind, seed, first)


def together(model: Generator, kind: Generate) -> int:
  """Of how many prompts the answers depend on one another: 1, but over stages those of a batch."""
  return max(1, BATCH // kind.samples) if _stages(model) else 1


# Of a model the engine that wrote last, and what it has room for: the next task of these sizes
# compiles nothing.
_spare: weakref.WeakKeyDictionary[Generator, tuple[Sizes, Engine]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _lent(
  model: Generator, prompts: Sequence[Sequence[int]], new: int, samples: int = 1
) -> Iterator[Engine]:
  """An engine for so many samples of these prompts, of so many new tokens each, that nobody else
  has. What it held takes no memory afterwards, also where its user stops half-way.
  """
  sizes = _sizes(model, [*map(len, prompts)], new, samples)
  before, engine = _spare.pop(model, (None, None))
  if before == sizes:
    engine.reset()
  else:
    engine = _engine(model, sizes)
  try:
    yield engine
  finally:
    engine.rest()
    _spare[model] = sizes, engine


def _sizes(model: Generator, prompts: Sequence[int], new: int, samples: int) -> Sizes:
  """prompts: tokens of each."""
  front, parts, ends = model.plain, model.parts, generation.ends(model.tokenizer)
  source = 0
  if front.encoder:
    source, prompts = max(prompts) + len(front.soft), [1] * len(prompts)
  prompts = [tokens + len(front.begins) for tokens in prompts]
  longest = max(prompts)
  capacity = min(front.positions or longest + new, bucket(longest + new))
  rows = min(ROWS, HELD // (capacity + source), -(-len(prompts) * samples // EVEN) * EVEN)
  rows = max(1, rows // parts) * parts
  read_rows = max(1, rows // 4 // parts) * parts
  return Sizes(
    rows=rows,
    capacity=capacity,
    read_rows=read_rows,
    read_tokens=min(_part(prompts, read_rows), capacity),
    bias=0,
    ends=max(1, len(ends)),
    adapters=adapters(model.model),
    source=source,
  )


def _part(prompts: Sequence[int], rows: int) -> int:
  """How many tokens of so many prompts are best read at a time: what is read beyond a prompt's end
  is thrown away, and a call has its own costs. A power of two.
  """

  def cost(tokens: int) -> float:
    parts = sum(-(-prompt // tokens) for prompt in prompts)
    return parts * (tokens + CALL / rows)

  size = min(PART, bucket(max(prompts), 1))
  sizes = [size]
  while sizes[-1] < min(READ, max(prompts)):
    sizes.append(2 * sizes[-1])
  return min(sizes, key=cost)


def _engine(model: Generator, sizes: Sizes) -> Engine:
  return Engine(
    model.model.config,
    model.mesh,
    sizes,
    vocabulary=model.vocabulary,
    pad=model.tokenizer.pad,
    virtual=len(model.plain.soft),
  )


def continued(
  model: Generator,
  prompts: Sequence[Sequence[int]],
  new: int,
  temperature: float = 0.0,
  seed: int = 0,
  kept: JournalPart | None = None,
) -> list[Written]:
  """Ids that are written behind each of some prompts, of ids, in order: `new` ones, or fewer where
  the text ends. kept: what was written before, and where more is kept as it ends; of what was kept
  no more is known than its ids.

  Raises NotImplementedError for a model that is no decoder, and for layers in stages.
  """
  config = model.model.config
  if config.encoder_layers or not config.causal or _stages(model):
    raise NotImplementedError(
      'texts are gone on with by a decoder whose layers are together; this model has an encoder, '
      'or the mesh has stages'
    )
  kept = nothing_kept() if kept is None else kept
  done = {i: Written(ids) for i, ids in kept.values.items()}
  due = [i for i in range(len(prompts)) if i not in done]
  if not due:
    return [done[i] for i in range(len(prompts))]
  ends = generation.ends(model.tokenizer)

  def requests() -> Iterator[Request]:
    for i in due:
      sampling = make_sampling(1, temperature=temperature, seed=seed_of(seed, i))
      yield Request(model.plain.row(prompts[i]), new, sampling, ends)

  # For all prompts, whichever are due: programs of one shape round alike.
  with _lent(model, prompts, new) as engine:
    for at, written in complete(engine, model.model, requests()):
      done[due[at]] = written
      if not written.broken:
        kept.add(due[at], written.ids)
  return [done[i] for i in range(len(prompts))]


def _continuous(model, prompts, kind, seed, first) -> Iterator[list[Reply]]:
  ends = generation.ends(model.tokenizer)
  front = model.plain
  texts: dict[int, _Text] = {}

  def requests() -> Iterator[Request]:
    for i in range(first, len(prompts)):
      sampling = make_sampling(1, temperature=kind.temperature, seed=seed_of(seed, i))
      prompt, source = front.read(prompts[i], model.tokenizer.pad)
      request = Request(prompt, kind.max_new_tokens, sampling, ends, source=source)
      yield from samples(request, kind.samples)

  def over(index: int, written: Written) -> bool:
    text = texts.setdefault(index, _Text(model, kind.stops))
    return text.stopped_by(written.ids)

  ended: dict[int, Reply] = {}
  due = 0  # the first sample of the next prompt
  with (
    _lent(model, prompts, kind.max_new_tokens, kind.samples) as engine,
    contextlib.closing(complete(engine, model.model, requests(), over)) as endings,
  ):
    for index, written in endings:
      ended[index] = texts.pop(index).answer(written)
      while all(due + j in ended for j in range(kind.samples)):
        yield [ended.pop(due + j) for j in range(kind.samples)]
        due += kind.samples


class _Text:
  """An answer while it grows."""

  def __init__(self, model: Generator, stops: Sequence[str]):
    self._stream = TextStream(model.tokenizer, stops)
    self._pieces: list[str] = []
    self._seen = 0

  def stopped_by(self, ids: Sequence[int]) -> bool:
    """Whether a stop has come, with these ids, of which the first ones were there before."""
    self._pieces.append(self._stream.add(ids[self._seen :]))
    self._seen = len(ids)
    return self._stream.stopped is not None

  def answer(self, written: Written) -> Reply:
    """What has come of it."""
    text = ''.join([*self._pieces, self._stream.end()])
    stopped = self._stream.stopped is not None or written.ended
    if written.broken and not stopped:
      return Reply(text, FAILED)
    return Reply(text, STOPPED if stopped else LENGTH)


def _in_batches(model: Generator, prompts, kind, seed, first) -> Iterator[list[Reply]]:
  options = {
    'max_new_tokens': kind.max_new_tokens,
    'temperature': kind.temperature,
    'num_samples': kind.samples,
    'stop': kind.stops,
    'seed': seed_of(seed, first),
  }
  for batch in model.in_batches(prompts[first:], together(model, kind), **options):
    # The generator gives what there is of a batch; of an answer that is cut short nothing is told,
    # and its batch is written anew.
    if any(row.finish == INTERRUPTED for row in batch):
      raise KeyboardInterrupt
    for begin in range(0, len(batch), kind.samples):
      rows = batch[begin : begin + kind.samples]
      yield [Reply(row.text, row.finish) for row in rows]


def _stages(model: Generator) -> bool:
  with jax.set_mesh(model.mesh):
    return ax.size('layers') > 1
