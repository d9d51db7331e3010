"""Do rows of several adapters, in one batch of one model, write what each adapter writes alone?"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tokenizers import ByteTokenizer
from decode import loop
from decode.bulk import complete, samples
from decode.conversation import Conversation
from decode.engine import Engine, Request, Sizes
from decode.generating import generating_model
from decode.generator import Generator
from decode.sampling import make_sampling
from model import adapters, banks, transformer, weights
from model.adaptation import AdapterConfig
from model.config import LatentConfig, MoEConfig
from model.weights import int8
from model.weights.bank import Bank
from model.weights.int8 import Int8
from model.weights.plain import Plain
from parallel.mesh import MeshConfig, make_mesh
from tests.decode.small import config_of
from tests.decode.test_engine import compilations

LORA = AdapterConfig(kind='lora', rank=3, alpha=6.0)
CONFIGS = {
  'orders': LORA,
  # Another rank, another scale, fewer matrices.
  'tables': AdapterConfig(
    kind='lora', rank=2, alpha=4.0, stabilised=True, targets=('stack.blocks.*.attention.[qv]',)
  ),
  'lengths': dataclasses.replace(LORA, kind='dora', alpha=3.0),
}
NAMES = ['', *CONFIGS]
BLOCKS = ('stack.blocks.*.attention.*', 'stack.blocks.*.feed_forward.shared.*')
FAMILIES = {
  'llama': {},
  'windows': dict(window=8, global_every=2, attention_softcap=3.0, layers=3),
  'gemma': dict(
    norm_placement='both',
    norm_offset=True,
    qk_norm=True,
    embedding_scale=True,
    activation='gelu',
    tie_embeddings=True,
    logit_softcap=5.0,
  ),
  'biases': dict(biases='all', norm='layer', gated=False, position='learned'),
  'latent': dict(latent=LatentConfig(width=6, query_width=8, rope_width=4, value_width=3)),
  'shared expert': dict(moe=MoEConfig(experts=4, feed_forward=8, shared_feed_forward=12)),
  'encoder': dict(encoder_layers=2, position='relative', kv_heads=0),
}


def mesh_of(**sizes):
  return make_mesh(MeshConfig(**{'data': 1} | sizes), jax.devices()[: math.prod(sizes.values())])


def awake(adapter, seed):
  """With a B that is not zero any more."""
  draw = np.random.default_rng(seed)

  def noise(p):
    return p + jnp.float32(0.3 * draw.normal(size=p.shape))

  return jax.tree.map(noise, adapter)


class Models:
  """A base, its adapters by name, and the model that merging each makes of it."""

  def __init__(self, mesh, configs=CONFIGS, **changes):
    self.mesh = mesh
    config = config_of(64, **{'heads': 4, 'vocabulary_multiple': 16} | changes)
    with jax.set_mesh(mesh):
      self.base = jax.jit(transformer.init, static_argnums=(0, 1))(config, 0)
      self.adapters = {}
      for i, (name, settings) in enumerate(configs.items()):
        new = jax.jit(adapters.new, static_argnums=1)(self.base, settings, jax.random.key(i))
        self.adapters[name] = awake(new, i), settings

  def merged(self, name):
    if not name:
      return self.base
    adapter, settings = self.adapters[name]
    with jax.set_mesh(self.mesh):
      return jax.jit(functools.partial(adapters.merged, config=settings))(self.base, adapter)

  def together(self, weights=''):
    """A Generator of the base with all adapters."""
    return Generator(self.base, ByteTokenizer(), self.mesh, weights, self.adapters)

  def alone(self, name):
    """One of what an adapter was merged into: another implementation."""
    return Generator(self.merged(name), ByteTokenizer(), self.mesh)


@functools.cache
def models_of(name='llama', **sizes):
  configs = CONFIGS
  if name == 'shared expert':
    configs = {
      key: dataclasses.replace(settings, targets=BLOCKS) for key, settings in configs.items()
    }
  return Models(mesh_of(**sizes), configs, **FAMILIES[name])


@functools.cache
def banked(order=tuple(CONFIGS), rank=0, room=0):
  """Weights of an engine with these adapters."""
  models = models_of()
  pairs = [models.adapters[name] if name else (None, None) for name in order]
  trees, configs = zip(*pairs, *[(None, None)] * room)
  with jax.set_mesh(models.mesh):
    model = jax.jit(generating_model)(models.base)
    run = jax.jit(banks.banked, static_argnums=(1, 3), static_argnames='rank')
    return run(model, models.base.config, trees, configs, rank=rank)


@functools.cache
def engine_of(adapters=3, about=''):
  """about: of which weights."""
  del about
  models = models_of()
  sizes = Sizes(rows=6, capacity=40, read_tokens=8, steps=4, bias=2, ends=2, adapters=adapters)
  return Engine(banked().config, models.mesh, sizes)


def request(length, adapter, new=9, **options):
  ids = np.random.default_rng(length).integers(3, 259, length).tolist()
  return Request(ids, new, make_sampling(1, vocabulary=259, **options), adapter=adapter)


# The same prompt with each adapter, and others; drawn and greedy.
REQUESTS = [
  *(request(11, adapter, temperature=0.0) for adapter in (0, 1, 2, 3)),
  *(request(11, adapter, seed=5, temperature=0.8) for adapter in (2, 1, 3, 0)),
  request(1, 1, seed=3),
  request(21, 2, temperature=0.0),
]


def bits(written):
  assert not written.broken and len(written.ids) == len(written.raw) > 0
  return written.ids, written.raw, written.processed


def alone(engine, model, asked):
  """What a request gets where no one else is."""
  engine.reset()
  ((_, written),) = complete(engine, model, [asked])
  return bits(written)


def check_company(engine, model):
  """Who else is there changes no bit, and each row's log-probabilities are those of the model that
  its adapter was merged into.
  """
  engine.reset()
  together = {index: bits(written) for index, written in complete(engine, model, REQUESTS)}
  for index, asked in enumerate(REQUESTS):
    assert together[index] == alone(engine, model, asked), index
    ids, raw, _ = together[index]
    (scores,) = merged_generator(NAMES[asked.adapter]).score([[*asked.prompt, *ids]])
    np.testing.assert_allclose(raw, scores[len(asked.prompt) - 1 :], rtol=0, atol=1e-5)


@functools.cache
def merged_generator(name):
  return models_of().alone(name)


@pytest.mark.slow
def test_rows_of_several_adapters_are_each_alone_and_the_merged_model():
  check_company(engine_of(), banked())
  texts = [written.ids for _, written in sorted(complete(engine_of(), banked(), REQUESTS[:4]))]
  assert len(set(map(tuple, texts))) == 4, 'the adapters differ'


@pytest.mark.slow
def test_other_values_compile_nothing():
  """Adapters that change places, and one that comes into a place for later."""
  engine, first = engine_of(3, 'with room'), banked(('orders', 'tables'), rank=4, room=1)
  others = banked(('tables', 'orders'), rank=4, room=1)
  third = banked(('orders', '', 'tables'), rank=4)
  expected = alone(engine, first, REQUESTS[1])
  with compilations() as compiled:
    swapped = alone(engine, others, dataclasses.replace(REQUESTS[1], adapter=2))
    empty = alone(engine, first, dataclasses.replace(REQUESTS[1], adapter=3))
    came = alone(engine, third, dataclasses.replace(REQUESTS[1], adapter=3))
  assert not compiled
  for ours, theirs in ((swapped, expected), (empty, alone(engine, first, REQUESTS[0]))):
    assert ours[0] == theirs[0]
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=1e-5)
  assert came[0] != empty[0]


@pytest.mark.slow
def test_samples_share_a_reading_and_adapters_do_not():
  engine = engine_of()
  engine.reset()
  one = samples(REQUESTS[5], 2)
  for row, asked in enumerate([*one, dataclasses.replace(one[0], adapter=2)]):
    engine.join(row, asked)
  assert engine.reading == [0, 2]
  engine.reset()


@pytest.fixture(scope='module')
def generator():
  return models_of().together()


PROMPTS = ['one text', 'another, longer text', 'one text', 'one text']
WHICH = ['orders', 'tables', '', 'lengths']


@pytest.mark.slow
def test_texts_are_scored_with_one_each(generator):
  scored = generator.score(PROMPTS, adapter=WHICH)
  for prompt, name, scores in zip(PROMPTS, WHICH, scored):
    np.testing.assert_allclose(scores, merged_generator(name).score(prompt)[0], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_generator_takes_one_for_each_prompt(generator):
  options = dict(max_new_tokens=8, seed=4)
  together = generator(PROMPTS, adapter=WHICH, num_samples=2, temperature=0.7, **options)
  assert [c.ids for c in together[4:6]] == [
    c.ids for c in generator(PROMPTS[2], num_samples=2, temperature=0.7, max_new_tokens=8, seed=6)
  ]
  for i, name in enumerate(WHICH):
    completion = together[2 * i]
    (scores,) = merged_generator(name).score([[*completion.prompt_ids, *completion.ids]])
    expected = scores[len(completion.prompt_ids) - 1 :]
    np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_searches_drafts_sessions_and_batches_take_one(generator):
  greedy = dict(max_new_tokens=10, temperature=0.0)
  expected = [
    merged_generator(name)(prompt, **greedy)[0].ids for prompt, name in zip(PROMPTS, WHICH)
  ]
  for how in (dict(lookup=2), dict(early_exit=1), dict(draft=merged_generator(''))):
    assert [c.ids for c in generator(PROMPTS, adapter=WHICH, **greedy, **how)] == expected, how
  batches = generator.in_batches(PROMPTS, 3, adapter=WHICH, **greedy)
  assert [c.ids for batch in batches for c in batch] == expected
  for prompt, name, ids in zip(PROMPTS, WHICH, expected):
    session = generator.session(48, adapter=name)
    assert session(prompt, **greedy).ids == ids
    assert session.fork().truncate(5).append('more').text == session.truncate(5).append('more').text
    (searched,) = generator(prompt, adapter=name, beams=3, max_new_tokens=6)
    (theirs,) = merged_generator(name)(prompt, beams=3, max_new_tokens=6)
    assert searched.ids == theirs.ids
    assert ''.join(generator.stream(prompt, adapter=name, **greedy))
  talk = Conversation(generator, chat=False, adapter='orders', **greedy)
  assert list(talk.say('one text'))
  other = Conversation(merged_generator('orders'), chat=False, **greedy)
  assert ''.join(other.say('one text')) == talk.turns[0].answer


@pytest.mark.slow
def test_names_and_numbers_that_there_are_not(generator):
  with pytest.raises(ValueError, match="adapter='order' is unknown; did you mean 'orders'"):
    generator('a', adapter='order')
  with pytest.raises(ValueError, match='adapter has 2 values for 1 prompts'):
    generator.score('a', adapter=['', 'orders'])
  with pytest.raises(ValueError, match='no adapters were loaded'):
    merged_generator('')('a', adapter='orders')
  with pytest.raises(ValueError, match="adapter='orders' is of a whole session"):
    generator.session(32)('a', adapter='orders')
  with pytest.raises(
    NotImplementedError, match='a Generator with adapters .orders, tables, lengths.'
  ):
    generator('a', draft=generator)
  with pytest.raises(ValueError, match=r'adapter=4 of a request must be in \[0, 3\]'):
    engine_of().join(0, request(3, 4))
  with pytest.raises(ValueError, match='weights with 3 adapters in an engine for 0'):
    engine_of(0).compile(banked())
  with pytest.raises(ValueError, match='told of which'):
    jax.eval_shape(lambda model: model(jnp.zeros((1, 4), jnp.int32)), generator.model)


def refused(models, name, settings, change=lambda x: x):
  with jax.set_mesh(models.mesh):
    new = jax.jit(adapters.new, static_argnums=1)(models.base, settings, jax.random.key(0))
  pair = jax.tree.map(change, new), settings
  Generator(models.base, ByteTokenizer(), models.mesh, adapters={name: pair})


def test_what_goes_beside_no_other_is_refused_by_name():
  models = models_of()
  for settings, words in [
    (dataclasses.replace(LORA, targets=('embedding.tokens',)), "'words' has embedding.tokens"),
  ]:
    with pytest.raises(NotImplementedError, match=words):
      refused(models, 'words', settings)
  with pytest.raises(ValueError, match="'words' has numbers that are not finite"):
    refused(models, 'words', LORA, lambda x: x * jnp.nan)


def thin(axes_of, shape, inputs, rank, many, seed):
  draw = np.random.default_rng(seed)
  ins, outs = shape[:inputs], shape[inputs:]
  a = draw.normal(size=(many, *ins, rank)).astype(np.float32)
  b = draw.normal(size=(many, rank, *outs)).astype(np.float32)
  return Plain(jnp.array(a), (None, *axes_of[:inputs], None)), Plain(
    jnp.array(b), (None, None, *axes_of[inputs:])
  )


@pytest.mark.costly
@pytest.mark.parametrize('stored', ['plain', 'int8'])
@pytest.mark.parametrize('many', [2, 5])
def test_products_are_what_the_formula_says(many, stored):
  """By numpy: of fewer adapters than rows, and of more; of MLA's products against a cache, too."""
  B, T, draw = 3, 4, np.random.default_rng(0)
  index = np.array([2, 0, 1], np.int32)
  for formula, left, shape, inputs in [
    ('BTD,DNH->BTNH', (6,), (6, 2, 5), 1),
    ('BTNH,NHD->BTD', (2, 5), (2, 5, 6), 2),
    ('BTNH,RNH->BTNR', (2, 5), (4, 2, 5), 1),
    ('BTNR,RNH->BTNH', (2, 4), (4, 2, 5), 1),
    ('...D,DE->...E', (6,), (6, 7), 1),
  ]:
    w = draw.normal(size=shape).astype(np.float32)
    axes = (None,) * len(shape)
    base = Plain(jnp.array(w), axes)
    if stored == 'int8':
      base = Int8.of(jnp.array(w), tuple(range(-len(shape), inputs - len(shape))), axes)
      w = np.asarray(base.numbers('float32'))
    a, b = thin(axes, shape, inputs, 2, many, many)
    t = draw.uniform(0.5, 2, size=(many, *shape[inputs:])).astype(np.float32)
    stretch = Plain(jnp.array(t), (None,) * t.ndim)
    bank = Bank(base, a, b, stretch, None, inputs).of_rows(jnp.array(index))
    x = draw.normal(size=(B, T, *left)).astype(np.float32)
    y = jax.jit(lambda bank, x, formula=formula: bank.product(formula, x, 'float32'))(bank, x)
    for row, i in enumerate(index):
      whole = w.astype(np.float64)
      if i:
        pair = [np.asarray(part.value[i - 1], np.float64) for part in (a, b)]
        whole = (whole + np.tensordot(*pair, axes=1)) * t[i - 1]
      expected = np.einsum(formula.replace('...', 'BT'), x[row : row + 1], whole)
      np.testing.assert_allclose(
        y[row : row + 1], expected, rtol=0, atol=2e-3 if stored == 'int8' else 2e-5
      )


