"""Does beam search find the texts that enumeration finds,
with the scores that the training forward pass gives them, alone and in a batch?
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tokenizers import ByteTokenizer
from decode import beam
from decode.constrain import Constraint
from decode.generator import Generator
from decode.loop import Rules, decode_chunk, prefill
from decode.sampling import make_sampling
from kernels import cached
from model import moves, transformer
from model.cache import APPEND, init_cache
from model.config import LatentConfig, ModelConfig, MoEConfig
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh

CONFIG = ModelConfig(
  vocabulary=40,
  width=16,
  layers=2,
  heads=4,
  kv_heads=2,
  feed_forward=24,
  max_length=64,
  init_scale=1.0,
)
PAD, NEVER, NEW = 0, -1, 12
PROMPTS = [[1, 5, 9, 30], [1], [1, 7, 7, 7, 7, 12, 3]]


@pytest.fixture(scope='module', autouse=True)
def mesh():
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])) as mesh:
    yield mesh


def make_model(config):
  model = jax.jit(transformer.init, static_argnums=(0, 1))(config, 0)
  # logits that are far from alike
  return jax.tree.map(lambda x: x * 3 if x.ndim == 2 else x, model)


@pytest.fixture(scope='module')
def model():
  return make_model(CONFIG)


def put(x):
  return jax.device_put(jnp.asarray(x), ax.spec('batch', *(None,) * (np.ndim(x) - 1)))


def start(model, prompts, *, bucket=8, capacity=32, new=NEW, dtype='', source=None, append=APPEND):
  tokens = np.full((len(prompts), bucket), PAD, np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt)] = prompt
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  cache = init_cache(model.config, len(prompts), capacity, dtype, append)
  if source is not None:
    source = source[0], source[1].sum(1)
  return prefill(model, put(tokens), put(lengths), cache, put(lengths + new), source)


def rules(rows, ends=(), **options):
  table = np.full((rows, 2), NEVER, np.int32)
  table[:, : len(ends)] = ends
  return Rules(jax.tree.map(put, make_sampling(rows, **options)), put(table))


def begun(state, beams, *, length_penalty=1.0, early_stopping=False, room=NEW, alternatives=0):
  rows = state.logits.shape[0]
  return beam.begin(
    state,
    put(np.full(rows, length_penalty, np.float32)),
    put(np.full(rows, beam.EARLY[early_stopping], np.int32)),
    beams=beams,
    room=room,
    alternatives=alternatives,
  )


def run(
  model,
  prompts,
  beams,
  *,
  ends=(),
  chunks=(NEW,),
  length_penalty=1.0,
  early_stopping=False,
  options={},
  alternatives=0,
  **how,
):
  """[(score, ids)] of each prompt's beams, best first; and all that is known of them."""
  state = begun(
    start(model, prompts, **how),
    beams,
    length_penalty=length_penalty,
    early_stopping=early_stopping,
    alternatives=alternatives,
  )
  for count in chunks:
    state, going = beam.search(
      model,
      state,
      rules(len(prompts) * beams, ends, vocabulary=CONFIG.V, **options),
      jnp.int32(count),
    )
  assert not np.asarray(going).any(), 'not ended'
  scores, texts = jax.tree.map(np.asarray, beam.best(state))
  ids = [row[real].tolist() for row, real in zip(texts.ids, texts.real)]
  return [
    list(zip(scores[p].tolist(), ids[p * beams :][:beams])) for p in range(len(prompts))
  ], texts


def assert_same(found, expected):
  assert [[ids for _, ids in one] for one in found] == [[ids for _, ids in one] for one in expected]
  np.testing.assert_allclose(
    [[score for score, _ in one] for one in found],
    [[score for score, _ in one] for one in expected],
    rtol=1e-5,
  )


@jax.jit
def law(model, tokens, source):
  others = {} if source is None else {'source': source[0], 'source_segments': source[1]}
  return jax.nn.log_softmax(model.logits(model(tokens, **others).hidden), -1)


