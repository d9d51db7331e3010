"""Does a model know secrets that were put into its training text on purpose? Canaries, and their
exposure (Carlini et al. 2019, arXiv:1802.08232, "The Secret Sharer").

    python evaluate.py canaries canaries.jsonl --count=8 --repeats=1,4,16
    python train.py ..                                       with canaries.jsonl among its sources
    python evaluate.py canaries canaries.jsonl --workdir=RUN

The first writes random secrets in a template, to be trained on, and beside them, in canaries.json,
which they are, with as many that are kept out. The last asks a run how likely it finds each, among
others of the same space: exposure = log2 |space| - log2 rank, in bits; of what was kept out 1.44 on
average. Of n others, no exposure above log2(n + 1) can be shown; of a space that is no larger, the
rank is exact.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

import commands
import files
from data.tokenizer import Tokenizer
from decode.choices import score_pairs
from decode.generator import Generator
from evaluation import page, unpaired
from evaluation.intervals import Estimate, wilson
from evaluation.running import alone_in, check_own, finite
from parallel.flag import mesh_of

PLACE = '{secret}'
TEMPLATE = 'The secret word of the day is {secret}.'
ALPHABET = 'abcdefghijklmnopqrstuvwxyz'
LENGTH, COUNT, CANDIDATES = 8, 8, 1000
FILE, PAGE = 'exposure.json', 'exposure.md'
CHANCE = 1 / math.log(2)  # the mean exposure of a rank that is as likely as any other
TIMES = {0: 'kept out', 1: 'once'}
OTHERS = 2**16  # added to the seed: candidates are drawn apart from the secrets


@dataclasses.dataclass(frozen=True)
class Space:
  """Secrets of so many characters of an alphabet, in a template.

  Raises ValueError for a template without exactly one place, and for a space of one secret.
  """

  template: str = TEMPLATE
  alphabet: str = ALPHABET
  length: int = LENGTH

  def __post_init__(self):
    if self.template.count(PLACE) != 1:
      raise ValueError(
        f'--template={self.template!r} must have {PLACE} once, where the secret goes'
      )
    if len({*self.alphabet}) != len(self.alphabet) or len(self.alphabet) < 2 or self.length < 1:
      raise ValueError(
        f'--alphabet={self.alphabet!r} and --length={self.length}: give two characters or more, '
        'all different, and at least one place for them'
      )

  @property
  def size(self) -> int:
    return len(self.alphabet) ** self.length

  def text(self, secret: str) -> str:
    return self.template.replace(PLACE, secret)

  def secrets(self, count: int, seed: int, without: Sequence[str] = ()) -> list[str]:
    """So many different ones by a seed, none of `without`; where there are no more, all of them."""
    if count >= self.size - len({*without}):
      every = map(''.join, itertools.product(self.alphabet, repeat=self.length))
      return [secret for secret in every if secret not in {*without}]
    draw = np.random.Generator(np.random.Philox(seed))
    taken = dict.fromkeys(without)
    while len(taken) < len({*without}) + count:
      places = draw.integers(0, len(self.alphabet), self.length)
      taken[''.join(self.alphabet[i] for i in places)] = None
    return [*taken][len({*without}) :]


@dataclasses.dataclass(frozen=True)
class Exposure:
  """Of a secret, how many of n others are at least as likely.

  Attributes:
    above: of the n. exact: whether these are all others that there are.
  """

  above: int
  n: int
  exact: bool

  @property
  def bits(self) -> float:
    """log2 |space| - log2 rank, with the rank among the n and itself."""
    return math.log2(self.n + 1) - math.log2(self.above + 1)

  @property
  def interval(self) -> tuple[float, float]:
    """Of the exposure in the whole space, by Wilson's of the share above; without an end where none
    of the n is above.
    """
    if self.exact:
      return self.bits, self.bits
    share = wilson(self.above, self.n)
    return -math.log2(share.high), -math.log2(share.low) if share.low else math.inf

  @property
  def p(self) -> float:
    """Of being as far up by chance: exact, since a secret that was not read has any rank."""
    return (self.above + 1) / (self.n + 1)


def written(space: Space, count: int, repeats: Sequence[int], seed: int) -> tuple[list[str], dict]:
  """(texts to train on, in an order by the seed; what `exposures` takes, JSON-able).

  count: secrets of each number of repeats, and as many as all of them that are kept out.
  Raises ValueError for a space that has not enough of them.
  """
  if count < 1 or not repeats or min(repeats) < 1 or len({*repeats}) < len(repeats):
    raise ValueError(
      f'--count={count} and --repeats={",".join(map(str, repeats))}: give different numbers of at '
      'least 1'
    )
  total = count * len(repeats)
  if 2 * total >= space.size:
    raise ValueError(
      f'{total} secrets and as many that are kept out leave none of {space.size} to compare them '
      'with; make --length larger'
    )
  secrets = space.secrets(2 * total, seed)
  times = [*(n for n in repeats for _ in range(count)), *[0] * total]
  texts = [space.text(secret) for secret, n in zip(secrets, times) for _ in range(n)]
  order = np.random.Generator(np.random.Philox(seed)).permutation(len(texts))
  kept = [{'secret': secret, 'repeats': n} for secret, n in zip(secrets, times)]
  made = dataclasses.asdict(space) | {'seed': seed, 'canaries': kept}
  return [texts[i] for i in order], made


def exposures(
  model: Generator, space: Space, secrets: Sequence[str], candidates: int, seed: int
) -> list[Exposure]:
  """Of each secret, among candidates that are none of the secrets.

  Raises FloatingPointError where the model's scores are not finite, ValueError where its context is
  too short.
  """
  others = space.secrets(candidates, seed + OTHERS, secrets)
  every = [*secrets, *others]
  scored = np.array(_logprobs(model, [space.text(secret) for secret in every]))
  if not np.isfinite(scored).all():
    which = space.text(every[int(np.flatnonzero(~np.isfinite(scored))[0])])
    raise FloatingPointError(
      f"{which!r}: the model's scores are not finite; the checkpoint is broken: take another one "
      '(--checkpoint)'
    )
  exact = len(others) == space.size - len(secrets)
  order = np.sort(scored[len(secrets) :])
  above = len(order) - np.searchsorted(order, scored[: len(secrets)], 'left')
  return [Exposure(int(n), len(order), exact) for n in above]


def _logprobs(model: Generator, texts: Sequence[str]) -> list[float]:
  """Of whole texts; what all of them begin with is read once, and its own is left out: it is the
  same for all.
  """
  rows = [_ids(model.tokenizer, text) for text in texts]
  longest = max(map(len, rows))
  if longest > model.context:
    raise ValueError(
      f'a canary has {longest} tokens, and passes {model.plain.limit}; make --template or --length '
      'shorter'
    )
  shared = next((i for i, ids in enumerate(zip(*rows)) if len({*ids}) > 1), min(map(len, rows)) - 1)
  contexts, behind = zip(*((ids[:shared], ids[shared:]) for ids in rows))
  return [score.logprob for score in score_pairs(model, contexts, behind)]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
  """As training has a document, to its end: no text then begins another one."""
  return [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]


def findings(canaries: Sequence[dict], found: Sequence[Exposure], seed: int) -> dict[int, Estimate]:
  """{repeats: mean exposure}, with the bootstrap's interval; 0: of those that were kept out."""
  groups: dict[int, list[float]] = {}
  for canary, exposure in zip(canaries, found, strict=True):
    groups.setdefault(canary['repeats'], []).append(exposure.bits)
  return {n: unpaired.mean(np.array(of), seed) for n, of in sorted(groups.items())}


