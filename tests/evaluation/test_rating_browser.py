"""Is the page of ratings used by keys alone, in a real browser, and is what a model wrote only ever
text there?
"""

import io
import urllib.error

import numpy as np
import pytest
from matplotlib import image

from evaluation.ratings import RatedItem, Study
from tests.evaluation import browser

pytest.importorskip('starlette', reason='starlette serves the page')
from tests.evaluation.test_ratings import SCRIPT, Server, write

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(not browser.executable(), reason='no chromium is installed'),
]
COUNT = 'document.getElementById("count").textContent'
PRESSED = '[...document.querySelectorAll("[aria-pressed=true]")].map(x => x.textContent)'
MARKED = 'document.querySelector(".row.now span").textContent'
ITEMS = [RatedItem(f'k{i}', f'question {i}', (SCRIPT, f'b {i}\n{SCRIPT}')) for i in range(4)]


def enter(b: browser.Browser, address: str) -> None:
  """A rater's name, by keys."""
  b.go(address)
  b.type('ann')
  b.press('Enter')
  b.until('!document.getElementById("rate").hidden')


def only_text(b: browser.Browser) -> None:
  """Nothing of what a model wrote is markup, was run, or could be made to be."""
  assert b.value('document.title') == 'Rate answers'
  assert not b.value('document.querySelectorAll("#rate script, #rate img, #rate b").length')
  refused = '(() => {try {document.body.innerHTML = "<b>x</b>"; return 0} catch {return 1}})()'
  assert b.value(refused) == 1
  assert not [e for e in b.events if e.get('method') == 'Runtime.exceptionThrown']


def test_pairs_are_rated_by_keys(tmp_path):
  """Of a model that writes scripts; by a person who never touches the mouse."""
  write(tmp_path, ITEMS)
  server = Server(tmp_path)
  try:
    with browser.opened(tmp_path / 'profile') as b:
      enter(b, server.address)
      for i, key in enumerate(('ArrowLeft', '3', 'ArrowDown')):
        b.until(f'{COUNT} === "{i} of 4"')
        answers = b.value('[...document.querySelectorAll("#answers pre")].map(x => x.textContent)')
        assert SCRIPT in answers and any(text.startswith('b ') for text in answers)
        b.press(key)
      b.until(f'{COUNT} === "3 of 4"')
      b.press('u')
      b.until(f'{PRESSED}.join() === "About equal"')
      b.press('1')
      b.until(f'!{PRESSED}.length')
      only_text(b)
  finally:
    server.end()
  kept = Study.open(tmp_path / 'ratings.sqlite').ratings()
  assert [each.value == each.left for each in kept] == [True, False, True] and len(kept) == 3


def test_scales_are_rated_by_keys_and_with_a_token(tmp_path):
  """Each answer by itself, on a server that wants a token: it is in the address, and never sent
  but in a header.
  """
  write(tmp_path, ITEMS)
  token, criteria = 'a-secret-token', ['relevance', 'tone']
  flags = [f'--token={token}', '--mode=scales', f'--criteria={",".join(criteria)}']
  server = Server(tmp_path, *flags)
  try:
    with pytest.raises(urllib.error.HTTPError, match='401'):
      server.call('next', rater='bob')
    with browser.opened(tmp_path / 'profile') as b:
      # Without it nothing is shown, and why is said.
      b.go(server.address)
      b.type('ann')
      b.press('Enter')
      b.until('!document.getElementById("error").hidden')
      assert b.value('document.getElementById("rate").hidden')
      b.go('about:blank')

      enter(b, f'{server.address}/#token={token}')
      b.until(f'{COUNT} === "0 of 8" && {MARKED} === "relevance"')
      b.press('4')
      b.until(f'{MARKED} === "tone" && {PRESSED}.join() === "4 good"')
      b.press('ArrowUp')  # it was meant to be a 5
      b.until(f'{MARKED} === "relevance"')
      b.press('5')
      b.until(f'{MARKED} === "tone" && {PRESSED}.join() === "5 very good"')
      is_drawn(b.picture())
      b.press('2')
      b.until(f'{COUNT} === "1 of 8" && !{PRESSED}.length')
      b.press('u')
      b.until(f'{PRESSED}.join() === "5 very good,2 bad"')
      only_text(b)
  finally:
    server.end()
  kept = Study.open(tmp_path / 'ratings.sqlite').ratings()
  assert {each.criterion: each.value for each in kept} == {'relevance': 5, 'tone': 2}


def is_drawn(png: bytes) -> None:
  """A picture of the size of the window, with dark text on a light page."""
  height, width, _ = (drawn := image.imread(io.BytesIO(png))).shape
  assert (width, height) >= (800, 500) and drawn.min() < 0.3 and np.median(drawn) > 0.7