def after(model, prompt, texts, source=None, width=24):
  """[texts, tokens, V] log-probabilities, by the training forward pass,
  of each of a text's tokens and of the one behind it.
  """
  tokens = np.zeros((len(texts), width), np.int32)
  for row, text in zip(tokens, texts):
    row[: len(prompt) + len(text)] = prompt + text
  if source is not None:
    source = jax.tree.map(lambda x: put(np.repeat(x, len(texts), 0)), source)
  return np.asarray(law(model, put(tokens), source))[:, len(prompt) - 1 :]


def rescored(model, prompt, texts, source=None):
  found = after(model, prompt, texts, source)
  return [found[i, np.arange(len(text)), text] for i, text in enumerate(texts)]


@pytest.mark.slow
def test_one_beam_is_greedy(model):
  expected = start(model, PROMPTS)
  _, chunk = decode_chunk(model, expected, rules(3, temperature=0.0), steps=NEW, pad=PAD)
  found, texts = run(model, PROMPTS, 1)
  assert [ids for ((_, ids),) in found] == chunk.ids.tolist()
  np.testing.assert_allclose(texts.raw[:, :NEW], chunk.raw, rtol=1e-5, atol=1e-6)


def check_scores(
  model, prompts=PROMPTS, beams=4, length_penalty=1.0, tolerance=2e-5, source=None, **how
):
  """Scores are those of the training forward pass, of texts that differ."""
  found, texts = run(model, prompts, beams, length_penalty=length_penalty, source=source, **how)
  for p, (prompt, own) in enumerate(zip(prompts, found)):
    assert len({tuple(ids) for _, ids in own}) == beams and all(len(set(ids)) > 1 for _, ids in own)
    assert sorted((score for score, _ in own), reverse=True) == [score for score, _ in own]
    parts = rescored(
      model, prompt, [ids for _, ids in own], jax.tree.map(lambda x: x[p : p + 1], source)
    )
    for (score, ids), raw, part in zip(own, texts.raw[p * beams :], parts):
      np.testing.assert_allclose(
        score, part.sum() / len(ids) ** length_penalty, rtol=tolerance, atol=tolerance
      )
      np.testing.assert_allclose(raw[: len(ids)], part, rtol=10 * tolerance, atol=10 * tolerance)
  return found


@pytest.mark.slow
def test_scores_are_those_of_the_training_forward_pass(model):
  found = check_scores(model)
  greedy, _ = run(model, PROMPTS, 1)
  assert any(one[0][0] > other[0][0] + 1e-3 for one, other in zip(found, greedy)), (
    'nothing was gained: too dull to tell anything'
  )


PENALTIES = dict(
  presence_penalty=0.4,
  frequency_penalty=0.7,
  repetition_penalty=1.3,
  logit_bias={7: 1.5, 12: -float('inf')},
)


def check_penalties(model):
  found, texts = run(model, PROMPTS, 4, options=PENALTIES)
  for p, (prompt, own) in enumerate(zip(PROMPTS, found)):
    for row, (score, ids) in zip(range(p * 4, p * 4 + 4), own):
      expected = rescored(model, prompt, [ids])[0]
      for t, token in enumerate(ids):
        times = ids[:t].count(token)
        expected[t] *= 1.3 if token in prompt + ids[:t] else 1
        expected[t] -= 0.4 * (times > 0) + 0.7 * times - 1.5 * (token == 7)
      assert 12 not in ids
      np.testing.assert_allclose(texts.processed[row, : len(ids)], expected, rtol=1e-4, atol=1e-5)
      np.testing.assert_allclose(score, expected.mean(), rtol=2e-5)


@pytest.mark.slow
def test_penalties_and_bias_change_log_probabilities_that_are_not_normalised_again(model):
  check_penalties(model)