def check_merged(generator, models, atol=1e-5):
  """Scores, and the log-probabilities of what is written, are those of the merged models."""
  greedy = dict(max_new_tokens=6, temperature=0.0)
  encoder = models.base.config.encoder_layers
  expected = [models.alone(name)(p, **greedy)[0] for p, name in zip(PROMPTS, WHICH)]
  completions = generator(PROMPTS, adapter=WHICH, **greedy)
  assert len({round(sum(c.logprobs), 3) for c in completions}) == 4, 'they differ'
  for ours, theirs in zip(completions, expected):
    assert ours.ids == theirs.ids
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=atol)
  if not encoder:
    for prompt, name, scores in zip(PROMPTS, WHICH, generator.score(PROMPTS, adapter=WHICH)):
      (theirs,) = models.alone(name).score(prompt)
      np.testing.assert_allclose(scores, theirs, rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize('family', FAMILIES)
def test_every_family_takes_several(family):
  models = models_of(family)
  check_merged(models.together(), models)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
  ['family', 'sizes'],
  [
    ('llama', dict(data=2, tensor=4)),
    ('llama', dict(fsdp=4, tensor=2)),
    ('latent', dict(data=2, fsdp=2, tensor=2)),
    ('llama', dict(data=2, context=4)),
    ('shared expert', dict(data=2, expert=4)),
  ],
  ids=str,
)
def test_every_mesh_is_one_device(family, sizes):
  models = models_of(family, **sizes)
  check_merged(models.together(), models_of(family))


