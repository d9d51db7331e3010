"""Which wheels does a machine with a GPU, and without a network, still need?

    python -m benchmarks.gpu_wheels [--held there.txt] [--with beartype,outlines-core,trl]
    python -m benchmarks.gpu_wheels --to wheels

The first lists them, the second downloads them by pip, for Linux on x86-64 and Python 3.12. There:

    python3 -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site python3 -m benchmarks.gpu_day --budget 540 --json day.json

What is needed is what setup.cfg requires, and of its extras what --with names, and what those
require in turn; without what the machine holds, and what those require, unless it is there in a
version that is not wanted. --held is names with commas between (by default jax, flax, optax and
orbax), or a file with all that `python3 -m pip list --format=freeze` prints there. Of what a
package requires its wheel speaks, once it is downloaded, and before that the one installed here;
where there is none here, the list says so.
"""

import collections
import configparser
import email
import importlib.metadata
import pathlib
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename

import commands
import names

ROOT = pathlib.Path(__file__).parents[1]
PYTHON = '3.12'
# What a requirement's marker is asked about there.
THERE = {
  'python_version': PYTHON,
  'python_full_version': f'{PYTHON}.3',
  'implementation_name': 'cpython',
  'platform_python_implementation': 'CPython',
  'os_name': 'posix',
  'sys_platform': 'linux',
  'platform_system': 'Linux',
  'platform_machine': 'x86_64',
}
HELD = 'jax==0.11.2,flax,optax,orbax-checkpoint'  # the machine of docs/measured.md
OPTIONAL = 'beartype,outlines-core'  # what tests/ check types with, and what a constraint needs
# pip takes a wheel of exactly these tags.
TAGS = [*(f'manylinux_2_{n}_x86_64' for n in range(39, 4, -1)), 'manylinux2014_x86_64']

# What a package requires, or None where that is not known.
Requires = Callable[[Requirement], list[str] | None]


def asked_for() -> tuple[list[str], dict[str, str]]:
  """What setup.cfg requires; and a requirement of each package of its extras, by name: the one with
  most to say, where several extras have it.
  """
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  lines = [parser['options']['install_requires'], *parser['options.extras_require'].values()]
  core, *extras = ([line.strip() for line in text.split('\n') if line.strip()] for text in lines)
  optional = {}
  for line in (line for extra in extras for line in extra):
    name = named(line)
    optional[name] = max(optional.get(name, ''), line, key=len)
  return core, optional


def named(line: str) -> str:
  return canonicalize_name(Requirement(line).name)


def wanted(more: str) -> list[str]:
  """Requirements of setup.cfg: its own, and those of packages of its extras that `more` names, with
  commas between.

  Raises ValueError for a name that no extra has.
  """
  core, optional = asked_for()
  chosen = [canonicalize_name(name) for name in more.split(',') if name]
  for name in chosen:
    names.check('package of an extra', name, optional)
  return core + [optional[name] for name in chosen]


def walk(
  roots: Iterable[str], requires: Requires, there: Mapping[str, Requirement] = {}
) -> tuple[dict[str, Requirement], list[str]]:
  """These requirements and what they require in turn there, by name, as they are met; and names of
  packages of which it is not known what they require.

  What several ask of a version is put together. What a machine holds (`there`, by name) is left
  out, and with it what only that requires, unless it is of a version that someone does not want.
  """
  met, unknown, served = {}, [], {}
  waiting = collections.deque((Requirement(root), ['']) for root in roots)
  while waiting:
    requirement, extras = waiting.popleft()
    marker, name = requirement.marker, canonicalize_name(requirement.name)
    if marker and not any(marker.evaluate(THERE | {'extra': extra}) for extra in extras):
      continue
    if name not in met and fits(there, requirement):
      # Heeded all the same where another one wants a newer one.
      served[name] = served.get(name, SpecifierSet()) & requirement.specifier
      continue
    requirement.marker = None
    requirement.specifier &= served.pop(name, SpecifierSet())
    before = met.setdefault(name, requirement)
    if before is not requirement:
      before.specifier &= requirement.specifier
      if requirement.extras <= before.extras:
        continue
      before.extras |= requirement.extras
    lines = requires(before)
    if lines is None:
      unknown.append(name)
    waiting += [(Requirement(line), ['', *before.extras]) for line in lines or ()]
  return met, unknown


