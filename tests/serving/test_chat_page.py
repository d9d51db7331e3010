"""Does the chat page show what a model wrote, whatever it wrote, as text; and can it be used by
keys alone? In a real browser, against a server of a few lines that speaks as OpenAI's does.
"""

import contextlib
import http.server
import json
import re
import threading
import time

import pytest

from serving import chat, pages
from tests.evaluation import browser

SCRIPT = '<script>document.title = "taken"</script><img src=x onerror="document.title=1"> a & b'
KEY = 'a key'


def events(pieces, finish='stop'):
  """The chunks of an answer, as vLLM and OpenAI send them."""
  yield {'choices': [{'index': 0, 'delta': {'role': 'assistant', 'content': ''}}]}
  for i, (text, tokens) in enumerate(pieces):
    content = []
    for token, probability in tokens:
      taken = {'token': token, 'bytes': list(token.encode()), 'logprob': probability}
      other = {'token': ' other', 'bytes': [], 'logprob': -1.5}
      content.append(taken | {'top_logprobs': [taken, other]})
    end = finish if i == len(pieces) - 1 else None
    choice = {'index': 0, 'delta': {'content': text}, 'finish_reason': end}
    yield {'choices': [choice | {'logprobs': {'content': content}}]}
  yield {'choices': [], 'usage': {'prompt_tokens': 9, 'completion_tokens': len(pieces)}}


def halves(text: str) -> list[dict]:
  """A character whose bytes are in two tokens."""
  whole = text.encode()
  parts = (whole[:1], whole[1:])
  return [
    {'token': '?', 'bytes': list(part), 'logprob': -0.1, 'top_logprobs': []} for part in parts
  ]


class Handler(http.server.BaseHTTPRequestHandler):
  """asked: bodies that came; gone: how many readers went away."""

  protocol_version = 'HTTP/1.1'

  def log_message(self, *arguments):
    pass

  def do_GET(self):
    if self.path in chat.FILES:
      kind, content = chat.routes()[self.path]
      self._send(200, content, {'Content-Type': kind, **pages.HEADERS})
    elif self.path == '/v1/models':
      self._json({'data': [{'id': 'small'}]})
    else:
      self._json({'error': {'message': f'no {self.path}'}}, 404)

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
    self.server.asked.append(body)
    if self.headers.get('Authorization') != f'Bearer {KEY}':
      self._json({'error': {'message': 'give a key'}}, 401)
      return
    self.close_connection = True
    self.send_response(200)
    self.send_header('Content-Type', 'text/event-stream')
    self.send_header('Connection', 'close')
    self.end_headers()
    said = body['messages'][-1]['content']
    try:
      for chunk in self.server.answers[said]():
        # In pieces that no event ends with.
        line = f'data: {json.dumps(chunk)}\r\n\r\n'.encode()
        self.wfile.write(line[:7])
        self.wfile.write(line[7:])
      if said != 'broken':
        self.wfile.write(b'data: [DONE]\n\n')
    except OSError:
      self.server.gone.set()

  def _json(self, value, status=200):
    self._send(status, json.dumps(value).encode(), {'Content-Type': 'application/json'})

  def _send(self, status, content, headers):
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    self.wfile.write(content)


def endless():
  for i in range(10_000):
    yield from events([(f'{i} ', [(f'{i} ', -0.2)])], None)
    time.sleep(0.02)


def split():
  first, second = halves('ß')
  head = {'choices': [{'delta': {'content': ''}, 'logprobs': {'content': [first]}}]}
  yield head
  yield {'choices': [{'delta': {'content': 'ß!'}, 'logprobs': {'content': [second]}}]}
  yield {'choices': [{'delta': {'content': '?'}, 'finish_reason': 'length'}]}


def failing():
  yield {'choices': [{'delta': {'content': 'half'}}]}
  yield {'error': {'message': 'the device has failed'}}


ANSWERS = {
  'hello': lambda: events([(SCRIPT, [(SCRIPT[:9], -0.05), (SCRIPT[9:], -4.0)]), (' end', [])]),
  'split': split,
  'endless': endless,
  'failing': failing,
  'broken': lambda: events([('cut', [])], None),
}


