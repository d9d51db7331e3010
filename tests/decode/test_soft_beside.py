"""Do rows with soft tokens, low-rank adapters and neither, in one batch, write what each writes
alone, and end where its own context does?
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tokenizers import ByteTokenizer
from decode.bulk import complete
from decode.constrain import Constraint
from decode.conversation import Conversation
from decode.engine import Engine, Request, Sizes
from decode.front import Front
from decode.generator import Generator
from decode.loaded import LoadedModel
from decode.sampling import make_sampling
from model import adapters, soft, transformer
from model.adaptation import AdapterConfig
from model.config import LatentConfig
from model.weights import adapters as banks_of, read
from tests.decode.small import config_of
from tests.decode.test_several_adapters import LORA, awake, mesh_of

CONTEXT = 30
CONFIGS = {
  'spell': AdapterConfig(kind='prompt', tokens=3),
  'orders': LORA,
  'sums': AdapterConfig(kind='prefix', tokens=2),
  'few': AdapterConfig(kind='prompt', tokens=1),
}
FAMILIES = {
  'llama': {},
  'windows': dict(
    window=8,
    global_every=2,
    layers=3,
    qk_norm=True,
    embedding_scale=True,
    tie_embeddings=True,
  ),
  'encoder': dict(encoder_layers=2, position='relative', kv_heads=0),
}
# Physical lengths differ, and the order of adapters is not that in which they were loaded.
PROMPTS = ['one text', 'another, text', 'one text', 'one text', 'one text']
WHICH = ['sums', 'spell', '', 'orders', 'few']
GREEDY = dict(max_new_tokens=6, temperature=0.0)


class Models:
  """A base with adapters, and the model that each makes of it alone."""

  def __init__(self, mesh, names=tuple(CONFIGS), **changes):
    self.mesh = mesh
    config = config_of(CONTEXT, **{'heads': 4, 'vocabulary_multiple': 16} | changes)
    with jax.set_mesh(mesh):
      self.base = jax.jit(transformer.init, static_argnums=(0, 1))(config, 0)
      self.adapters = {}
      for i, name in enumerate(names):
        new = jax.jit(adapters.new, static_argnums=1)(self.base, CONFIGS[name], jax.random.key(i))
        self.adapters[name] = awake(new, i), CONFIGS[name]

  def together(self, weights=''):
    return Generator(self.base, ByteTokenizer(), self.mesh, weights, self.adapters)

  @functools.cache
  def alone(self, name, weights=''):
    """A Generator of the model that has this adapter and no other, as its run is opened."""
    model = self.base
    if name:
      adapter, settings = self.adapters[name]
      with jax.set_mesh(self.mesh):
        model = jax.jit(functools.partial(adapters.merged, config=settings))(model, adapter)
    return Generator(model, ByteTokenizer(), self.mesh, weights)


@functools.cache
def models_of(family='llama', **sizes):
  names = [name for name in CONFIGS if family != 'encoder' or name != 'sums']
  return Models(mesh_of(**sizes), names, **FAMILIES[family])


@pytest.fixture(scope='module')
def generator():
  return models_of().together()


def check_scores(generator, models, names=WHICH):
  """A forward pass over a batch of all is that of the model with one adapter's tokens, by hand."""
  scored = generator.score([PROMPTS[0]] * len(names), adapter=names)
  ids = generator.encoded(PROMPTS[0])
  assert len({round(float(scores.sum()), 4) for scores in scored}) == len(names), 'they differ'
  for name, scores in zip(names, scored):
    adapter, settings = models.adapters[name]
    with jax.set_mesh(models.mesh):
      put = adapters.applied(models.base, adapter, settings)
      front = [*read(put.embedding.tokens).virtual]
      tokens = jnp.asarray([[*front, *ids]])
      logits = jax.jit(lambda model, x: model.logits(model(x).hidden))(put, tokens)
    law = jax.nn.log_softmax(logits[0, len(front) :, : generator.vocabulary])
    expected = law[np.arange(len(ids) - 1), ids[1:]]
    assert len(front) == (settings.tokens if settings.soft else 0)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5, err_msg=name)