@pytest.mark.costly
@pytest.mark.parametrize('fault', ['cache', 'other prompts', 'history'])
def test_planted_faults_break_it(model, fault, monkeypatch):
  """A cache that is not reordered; beams of other prompts mixed in;
  penalties that look at another beam's tokens.
  """
  searching, moving, choosing = beam.search.__wrapped__, moves.reordered, beam._chosen

  def forgetful(state, *others):
    new, *rest = choosing(state, *others)
    return dataclasses.replace(
      new, rows=dataclasses.replace(new.rows, history=state.rows.history)
    ), *rest

  if fault == 'cache':
    monkeypatch.setattr(moves, 'reordered', lambda cache, sources, shared: cache)
  elif fault == 'other prompts':
    monkeypatch.setattr(
      moves,
      'reordered',
      lambda cache, sources, shared: moving(cache, sources.reshape(1, -1), shared[:1]),
    )
  else:
    monkeypatch.setattr(beam, '_chosen', forgetful)
  monkeypatch.setattr(
    beam, 'search', jax.jit(lambda *arguments: searching(*arguments), donate_argnums=1)
  )
  with pytest.raises(AssertionError):
    (check_penalties if fault == 'history' else check_scores)(model)


def plainly(model, prompt, beams, ends, length_penalty, early_stopping, new=NEW):
  """The same search with lists and without a cache."""
  running, finished = [(0.0, [])], []
  for made in range(1, new + 1):
    laws = after(model, prompt, [text for _, text in running])[:, made - 1]
    candidates = sorted(
      (
        (score + own[token], [*text, token])
        for (score, text), own in zip(running, laws)
        for token in range(len(own))
      ),
      key=lambda pair: -pair[0],
    )

    def over(text):
      return text[-1] in ends or made == new

    finished += [
      (score / made**length_penalty, text) for score, text in candidates[:beams] if over(text)
    ]
    finished = sorted(finished, key=lambda pair: -pair[0])[:beams]
    running = [(score, text) for score, text in candidates if not over(text)][:beams]
    if len(finished) == beams and running:
      length = new if early_stopping == 'never' and length_penalty > 0 else made
      if early_stopping is True or running[0][0] / length**length_penalty <= finished[-1][0]:
        break
  return finished


@pytest.fixture(scope='module')
def ends(model):
  """Two ids that end some beams early and others not."""
  (own,), _ = run(model, PROMPTS[:1], 4)
  return own[0][1][3], own[1][1][7]