def installed(requirement: Requirement) -> list[str] | None:
  """What the package that is installed here requires."""
  try:
    return importlib.metadata.requires(requirement.name) or []
  except importlib.metadata.PackageNotFoundError:
    return None


def holding(held: str) -> dict[str, Requirement]:
  """What the machine holds, by name: of a file what it lists, of names what those require, too."""
  path = pathlib.Path(held)
  if not path.is_file():
    return walk(filter(None, held.split(',')), installed)[0]
  # Of what was built from a directory of that machine (`name @ file:///...`) no version is said.
  lines = [line.split(' @ ')[0] for line in path.read_text().splitlines()]
  return walk([line for line in lines if line.strip() and line[0] not in '#-'], lambda _: [])[0]


def fits(there: Mapping[str, Requirement], asked: Requirement) -> bool:
  """Whether a machine holds what a requirement wants, as far as its version is said."""
  held = there.get(canonicalize_name(asked.name))
  if held is None:
    return False
  versions = [s.version for s in held.specifier if s.operator == '==' and '*' not in s.version]
  return all(asked.specifier.contains(version, prereleases=True) for version in versions)


def needed(held: str, more: str, requires: Requires = installed):
  """What the machine still needs: see `walk`."""
  return walk(wanted(more), requires, holding(held))


def wheels(to: pathlib.Path) -> dict[str, pathlib.Path]:
  """Those of a directory, by the name of their package."""
  return {parse_wheel_filename(path.name)[0]: path for path in to.glob('*.whl')}


def download(requirement: Requirement, to: pathlib.Path) -> list[str]:
  """Fetches its wheel by pip, where it is not there; what that requires.

  Raises RuntimeError where there is none for that machine.
  """
  name = canonicalize_name(requirement.name)
  if name not in wheels(to):
    command = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--only-binary=:all:']
    command += ['--implementation=cp', f'--python-version={PYTHON}', f'--dest={to}']
    command += [*(f'--platform={tag}' for tag in TAGS), f'{name}{requirement.specifier}']
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      said = [line for line in done.stderr.splitlines() if line.startswith('ERROR')] or ['no word']
      raise RuntimeError(f'{name}{requirement.specifier}: pip finds no wheel of it: {said[-1]}')
  with zipfile.ZipFile(wheels(to)[name]) as files:
    inside = next(path for path in files.namelist() if path.endswith('.dist-info/METADATA'))
    return email.message_from_bytes(files.read(inside)).get_all('Requires-Dist') or []


def check(met: dict[str, Requirement], there: dict[str, pathlib.Path]) -> None:
  """Raises RuntimeError where a wheel is of a version that someone, who was asked later, does not
  want.
  """
  for name, requirement in met.items():
    version = parse_wheel_filename(there[name].name)[1]
    if not requirement.specifier.contains(version, prereleases=True):
      raise RuntimeError(
        f'{there[name]} is not {name}{requirement.specifier}: delete it and run the same again, or '
        f'download that one yourself'
      )


def main():
  parser = commands.parser(__doc__)
  parser.add_argument('--held', default=HELD, help='what the machine has: names, or a file')
  parser.add_argument(
    '--with', dest='more', default=OPTIONAL, help="names of packages of setup.cfg's extras"
  )
  parser.add_argument('--to', default='', metavar='DIR', help='download the wheels to here')
  options = parser.parse_args()
  with commands.mendable(RuntimeError):
    if not options.to:
      met, unknown = needed(options.held, options.more)
      print(*(f'{name}{requirement.specifier}' for name, requirement in met.items()), sep='\n')
      for name in unknown:
        print(f'{name}: not installed here, so that what it requires is not in this list')
      return
    to = pathlib.Path(options.to)
    to.mkdir(parents=True, exist_ok=True)
    met, _ = needed(options.held, options.more, lambda requirement: download(requirement, to))
    check(met, wheels(to))
    sizes = {path.name: path.stat().st_size for path in map(wheels(to).get, met)}
    print(*(f'{size / 2**20:8.1f} MiB  {name}' for name, size in sizes.items()), sep='\n')
    print(f'{sum(sizes.values()) / 2**20:8.1f} MiB in {to}')


if __name__ == '__main__':
  main()