def check_written(generator, models, atol=1e-5, **options):
  """Greedy texts of a batch of all are those of each model by itself."""
  named = [(p, n) for p, n in zip(PROMPTS, WHICH) if n in (*models.adapters, '')]
  completions = generator(
    [prompt for prompt, _ in named], adapter=[name for _, name in named], **GREEDY, **options
  )
  assert len({round(sum(each.logprobs), 5) for each in completions}) == len(named), 'they differ'
  for (prompt, name), ours in zip(named, completions):
    (theirs,) = models.alone(name)(prompt, **GREEDY)
    assert ours.ids == theirs.ids and ours.prompt_ids == theirs.prompt_ids, name
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=atol, err_msg=name)


@pytest.mark.slow
def test_scores_are_the_forward_pass_of_one_adapter(generator):
  check_scores(generator, models_of(), ['sums', 'spell'])


def test_a_front_counts_its_tokens():
  plain = Front(positions=20)
  prompt = Front('spell', 0, (300, 301), 20)
  assert (plain.context, prompt.context, Front().context) == (20, 18, 2**63 - 1)
  assert prompt.row([5]) == prompt.whole([5]) == [300, 301, 5] and prompt.behind(4) == 6
  assert prompt.bound(10, 8).note == '' and prompt.bound(10, 9).most == 8
  assert 'model.max_length=20 less 2 soft tokens' in prompt.bound(10, 9).note
  prompt.check_room(17)
  with pytest.raises(ValueError, match='18 tokens leaves no room .* less 2 soft tokens'):
    prompt.check_room(18)
  assert len(prompt.whole([7] * 18)) == 20
  with pytest.raises(ValueError, match='19 tokens passes model.max_length=20 less 2 soft tokens'):
    prompt.whole([7] * 19)
  # An encoder reads them, and what is written has all positions.
  encoder = Front('spell', 0, (300, 301), 20, encoder=True)
  assert encoder.row([5]) == [5] and encoder.whole([5]) == [300, 301, 5]
  assert encoder.context == 20 and encoder.behind(4) == 4


def with_adapter(models, settings, change=lambda x: x, model=None):
  with jax.set_mesh(models.mesh):
    new = jax.jit(adapters.new, static_argnums=1)(models.base, settings, jax.random.key(0))
  pair = jax.tree.map(change, new), settings
  base = model or models.base
  return Generator(base, ByteTokenizer(), models.mesh, adapters={'words': pair})


@pytest.mark.slow
def test_what_goes_beside_no_other_is_refused_by_name(generator):
  models, prompt = models_of(), CONFIGS['spell']
  for settings in (prompt, CONFIGS['sums']):
    with pytest.raises(ValueError, match="'words' has numbers that are not finite"):
      with_adapter(models, settings, lambda x: x * jnp.nan)
  with jax.set_mesh(models.mesh):
    put = soft.applied(models.base, models.adapters['spell'][0])
  with pytest.raises(ValueError, match="'words' has soft tokens, and the model has 3 of its own"):
    with_adapter(models, prompt, model=put)
  with pytest.raises(ValueError, match="adapter='spel' is unknown; did you mean 'spell'"):
    generator.score('a', adapter='spel')
  plain = models.alone('')
  with pytest.raises(ValueError, match="model with adapter='spell' reads soft tokens before every"):
    generator(['a', 'b'], adapter=['orders', 'spell'], draft=plain)
  with pytest.raises(NotImplementedError, match='a Generator with adapters .spell, orders'):
    generator('a', draft=generator)
  latent = LatentConfig(width=6, query_width=8, rope_width=4, value_width=3)
  with jax.set_mesh(models.mesh):
    other = jax.eval_shape(lambda: transformer.init(config_of(CONTEXT, latent=latent), 0))
  with pytest.raises(NotImplementedError, match="adapter.kind='prefix' .* model.latent.width=6"):
    with_adapter(models, CONFIGS['sums'], model=other)
  # The room is that of the row's adapter, and told before anything is generated.
  text = 'x' * (CONTEXT - 3)
  assert len(generator.encoded(text)) == CONTEXT - 2
  with pytest.raises(ValueError, match='28 tokens leaves no room .* less 3 soft tokens'):
    generator.in_batches([text, text], 1, adapter=['few', 'spell'])
  with pytest.raises(ValueError, match='28 tokens passes .* less 3 soft tokens'):
    generator.score(text, adapter='spell')


