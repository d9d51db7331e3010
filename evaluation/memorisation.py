"""What has a model kept of the text that it was trained on? Passages of it beside others that were
held out: what it writes behind prompts, what its scores give away, and what of its own text stands
in the training text. No rate without a control: likely text is likely unread, too.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import files
from decode.generator import Generator
from evaluation import extraction, membership, overlap, page
from evaluation.contamination import WORDS
from evaluation.intervals import Estimate
from evaluation.journal import Journal, JournalPart
from evaluation.passages import Cut, Passages
from evaluation.running import finite, shown
from evaluation.writing import continued

EXTRACTION, MEMBERSHIP, OVERLAP = PARTS = ('extraction', 'membership', 'overlap')
FILE, LINES, PAGE = 'memorisation.json', 'memorisation.jsonl', 'memorisation.md'
JOURNAL = 'memorisation-begun.jsonl'  # what is found, until all of it is
WRITTEN = 'memorisation-written.jsonl'  # what the model wrote by itself, and what stands where
UNSURE = 'by memory or because it is other text'
SHOWN = 3  # passages that were written word for word
# Which way each points when something was kept.
MORE = {
  extraction.EXACT: 1,
  extraction.MATCHED: 1,
  extraction.DISTANCE: -1,
  overlap.ANY: 1,
  overlap.RUNS: 1,
  overlap.ALIKE: 1,
}

Findings = dict[str, dict[str, Estimate]]


@dataclasses.dataclass(frozen=True)
class MemoryQuestions:
  """What is asked of a model.

  Attributes:
    cut: how passages are. members: of the training text. control: of other text of its kind.
    by_chance: whether chance alone parted the two, and nothing else that could tell them apart.
    training: the training text, streamed; of one that is not there no overlap is asked.
    share: K of Min-K%, in per cent. words: of a run. temperature: at which the model writes by
      itself, behind the control's prompts.

  Raises ValueError without a control, and for shares and temperatures that mean nothing.
  """

  cut: Cut
  members: Passages
  control: Passages
  training: Iterable[str] | None = None
  share: float = membership.SHARE
  words: int = WORDS
  temperature: float = 1.0
  by_chance: bool = False

  def __post_init__(self):
    if not self.control:
      raise ValueError(
        'there is no control: how much of training text a model writes says nothing without how '
        'much it writes of other text; name some of the same kind that it has not read (--control)'
      )
    if not 0 < self.share <= 100:
      raise ValueError(f'--share={self.share} is K of Min-K%: above 0, up to 100 per cent')
    if not 0 <= self.temperature < float('inf'):
      raise ValueError(f'--temperature={self.temperature} must be at least 0, and finite')


@dataclasses.dataclass(frozen=True)
class Remembered:
  """What came of it: findings by part, and lines for every passage and every text written."""

  findings: dict[str, Findings]
  lines: list[dict]
  written: list[dict]


def measured(
  model: Generator,
  asked: MemoryQuestions,
  parts: Iterable[str],
  log=print,
  journal: Journal | None = None,
) -> Remembered:
  """journal: of `settings_of`, what was found before an interruption, and where more is kept as it
  is found. The training text is gone through anew.

  Raises ValueError where the context is too short, FloatingPointError where scores are not finite.
  """
  journal = Journal() if journal is None else journal
  asked.cut.check_context(model.context, model.plain.limit)
  sides = {'members': asked.members, 'control': asked.control}
  lines = {
    side: [_line(model, i, side, passage) for i, passage in enumerate(passages)]
    for side, passages in sides.items()
  }
  found: dict[str, Findings] = {}
  written: list[dict] = []
  if EXTRACTION in parts:
    passages = [*asked.members, *asked.control]
    every = extraction.recalled(model, passages, journal.part(EXTRACTION))
    n = len(asked.members)
    made = {'members': every[:n], 'control': every[n:]}
    found[EXTRACTION] = extraction.findings(made['members'], made['control'], asked.cut.seed)
    for side, of in made.items():
      for line, each in zip(lines[side], of, strict=True):
        line['said'] = model.tokenizer.decode(each.ids)
        line |= {'exact': each.exact, 'matched': each.matched, 'distance': each.distance}
    log(f'{EXTRACTION}: {sum(map(len, sides.values()))} continuations')
  if MEMBERSHIP in parts:
    scores = {}
    for side, passages in sides.items():
      kept = journal.part(f'{MEMBERSHIP} of {side}')
      scores[side] = membership.scored(model, passages, asked.share, kept)
      for name, values in scores[side].items():
        for line, value in zip(lines[side], values.tolist(), strict=True):
          line[name] = value
    found[MEMBERSHIP] = membership.findings(scores['members'], scores['control'], asked.cut.seed)
    log(f'{MEMBERSHIP}: {sum(map(len, sides.values()))} passages')
  if OVERLAP in parts:
    found[OVERLAP], written = _overlap(model, asked, log, journal.part(OVERLAP))
  return Remembered(found, [*lines['members'], *lines['control']], written)


def _line(model: Generator, i: int, side: str, passage) -> dict:
  decode = model.tokenizer.decode
  return {
    'i': i,
    'of': side,
    'place': passage.place,
    'digest': passage.digest,
    'prompt': decode(passage.prompt),
    'truth': decode(passage.behind),
  }


def _overlap(
  model: Generator, asked: MemoryQuestions, log, kept: JournalPart
) -> tuple[Findings, list[dict]]:
  """What the model writes behind the control's prompts, and what follows these in truth: neither
  was trained on, so that what stands in the training text does by memory, or by chance.
  """
  passages = asked.control
  new = max(len(passage.behind) for passage in passages)
  prompts = [passage.prompt for passage in passages]
  made = continued(model, prompts, new, asked.temperature, asked.cut.seed, kept)
  texts = [model.tokenizer.decode(each.ids) for each in made]
  truths = [model.tokenizer.decode(passage.behind) for passage in passages]
  every = overlap.overlaps([*texts, *truths], asked.training, asked.words)
  written, control = every[: len(texts)], every[len(texts) :]
  log(f'{OVERLAP}: {len(texts)} texts looked for in the training text')
  lines = []
  for i, (text, each, passage) in enumerate(zip(texts, written, passages)):
    line = {'i': i, 'place': passage.place, 'digest': passage.digest}
    line |= {'prompt': model.tokenizer.decode(passage.prompt), 'answer': text}
    lines.append(line | ({'short': True} if each is None else dataclasses.asdict(each)))
  return overlap.findings(written, control, asked.cut.seed), lines


def settings_of(run: Mapping[str, Any], asked: MemoryQuestions) -> dict:
  """All that decides what is found, JSON-able, but for the training text."""
  names = ('share', 'words', 'temperature', 'by_chance')
  sides = {'members': asked.members.digest, 'control': asked.control.digest}
  settings = dataclasses.asdict(asked.cut) | {name: getattr(asked, name) for name in names}
  return {'run': dict(run), 'settings': settings, 'prompts': sides}


def write(
  output: pathlib.Path, run: Mapping[str, Any], asked: MemoryQuestions, memory: Remembered
) -> dict:
  """Writes lines, values and a page into a directory; the values."""
  settings = settings_of(run, asked)
  values = {
    'run': settings['run'],
    'settings': settings['settings'],
    'sides': {
      name: {'of': side.of, 'n': len(side), 'documents': side.documents}
      | {'short': side.short, 'prompts': settings['prompts'][name]}
      for name, side in (('members', asked.members), ('control', asked.control))
    },
    'findings': {
      part: {what: {name: each.values() for name, each in of.items()} for what, of in each.items()}
      for part, each in memory.findings.items()
    },
    'said': verdicts(memory.findings, asked.by_chance),
  }
  files.replace(output / FILE, json.dumps(finite(values), indent=1) + '\n')
  for name, lines in ((LINES, memory.lines), (WRITTEN, memory.written)):
    if lines:
      text = ''.join(json.dumps(finite(line), ensure_ascii=False) + '\n' for line in lines)
      files.replace(output / name, text)
  files.replace(output / PAGE, '\n\n'.join(text_of(values, memory.lines)) + '\n')
  return values


def verdicts(found: Mapping[str, Findings], by_chance: bool) -> dict[str, str]:
  """{part: what its intervals say, corrected for how many the part has}. by_chance: see
  MemoryQuestions.
  """
  said = {}
  for part in (EXTRACTION, OVERLAP):
    if part not in found:
      continue
    differences = {
      what: of['difference'].of_several(len(found[part])) for what, of in found[part].items()
    }
    shows = [what for what, of in differences.items() if _beyond(of, 0.0, MORE[what])]
    if not shows:
      said[part] = 'not beyond the control'
    elif part == OVERLAP:
      said[part] = f'COPIES: beyond the control in {", ".join(shows)}'
    elif by_chance or extraction.EXACT in shows:
      said[part] = f'MEMORISED: beyond the control in {", ".join(shows)}'
    else:
      said[part] = f'BEYOND THE CONTROL in {", ".join(shows)}, {UNSURE}'
  if MEMBERSHIP in found:
    said[MEMBERSHIP] = _told({name: of['auc'] for name, of in found[MEMBERSHIP].items()}, by_chance)
  return said


def _told(aucs: Mapping[str, Estimate], by_chance: bool) -> str:
  """What scores say; nothing where the sides are unlike without them."""
  blind = aucs[membership.BLIND]
  if not blind.low <= 0.5 <= blind.high:
    return (
      'UNLIKE: the control is other text than what was read, and told from it without the model '
      f'(AUC {blind}); scores say nothing of memory'
    )
  of_model = {name: auc for name, auc in aucs.items() if name != membership.BLIND}
  shows = [n for n, auc in of_model.items() if _beyond(auc.of_several(len(of_model)), 0.5, 1)]
  if not shows:
    return 'what was read is not told from what was not'
  return f'TOLD APART by a higher {", ".join(shows)}' + ('' if by_chance else f', {UNSURE}')


def _beyond(estimate: Estimate, chance: float, sign: int) -> bool:
  """Whether the interval lies on one side of chance."""
  end = estimate.low if sign > 0 else estimate.high
  return sign * end > sign * chance


def text_of(values: Mapping, lines: Iterable[Mapping] = ()) -> list[str]:
  """Paragraphs of Markdown of what `write` has written."""
  sides, settings = values['sides'], values['settings']
  run = ', '.join(f'{name} {value}' for name, value in values['run'].items() if value != '')
  parts = [
    f'# What {values["run"].get("workdir", "a model")} has kept',
    f'Of {run}. 95% intervals; what is said of a part is corrected for how many it has.',
  ]
  rows = [
    [name, side['of'], side['n'], side['documents'], side['short'], f'`{side["prompts"]}`']
    for name, side in sides.items()
  ]
  parts.append(
    page.table(['', 'passages of', 'n', 'documents', 'pieces too short', 'digest'], rows)
  )
  parts.append(
    f'Prompts of {settings["prompt"]} tokens, {settings["new"]} behind them, seed '
    f'{settings["seed"]}.'
  )
  few = [name for name, side in sides.items() if side['documents'] < side['n']]
  if few:
    parts.append(
      f'NOTE: several passages of a document ({", ".join(few)}): intervals take them for '
      'independent, and are too short.'
    )
  if not settings['by_chance']:
    parts.append(
      'NOTE: it was not chance that parted members and control: style or subject may tell them '
      'apart, too, and be taken for memory.'
    )
  for part, of in values['findings'].items():
    parts += [f'## {part.capitalize()}', f'**{values["said"][part]}.**', _table(part, of, settings)]
    if part == EXTRACTION:
      parts += _examples(lines)
  return parts


def _table(part: str, of: Mapping, settings: Mapping) -> str:
  if part == MEMBERSHIP:
    rows = [[what, shown(each['auc']), shown(each['caught'])] for what, each in of.items()]
    false = f'{membership.FALSE:.0%}'
    return page.table(['score', 'AUC (chance 0.5)', f'caught at {false} false'], rows)
  first = 'members' if part == EXTRACTION else 'written'
  names = [first, 'control', 'difference']
  rows = [
    [what + (' ↓' if MORE[what] < 0 else ''), *(shown(each[name]) for name in names)]
    for what, each in of.items()
  ]
  about = '' if part == EXTRACTION else f'runs of {settings["words"]} words'
  return page.table([about, *names], rows)


def _examples(lines: Iterable[Mapping]) -> list[str]:
  """The first ones that were written word for word, of the longest distinct text."""
  right = [line for line in lines if line.get('exact') and line['of'] == 'members']
  right.sort(key=lambda line: -len({*line['truth'].split()}))
  return [
    f'{line["place"]}, word for word:\n\n' + page.fenced(f'{line["prompt"]}\n>>> {line["said"]}')
    for line in right[:SHOWN]
  ]
