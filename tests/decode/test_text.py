"""Is streamed text the text, and is no character ever torn?"""
import pytest
from hypothesis import given, settings, strategies as st

from data.tokenizer import ByteTokenizer
from decode.text import TextStream

TOKENIZER = ByteTokenizer()


def pieces_of(ids, cuts):
  """Streamed pieces of ids cut at these places, and the rest at the end."""
  stream, places = TextStream(TOKENIZER), sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
  return [stream.add(ids[a:b]) for a, b in zip(places, places[1:])], stream.end()


@given(st.lists(st.integers(0, 258), max_size=40), st.lists(st.integers(0, 100), max_size=40))
@settings(max_examples=300)
def test_pieces_of_any_ids_join_to_their_text(ids, cuts):
  pieces, rest = pieces_of(ids, cuts)
  assert ''.join(pieces) + rest == TOKENIZER.decode(ids)


@given(st.text(max_size=20), st.lists(st.integers(0, 100), max_size=40))
@settings(max_examples=300)
def test_pieces_of_a_text_are_whole_characters(text, cuts):
  pieces, rest = pieces_of(TOKENIZER.encode(text), cuts)
  assert ''.join(pieces) == text and not rest
  assert '\ufffd' in text or not any('\ufffd' in piece for piece in pieces)


@pytest.mark.parametrize('character', ['é', '€', '😀'])
def test_a_character_is_held_back_until_it_is_whole(character):
  stream, ids = TextStream(TOKENIZER), TOKENIZER.encode(character)
  assert [stream.add([id_]) for id_ in ids] == [''] * (len(ids) - 1) + [character]
  stream.add(ids[:-1])
  assert stream.end() == '\ufffd'