@contextlib.contextmanager
def served(answers=ANSWERS):
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.daemon_threads = True
  server.answers, server.asked, server.gone = answers, [], threading.Event()
  thread = threading.Thread(target=server.serve_forever, args=[0.05], daemon=True)
  thread.start()
  try:
    yield server, f'http://127.0.0.1:{server.server_port}/'
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


TEXT = '[...document.querySelectorAll(".assistant .text")].at(-1).textContent'
IDLE = 'document.getElementById("log").getAttribute("aria-busy") === "false"'
ERROR = 'document.getElementById("error").textContent'
ENDS = '[...document.querySelectorAll(".end")].at(-1)?.textContent'


def ask(b, text):
  b.type(text)
  b.press('Enter')


def test_the_page_names_no_other_place_and_makes_no_markup():
  for path, (kind, content) in chat.routes().items():
    text = content.decode()
    assert kind.endswith('charset=utf-8'), path
    assert not re.search(
      r'https?:|\b//\w|innerHTML|outerHTML|insertAdjacent|\beval\b|style="', text
    )
  policy = pages.HEADERS['Content-Security-Policy']
  assert "default-src 'none'" in policy and 'unsafe' not in policy


@pytest.mark.slow
def test_a_person_talks_by_keys_and_reads_text(tmp_path):
  if not browser.executable():
    pytest.skip('no chromium is installed')
  with served() as (server, address), browser.opened(tmp_path / 'profile') as b:
    b.go(address)
    b.until('document.title === "small"')
    # No key: said, with the question back in its box, and the field to give one.
    ask(b, 'hello')
    b.until(f'{ERROR} === "Give a key."')
    assert b.value('document.getElementById("question").value') == 'hello'
    assert b.value('document.activeElement.id') == 'key'
    b.type(KEY)
    b.value('document.getElementById("seed").value = "7"')
    b.press('Escape')
    b.press('Enter')

    # Markup is text, in tokens that say how likely they were, and cannot be made to run.
    b.until(f'{TEXT} === {json.dumps(SCRIPT + " end")} && {IDLE}')
    assert b.value('document.title') == 'small'
    assert not b.value('document.querySelectorAll("#log script, #log img").length')
    refused = '(() => {try {document.body.innerHTML = "<b>x</b>"; return 0} catch {return 1}})()'
    assert b.value(refused) == 1
    assert b.value('[...document.querySelectorAll(".token")].map(x => x.className)') == [
      'token',
      'token rare',
    ]
    b.value('document.querySelector(".assistant .text").focus()')
    b.press('ArrowRight')
    assert '95.1%' in b.value('document.getElementById("likely").textContent')
    b.press('ArrowRight')
    assert '1.8%' in b.value('document.getElementById("likely").textContent')
    b.press('Escape')
    assert b.value('document.getElementById("likely").hidden')
    rectangle = b.value('document.querySelector(".token").getBoundingClientRect().toJSON()')
    place = {'x': rectangle['x'] + 2, 'y': rectangle['y'] + 2}
    b('Input.dispatchMouseEvent', type='mouseMoved', **place)
    b.until('document.getElementById("likely").textContent.includes("95.1%")')
    sent = server.asked[-1]
    assert sent['seed'] == 7 and sent['stream'] and 'temperature' not in sent
    assert [m['role'] for m in sent['messages']] == ['user']

    # A character in two tokens; what is not among the tokens is text all the same.
    ask(b, 'split')
    b.until(f'{TEXT} === "ß!?" && {IDLE}')
    assert b.value('[...document.querySelectorAll(".token")].at(-1).textContent') == 'ß'
    assert 'cut off' in b.value(ENDS)
    assert [m['role'] for m in server.asked[-1]['messages']] == ['user', 'assistant', 'user']

    # Stopped: the server sees it, and what was written stays.
    ask(b, 'endless')
    b.until(f'{TEXT}.startsWith("0 1 2 ")')
    b.press('Escape')
    b.until(f'{IDLE} && {ENDS}.startsWith("stopped")')
    assert server.gone.wait(browser.WAIT)

    # Failures: half an answer is marked, none gives the question back.
    for question, said in (('failing', 'The device has failed.'), ('broken', 'broke off.')):
      ask(b, question)
      b.until(f'{ERROR}.endsWith("{said}") && {ENDS}.startsWith("broken off") && {IDLE}')
    assert not [e for e in b.events if e.get('method') == 'Runtime.exceptionThrown']
