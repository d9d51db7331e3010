"""What does the site have that no page under docs/ says itself? Tables that are read from the code
as the site is built, and the pages of other rooms. mkdocs calls the functions `on_*` (mkdocs.yml).
"""

import os
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from training import reference
from workdir import metrics

# Pages and files of other rooms, which the site has under their own names.
OTHERS = (
  'benchmarks/README.md',
  'kernels/README.md',
  'launch/README.md',
  'notebooks/flan_t5_exercise.ipynb',
  'notebooks/generate.ipynb',
)
COMMANDS = ('train.py', 'generate.py', 'evaluate.py', 'plan.py')
# Those that take arguments: what each is asked with beside --help.
OTHER_COMMANDS = {
  'serve.py': ('',),
  'evaluate.py': (
    'compare',
    'rate',
    'bias',
    'safety',
    'contamination',
    'memorisation',
    'canaries',
    'knowledge',
    'card',
  ),
  'convert.py': (
    '',
    'import',
    'export',
    'inspect',
    'merge',
    'rebase',
    'quantise',
    'prune',
    'judge',
    'seal',
  ),
}
MARK = re.compile(r'<!-- generated: (\w+)[^>]*-->')


def on_files(files, config):
  """Adds the pages of other rooms."""
  for name in OTHERS:
    files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
  return files


def on_page_markdown(markdown, page, config, files):
  """Links between rooms become links within the site; marks become tables."""
  inside = page.file.src_uri in OTHERS
  markdown = re.sub(
    r'\]\(\.\./docs/' if inside else r'\]\(\.\./', '](../' if inside else '](', markdown
  )
  return MARK.sub(lambda mark: TABLES[mark[1]](), markdown)


def flags() -> str:
  """The flags of the commands that have a config, and the arguments of the others."""
  parts = []
  for command in COMMANDS:
    parts += [f'## {command}', _table(('flag', 'type', 'default', ''), _flags(command))]
  for command, name in ((c, name) for c, names in OTHER_COMMANDS.items() for name in names):
    said = _run(command, *filter(None, [name]), '--help')
    parts += [f'## {command} {name}'.rstrip(), f'```text\n{said.strip()}\n```']
  return '\n\n'.join(parts)


def _flags(command: str):
  """(flag, type, default, meaning) of those that a command, or what it shares, defines itself."""
  said = _run(command, '--helpxml')
  for flag in ElementTree.fromstring(said[said.index('<?xml') :]).iter('flag'):
    name, kind, default, meaning = (
      flag.findtext(x) for x in ('name', 'type', 'default', 'meaning')
    )
    # Others are absl's own, and those of train.py that plan.py refuses.
    if flag.findtext('file') in (command, 'training.overrides'):
      yield f'`--{name}`', kind, f'`{default}`' if default else '', meaning


def _run(*command: str) -> str:
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'COLUMNS': '100'}
  done = subprocess.run(
    [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
  )
  if not done.stdout:
    raise RuntimeError(f'{" ".join(command)} printed nothing: {done.stderr}')
  return done.stdout


def fields() -> str:
  """All fields of a config, by section, as --config.help has them."""
  sections = {}
  for field in reference.fields():
    head, _, name = field.path.rpartition('.')
    row = (f'`{name}`', field.type, f'`{field.default}`', field.meaning)
    sections.setdefault(head, []).append(row)
  return '\n\n'.join(
    f'## config{"." * bool(head)}{head}\n\n{_table(("field", "type", "default", ""), rows)}'
    for head, rows in sections.items()
  )


def keys() -> str:
  """What a line of metrics.jsonl may hold."""
  rows = [(f'`{key}`', unit, meaning) for key, (unit, meaning) in metrics.KEYS.items()]
  return _table(('key', 'unit', 'meaning'), rows)


def _table(headers, rows) -> str:
  def line(cells):
    # A pipe ends a cell, and what looks like a tag is one.
    cells = [' '.join(str(cell).split()).replace('|', '\\|').replace('<', '&lt;') for cell in cells]
    return f'| {" | ".join(cells)} |'

  return '\n'.join([line(headers), line(['---'] * len(headers)), *map(line, rows)])


TABLES = {'flags': flags, 'fields': fields, 'keys': keys}
