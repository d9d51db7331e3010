"""Is exactly what the expression accepts reachable, in every tokenization, and nothing else,
whatever the neighbours?
"""

import collections
import functools
import itertools
import json
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from analysis import aot, schedule
from data import sources, tokenizers
from data.config import SourceConfig, TokenizerConfig
from data.huggingface import HuggingFaceTokenizer
from data.tokenizers import ByteTokenizer
from decode import automaton, constrain
from decode.constrain import FREE, Automaton, Constraint
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh
from tests.data import tokenizer_families
from tests.decode.automata import made_here

allowed, advance = jax.jit(constrain.allowed), jax.jit(constrain.advance)
BYTES = tokenizers.ByteTokenizer()


@pytest.fixture(autouse=True, scope='module')
def here():
  with made_here():
    yield


@functools.cache
def made(kind):
  if kind == 'byte':
    return BYTES
  if kind == 'bpe':
    texts = list(
      itertools.islice(
        (t for t in sources.documents(SourceConfig(), collections.Counter()) if len(t) < 20_000), 30
      )
    )
    return tokenizers.build(TokenizerConfig(vocabulary=600), texts, texts)
  return HuggingFaceTokenizer(tokenizer_families.contents(kind))


KINDS = ('byte', 'bpe', 'gpt2', 'llama2', 'gemma')
MOSTLY_SLOW = [
  pytest.param(kind, marks=[] if kind in ('byte', 'llama2') else pytest.mark.slow) for kind in KINDS
]


def after(constraint, ids):
  """The state after ids, from the tables alone; -1 where one is not allowed."""
  state = 0
  for id_ in ids:
    state = constraint.next[state, constraint.classes[id_]] if state >= 0 else -1
  return state


def accepts(constraint, tokenizer, ids):
  return after(constraint, [*ids, tokenizer.eos]) >= 0


def steps_to_end(constraint, tokenizer):
  """[S] the fewest tokens from each state to one where the text may end."""
  ending, far = constraint.next[:, constraint.classes[tokenizer.eos]] >= 0, len(constraint.next) + 1
  steps = np.where(ending, 0, far)
  others = np.delete(constraint.next, constraint.classes[tokenizer.eos], 1)
  for _ in range(len(steps)):
    steps = np.minimum(steps, 1 + np.where(others >= 0, steps[others], far).min(1, initial=far))
  return steps


def walk(constraint, tokenizer, seed, longest=30):
  """A text by tokens that are drawn evenly from the allowed ones,
  and towards an end after the first few.
  """
  random, steps = np.random.default_rng(seed), steps_to_end(constraint, tokenizer)
  automaton, states = Automaton.of([constraint], tokenizer.vocabulary)
  offset, states, ids = states[0], jnp.asarray(states), []
  while True:
    choice = np.flatnonzero(allowed(automaton, states)[0])
    assert choice.size, 'a dead end'
    if len(ids) > longest:
      nearer = [
        id_
        for id_ in choice
        if id_ == tokenizer.eos
        or steps[after(constraint, [*ids, id_])] < steps[int(states[0]) - offset]
      ]
      choice = [tokenizer.eos] if tokenizer.eos in nearer else nearer
    id_ = int(random.choice(choice))
    if id_ == tokenizer.eos:
      return tokenizer.decode_bytes(ids).decode()  # strict: only whole characters
    assert tokenizer.token_bytes[id_]
    ids.append(id_)
    states = advance(automaton, states, jnp.asarray([id_], jnp.int32))


REGEXES = [
  r'a|ab',
  r'(ab|a)(c|bcd)?',
  r'[a-z]+@[a-z]+\.(com|org)',
  r'(é|😀|日本)+!',
  r'-?(0|[1-9][0-9]*)(\.[0-9]+)?',
  r'[a-zé_]{2,5} \d',
  r'[^"\n]{3,40}',
  r'( the| quick|\n){1,4}',
  r'.*',
  r'',
  r'(?i)yes|no',
  r'x.{0,60}y?',
]


@pytest.mark.parametrize('kind', MOSTLY_SLOW)
def test_random_walks_match(kind):
  tokenizer = made(kind)
  for regex in REGEXES:
    constraint = Constraint(tokenizer, regex=regex)
    for seed in range(3):
      text = walk(constraint, tokenizer, seed)
      assert re.fullmatch(regex, text), (regex, text)


