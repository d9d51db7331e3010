"""What is to be told of a model to whoever uses it? A model card (Mitchell et al.,
arXiv:1810.03993) as Hugging Face reads it: blocks that are written anew from what a run's directory
holds, and all else a person's, which stays.

A block's mark has a digest of what was written: one that was changed by hand is not written over.
"""

import hashlib
import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import files
from evaluation import canaries, contamination, harness_results, knowledge, memorisation, page
from evaluation.bias import FILE as BIAS
from evaluation.running import Summary, shown
from evaluation.safety import FILE as SAFETY

FILE = 'MODEL_CARD.md'
FRONT = 'front matter'
ROWS = 30  # of a table, at most
FILL = '*To be filled.*'
# The sections in their order: a block that is written, or what a person is asked to fill.
SECTIONS = (
  ('', FILL + ' What this model is, in a sentence, and who made it.'),
  (
    'Intended use',
    FILL + ' What it is for, and who is meant to use it.\n\n'
    '**Out of scope.** ' + FILL + ' What it must not be used for.',
  ),
  ('Model', 'model'),
  ('Training data', 'data'),
  ('Training', 'training'),
  ('Scores', 'scores'),
  ('Bias', 'bias'),
  ('Safety', 'safety'),
  ('Memorisation', 'memorisation'),
  ('Contamination', 'contamination'),
  ('Knowledge by date', 'knowledge'),
  ('Energy and carbon', 'energy'),
  ('Limitations', FILL + ' Where it fails, and for whom.'),
  (
    'Licence',
    FILL + ' Of the weights; of every source of the training data, and whether it lets a model be '
    'trained and passed on; `license` above, as Hugging Face names it.',
  ),
  ('Contact', FILL),
)
BLOCKS = (FRONT, *(text for _, text in SECTIONS if text.isidentifier()))
PERSONAL = """# To be filled; take the # off where it is known:
# license: apache-2.0
# language: en
# datasets: []
"""
_BEGIN = re.compile(r'^(<!-- |# )begin (.+) ([0-9a-f]{12}):.*$', re.MULTILINE)


def written(name: str, blocks: Mapping[str, str]) -> str:
  """A new card of a model of this name; blocks: of BLOCKS."""
  parts = [f'---\n{_marked(FRONT, blocks[FRONT])}\n{PERSONAL}---', f'# {name}']
  for title, text in SECTIONS:
    if title:
      parts.append(f'## {title}')
    parts.append(_marked(text, blocks[text]) if text in BLOCKS else text)
  return '\n\n'.join(parts) + '\n'


def rewritten(text: str, blocks: Mapping[str, str], place: str) -> tuple[str, list[str]]:
  """(The card with its blocks written anew and all else as it is, blocks that it has no more).

  Raises ValueError for a text that is no such card, and for a block that was changed by hand.
  """
  parts, at, met = [], 0, set()
  for begin in _BEGIN.finditer(text):
    opening, name, digest = begin.groups()
    if name not in BLOCKS or begin.start() < at:
      continue
    close = f'{opening}end {name}' + (' -->' if opening.startswith('<') else '')
    end = re.compile(f'^{re.escape(close)}[ \t]*$', re.MULTILINE).search(text, begin.end())
    if end is None:
      raise ValueError(f'{place}: the block {name!r} has no end; bring back the line {close!r}')
    if _digest(text[begin.end() : end.start()]) != digest:
      raise ValueError(
        f'{place}: the block {name!r} was changed by hand, and would be lost; put the words below '
        'its end, where they stay, and remove the block with its two marks'
      )
    parts += [text[at : begin.start()], _marked(name, blocks[name])]
    at = end.end()
    met.add(name)
  if not met:
    raise ValueError(
      f'{place} is a card that this has not written, and would be lost; move it, or give another '
      '--output'
    )
  return ''.join([*parts, text[at:]]), [name for name in BLOCKS if name not in met]


def _marked(name: str, text: str) -> str:
  """A block in its marks: comments of YAML in front, of Markdown elsewhere."""
  text = text.strip('\n')
  said = 'written by evaluate.py card; your own words go below the end'
  if name == FRONT:
    return f'# begin {name} {_digest(text)}: {said}\n{text}\n# end {name}'
  # What a model said may hold anything, and is not to end a block.
  text = text.replace('<!--', '&lt;!--')
  return f'<!-- begin {name} {_digest(text)}: {said} -->\n{text}\n<!-- end {name} -->'


def _digest(text: str) -> str:
  """Whatever an editor does at the ends of lines."""
  lines = '\n'.join(line.rstrip() for line in text.strip().splitlines())
  return hashlib.blake2b(lines.encode(), digest_size=6).hexdigest()


# What is written of results.


