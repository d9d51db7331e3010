"""What does a program do that a model wrote? It runs in a process of its own, which has so many
seconds, so much memory and, where it is confined, an empty directory: of all other files it can
only read what Python is made of, and it reaches no network and no other process.

    Sandbox(confined=True).fault('assert 1 + 1 == 3')  # 'AssertionError'
"""

import contextlib
import dataclasses
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import tempfile

import names
from evaluation import confined

CONFINED, TRUSTED = MODES = ('confined', 'trusted')
SAID = 200  # characters of what went wrong, at most


@dataclasses.dataclass(frozen=True)
class Sandbox:
  """Where programs run.

  Attributes:
    mode: 'confined'; or 'trusted', with the files and the network of the person who evaluates, in a
      container or on a machine that is there for nothing else.
    seconds: of the clock and of a processor, after which a program is ended.
    memory: bytes that it may ask for.

  Raises ValueError for another mode, limits that are none, and where the system confines nothing.
  """

  mode: str = CONFINED
  seconds: int = 10
  memory: int = 2**30

  def __post_init__(self):
    names.check('--run_programs', self.mode, MODES)
    for name, least in (('seconds', 1), ('memory', 2**26)):
      if getattr(self, name) < least:
        raise ValueError(f'{name}={getattr(self, name)} of a program must be at least {least}')
    missing = confined.missing() if self.mode == CONFINED else ''
    if missing:
      raise ValueError(
        f'--run_programs={CONFINED}: {missing}; evaluate in a container that has nothing to lose '
        f'and no network, with --run_programs={TRUSTED}'
      )

  def fault(self, program: str) -> str:
    """Runs it to its end; what went wrong, on a line, or '' where nothing did. Raises RuntimeError
    where the system does not confine it after all.

    That a process has ended well says nothing: it may have ended itself. So the last thing that it
    does is to say a word, which it did not know before.
    """
    word = secrets.token_hex(16)
    # Files and no pipes: what a program has started may hold a pipe open behind its end.
    with (
      tempfile.TemporaryDirectory() as room,
      tempfile.TemporaryFile() as given,
      tempfile.TemporaryFile() as out,
    ):
      given.write(f'{word}\n{program}'.encode(errors='replace'))
      given.seek(0)
      process = subprocess.Popen(
        [sys.executable, '-I', pathlib.Path(confined.__file__), *self._limits()],
        stdin=given,
        stdout=out,
        stderr=subprocess.DEVNULL,
        cwd=room,
        env={},
        start_new_session=True,
      )
      try:
        process.wait(self.seconds)
      except subprocess.TimeoutExpired:
        return f'it did not end within {self.seconds} s'
      finally:
        # With all that it has started, whether it lives or not.
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, signal.SIGKILL)
        process.wait()
      out.seek(0)
      said = out.read()
    if process.returncode < 0:
      return f'it was ended by {signal.Signals(-process.returncode).name}'
    last = said.decode(errors='replace').rpartition('\n')[2]
    if last.startswith(f'{word} '):
      raise RuntimeError(f'programs cannot be confined here: {last.removeprefix(word).strip()}')
    if last == word:
      return ''
    known = last.startswith(confined.FAULT)
    return last.removeprefix(confined.FAULT)[:SAID] if known else 'it ended before its last line'

  def _limits(self) -> list[str]:
    return [self.mode, str(self.seconds), str(self.memory)]
