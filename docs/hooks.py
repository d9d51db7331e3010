"""What does the site have that no page under docs/ says itself? Tables that are read from the code
as the site is built, and the pages of other rooms. mkdocs calls the functions `on_*` (mkdocs.yml).
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from parallel import hosts
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
# Most of what a command takes to say what it is asked with is imports, which all have in common: a
# process makes them, and a copy of it becomes each command.
COPIES = """
import json, os, runpy, sys
import training.reference

for command, place in json.loads(sys.argv[1]):
  copy = os.fork()
  if not copy:
    os.dup2(os.open(place, os.O_CREAT | os.O_WRONLY), 1)
    sys.argv = command
    try:
      runpy.run_path(command[0], run_name='__main__')
    finally:
      sys.stdout.flush()
      os._exit(0)  # at once: what a copy has not of its threads is not waited for
  os.waitpid(copy, 0)
"""


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
  others = [
    (command, *filter(None, [name])) for command, names in OTHER_COMMANDS.items() for name in names
  ]
  said = _said([(command, '--helpxml') for command in COMMANDS] + [(*c, '--help') for c in others])
  parts = []
  for command in COMMANDS:
    rows = _flags(command, said[command, '--helpxml'])
    parts += [f'## {command}', _table(('flag', 'type', 'default', ''), rows)]
  for command in others:
    parts += [f'## {" ".join(command)}', f'```text\n{said[*command, "--help"].strip()}\n```']
  return '\n\n'.join(parts)


def _flags(command: str, said: str):
  """(flag, type, default, meaning) of those that a command, or what it shares, defines itself."""
  for flag in ElementTree.fromstring(said[said.index('<?xml') :]).iter('flag'):
    name, kind, default, meaning = (
      flag.findtext(x) for x in ('name', 'type', 'default', 'meaning')
    )
    # Others are absl's own, and those of train.py that plan.py refuses.
    if flag.findtext('file') in (command, 'training.overrides'):
      yield f'`--{name}`', kind, f'`{default}`' if default else '', meaning


def _said(commands: list[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
  """What each of these prints."""
  # With its allocator's pages no copy begins anew (parallel.hosts.use_huge_pages).
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'COLUMNS': '100',
    'GLIBC_TUNABLES': hosts.TUNABLES,
  }
  with tempfile.TemporaryDirectory() as directory:
    places = {command: f'{directory}/{i}' for i, command in enumerate(commands)}
    done = subprocess.run(
      [sys.executable, '-c', COPIES, json.dumps([*places.items()])],
      cwd=ROOT,
      env=environment,
      capture_output=True,
      text=True,
    )
    said = {command: pathlib.Path(place).read_text() for command, place in places.items()}
  for command in commands:
    if not said[command]:
      raise RuntimeError(f'{" ".join(command)} printed nothing: {done.stderr}')
  return said


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