def front(
  name: str, summaries: Iterable[tuple[pathlib.Path, Summary]], emissions: Mapping | None = None
) -> str:
  """YAML that Hugging Face reads: scores as it lists them, with what they are of; emissions: as it
  has them, where they are known.
  """
  results = [
    {
      'task': {'type': 'text-generation', 'name': summary.name},
      'dataset': {'type': summary.task, 'name': ', '.join(filter(None, _asked(summary)))},
      'metrics': [
        {
          'type': re.sub(r'\W+', '_', metric).strip('_'),
          'name': metric,
          'value': of['value'],
          'args': {'n': of['n'], 'low': of['low'], 'high': of['high'], 'prompts': summary.prompts},
        }
        for metric, of in summary.metrics.items()
        if all(_finite(of[key]) for key in ('value', 'low', 'high'))
      ],
    }
    for _, summary in summaries
  ]
  results = [result for result in results if result['metrics']]
  lines = ['library_name: tandem', 'pipeline_tag: text-generation']
  # JSON is YAML, and cannot be misread for what it is not.
  if emissions:
    lines.append(f'co2_eq_emissions: {json.dumps(emissions)}')
  if results:
    index = [{'name': name, 'results': results}]
    lines.append(f'model-index: {json.dumps(index, indent=1, ensure_ascii=True)}')
  return '\n'.join(lines)


def _asked(summary: Summary) -> list[str]:
  return [summary.task, f'{summary.shots} shots', _chat(summary)]


def _chat(summary: Summary) -> str:
  return 'chat' if summary.settings.get('chat') else ''


def _finite(value) -> bool:
  return isinstance(value, int | float) and math.isfinite(value)


def is_of(run: Mapping, digest: str) -> bool:
  """Whether what was evaluated (`run` of results) is the checkpoint of this digest, in its own
  weights. Of results from before digests were told it is not known.
  """
  return run.get('digest') == digest and not run.get('weights')


def scores(
  found: Sequence[tuple[pathlib.Path, Summary]], others: Iterable[str], step, digest: str
) -> str:
  """A table of all, with the checkpoint that each is of; others: paragraphs of other results.

  step, digest: of the last checkpoint, which is the model that the card is of.
  """
  rows = []
  for place, summary in found:
    run = summary.settings['run']
    of = run.get('step') if run.get('digest') == digest else _checkpoint(run)
    asked = ', '.join(filter(None, [run.get('weights'), _chat(summary)]))
    for name, metric in summary.metrics.items():
      lower = ' ↓' if metric['lower_is_better'] else ''
      row = [summary.task, summary.shots, name + lower, shown(metric), metric['n']]
      chance = f'{summary.chance_of(name):.3g}' if summary.chance_of(name) else ''
      rows.append([*row, chance, of, asked, place.name, f'`{summary.prompts[:12]}`'])
  headers = ['task', 'shots', 'metric (↓ lower is better)', '95% interval', 'n', 'chance']
  parts = [page.table([*headers, 'step', 'asked with', 'in', 'prompts'], rows)] if rows else []
  stale = {row[6] for row in rows} - {step}
  if stale:
    said = ', '.join(sorted(map(str, stale)))
    parts.append(f'Of other checkpoints than the last, {step}, or of one that is not told: {said}.')
  parts += others
  return '\n\n'.join(parts) or not_yet('python evaluate.py --workdir=RUN --tasks=..')


def harness(of: Mapping, place: str, about: str) -> str:
  """Of lm_eval.json in a directory; about: of which model."""
  rows = harness_results.rows(of)
  told = [[*row, f'`{of["tasks"].get(row[0], {}).get("prompts", "")[:12]}`'] for row in rows[:ROWS]]
  headers = ['task', 'metric', '95% interval', 'n', 'prompts']
  parts = [f'Of the lm-evaluation-harness {of["lm_eval"]} ({about}), `{place}`:']
  parts.append(page.table(headers, told))
  if len(rows) > ROWS:
    parts.append(f'And {len(rows) - ROWS} more.')
  failed = [f'{name} failed: {why}' for name, why in of.get('failed', {}).items()]
  parts += ['\n'.join(f'- {note}' for note in (*harness_results.notes(of), *failed))]
  return '\n\n'.join(filter(None, parts))


def said_of(run: Mapping, step, digest: str) -> str:
  """Which checkpoint results are of; step, digest: of the last one."""
  if 'digest' not in run:
    return f'of a checkpoint that is not told, maybe not the last, {step}'
  if run['digest'] == digest:
    return f'checkpoint {step}' + (f' in {run["weights"]}' if run.get('weights') else '')
  return f'checkpoint {_checkpoint(run)}, not the last, {step}'