PERSON = {
  'type': 'object',
  'required': ['name', 'age', 'tags'],
  'properties': {
    'name': {'type': 'string', 'maxLength': 12},
    'born': {'type': 'string', 'format': 'date'},
    'age': {'type': 'integer', 'minimum': 18, 'maximum': 120},
    'tags': {
      'type': 'array',
      'items': {'enum': ['a', 'b"', None, 1.5]},
      'minItems': 1,
      'maxItems': 3,
    },
    'code': {'type': 'string', 'pattern': r'^[A-Zé]{2}\d$'},
    'inner': {'$ref': '#/$defs/inner'},
  },
  '$defs': {
    'inner': {
      'type': 'object',
      'properties': {'x': {'type': 'number'}, 'y': {'type': ['boolean', 'null']}},
    }
  },
}


def check_person(value):
  assert value.keys() <= PERSON['properties'].keys() and {'name', 'age', 'tags'} <= value.keys()
  assert isinstance(value['name'], str) and len(value['name']) <= 12
  assert isinstance(value['age'], int) and 18 <= value['age'] <= 120
  assert 1 <= len(value['tags']) <= 3 and all(
    tag in ('a', 'b"', None, 1.5) for tag in value['tags']
  )
  assert re.fullmatch('[0-9]{4}-[0-9]{2}-[0-9]{2}', value.get('born', '2000-01-01'))
  assert re.fullmatch(r'[A-Zé]{2}\d', value.get('code', 'AA1'))
  inner = value.get('inner', {})
  assert (
    inner.keys() <= {'x', 'y'}
    and isinstance(inner.get('x', 0), (int, float))
    and inner.get('y') in (True, False, None)
  )


@pytest.mark.parametrize('kind', MOSTLY_SLOW)
def test_random_walks_are_json_of_the_schema(kind):
  tokenizer = made(kind)
  constraint = Constraint(tokenizer, schema=PERSON)
  print(
    f'{kind}: {constraint.next.shape[0]} states, {constraint.next.shape[1]} classes of '
    f'{tokenizer.vocabulary} ids'
  )
  seen = [json.loads(walk(constraint, tokenizer, seed, longest=60)) for seed in range(12)]
  for value in seen:
    check_person(value)
  assert len({tuple(value) for value in seen}) > 1


ATOMS = st.sampled_from(['a', 'b', '[ab]', '[^a]', '.', 'é', '[é-ü]', '😀', r'\w'])
PATTERNS = st.recursive(
  ATOMS,
  lambda inner: st.one_of(
    st.lists(inner, min_size=1, max_size=3).map(''.join),
    st.lists(inner | st.just(''), min_size=1, max_size=3).map(lambda p: f'(?:{"|".join(p)})'),
    st.tuples(
      inner, st.sampled_from(['*', '+', '?', '{2}', '{0,2}', '{1,}', '*?', '+?', '??'])
    ).map(lambda p: f'(?:{p[0]}){p[1]}'),
  ),
  max_leaves=6,
)
SHORT = [''.join(letters) for n in range(5) for letters in itertools.product('abé😀', repeat=n)]


@given(PATTERNS)
@settings(max_examples=150)
def test_what_is_accepted_is_what_python_accepts(pattern):
  constraint = Constraint(BYTES, regex=pattern)
  for text in SHORT:
    assert accepts(constraint, BYTES, BYTES.encode(text)) == (
      re.fullmatch(pattern, text) is not None
    ), text


def spellings(tokenizer, data):
  """All sequences of ids that decode to these bytes."""
  if not data:
    return [[]]
  return [
    [id_, *rest]
    for id_, piece in enumerate(tokenizer.token_bytes)
    if piece and data.startswith(piece)
    for rest in spellings(tokenizer, data[len(piece) :])
  ]


SPELT = [r'(the|é|the quick)( fox)?', r'[hé]?(el|l)*o', '(naïve|café|über|ß)+']


@pytest.mark.costly
@pytest.mark.parametrize(
  'pattern, kind',
  [
    # Each pattern and each kind is met without the slow ones.
    pytest.param(pattern, kind, marks=[pytest.mark.slow] * (i % 3 != j))
    for i, kind in enumerate(KINDS)
    for j, pattern in enumerate(SPELT)
  ],
)
def test_every_text_is_reachable_in_every_tokenization(kind, pattern):
  tokenizer = made(kind)
  constraint, seen = Constraint(tokenizer, regex=pattern), 0
  for text in [
    'the',
    'é',
    'the quick',
    'the fox',
    'the quick fox',
    'é fox',
    'the qui',
    'hello',
    'o',
    'éelo',
    'ello',
    'hell',
    'naïve',
    'caféüber',
    'ßß',
    '',
  ]:
    for ids in itertools.islice(spellings(tokenizer, text.encode()), 300):
      assert accepts(constraint, tokenizer, ids) == (re.fullmatch(pattern, text) is not None), (
        text,
        ids,
      )
      seen += 1
  assert seen > 15