@pytest.mark.slow
@pytest.mark.long
def test_a_batch_of_all_is_each_alone(generator):
  """As the model of each adapter, and bit for bit as a batch of the same shapes of one of them."""
  check_written(generator, models_of())
  together = generator(PROMPTS, adapter=WHICH, num_samples=2, max_new_tokens=6, seed=3)
  for i, name in enumerate(WHICH):
    same = generator(PROMPTS, adapter=name, num_samples=2, max_new_tokens=6, seed=3)
    for row in (2 * i, 2 * i + 1):
      assert together[row] == same[row], name


def check_context(generator):
  rows = generator(['ab'] * len(WHICH), adapter=WHICH, max_new_tokens=99, temperature=0.0)
  for name, row in zip(WHICH, rows):
    settings = CONFIGS.get(name, LORA)
    soft_tokens = settings.tokens if settings.soft else 0
    assert len(row.prompt_ids) + len(row.ids) == CONTEXT - soft_tokens, name
    assert (f'less {soft_tokens} soft tokens' in row.note) == (soft_tokens > 0)
    (scores,) = generator.score([[*row.prompt_ids, *row.ids]], adapter=name)
    np.testing.assert_allclose(row.logprobs, scores[-len(row.ids) :], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_each_ends_at_the_context_of_its_own(generator):
  check_context(generator)


@pytest.mark.slow
@pytest.mark.long
def test_searches_drafts_sessions_and_talks_have_them(generator):
  models = models_of()
  for how in (dict(lookup=2), dict(early_exit=1)):
    check_written(generator, models, **how)
  drafted = generator(PROMPTS[2:4], adapter=['', 'orders'], draft=models.alone(''), **GREEDY)
  assert [c.ids for c in drafted] == [
    c.ids for c in generator(PROMPTS[2:4], adapter=['', 'orders'], **GREEDY)
  ]
  searched = generator(PROMPTS, adapter=WHICH, beams=2, max_new_tokens=5)
  digits = Constraint(generator.tokenizer, regex='[0-9]{3}')
  kept = generator(PROMPTS, adapter=WHICH, constraint=digits, **GREEDY)
  batches = generator.in_batches(PROMPTS, 3, adapter=WHICH, **GREEDY)
  in_batches = [each for batch in batches for each in batch]
  for i, (prompt, name) in enumerate(zip(PROMPTS[:3], WHICH)):
    alone = models.alone(name)
    (theirs,) = alone(prompt, **GREEDY)
    assert in_batches[i].ids == theirs.ids
    assert searched[i].ids == alone(prompt, beams=2, max_new_tokens=5)[0].ids
    assert kept[i].text.isdigit()
    assert kept[i].ids == alone(prompt, constraint=digits, **GREEDY)[0].ids

    session = generator.session(adapter=name)
    assert session.capacity == alone.session().capacity
    assert session(prompt, **GREEDY).ids == theirs.ids
    session.append('cd').truncate(len(session.ids) - 1)
    (expected,) = alone(list(session.ids), **GREEDY)
    assert session.fork()(**GREEDY).ids == session(**GREEDY).ids == expected.ids
    full = session(max_new_tokens=99, temperature=0.0)
    assert len(session.ids) == session.capacity and 'the context ended it' in full.note

    talk = Conversation(generator, chat=False, adapter=name, **GREEDY)
    assert ''.join(talk.say(prompt)) == theirs.text
    other = Conversation(alone, chat=False, **GREEDY)
    assert ''.join(other.say(prompt)) == theirs.text
    assert (talk.room, talk.limit) == (other.room, other.limit)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('family', ['windows', 'encoder'])
def test_families_take_them(family):
  models = models_of(family)
  check_written(models.together(), models)


@pytest.mark.slow
@pytest.mark.parametrize(
  'family, sizes',
  [
    ('llama', dict(fsdp=2, context=2, tensor=2)),
    pytest.param('encoder', dict(data=2, fsdp=2), marks=pytest.mark.long),
  ],
  ids=str,
)
def test_every_mesh_is_one_device(family, sizes):
  check_written(models_of(family, **sizes).together(), models_of(family))


@pytest.mark.slow
def test_a_base_in_bytes_and_stages():
  models = models_of()
  in_bytes = models.together('int8')
  for name, scores in zip(WHICH[:3], in_bytes.score(PROMPTS[:3], adapter=WHICH[:3])):
    prompt = PROMPTS[WHICH.index(name)]
    (expected,) = models.alone(name, 'int8').score(prompt)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4, err_msg=name)
  # Without matrices of their own, they cross stages, whose microbatches split the rows.
  names = ['spell', 'sums', '', 'spell']
  staged = Models(mesh_of(stage=2), names[:2]).together().score(PROMPTS[:4], adapter=names)
  single = Models(mesh_of(), names[:2])
  for name, prompt, scores in zip(names, PROMPTS, staged):
    (expected,) = single.alone(name).score(prompt)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_an_engine_takes_them(generator):
  """By its documented recipe: ids in front, and a number."""
  models, ids = models_of(), [1, 100, 101, 102]
  virtual = len(read(generator.model.embedding.tokens).virtual)
  sizes = Sizes(
    rows=4, capacity=CONTEXT, read_tokens=8, steps=4, adapters=banks_of(generator.model)
  )
  engine = Engine(
    generator.model.config, generator.mesh, sizes, vocabulary=generator.vocabulary, virtual=virtual
  )

  def asked(name):
    front = generator.adapters[name] if name else generator.plain
    law = make_sampling(1, temperature=0.0)
    return Request(front.row(ids), 6, law, ends=(), adapter=front.index)

  together = dict(complete(engine, generator.model, [asked(name) for name in WHICH]))
  for i, name in enumerate(WHICH):
    ((_, alone),) = complete(engine, generator.model, [asked(name)])
    assert alone.ids == together[i].ids and alone.raw == together[i].raw
    (scores,) = models.alone(name).score([[*ids, *alone.ids]])
    np.testing.assert_allclose(alone.raw, scores[len(ids) - 1 :], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  'fault', ['a neighbour', 'none before a row', 'none before a pass', 'the context of the model']
)
def test_planted_faults_are_noticed(fault, generator, monkeypatch):
  models = models_of()
  for name in WHICH:
    models.alone(name)(PROMPTS[0], **GREEDY)
  check = functools.partial(check_written, generator, models)
  if fault == 'a neighbour':
    fronts_of = LoadedModel.fronts_of

    def rolled(self, *asked):
      fronts = fronts_of(self, *asked)
      return fronts[1:] + fronts[:1]

    monkeypatch.setattr(LoadedModel, 'fronts_of', rolled)
  elif fault == 'none before a row':
    monkeypatch.setattr(Front, 'row', lambda self, ids: [*ids])
  elif fault == 'none before a pass':
    monkeypatch.setattr(Front, 'whole', lambda self, ids: [0] * len(self.soft) + [*ids])
    check = functools.partial(check_scores, generator, models, ['sums', 'spell'])
  else:
    monkeypatch.setattr(Front, 'context', property(lambda self: self.positions))
    check = functools.partial(check_context, generator)
  with pytest.raises(AssertionError):
    check()
