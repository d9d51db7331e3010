"""What does a person see of a report of bias, of safety, or of contamination? A page beside its
JSON, of the same values, and a picture of findings.
"""

from collections.abc import Mapping

from evaluation.intervals_picture import picture
from evaluation.page import fenced, table
from evaluation.running import finite, shown

HEADERS = ('of', 'what', 'n', '95% interval', 'p (Holm)')
ABOUT = ('prompts', 'run', 'judge', 'seed')
NATS = 'nats'
FOUND = 2  # questions of a task that were found in text


def findings_picture(title: str, said: Mapping[str, Mapping]) -> bytes:
  """A PNG of findings of reports, by name; those in nats have a panel of their own."""
  panels: dict[str, list] = {}
  for name, of in said.items():
    for each in finite(of['findings']):
      unit = NATS if each['what'].startswith(NATS) else 'shares, and differences of shares'
      panels.setdefault(f'{name}: {unit}', []).append((f'{each["category"]}: {each["what"]}', each))
  return picture(panels, title)


def findings_page(title: str, said: Mapping[str, Mapping], drawn: str) -> str:
  """Markdown of reports of results, by name: `findings`, what they are of, and, where there are
  such, what was left out, sentences, and what two judges say otherwise. drawn: the picture's file.
  """
  parts = [f'# {title}', 'Intervals are of 95%. They are of these prompts and this model.']
  parts.append(f'![{title}]({drawn})')
  for name, of in finite(said).items():
    about = [f'{key}: {of[key]}' for key in ABOUT if of.get(key) not in (None, '', {})]
    rows = [
      [f['category'], f['what'], f['n'], shown(f), '' if f['p'] is None else f'{f["p"]:.3g}']
      for f in of['findings']
    ]
    parts += [f'## {name}', '\n'.join(f'- {line}' for line in about), table(HEADERS, rows)]
    left_out = of.get('left out') or {}
    counts = left_out if isinstance(left_out, Mapping) else {'not told by their rows': left_out}
    parts += [f'- left out, {why}: {count}' for why, count in counts.items() if count]
    if apart := of.get('disagreement'):
      kappa = shown(apart['kappa']) if apart['kappa'] else 'undefined'
      parts.append(f"Two judges say otherwise of {shown(apart['of'])}; Cohen's kappa {kappa}.")
    for category, lines in of.get('sentences', {}).items():
      if lines:
        parts += [f'{category}:', fenced(*lines)]
  return '\n\n'.join(filter(None, parts)) + '\n'


def contamination_page(said: Mapping) -> str:
  """Markdown of contamination.json."""
  said, rows, parts = finite(said), [], []
  for each in said['tasks']:
    scores = [
      shown(each['scores'][of]) if of in each['scores'] else '' for of in ('found', 'others')
    ]
    share = each['share']
    row = [each['task'], share['n'], shown(share), each['short'], each['metric'], *scores]
    rows.append([*row, f'`{each["prompts"]}`'])
    first = [*each['found'].items()][:FOUND]
    if first:
      parts += [f'{each["task"]}, question {i}:\n\n{fenced(run)}' for i, run in first]
  headers = ['task', 'questions', 'share found', 'too short', 'metric', 'of found', 'of others']
  about = f'Runs of {said["words"]} words in {", ".join(said["training"])}. Intervals are of 95%.'
  whole = table([*headers, 'digest of the prompts'], rows)
  return '\n\n'.join(['# What had been read before', about, whole, *parts]) + '\n'