@pytest.mark.costly
@pytest.mark.parametrize('kind', KINDS)
def test_merging_changes_nothing(kind):
  tokenizer = made(kind)
  for pattern in (r'[a-z]+@(é|😀)*\.com', r'( the| \w)+'):
    constraint, plain = Constraint(tokenizer, regex=pattern), Constraint(BYTES, regex=pattern)

    def bytewise(state, piece):
      return after_bytes(plain, state, piece)

    todo, partner = [0], {0: 0}
    while todo:
      state = todo.pop()
      for id_, piece in enumerate(tokenizer.token_bytes):
        there = constraint.next[state, constraint.classes[id_]]
        if id_ == tokenizer.eos:
          assert (there >= 0) == (plain.next[partner[state], plain.classes[BYTES.eos]] >= 0)
        else:
          expected = bytewise(partner[state], piece) if piece else -1
          assert (there >= 0) == (expected >= 0)
          if there >= 0 and there not in partner:
            todo.append(there)
            partner[there] = expected
    assert len(partner) == len(constraint.next)


def after_bytes(plain, state, piece):
  for byte in piece:
    state = plain.next[state, plain.classes[byte + 3]] if state >= 0 else -1
  return state


def test_end_of_text_is_allowed_exactly_where_the_text_may_end():
  automaton, states = Automaton.of([Constraint(BYTES, regex='ab?')], BYTES.vocabulary)
  seen = []
  for character in 'abb':
    seen.append(
      [BYTES.decode([id_]) or id_ for id_ in np.flatnonzero(allowed(automaton, states)[0])]
    )
    # the last b is not allowed: nothing changes
    states = advance(automaton, states, np.array([BYTES.encode(character)[0]], np.int32))
  assert seen == [['a'], [BYTES.eos, 'b'], [BYTES.eos]]
  assert np.flatnonzero(allowed(automaton, states)[0]).tolist() == [BYTES.eos]
  for ignored in (BYTES.eos, BYTES.pad):
    assert advance(automaton, states, np.array([ignored], np.int32)) == states


def test_rows_keep_to_their_own_constraints():
  tokenizer = made('gpt2')
  one, two = Constraint(tokenizer, regex='[a-f]+'), Constraint(tokenizer, schema=PERSON)
  vocabulary = tokenizer.vocabulary + 7  # a model may have more logits than there are ids
  rows = [one, None, two, one, None]
  automaton, states = Automaton.of(rows, vocabulary)
  alone = [Automaton.of([row], vocabulary) for row in rows]
  assert states[0] == states[3] and states[1] == states[4] == FREE and len(set(states)) == 3
  random, states = np.random.default_rng(0), jnp.asarray(states)
  own = [jnp.asarray(first) for _, first in alone]
  for _ in range(30):
    masks = np.asarray(allowed(automaton, states))
    assert masks[1].all() and not masks[[0, 2, 3], tokenizer.vocabulary :].any()
    ids = np.array([random.choice(np.flatnonzero(mask)) for mask in masks], np.int32)
    for i, (tables, _) in enumerate(alone):
      np.testing.assert_array_equal(masks[i], allowed(tables, own[i])[0])
      own[i] = advance(tables, own[i], ids[i : i + 1])
    # as on TPUs
    np.testing.assert_array_equal(
      masks, constrain._by_product(automaton.next[states] >= 0, automaton.classes)
    )
    states = advance(automaton, states, ids)
  with pytest.raises(
    ValueError,
    match=rf'over {tokenizer.vocabulary} ids, but vocabulary=9; '
    "build it with the model's tokenizer",
  ):
    Automaton.of([one], 9)


def test_a_loop_is_compiled_once_for_constraints_of_like_size():
  @jax.jit
  def generate(automaton, states, key):
    def step(states, key):
      ids = jax.random.categorical(
        key, jnp.where(constrain.allowed(automaton, states), 0.0, -jnp.inf)
      ).astype(jnp.int32)
      return constrain.advance(automaton, states, ids), ids

    return jax.lax.scan(step, states, jax.random.split(key, 8))[1]

  for regex in ('[a-c]{3}', 'x[yz][0-9]'):
    ids = generate(
      *Automaton.of([Constraint(BYTES, regex=regex)] * 4, BYTES.vocabulary), jax.random.key(0)
    )
    for row in ids.T.tolist():
      assert re.fullmatch(regex, BYTES.decode(row)) and row[3:] == [BYTES.eos] * 5
  assert generate._cache_size() == 1


