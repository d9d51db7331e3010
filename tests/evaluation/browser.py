"""How does a test press keys in a real browser? Chromium's, over its DevTools' pipe."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator

WAIT = 30.0
NAMES = ('chromium', 'chromium-browser', 'google-chrome')


def executable() -> str | None:
  """Of a browser on this machine."""
  return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
  """One page of it."""

  def __init__(self, directory):
    read, their_write = os.pipe()
    their_read, write = os.pipe()

    # The protocol speaks on these two numbers.
    def numbered():
      os.dup2(their_read, 200)
      os.dup2(their_write, 201)
      os.dup2(200, 3)
      os.dup2(201, 4)

    command = [executable(), '--headless=new', '--remote-debugging-pipe', '--disable-gpu']
    command += ['--no-sandbox', '--no-first-run', f'--user-data-dir={directory}']
    command += ['--disable-dev-shm-usage', '--window-size=1200,800', 'about:blank']
    self._process = subprocess.Popen(
      command,
      preexec_fn=numbered,
      close_fds=False,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(their_read)
    os.close(their_write)
    self._write, self._read = os.fdopen(write, 'wb', 0), os.fdopen(read, 'rb', 0)
    self._next, self._pending, self.events = 0, b'', []
    target = self('Target.createTarget', url='about:blank', session='')['targetId']
    attached = self('Target.attachToTarget', targetId=target, flatten=True, session='')
    self._session = attached['sessionId']
    for domain in ('Page', 'Runtime', 'Log'):
      self(f'{domain}.enable')

  def __call__(self, method: str, session: str | None = None, **parameters) -> dict:
    """What a command answers."""
    self._next += 1
    message = {'id': self._next, 'method': method, 'params': parameters}
    session = self._session if session is None else session
    if session:
      message['sessionId'] = session
    self._write.write(json.dumps(message).encode() + b'\0')
    while True:
      answer = self._message()
      if answer.get('id') == self._next:
        assert 'error' not in answer, (method, answer['error'])
        return answer['result']
      self.events.append(answer)

  def _message(self) -> dict:
    while b'\0' not in self._pending:
      piece = self._read.read(65536)
      assert piece, 'the browser ended'
      self._pending += piece
    message, _, self._pending = self._pending.partition(b'\0')
    return json.loads(message)

  def value(self, script: str):
    """Of an expression in the page."""
    made = self('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)
    assert 'exceptionDetails' not in made, made['exceptionDetails']
    return made['result'].get('value')

  def until(self, script: str) -> None:
    """Waits for an expression to be true."""
    ends = time.monotonic() + WAIT
    while not self.value(script):
      assert time.monotonic() < ends, f'{script} never came true'
      time.sleep(0.05)

  def go(self, address: str) -> None:
    self('Page.navigate', url=address)
    self.until('document.readyState === "complete"')

  def type(self, text: str) -> None:
    self('Input.insertText', text=text)

  def press(self, key: str) -> None:
    """A key by its name, as KeyboardEvent.key has it."""
    code = {'Enter': 13, 'ArrowLeft': 37, 'ArrowUp': 38, 'ArrowRight': 39, 'ArrowDown': 40}
    number = code.get(key, ord(key[0].upper()))
    more = {'text': '\r'} if key == 'Enter' else ({'text': key} if len(key) == 1 else {})
    for kind in ('keyDown', 'keyUp'):
      self('Input.dispatchKeyEvent', type=kind, key=key, windowsVirtualKeyCode=number, **more)
      more = {}

  def picture(self) -> bytes:
    """A PNG of what is seen."""
    return base64.b64decode(self('Page.captureScreenshot', format='png')['data'])

  def close(self) -> None:
    with contextlib.suppress(OSError, AssertionError):
      self('Browser.close', session='')
    self._process.wait(WAIT)
    self._write.close()
    self._read.close()


@contextlib.contextmanager
def opened(directory) -> Iterator[Browser]:
  """A browser with a profile of its own."""
  browser = Browser(directory)
  try:
    yield browser
  finally:
    browser.close()