def _checkpoint(run: Mapping) -> str:
  weights = f' in {run["weights"]}' if run.get('weights') else ''
  return f'{run.get("step")} of `{run.get("workdir")}`{weights}'


def not_yet(command: str) -> str:
  """What stands for results that are not there."""
  return f'Not evaluated: `{command}`'


def findings(of: Mapping[str, Mapping], about: str) -> str:
  """Of bias.json or safety.json."""
  parts = [about]
  for name, each in of.items():
    rows = [
      [f['category'], f['what'], f['n'], shown(f), '' if f.get('p') is None else f'{f["p"]:.3g}']
      for f in each['findings']
    ]
    of_run = f', checkpoint {_checkpoint(each["run"])}' if each.get('run') else ''
    parts.append(f'{name}, prompts `{each["prompts"]}`{of_run}:')
    parts.append(page.table(['', '', 'n', '95% interval', 'p (Holm)'], rows[:ROWS]))
    if len(rows) > ROWS:
      parts.append(f'And {len(rows) - ROWS} more.')
  return '\n\n'.join(parts)


def contaminated(of: Mapping) -> str:
  """Of contamination.json."""
  rows = [
    [
      each['task'],
      each['share']['n'],
      shown(each['share']),
      *(shown(each['scores'][w]) if w in each['scores'] else '' for w in ('found', 'others')),
      each['metric'],
    ]
    for each in of['tasks']
  ]
  about = (
    f'Questions of which a run of {of["words"]} words stands in {", ".join(of["training"])}, and '
    'scores of these and of the others:'
  )
  headers = ['task', 'n', 'share found', 'score of found', 'of others', 'metric']
  return f'{about}\n\n{page.table(headers, rows)}'


def estimates(title: str, metrics: Mapping[str, Mapping], about: str) -> str:
  """Of results that have {metric: estimate}."""
  rows = [[name, shown(each), each['n']] for name, each in metrics.items()]
  return f'{title} ({about}):\n\n' + page.table(['', '95% interval', 'n'], rows)


READERS = {
  'bias': (
    BIAS,
    lambda of: findings(of, 'Of these sentences only, and no proof that the model is fair.'),
    'python evaluate.py bias RUN/evaluation',
  ),
  'safety': (
    SAFETY,
    lambda of: findings(of, 'Rates of these prompts; lower is better.'),
    'python evaluate.py safety RUN/evaluation',
  ),
  'memorisation': (
    memorisation.FILE,
    lambda of: _lowered(memorisation.text_of(of)[1:]),
    'python evaluate.py memorisation --workdir=RUN',
  ),
  'canaries': (
    canaries.FILE,
    lambda of: _lowered(['### Canaries', *canaries.text_of(of)[1:]]),
    'python evaluate.py canaries FILE --workdir=RUN',
  ),
  'contamination': (
    contamination.FILE,
    contaminated,
    'python evaluate.py contamination --tasks=.. --training=..',
  ),
  'knowledge': (
    knowledge.FILE,
    lambda of: _lowered([p for name, each in of.items() for p in knowledge.text_of(name, each)]),
    'python evaluate.py knowledge RUN/evaluation',
  ),
}


def of_results(
  block: str, places: Iterable[pathlib.Path], step: int | None = None, digest: str = ''
) -> str:
  """A block of the results of its kind in some directories; step, digest: of the last checkpoint,
  '' where there is none.
  """
  kinds = [block, 'canaries'] if block == 'memorisation' else [block]
  parts = []
  for kind in kinds:
    name, text, command = READERS[kind]
    found = [place / name for place in places if (place / name).is_file()]
    for path in found:
      content = files.json_object(path.read_bytes(), path)
      try:
        parts.append(text(content))
        parts += _stale(content, step, digest)
      except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
          f'{path} is not what {command.split()[2]} writes ({error!r}); write it anew'
        ) from error
    if not found and kind == block:
      parts.append(not_yet(command))
  return '\n\n'.join(parts)


def _stale(content: Mapping, step: int | None, digest: str) -> list[str]:
  """A sentence where results, or some of them, are of another checkpoint than the last."""
  each = [content, *(of for of in content.values() if isinstance(of, Mapping))]
  runs = [of['run'] for of in each if isinstance(of.get('run'), Mapping)]
  others = {_checkpoint(run) for run in runs if digest and run.get('digest') != digest}
  if not others:
    return []
  of_them = ', '.join(sorted(others))
  return [f'Of another checkpoint than the last, {step}, or of one that is not told: {of_them}.']


def _lowered(paragraphs: Iterable[str]) -> str:
  """Headings below those of the card."""
  return '\n\n'.join(re.sub(r'^##? ', '### ', paragraph) for paragraph in paragraphs)