@pytest.mark.slow
def test_a_base_in_bytes():
  """The model is the numbers of the bytes, with the adapters on it as they are."""
  models = models_of()
  scored = models.together('int8').score(PROMPTS, adapter=WHICH)
  for prompt, name, scores in zip(PROMPTS, WHICH, scored):
    adapter, settings = models.adapters.get(name, ({}, LORA))
    with jax.set_mesh(models.mesh):
      base = jax.jit(int8.in_bytes)(models.base)
      numbers = jax.jit(functools.partial(adapters.merged, config=settings))(base, adapter)
    (expected,) = Generator(numbers, ByteTokenizer(), models.mesh).score(prompt)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_experts_and_stages_are_refused():
  with pytest.raises(NotImplementedError, match='feed_forward.* among .* of experts'):
    refused(models_of('shared expert'), 'words', LORA)
  with pytest.raises(NotImplementedError, match='mesh.stage=2'):
    models_of('llama', stage=2).together()


def neighbours(model, index):
  return weights.of_rows(model, None if index is None else jnp.roll(index, 1))


@pytest.mark.slow
@pytest.mark.parametrize('fault', ['a neighbour', 'scale twice', 'a reading of another adapter'])
def test_planted_faults_are_noticed(fault, monkeypatch):
  jax.clear_caches()
  model = banked()
  for name in NAMES:
    merged_generator(name)
  if fault == 'a neighbour':
    monkeypatch.setattr(loop, 'of_rows', neighbours)
  elif fault == 'scale twice':
    scale = AdapterConfig.scale.fget
    monkeypatch.setattr(AdapterConfig, 'scale', property(lambda self: scale(self) ** 2))
    model = banked.__wrapped__()
  else:
    alike = Engine._alike

    def careless(self, row, other):
      kept = self._requests
      self._requests = {i: dataclasses.replace(asked, adapter=0) for i, asked in kept.items()}
      same = alike(self, row, other)
      self._requests = kept
      return same

    monkeypatch.setattr(Engine, '_alike', careless)
  with pytest.raises(AssertionError):
    check_company(engine_of.__wrapped__(), model)
  monkeypatch.undo()
  jax.clear_caches()