def test_rows_over_devices():
  automaton, states = Automaton.of([Constraint(BYTES, regex='ab*'), None] * 4, BYTES.vocabulary)
  ids = np.full(8, ord('a') + 3, np.int32)
  expected = allowed(automaton, states), advance(automaton, states, ids)
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):

    def put(x, *names):
      return jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), ax.spec(*names)))

    automaton, states, ids = jax.tree.map(put, automaton), put(states, 'batch'), put(ids, 'batch')
    found = allowed(automaton, states), advance(automaton, states, ids)
    assert jax.typeof(found[0]).sharding.spec == ax.spec('batch', None)
    for one, other in zip(found, expected, strict=True):
      np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('rows', [1, 8])
def test_a_tpu_compiles_the_mask(rows):
  try:
    mesh = make_mesh(MeshConfig(), aot.topology('v5e:2x2')[:1])
  except ImportError as error:
    pytest.skip(str(error))

  def shape(size, dtype):
    return jax.ShapeDtypeStruct(size, dtype, sharding=jax.NamedSharding(mesh, jax.P()))

  automaton = Automaton(shape((131_072,), jnp.int32), shape((2048, 256), jnp.int32))
  with jax.set_mesh(mesh):
    compiled = jax.jit(constrain.allowed).lower(automaton, shape((rows,), jnp.int32)).compile()
  assert schedule.cycles(compiled.as_text()) < 100_000
  assert compiled.memory_analysis().temp_size_in_bytes < 1e6


def test_what_the_vocabulary_lacks_is_no_way():
  characters = tokenizers.CharTokenizer('abé')
  constraint = Constraint(characters, regex='ac|b[cé]|a+[xy]')
  assert (
    accepts(constraint, characters, characters.encode('bé'))
    and after(constraint, characters.encode('a')) == -1
  )
  with pytest.raises(
    ValueError,
    match=r"regex='ac' accepts no text that ids of this 'char' tokenizer spell: "
    r'it accepts none, or only some with char',
  ):
    Constraint(characters, regex='ac')
  with pytest.raises(ValueError, match="can't be used: .*Found no transitions"):
    Constraint(BYTES, regex='a[^\x00-\U0010ffff]b|c$d')


@pytest.mark.parametrize(
  'regex', ['(', 'a)|(?:b', '[', '*', '(?=a)b', r'(a)\1', '^a', 'a**{', r'\ba']
)
def test_what_is_no_regular_expression_raises(regex):
  with pytest.raises(
    ValueError, match=rf"regex={re.escape(repr(regex))} can't be used: .*Rust's regex crate"
  ):
    Constraint(BYTES, regex=regex)


def test_options_that_make_no_sense_raise(monkeypatch):
  for options in ({}, {'regex': 'a', 'schema': {'type': 'null'}}):
    with pytest.raises(ValueError, match='give one of the two'):
      Constraint(BYTES, **options)
  with pytest.raises(ValueError, match=r'pattern=.* accepts \'"\''):
    Constraint(BYTES, schema={'type': 'string', 'pattern': r'^\S+$'})
  monkeypatch.setitem(sys.modules, 'outlines_core', None)
  with pytest.raises(ImportError, match=r'constraints need outlines-core: .*tandem\[constrain\]'):
    Constraint(BYTES, regex='a')


def test_a_large_vocabulary_has_few_classes():
  random, characters = np.random.default_rng(0), list(b'abcdefgh 0123",:{}[]tn')
  large = tokenizers.Tokenizer(
    [
      *BYTES.token_bytes,
      *(bytes(random.choice(characters, n).tolist()) for n in random.integers(2, 7, 30_000)),
    ]
  )
  large.kind = 'byte'
  began = time.monotonic()
  constraint = Constraint(large, schema=PERSON)
  print(
    f'{constraint.next.shape} states and classes of {large.vocabulary} ids in '
    f'{time.monotonic() - began:.2f} s'
  )
  assert constraint.next.shape[1] < large.vocabulary / 10


def test_repeated_classes_after_a_character_of_theirs_are_built():
  # 2**60 states, if matches that begin later are followed, too
  constraint = Constraint(BYTES, regex='x.{0,60}y?')
  assert len(constraint.next) < 1000


def test_what_tokens_do_is_bounded_too(monkeypatch):
  constrain.Constraint(ByteTokenizer(), regex='[a-z]{40}')
  monkeypatch.setattr(automaton, 'MOST_MOVES', 2**8)
  with pytest.raises(ValueError, match=r'\{40\}.* takes more than .* MiB .*lower its counts'):
    constrain.Constraint(ByteTokenizer(), regex='[a-z]{40}')