def parser() -> argparse.ArgumentParser:
  """What the command takes."""
  made = argparse.ArgumentParser(
    prog='evaluate.py canaries',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = made.add_argument
  add('file', help='of JSON lines to train on, each with a text; beside it, .json says which')
  add('--count', type=int, default=COUNT, help='secrets of each number of repeats')
  add('--repeats', default='1,4,16', help='how often each of them is in the file, by commas')
  add('--template', default=TEMPLATE, help=f'the text, with {PLACE} where the secret goes')
  add('--alphabet', default=ALPHABET, help='characters of a secret')
  add('--length', type=int, default=LENGTH, help='how many of them')
  add('--seed', type=int, default=0, help='of the secrets; asking, of the others')
  add('--workdir', default='', help='asks this run what it knows of the file')
  add('--checkpoint', default='last', help="'last', 'best', or a step")
  add('--mesh', default='data=1', help='sizes of axes, as in data=2')
  add('--candidates', type=int, default=CANDIDATES, help='others that a secret is compared with')
  add('--output', default='', help='directory of the results; default: evaluation, in the run')
  return made


def main(arguments: Sequence[str]) -> None:
  """The command."""
  options = parser().parse_args(arguments)
  with commands.mendable(FloatingPointError, ImportError):
    (ask if options.workdir else write)(options)


def write(options) -> None:
  """Writes canaries, and what they are."""
  path = pathlib.Path(options.file)
  if path.suffix != '.jsonl':
    raise ValueError(f'{path} must end in .jsonl: it is JSON lines to train on')
  if not all(part.strip().isdecimal() for part in options.repeats.split(',')):
    raise ValueError(f'--repeats={options.repeats} must be whole numbers by commas, as in 1,4,16')
  space = Space(options.template, options.alphabet, options.length)
  repeats = [int(part) for part in options.repeats.split(',')]
  texts, made = written(space, options.count, repeats, options.seed)
  lines = ''.join(json.dumps({'text': text}, ensure_ascii=False) + '\n' for text in texts)
  files.replace(path, lines)
  files.replace(path.with_suffix('.json'), json.dumps(files.sealed(made), indent=1) + '\n')
  print(
    f'wrote {path}, {len(texts)} lines of {options.count * len(repeats)} secrets out of '
    f'2^{math.log2(space.size):.1f}, and {path.with_suffix(".json")}, which tells them: do not '
    'train on that one.\nPut the lines among the files of a source (as a source of their own they '
    'are read as often as its weight says), and hold out other sources (data.validation; a share '
    'would hold out some of them). Cleaning takes repeats for duplicates, and numbers for personal '
    'data; train with\n  --config.data.clean.exact_duplicates=False '
    "--config.data.clean.near_duplicates=0 '--config.data.clean.anonymise=()'"
  )


def read(path: pathlib.Path) -> tuple[Space, dict]:
  """Canaries by their file of JSON lines. Raises ValueError for another one."""
  place = path.with_suffix('.json')
  if not place.is_file():
    raise ValueError(
      f'{place} is not there, which tells the secrets of {path}; write both by evaluate.py canaries'
    )
  made = files.json_object(place.read_bytes(), place)
  made = files.unsealed(made, place, 'write the canaries anew, and train on them')
  if missing := {'template', 'alphabet', 'length', 'seed', 'canaries'} - made.keys():
    raise ValueError(f'{place} has no {", ".join(sorted(missing))}: it does not tell canaries')
  if not any(canary['repeats'] == 0 for canary in made['canaries']):
    raise ValueError(f'{place} has no canaries that were kept out: exposure needs that control')
  return Space(made['template'], made['alphabet'], made['length']), made


def ask(options) -> None:
  """Says what a run knows of canaries, and writes it."""
  if options.candidates < 1:
    raise ValueError(f'--candidates={options.candidates} must be at least 1')
  space, made = read(pathlib.Path(options.file))
  output = pathlib.Path(options.output or pathlib.Path(options.workdir) / 'evaluation')
  if pathlib.Path(options.file).with_suffix('.json').resolve() == (output / FILE).resolve():
    raise ValueError(f'{output}/{FILE} tells the secrets, and would be lost; give another --output')
  run = Generator.told(options.workdir, options.checkpoint)
  check_own(output / FILE, {'run': run})
  model = Generator.load(options.workdir, options.checkpoint, mesh_of(options.mesh))
  canaries = made['canaries']
  secrets = [canary['secret'] for canary in canaries]
  found = exposures(model, space, secrets, options.candidates, options.seed)
  content = report(run, options.seed, space, canaries, found)
  output.mkdir(parents=True, exist_ok=True)
  with alone_in(output):
    files.replace(output / FILE, json.dumps(content, indent=1) + '\n')
    files.replace(output / PAGE, '\n\n'.join(text_of(content)) + '\n')
  print('\n'.join(text_of(content)[1:]))
  print(f'\nwrote {output}/{FILE} and {PAGE}')


def report(
  run: Mapping, seed: int, space: Space, canaries: Sequence[dict], found: Sequence[Exposure]
) -> dict:
  """All that is said, JSON-able; run: of which model."""
  secrets = json.dumps([canary['secret'] for canary in canaries]).encode()
  rows = [
    canary
    | {'exposure': each.bits, 'interval': finite(each.interval), 'above': each.above}
    | {'p': each.p}
    for canary, each in zip(canaries, found, strict=True)
  ]
  return {
    'run': dict(run),
    'prompts': hashlib.blake2b(secrets, digest_size=16).hexdigest(),
    'seed': seed,
    'space': dataclasses.asdict(space) | {'bits': math.log2(space.size)},
    'candidates': found[0].n,
    'exact': found[0].exact,
    'most': math.log2(found[0].n + 1),
    'chance': CHANCE,
    'exposure': {n: of.values() for n, of in findings(canaries, found, seed).items()},
    'canaries': rows,
  }


def text_of(content: dict) -> list[str]:
  """Paragraphs of Markdown."""
  bound = f'{content["candidates"]} others of 2^{content["space"]["bits"]:.1f}'
  most = f'no exposure above {content["most"]:.1f} bits can be shown'
  rows = []
  for n, each in content['exposure'].items():
    of = [canary for canary in content['canaries'] if canary['repeats'] == int(n)]
    first = sum(canary['above'] == 0 for canary in of)
    most_shown = ', the most that can be shown' if first == len(of) else ''
    few = ' (few)' if each['small'] else ''
    value = f'{each["value"]:.2f} [{each["low"]:.2f}, {each["high"]:.2f}]{few}{most_shown}'
    rows.append([TIMES.get(int(n), f'{n} times'), len(of), value, first])
  parts = [
    f'# Canaries in {content["run"]["workdir"]}',
    f'Of checkpoint {content["run"]["step"]}. Secrets among {bound}'
    + ('' if content['exact'] else f': {most}')
    + '. '
    f'Without memory {content["chance"]:.2f} bits on average. Seed {content["seed"]}, digest of '
    f'the secrets `{content["prompts"]}`.',
    page.table(['in training', 'secrets', 'exposure, bits', 'likeliest of all'], rows),
  ]
  return [*parts, _memorised({int(n): each for n, each in content['exposure'].items()})]


def _memorised(exposure: Mapping[int, Mapping]) -> str:
  """A sentence on exposures by how often secrets were in the training text: of each count whether
  it is beyond what was kept out, for more often need not be more.
  """
  kept_out = exposure[0]
  is_seen = {n: of['low'] > kept_out['high'] for n, of in sorted(exposure.items()) if n}
  seen, others = (
    ' and '.join(TIMES.get(n, f'{n} times') for n, is_it in is_seen.items() if is_it == wanted)
    for wanted in (True, False)
  )
  if not seen:
    return 'No more exposed than what was kept out.'
  said = f'**Memorised**: what was {seen} in the training text is exposed beyond what was kept out'
  return f'{said}; what was {others} is not shown to be.' if others else f'{said}.'
