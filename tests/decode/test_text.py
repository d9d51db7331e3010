"""Is streamed text the text up to a stop string, and is no character ever torn?"""

import codecs
import re

import pytest
from hypothesis import given, settings, strategies as st

from data.tokenizers import ByteTokenizer
from decode.text import TextStream

TOKENIZER = ByteTokenizer()


def pieces_of(ids, cuts, stops=()):
  """Streamed pieces of ids cut at these places, the rest at the end among them, and the stream."""
  stream, places = (
    TextStream(TOKENIZER, stops),
    sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)}),
  )
  return [*(stream.add(ids[a:b]) for a, b in zip(places, places[1:])), stream.end()], stream


@given(st.lists(st.integers(0, 258), max_size=40), st.lists(st.integers(0, 100), max_size=40))
@settings(max_examples=300)
def test_pieces_of_any_ids_join_to_their_text(ids, cuts):
  pieces, stream = pieces_of(ids, cuts)
  assert ''.join(pieces) == TOKENIZER.decode(ids) and stream.ids_used == len(ids)


@given(st.text(max_size=20), st.lists(st.integers(0, 100), max_size=40))
@settings(max_examples=300)
def test_pieces_of_a_text_are_whole_characters(text, cuts):
  *pieces, rest = pieces_of(TOKENIZER.encode(text), cuts)[0]
  assert ''.join(pieces) == text and not rest
  assert '\ufffd' in text or not any('\ufffd' in piece for piece in pieces)


@pytest.mark.parametrize('character', ['é', '€', '😀'])
def test_a_character_is_held_back_until_it_is_whole(character):
  stream, ids = TextStream(TOKENIZER), TOKENIZER.encode(character)
  assert [stream.add([id_]) for id_ in ids] == [''] * (len(ids) - 1) + [character]
  stream.add(ids[:-1])
  assert stream.end() == '\ufffd'


def truncated(text, stops):
  """The text before the stop that is complete first, and that stop, by trying every end."""
  for end in range(len(text) + 1):
    for stop in sorted(stops, key=len, reverse=True):
      if text[:end].endswith(stop):
        return text[: end - len(stop)], stop
  return text, None


LETTERS = st.text('ab\ufffdé😀', min_size=1, max_size=4)


@given(
  st.lists(
    st.sampled_from([*'ab', 'é', '😀', 'aab', 'ab😀'])
    | st.sampled_from([b'\xf0', b'\x98', b'\xc3']),
    max_size=12,
  ),
  st.lists(LETTERS, max_size=4),
  st.lists(st.integers(0, 100), max_size=20),
)
@settings(max_examples=600)
def test_stops_truncate_as_they_would_the_whole_text(parts, stops, cuts):
  ids = [
    byte + 3 for part in parts for byte in (part if isinstance(part, bytes) else part.encode())
  ]
  pieces, stream = pieces_of(ids, cuts, stops)
  expected, stop = truncated(TOKENIZER.decode(ids), stops)
  assert (''.join(pieces), stream.stopped) == (expected, stop)
  # The ids that belong to the text are the fewest that decode to something with the stop in it.
  assert stream.ids_used == (
    len(ids)
    if stop is None
    else next(n for n in range(len(ids) + 1) if completes(ids[:n], stop, stops, n == len(ids)))
  )


def completes(ids, stop, stops, last):
  decoded = codecs.getincrementaldecoder('utf-8')(errors='replace').decode(
    TOKENIZER.decode_bytes(ids), final=last
  )
  return truncated(decoded, stops)[1] == stop


@given(
  st.lists(LETTERS, min_size=1, max_size=3),
  st.lists(st.sampled_from(['a', 'b', 'é', '😀']), max_size=10),
)
@settings(max_examples=300)
def test_only_what_may_begin_a_stop_is_held_back(stops, characters):
  stream, given_out, text = TextStream(TOKENIZER, stops), '', ''
  for character in characters:
    given_out += stream.add(TOKENIZER.encode(character))
    text += character
    if stream.stopped is None:
      held = text[len(given_out) :]
      assert text == given_out + held and (not held or any(stop.startswith(held) for stop in stops))


@pytest.mark.parametrize(
  'stops, pieces, expected, stopped',
  [
    (['abc', 'b'], ['a', 'bc'], 'a', 'b'),  # the one that is complete first
    (['b', 'ab'], ['xa', 'b'], 'x', 'ab'),  # of two that are complete together, the longest
    (['a', 'ab'], ['ab'], '', 'a'),
    (['aab'], ['aa', 'ab'], 'a', 'aab'),
    (['\n\nQ:', '\n\n\n'], ['x\n', '\n', '\nQ:'], 'x', '\n\n\n'),
    (['</s>'], ['1 <', '/', 's', ' <'], '1 </s <', None),
  ],
)
def test_overlapping_stops(stops, pieces, expected, stopped):
  stream = TextStream(TOKENIZER, stops)
  assert ''.join(stream.add(TOKENIZER.encode(piece)) for piece in pieces) + stream.end() == expected
  assert stream.stopped == stopped


def test_a_stop_within_an_emoji_s_bytes_and_what_follows_it():
  stream, ids = TextStream(TOKENIZER, ['😀!']), TOKENIZER.encode('hi 😀! more')
  assert [stream.add(ids[:5]), stream.add(ids[5:7]), stream.add(ids[7:])] == ['hi ', '', '']
  assert (stream.stopped, stream.ids_used) == ('😀!', 8)
  assert stream.add(ids) == stream.end() == '' and stream.ids_used == 8


@pytest.mark.parametrize('stops', [['a', ''], '', 'ab'])
def test_stops_that_make_no_sense_raise(stops):
  with pytest.raises(
    ValueError, match=rf'stops={re.escape(repr(stops))} must be several texts, none of them empty'
  ):
    TextStream(TOKENIZER, stops)