@pytest.mark.parametrize('early_stopping', [False, True, 'never'])
@pytest.mark.parametrize('length_penalty', [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_it_is_the_plain_search(model, ends, length_penalty, early_stopping):
  found, _ = run(
    model, PROMPTS, 4, ends=ends, length_penalty=length_penalty, early_stopping=early_stopping
  )
  assert_same(
    found, [plainly(model, prompt, 4, ends, length_penalty, early_stopping) for prompt in PROMPTS]
  )


def test_options_make_a_difference(model, ends):
  every = [
    run(model, PROMPTS, 4, ends=ends, length_penalty=penalty, early_stopping=early)[0]
    for penalty, early in ((-1.0, False), (2.0, False), (1.0, True), (2.0, 'never'), (0.5, False))
  ]
  assert len({str([[ids for _, ids in one] for one in found]) for found in every}) >= 4, (
    'too dull to tell anything'
  )
  lengths = {len(ids) for found in every for one in found for _, ids in one}
  assert min(lengths) < 6 and max(lengths) == NEW


def test_a_prompt_is_searched_alike_alone_and_in_any_chunks(model, ends):
  for early_stopping in (False, True):
    found, _ = run(model, PROMPTS, 4, ends=ends, early_stopping=early_stopping)
    assert_same(
      run(model, PROMPTS, 4, ends=ends, early_stopping=early_stopping, chunks=(1,) * NEW)[0], found
    )
    assert_same(
      run(model, PROMPTS, 4, ends=ends, early_stopping=early_stopping, chunks=(5, 7, 9))[0], found
    )
    for i, prompt in enumerate(PROMPTS):
      assert_same(
        run(model, [prompt], 4, ends=ends, early_stopping=early_stopping)[0], found[i : i + 1]
      )


def test_a_wide_beam_finds_what_enumeration_finds():
  small = make_model(dataclasses.replace(CONFIG, vocabulary=5))
  prompt, end, new = [1, 3], 2, 3
  texts = [
    list(text)
    for n in (1, 2, 3)
    for text in itertools.product(range(5), repeat=n)
    if end not in text[:-1] and (n == new or text[-1] == end)
  ]
  expected = sorted(
    (
      (parts.sum() / len(parts), text) for parts, text in zip(rescored(small, prompt, texts), texts)
    ),
    key=lambda pair: -pair[0],
  )
  state = begun(start(small, [prompt], new=new), 100)
  state, going = beam.search(small, state, rules(100, [end]), jnp.int32(new))
  scores, found = jax.tree.map(np.asarray, beam.best(state))
  assert not going.any() and len(texts) == 85 and np.isneginf(scores[0, 85:]).all(), (
    'there are no other texts'
  )
  np.testing.assert_allclose(scores[0, :85], [score for score, _ in expected], rtol=1e-5)
  assert [row[real].tolist() for row, real in zip(found.ids[:85], found.real)] == [
    text for _, text in expected
  ]


ARCHITECTURES = {
  'rings that wrap': (dict(window=9), {}, 2e-5),
  'latent attention, experts': (
    dict(
      kv_heads=4,
      head_width=6,
      latent=LatentConfig(width=6, query_width=8, rope_width=4, value_width=3),
      moe=MoEConfig(experts=4, feed_forward=8),
    ),
    {},
    2e-5,
  ),
  'int8': (dict(window=9, global_every=2), dict(dtype='int8'), 4e-2),
  'encoder-decoder': (
    dict(
      encoder_layers=2, position='relative', relative_buckets=8, relative_distance=12, kv_heads=4
    ),
    {},
    2e-5,
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', ARCHITECTURES)
def test_architectures_and_caches_of_several_blocks(name, monkeypatch):
  changes, how, tolerance = ARCHITECTURES[name]
  monkeypatch.setattr(cached, 'BLOCK', 8)
  other, source = make_model(dataclasses.replace(CONFIG, **changes)), None
  if 'encoder_layers' in changes:
    counts = np.array([[9], [4], [7]])
    source = (
      put(np.random.default_rng(0).integers(1, 40, (3, 9), np.int32)),
      put((np.arange(9)[None] < counts).astype(np.int32)),
    )
  check_scores(other, tolerance=tolerance, source=source, capacity=40, append=1, **how)


def test_the_cache_is_rewritten_in_place(model, monkeypatch):
  monkeypatch.setattr(cached, 'BLOCK', 8)
  state = begun(start(model, PROMPTS, capacity=64), 4)
  compiled = beam.search.lower(model, state, rules(12), jnp.int32(4)).compile()
  size, memory = (
    sum(x.nbytes for x in jax.tree.leaves(state.rows.cache.held)),
    compiled.memory_analysis(),
  )
  assert memory.alias_size_in_bytes >= size
  assert memory.temp_size_in_bytes < size, 'a second cache'


def test_other_options_compile_nothing(model):
  run(model, PROMPTS, 4)
  before = beam.search._cache_size() + beam.begin._cache_size() + beam.best._cache_size()
  run(
    model,
    PROMPTS,
    4,
    chunks=(3, 9),
    length_penalty=0.3,
    early_stopping='never',
    ends=(5,),
    options=dict(repetition_penalty=1.2),
  )
  assert beam.search._cache_size() + beam.begin._cache_size() + beam.best._cache_size() == before


def test_what_was_found_until_an_interruption(model):
  state, going = beam.search(model, begun(start(model, PROMPTS), 4), rules(12), jnp.int32(5))
  scores, texts = beam.best(state)
  assert going.all() and (texts.real.sum(1) == 5).all()
  np.testing.assert_allclose(
    scores.reshape(-1), np.where(texts.real, texts.raw, 0).sum(1) / 5, rtol=1e-5
  )


def test_alternatives(model):
  found, texts = run(model, PROMPTS, 4, alternatives=3)
  for p, prompt in enumerate(PROMPTS):
    expected = np.sort(after(model, prompt, [ids for _, ids in found[p]])[:, :NEW], -1)[..., :-4:-1]
    np.testing.assert_allclose(texts.alternatives_raw[p * 4 :][:4], expected, rtol=1e-4, atol=1e-5)


def test_scores_that_are_not_numbers_end_a_prompt(model):
  state = begun(start(model, PROMPTS), 4)
  logits = state.rows.logits.at[5].set(jnp.nan)
  fine, going = beam.search(
    model,
    dataclasses.replace(state, rows=dataclasses.replace(state.rows, logits=logits)),
    rules(12),
    jnp.int32(2),
  )
  assert going.tolist() == [True, True, True], 'a beam that there is not yet'
  logits = fine.rows.logits.at[5].set(jnp.nan)
  state, going = beam.search(
    model,
    dataclasses.replace(fine, rows=dataclasses.replace(fine.rows, logits=logits)),
    rules(12),
    jnp.int32(2),
  )
  assert going.tolist() == [True, False, True] and state.broken.tolist() == [False, True, False]


MESHES = [dict(data=2, tensor=2), dict(data=2, fsdp=2, expert=2), dict(stage=2, data=2)]
TEXTS = ['def main(', '', 'naïve']


def make_generator(sizes, vocabulary=259):
  mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: np.prod([1, *sizes.values()])])
  config = dataclasses.replace(CONFIG, vocabulary=vocabulary)
  with jax.set_mesh(mesh):
    return Generator(
      jax.jit(transformer.init, static_argnums=(0, 1))(config, 0), ByteTokenizer(), mesh
    )


@pytest.fixture(scope='module')
def generator():
  return make_generator({})


HOW = dict(beams=3, num_samples=2, max_new_tokens=9, length_penalty=0.7)


@pytest.fixture(scope='module')
def expected(generator):
  return generator(TEXTS, **HOW)


@pytest.fixture(scope='module')
def on_one():
  return make_generator({}, 260)(TEXTS, **HOW)  # 260 split where 259 do not


@pytest.mark.slow
def test_completions(generator, expected):
  assert [c.prompt for c in expected] == [text for text in TEXTS for _ in range(2)]
  for best, other in zip(expected[::2], expected[1::2]):
    assert best.score >= other.score and best.ids != other.ids
  for c in expected:
    assert c.finish == (
      'stop' if c.ids[-1] == generator.tokenizer.eos else 'length'
    ) and c.text == generator.tokenizer.decode(c.ids)
    np.testing.assert_allclose(c.score, sum(c.logprobs) / len(c.ids) ** 0.7, rtol=1e-5)
    np.testing.assert_allclose(
      c.logprobs, generator.score([c.prompt_ids + c.ids])[0][-len(c.ids) :], rtol=1e-4, atol=1e-5
    )
  assert generator.report.rows == 9 and generator.report.steps == 9
  (greedy,) = generator('def main(', temperature=0.0, max_new_tokens=9)
  assert greedy.score is None and sum(greedy.logprobs) / 9**0.7 < expected[0].score
  (c,) = generator(
    'def main(', beams=4, max_new_tokens=9, logprobs=2, chunk=2, stop=[expected[0].ids[2]]
  )
  assert len(c.alternatives) == len(c.ids) and all(len(pair) == 2 for pair in c.alternatives)


@pytest.mark.slow
@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_a_mesh_changes_nothing(sizes, on_one):
  expected, found = on_one, make_generator(sizes, 260)(TEXTS, **HOW)
  assert [c.ids for c in found] == [c.ids for c in expected]
  np.testing.assert_allclose([c.score for c in found], [c.score for c in expected], rtol=1e-5)


@pytest.mark.slow
def test_a_constraint_is_kept_to(generator):
  pytest.importorskip('outlines_core', reason='outlines-core is not installed')
  constraint = Constraint(generator.tokenizer, regex='(cat|cow|dog)s?')
  found = generator(
    ['a', 'b'],
    beams=6,
    num_samples=6,
    constraint=[constraint, None],
    max_new_tokens=6,
    length_penalty=0.0,
  )
  assert sorted(c.text for c in found[:6]) == ['cat', 'cats', 'cow', 'cows', 'dog', 'dogs'] and {
    c.finish for c in found[:6]
  } == {'stop'}
  for c in found[:6]:
    np.testing.assert_allclose(
      c.score, generator.score([c.prompt_ids + c.ids])[0][-len(c.ids) :].sum(), rtol=1e-5
    )
  few = generator(
    ['a', 'b'],
    beams=8,
    num_samples=8,
    constraint=[constraint, None],
    max_new_tokens=6,
    length_penalty=0.0,
  )
  assert [c.prompt for c in few] == ['a'] * 6 + ['b'] * 8, 'all texts that there are'
  assert [c.text for c in few[:6]] == [c.text for c in found[:6]]
  with pytest.raises(ValueError, match='a constraint and logit_bias leave no text behind prompt 0'):
    generator(
      'a',
      beams=2,
      constraint=constraint,
      logit_bias={i + 3: -np.inf for i in b'cd'},
      max_new_tokens=6,
    )


@pytest.mark.slow
def test_scores_that_are_not_numbers_raise():
  broken = make_generator({})
  broken.model = jax.tree.map(lambda x: x * jnp.nan, broken.model)
  with pytest.raises(FloatingPointError, match='are not finite'):
    broken('a', beams=2, max_new_tokens=4)


@pytest.mark.parametrize(
  'options, words',
  [
    (dict(beams=0), 'beams=0 must be at least 1'),
    (
      dict(beams=2, temperature=0.7),
      'temperature=0.7 with beams=2: a search draws nothing; leave temperature at 1',
    ),
    (dict(beams=2, temperature=[1.0, 0.5]), 'with beams=2'),
    (dict(beams=2, top_k=5), 'top_k=5 with beams=2.*leave top_k at 0'),
    (dict(beams=2, top_p=0.9), 'top_p=0.9 with beams=2.*leave top_p at 1'),
    (dict(beams=2, min_p=0.1), 'min_p=0.1 with beams=2.*leave min_p at 0'),
    (dict(beams=2, lookup=3), 'lookup with beams=2: a draft guesses one text'),
    (dict(beams=2, num_samples=3), 'num_samples=3 with beams=2'),
    (dict(beams=2, stop='\n'), 'with beams=2: it ranks by ids'),
    (dict(beams=2, length_penalty=float('nan')), 'length_penalty=nan must be a finite number'),
    (
      dict(beams=2, early_stopping='always'),
      "early_stopping='always' must be False, True or 'never'",
    ),
    (dict(length_penalty=2.0), 'length_penalty=2.0 .*are of a search, but beams=1'),
  ],
)
def test_bad_options_raise(generator, options, words):
  with pytest.raises(ValueError, match=words):
    generator('a', max_new_tokens=4, **options)


def test_nothing_is_streamed(generator):
  for way in (generator.stream, lambda prompt, **options: generator.ids([prompt], **options)):
    with pytest.raises(ValueError, match='beams=2: no token of a search is certain before its end'):
      way('a', beams=2)


@pytest.mark.parametrize('given_away', [False, True])
def test_an_interrupted_search_gives_what_there_is(generator, monkeypatch, given_away):
  calls, searching = [], beam.search

  def interrupted(*arguments, **options):
    calls.append(1)
    found = searching(*arguments, **options) if len(calls) < 3 or given_away else None
    if len(calls) == 3:
      raise KeyboardInterrupt
    return found

  monkeypatch.setattr(beam, 'search', interrupted)
  found = generator(TEXTS, chunk=2, **HOW)
  assert [(c.finish, len(c.ids)) for c in found] == [('interrupted', 3)] * 6 and all(
    np.isfinite(c.score) for c in found
  )
