"""How does a process give up what a program that it runs must not have? This file is run
(evaluation/sandbox.py), and imports nothing of ours: a word and the program come by its input, and
its output ends with the word, or with what went wrong.

Files are Linux's to withhold (Landlock, of kernel 5.13 or newer: docs.kernel.org/userspace-api/
landlock.html), whatever the program does. What else it could reach, Python asks for aloud (PEP
578), and is refused: that is a guard against what a model writes by mistake, and not against an
attack on the interpreter itself.
"""

import ctypes
import os
import resource
import sys

FAULT = 'fault: '
FILES = 64  # open at a time
WRITTEN = 2**20  # bytes of a file, at most

# Landlock, as of <linux/landlock.h>; its calls have these numbers on every processor.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
VERSION = 1  # the flag by which the first of them says which version there is
PATH_BENEATH = 1
READ = 1 << 2 | 1 << 3  # of files, of directories
# What versions 1, 2, 3 and 5 can withhold: all but the first 13 came one at a time.
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
NO_NEW_PRIVILEGES = 38  # of prctl

# Of the events of sys.audit those by which a program leaves its process, or changes files in ways
# that Landlock does not know (its oldest version neither how one is cut).
REFUSED = (
  'ctypes.',
  'os.chmod',
  'os.chown',
  'os.exec',
  'os.fork',
  'os.kill',
  'os.posix_spawn',
  'os.removexattr',
  'os.setxattr',
  'os.spawn',
  'os.system',
  'os.truncate',
  'os.utime',
  'pty.spawn',
  'resource.',
  'signal.pthread_kill',
  'socket.',
  'subprocess.',
)


class Ruleset(ctypes.Structure):
  _fields_ = [('files', ctypes.c_uint64)]


class Beneath(ctypes.Structure):
  _pack_ = 1
  _fields_ = [('allowed', ctypes.c_uint64), ('parent', ctypes.c_int32)]


def _call(number: int, *arguments) -> int:
  libc = ctypes.CDLL(None, use_errno=True)
  done = libc.syscall(ctypes.c_long(number), *arguments)
  if done < 0:
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
  return done


def _version() -> int:
  return _call(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(VERSION))


def missing() -> str:
  """Why this system withholds no files, or ''."""
  if sys.platform != 'linux':
    return f'there is no Landlock on {sys.platform}'
  try:
    _version()
  except OSError as error:
    return f'the kernel has no Landlock ({error.strerror})'
  return ''


def withhold_files(readable: list[str], writable: str) -> None:
  """From now on only what is below these directories can be read, and below one written."""
  known = (1 << RIGHTS[min(_version(), max(RIGHTS))]) - 1
  ruleset = Ruleset(known)
  size = ctypes.c_size_t(ctypes.sizeof(ruleset))
  made = _call(CREATE_RULESET, ctypes.byref(ruleset), size, ctypes.c_uint32(0))
  for path, rights in [*((path, READ) for path in readable), (writable, known & ~1)]:
    if os.path.isdir(path):
      parent = os.open(path, os.O_PATH)
      rule = Beneath(rights, parent)
      _call(ADD_RULE, ctypes.c_int(made), PATH_BENEATH, ctypes.byref(rule), ctypes.c_uint32(0))
      os.close(parent)
  ctypes.CDLL(None).prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
  _call(RESTRICT_SELF, ctypes.c_int(made), ctypes.c_uint32(0))
  os.close(made)


def refuse(event: str, arguments: tuple) -> None:
  if event.startswith(REFUSED):
    raise PermissionError(f'{event} is refused to a program that is confined')


def main(mode: str, seconds: int, memory: int) -> None:
  # Its own: what the program prints goes nowhere.
  out = os.dup(1)
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
  word, _, program = sys.stdin.buffer.read().decode().partition('\n')
  for limit, value in (
    (resource.RLIMIT_AS, memory),
    (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_CPU, seconds),
    (resource.RLIMIT_FSIZE, WRITTEN),
    (resource.RLIMIT_NOFILE, FILES),
  ):
    resource.setrlimit(limit, (value, value))
  if mode == 'confined':
    # Where modules are that it may import, and libraries that these need.
    parts = [*sys.path, sys.base_prefix, '/usr/lib', '/usr/lib64', '/lib', '/lib64']
    try:
      withhold_files(parts, os.getcwd())
    except OSError as error:  # no fault of the program's, which does not run
      os.write(out, f'\n{word} {error}'.encode())
      os._exit(0)
    sys.addaudithook(refuse)
  try:
    exec(compile(program, 'program', 'exec'), {'__name__': '__main__'})
    said = word
  except BaseException as error:  # SystemExit, too: a program that is right goes on to its end
    said = f'{FAULT}{type(error).__name__}: {error}'.strip().removesuffix(':').replace('\n', ' ')
  os.write(out, f'\n{said}'.encode(errors='replace'))
  os._exit(0)  # threads that it has left do not hold it up


if __name__ == '__main__':
  main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
