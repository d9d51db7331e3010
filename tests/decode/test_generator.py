"""Does the Generator write the same text whichever way it is asked,
and say what is wrong with what it is given?
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.config import DataConfig
from data.tokenizers import ByteTokenizer
from decode import beam, drafting, loop
from decode.constrain import Constraint
from decode.generating import generating
from decode.generator import Generator
from decode.report import CallTimer
from decode.request import Bound, Row
from decode.sampling import sample_seed
from kernels.blocks import Blocks
from model import params, rearranged, transformer
from model.weights import read
from parallel.mesh import MeshConfig, make_mesh
from tests.decode.small import config_of, generator_of
from training import config as configs, state as states
from training.config import Config
from training.optimizer import make_optimizer
from workdir.checkpoint import Checkpoints

MODEL = config_of(64)
CONFIG = Config(model=MODEL, data=DataConfig(sequence_length=64))
PROMPTS = ['def main(', '', 'naïve']


@pytest.fixture(scope='module')
def generator():
  return generator_of(MODEL)


def same(one, other):
  """Whether two completions are the same, log-probabilities but for rounding:
  other programs add in another order.
  """
  for name in ('logprobs', 'processed'):
    np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-5)
  return dataclasses.replace(one, logprobs=[], processed=[]) == dataclasses.replace(
    other, logprobs=[], processed=[]
  )


def test_text_streams_and_ids_agree(generator):
  together = generator(PROMPTS, max_new_tokens=20, seed=3)
  assert [c.prompt for c in together] == PROMPTS
  for i, completion in enumerate(together):
    assert completion.text == generator.tokenizer.decode(completion.ids)
    assert len(completion.ids) == 20 or completion.finish == 'stop'
    assert ''.join(generator.stream(PROMPTS[i], max_new_tokens=20, seed=3 + i)) == completion.text
    assert same(generator(PROMPTS[i], max_new_tokens=20, seed=3 + i, chunk=7)[0], completion)


class DropsFirstSpace(ByteTokenizer):
  """As SentencePiece models that put a space before every text:
  decoding a whole text takes it away.
  """

  def decode(self, ids):
    return super().decode(ids).removeprefix(' ')


def test_a_continuation_keeps_its_first_space(generator):
  spaced = Generator(generator.model, DropsFirstSpace(), generator.mesh)
  found = spaced(
    'hello', max_new_tokens=1, temperature=0.0, logit_bias={spaced.tokenizer.encode(' ')[0]: 99.0}
  )[0]
  assert (
    found.text
    == ''.join(
      spaced.stream('hello', max_new_tokens=1, temperature=0.0, logit_bias={found.ids[0]: 99.0})
    )
    == ' '
  )


def test_finish_reasons(generator):
  (free,) = generator('a', max_new_tokens=24, seed=1)
  assert free.finish == 'length' and len(free.ids) == 24
  tokenizer = ByteTokenizer()
  tokenizer.eos = free.ids[5]
  stopping = Generator(generator.model, tokenizer, generator.mesh)
  for chunk in (2, 16):
    (ended,) = stopping('a', max_new_tokens=24, seed=1, chunk=chunk)
    assert ended.finish == 'stop' and ended.ids == free.ids[: free.ids.index(free.ids[5]) + 1]
  (exact,) = stopping('a', max_new_tokens=len(ended.ids), seed=1)
  assert exact.finish == 'stop', 'end-of-text as the very last token that was allowed'


def test_a_model_is_filled_to_its_last_token(generator):
  (completion,) = generator('a' * 40, max_new_tokens=23, temperature=0.0)
  assert len(completion.ids) == 23


@pytest.mark.parametrize(
  'prompts, options, words',
  [
    ([], {}, 'there are no prompts; give at least one'),
    (['a'], {'max_new_tokens': 0}, 'max_new_tokens=0 must be at least 1'),
    (['a'], {'chunk': 0}, 'chunk=0 must be at least 1'),
    (
      ['a' * 63],
      {'max_new_tokens': 24},
      'a prompt of 64 tokens leaves no room for new ones in model.max_length=64; shorten',
    ),
    (['a'], {'temperature': -1.0, 'max_new_tokens': 4}, 'temperature=-1.0 must be'),
    (['a'], {'top_p': 0.0, 'max_new_tokens': 4}, 'top_p=0.0 must be'),
  ],
)
def test_bad_options_raise_at_once(generator, prompts, options, words):
  with pytest.raises(ValueError, match=words):
    generator(prompts, **options)
  if prompts:
    with pytest.raises(ValueError, match=words):
      generator.stream(prompts[0], **options)


def save_run(workdir, model=MODEL):
  """A run's directory with checkpoints 3 and 5, as train.py leaves it; returns the two models."""
  config = dataclasses.replace(CONFIG, model=model)
  configs.save(config, workdir)
  ByteTokenizer().save(workdir / 'tokenizer')
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  specs = params.specs({'policy': jax.eval_shape(lambda: transformer.init(model, 0))})
  optimizer = make_optimizer(config.optimizer, config.train.steps, specs)
  checkpoints = Checkpoints(workdir, log=lambda _: None)
  with jax.set_mesh(mesh):
    state = jax.jit(lambda: states.init(config, optimizer))()
    checkpoints.save(3, state, {}, {}, cost=1.0)
    checkpoints.wait()
    later = dataclasses.replace(
      state, models={'policy': jax.jit(transformer.init, static_argnums=(0, 1))(model, 9)}
    )
    checkpoints.save(5, later, {}, {}, cost=2.0)
    checkpoints.wait()
  return state.models['policy'], later.models['policy']


def test_load(tmp_path):
  models = save_run(tmp_path)
  for which, model in (
    ('last', models[1]),
    ('best', models[0]),
    ('3', models[0]),
    ('5', models[1]),
  ):
    loaded = Generator.load(tmp_path, which)
    with jax.set_mesh(loaded.mesh):
      model = rearranged.unstacked(model)
    of_both = (jax.tree.leaves(each, is_leaf=params.is_param) for each in (loaded.model, model))
    for a, b in zip(*of_both, strict=True):
      np.testing.assert_array_equal(read(a).numbers('float32'), b[...])
  assert len(loaded('def', max_new_tokens=5)[0].ids) == 5
  with pytest.raises(ValueError, match=r"checkpoint='4' is unknown.*3, 5, best, last"):
    Generator.load(tmp_path, '4')
  name = next(iter(Checkpoints(tmp_path).record(3)['files']))
  (tmp_path / 'checkpoints' / '00000003' / name).write_bytes(b'')
  with pytest.raises(ValueError, match="checkpoint 3 is damaged: .*use another, or 'last'"):
    Generator.load(tmp_path, '3')


def test_a_run_that_trained_with_a_backend_for_training_generates(tmp_path):
  save_run(tmp_path, MODEL.with_execution(attention='blocked'))
  assert len(Generator.load(tmp_path)('def', max_new_tokens=5)[0].ids) == 5


def test_neither_a_backend_nor_its_blocks_are_those_of_training():
  trained = MODEL.with_execution(attention='pallas_tpu', attention_blocks=Blocks(forward_keys=256))
  assert generating(trained) == MODEL


def test_wrong_directories_raise(tmp_path):
  with pytest.raises(FileNotFoundError, match=str(tmp_path)):
    Generator.load(tmp_path)
  configs.save(CONFIG, tmp_path)
  with pytest.raises(
    FileNotFoundError, match='holds no checkpoint; train with train.py --workdir='
  ):
    Generator.load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('table', [MODEL.V, MODEL.V + 61])
def test_log_probabilities_are_those_of_the_training_forward(generator, table):
  """Also with a table of more ids than there are,, whose share of the law is nobody's."""
  if table != MODEL.V:
    generator = generator_of(dataclasses.replace(MODEL, vocabulary=table))
  found = generator(PROMPTS[:2], max_new_tokens=12, temperature=0.7, top_k=9, seed=2, logprobs=3)
  for completion in found:
    scores = generator.score([completion.prompt_ids + completion.ids])[0][
      len(completion.prompt_ids) - 1 :
    ]
    np.testing.assert_allclose(completion.logprobs, scores, atol=1e-5)
    assert all(
      processed >= raw for processed, raw in zip(completion.processed, completion.logprobs)
    ), 'nine of all ids have all the mass'
    for id_, raw, likeliest in zip(completion.ids, completion.logprobs, completion.alternatives):
      assert len(likeliest) == 3 and likeliest == sorted(likeliest, key=lambda pair: -pair[1])
      assert raw <= likeliest[0][1] and (
        id_ not in dict(likeliest) or abs(dict(likeliest)[id_] - raw) < 1e-6
      )


def test_scores_are_of_capped_logits():
  """As plain log-softmax of the model's own logits, which its cap bends."""
  model = dataclasses.replace(MODEL, logit_softcap=0.5)
  generator = generator_of(model)
  ids = generator.encoded('def main(')
  with jax.set_mesh(generator.mesh):
    logits = jax.jit(lambda model: model.logits(model(jnp.asarray([ids])).hidden)[0])(
      generator.model
    )
    logs = np.asarray(jax.nn.log_softmax(logits))
  assert 0.3 < np.abs(logits).max() <= 0.5  # the cap bends them
  expected = logs[np.arange(len(ids) - 1), ids[1:]]
  np.testing.assert_allclose(generator.score([ids])[0], expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  'chunk', [5, *(pytest.param(chunk, marks=pytest.mark.slow) for chunk in (1, 16))]
)
def test_stop_strings_end_rows_wherever_chunks_end(generator, chunk):
  free = generator(PROMPTS[:2], max_new_tokens=30, seed=3)
  stop = free[0].text[7:9]
  found = generator(PROMPTS[:2], max_new_tokens=30, seed=3, stop=[stop, '\x00never'], chunk=chunk)
  for ended, whole in zip(found, free):
    text = whole.text.split(stop)[0]
    assert ended.text == text and (ended.finish, ended.stopped_by) == (
      ('stop', stop) if stop in whole.text else (whole.finish, whole.stopped_by)
    )
    assert ended.ids == whole.ids[: len(ended.ids)] and len(ended.logprobs) == len(
      ended.processed
    ) == len(ended.ids)
  assert (
    ''.join(generator.stream(PROMPTS[0], max_new_tokens=30, seed=3, stop=stop, chunk=chunk))
    == found[0].text
  )
  by_id = generator(PROMPTS[:1], max_new_tokens=30, seed=3, stop=free[0].ids[4], chunk=chunk)[0]
  assert (
    by_id.ids == free[0].ids[: free[0].ids.index(free[0].ids[4]) + 1]
    and by_id.stopped_by == free[0].ids[4]
  )


def test_samples_are_rows_of_their_own(generator):
  found = generator(PROMPTS[:2], max_new_tokens=8, num_samples=3, seed=7)
  assert [c.seed for c in found] == [sample_seed(s, i) for s in (7, 8) for i in range(3)]
  assert [c.prompt for c in found] == [p for p in PROMPTS[:2] for _ in range(3)]
  for completion in found:
    assert same(generator(completion.prompt, max_new_tokens=8, seed=completion.seed)[0], completion)
  mixed = generator(PROMPTS[:2], max_new_tokens=8, temperature=[0.0, 1.0], seed=[5, 7])
  assert mixed[0].ids == generator(PROMPTS[0], max_new_tokens=8, temperature=0.0)[0].ids
  assert mixed[1].ids == generator(PROMPTS[1], max_new_tokens=8, seed=7)[0].ids


def test_a_long_prompt_is_read_in_pieces(generator, monkeypatch):
  prompt = 'abc' * 17
  options = dict(max_new_tokens=8, temperature=0.0, logprobs=0, repetition_penalty=1.5)
  expected = generator(prompt, **options)[0]
  monkeypatch.setattr('decode.loaded.AT_ONCE', 16)
  monkeypatch.setattr('decode.loaded.APPEND', 8)
  found = generator([prompt, 'x'], **options)
  assert same(found[0], expected) and same(found[1], generator('x', seed=1, **options)[0])


@pytest.mark.slow
def test_bytes_in_the_cache_and_in_the_weights_are_near(generator):
  long = generator.score([generator('def main(', max_new_tokens=40, seed=1)[0].ids])[0]
  small = Generator(generator.model, generator.tokenizer, generator.mesh, weights='int8')
  ids = generator('def main(', max_new_tokens=40, seed=1)[0].ids
  divergence = np.abs(small.score([ids])[0] - long)
  assert 1e-6 < divergence.mean() < 0.1
  cached = generator('def main(', max_new_tokens=30, temperature=0.0, cache_dtype='int8')[0]
  assert (
    np.abs(
      np.array(cached.logprobs)
      - generator.score([cached.prompt_ids + cached.ids])[0][len(cached.prompt_ids) - 1 :]
    ).max()
    < 0.2
  )


def sharing(**sizes):
  """The generator over so many devices, of a vocabulary that they share."""
  mesh = make_mesh(MeshConfig(**{'data': 1} | sizes), jax.devices()[: math.prod(sizes.values())])
  with jax.set_mesh(mesh):
    return Generator(
      jax.jit(transformer.init, static_argnums=(0, 1))(
        dataclasses.replace(MODEL, vocabulary=264), 0
      ),
      ByteTokenizer(),
      mesh,
    )


@pytest.fixture(scope='module')
def alone():
  return sharing()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
  'sizes',
  [
    {'data': 2, 'tensor': 2, 'fsdp': 2},
    {'data': 2, 'tensor': 2, 'context': 2},
  ],
  ids=str,
)
def test_a_mesh_writes_what_one_device_writes(alone, sizes):
  several = sharing(**sizes)
  for options in (dict(seed=3), dict(temperature=0.0, lookup=2)):
    found = (
      several(PROMPTS, max_new_tokens=12, **options),
      alone(PROMPTS, max_new_tokens=12, **options),
    )
    assert all(same(one, other) for one, other in zip(*found, strict=True)), (
      'also with rows that are there to fill the mesh up'
    )
  for one, other in zip(several.score(PROMPTS), alone.score(PROMPTS), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_devices_that_share_a_long_text(alone):
  """A session that reads, writes, takes back and goes on;
  the slots of its one row are on four devices.
  """
  found = []
  for generator in (alone, sharing(context=4)):
    session = generator.session().append('def main(')
    first = session(max_new_tokens=9, temperature=0.0).ids
    session.truncate(12).append('return')
    found.append((first, session(max_new_tokens=9, seed=2).ids, session.logits))
  assert found[0][:2] == found[1][:2]
  np.testing.assert_allclose(found[0][2], found[1][2], rtol=1e-4, atol=1e-5)


def test_scores_that_are_not_finite_raise(generator):
  broken = Generator(
    jax.tree.map(lambda x: x * np.nan if x.ndim == 1 else x, generator.model),
    generator.tokenizer,
    generator.mesh,
  )
  with pytest.raises(FloatingPointError, match='the scores after token 2 .* are not finite'):
    broken('a', max_new_tokens=3)


@pytest.mark.slow
def test_a_row_that_nothing_is_left_to_ends_alone(generator):
  """Its constraint allows what its bias forbids; the rows beside it are as without it."""
  only_a = Constraint(generator.tokenizer, regex='a+')
  forbidden = {id_: -np.inf for id_ in generator.tokenizer.encode('a')}
  options = dict(max_new_tokens=4, temperature=0.0)
  beside = generator(['def', 'return'], **options)
  first, failed, last = generator(
    ['def', 'x', 'return'],
    constraint=[None, only_a, None],
    logit_bias=[None, forbidden, None],
    **options,
  )
  assert [first.ids, last.ids] == [row.ids for row in beside] and first.error == ''
  assert failed.finish == 'failed' and failed.ids == [] and failed.text == ''
  assert 'of the row that begins with' in failed.error and 'are not finite' in failed.error
  # Alone it raises, and so it does where nothing could say why.
  with pytest.raises(FloatingPointError, match='are not finite'):
    generator('x', constraint=only_a, logit_bias=forbidden, **options)
  pieces = generator.ids(
    ['def', 'x'], constraint=[None, only_a], logit_bias=[None, forbidden], **options
  )
  with pytest.raises(FloatingPointError, match='are not finite'):
    list(pieces)


def test_a_stop_that_the_last_flush_completes_is_reported(generator):
  """U+FFFD, of a character whose last bytes never come."""
  first = [b + 3 for b in 'é'.encode()][:1]
  row = Row('', [1], 0, ['\ufffd'], ByteTokenizer(), [], Bound(9))
  chunk = loop.Chunk(
    np.array([first]),
    np.ones((1, 1), bool),
    np.zeros((1, 1)),
    np.zeros((1, 1)),
    np.zeros((1, 1, 0), np.int32),
    np.zeros((1, 1, 0)),
    np.zeros(1, bool),
  )
  assert row.add(0, chunk) == '' and row.end('length') == ''
  completion = row.completion()
  assert (completion.finish, completion.stopped_by) == ('stop', '\ufffd')


def interrupted(function, number):
  """The function, interrupted behind its work when it is called for this time."""
  calls = []

  def run(*arguments, **options):
    found = function(*arguments, **options)
    calls.append(1)
    if len(calls) == number:
      raise KeyboardInterrupt
    return found

  return run


@pytest.mark.slow
def test_an_interrupt_returns_what_there_is(generator, monkeypatch):
  how = dict(max_new_tokens=40, seed=1, chunk=4)
  expected = generator('a', **how)[0]
  with monkeypatch.context() as patch:
    patch.setattr(generator, 'advance', interrupted(generator.advance, 4))
    (found,) = generator('a', **how)
  assert (
    found.finish == 'interrupted'
    and found.ids == expected.ids[:5]
    and generator.report.new_tokens == 5
  )
  monkeypatch.setattr(Row, 'add', interrupted(Row.add, 1))
  assert [len(c.ids) for c in generator(['a', 'b'], **how)] == [
    1,
    0,
  ] and generator.report.new_tokens == 1


@pytest.mark.parametrize('number', [1, 2])
@pytest.mark.parametrize(
  'ask',
  [lambda g, **how: g('a', **how), lambda g, **how: list(g.stream('a', **how))],
  ids=['call', 'stream'],
)
def test_an_interrupt_before_there_is_anything_raises(generator, monkeypatch, ask, number):
  monkeypatch.setattr(generator, 'advance', interrupted(generator.advance, number))
  with pytest.raises(KeyboardInterrupt) as caught:
    ask(generator, max_new_tokens=4)
  assert caught.traceback[-1].name == 'run', 'where it came'


@pytest.mark.parametrize('way', ['stream', 'ids'])
def test_a_listener_hears_of_an_interrupt(generator, monkeypatch, way):
  how, heard = dict(max_new_tokens=40, seed=1, chunk=4), []

  def ask():
    return (
      generator.stream('a', **how)
      if way == 'stream'
      else (new[0] for new in generator.ids(['a'], **how))
    )

  expected = [x for piece in ask() for x in piece]
  monkeypatch.setattr(generator, 'advance', interrupted(generator.advance, 4))
  with pytest.raises(KeyboardInterrupt):
    for piece in ask():
      heard += piece
  assert 0 < len(heard) < len(expected) and heard == expected[: len(heard)]


@pytest.mark.costly
@pytest.mark.parametrize('options', [{}, {'lookup': 1}, {'beams': 2}], ids=str)
def test_the_first_token_comes_alone_and_nothing_is_dispatched_before_it_is_timed(
  generator, monkeypatch, options
):
  asked, timed, first = [], [], CallTimer.first
  monkeypatch.setattr(
    CallTimer, 'first', lambda self, chunk: timed.append(list(asked)) or first(self, chunk)
  )
  for module, name in ((loop, 'decode_chunk'), (drafting, 'speculate_chunk'), (beam, 'search')):
    program = getattr(module, name)
    monkeypatch.setattr(
      module,
      name,
      lambda *given, program=program, **how: (
        asked.append(
          next(
            int(x)
            for x in given
            if isinstance(x, jax.Array) and x.shape == () and x.dtype == np.int32
          )
        )
        or program(*given, **how)
      ),
    )
  generator('a', max_new_tokens=9, temperature=0.0, chunk=4, **options)
  assert timed == [[1]] and len(asked) > 1


def test_a_report_adds_up(generator):
  found = generator(PROMPTS, max_new_tokens=9, seed=3)
  report = generator.report
  assert (report.rows, report.new_tokens, report.steps) == (
    3,
    sum(len(c.ids) for c in found),
    max(len(c.ids) for c in found),
  )
  assert (
    report.prompt_tokens == sum(len(c.prompt_ids) for c in found)
    and report.cache_bytes == 2 * 2 * 3 * 32 * 16 * 4
  )
  assert 0 < report.first_token <= report.seconds and report.share_of_bandwidth() > 0
  weights = (
    sum(x.nbytes for x in jax.tree.leaves(generator.model))
    - generator.model.embedding.tokens[...].nbytes
  )
  assert report.read_bytes == pytest.approx(
    weights + (report.prompt_tokens + report.new_tokens / 2) * 2 * 2 * 16 * 4, rel=1e-6
  )


@pytest.mark.parametrize(
  'prompts, options, words',
  [
    ([[]], {}, 'a prompt has no ids'),
    ([[1, 300]], {}, r'the id 300; this model has ids in \[0, 259\)'),
    (['a'], {'stop': ''}, "stop='' must be a text that is not empty"),
    (['a'], {'stop': 999}, 'stop=999 must be'),
    (['a'], {'temperature': [1.0, 2.0]}, 'temperature has 2 values for 1 prompts'),
    (['a'], {'logit_bias': {400: 1.0}}, 'the id 400'),
    (['a'], {'num_samples': 0}, 'num_samples=0 must be at least 1'),
    (['a'], {'cache_dtype': 'int4'}, 'int4'),
    (['a'], {'temprature': 1.0}, 'temperature'),
    (None, {}, 'prompts=None must be a text, ids, or a list of several'),
    (b'ab', {}, "prompts=b'ab' must be a text"),
    ({'messages': []}, {}, 'prompts=.* must be a text'),
    ([1.7, 5], {}, r'the prompt \[1.7, 5\] is neither a text nor ids, whole numbers in \[0, 259\)'),
    ([['a', 'b']], {}, r"the prompt \['a', 'b'\] is neither a text nor ids"),
    ([[3], None], {}, 'the prompt None is neither a text nor ids'),
    (['x', b'ab'], {}, "the prompt b'ab' is neither a text nor ids"),
    ('a\ud800b', {}, r"a text has '\\ud800' at 1, half of a surrogate pair"),
    (['a'], {'draft': 'runs/x'}, r"draft='runs/x' must be a Generator, such as Generator.load"),
    (
      ['a'],
      {'draft_tokens': 9},
      'draft_tokens=9, but nothing drafts; give draft, lookup or early_exit',
    ),
    (['a'], {'constraint': 'abc'}, "constraint='abc' must be a decode.constrain.Constraint"),
    (['a'], {'constraint': ['abc']}, r"constraint=\['abc'\] must be a decode.constrain.Constraint"),
    (['a'], {'stop': 1.5}, 'stop=1.5 must be a text, an id, or several'),
    (['a'], {'logit_bias': [(5, 1.0)]}, r'logit_bias=\[\(5, 1.0\)\] must map ids to what is added'),
    (['a'], {'logit_bias': 5}, 'logit_bias=5 must map ids'),
    (['a'], {'logprobs': 260}, 'logprobs=260 must be at most 259'),
  ],
)
def test_what_cannot_be_is_said(generator, prompts, options, words):
  with pytest.raises(ValueError, match=words):
    generator(prompts, **{'max_new_tokens': 4} | options)


def test_one_prompt_or_several_wherever_prompts_are_given(generator):
  text, ids = (
    generator.score('abc')[0],
    list(generator.ids('abc', max_new_tokens=2, temperature=0.0)),
  )
  assert text.shape == (3,) and len(generator.score('abc')) == 1
  np.testing.assert_array_equal(generator.score(generator.encoded('abc'))[0], text)
  assert all(len(rows) == 1 for rows in ids)
  for call in (generator.score, generator.ids, generator):
    with pytest.raises(ValueError, match='there are no prompts; give at least one'):
      call([])


def test_options_as_numpy_has_them_and_none(generator):
  expected = generator('abc', max_new_tokens=3, stop=[7], seed=1)
  assert all(
    same(*pair)
    for pair in zip(
      generator('abc', max_new_tokens=np.int64(3), stop=np.int32(7), seed=1), expected
    )
  )
  assert (
    generator(np.array(expected[0].prompt_ids), max_new_tokens=3, stop=None, seed=1)[0].ids
    == generator('abc', max_new_tokens=3, seed=1)[0].ids
  )
  json.dumps(
    dataclasses.asdict(
      generator('abc', max_new_tokens=3, stop=np.int32(expected[0].ids[0]), seed=1)[0]
    )
  )


def test_behind_the_last_seed_comes_the_first(generator):
  last = 2**32 - 1
  assert [c.seed for c in generator(['a', 'b'], max_new_tokens=2, seed=last)] == [last, 0]
  assert [
    c.seed for c in generator(['a', 'b'], max_new_tokens=2, seed=[last, 5], num_samples=2)
  ] == [last, sample_seed(last, 1), 5, sample_seed(5, 1)]


@pytest.mark.slow
def test_ids_that_the_tokenizer_lacks_are_neither_read_nor_reported(alone):
  """The table of embeddings has 264 rows, the tokenizer 259 ids."""
  for options, words in (
    ({}, r'the id 262; this model has ids in \[0, 259\)'),
    ({'logit_bias': {262: 1.0}}, 'the id 262'),
    ({'logprobs': 260}, 'logprobs=260 must be at most 259'),
  ):
    with pytest.raises(ValueError, match=words):
      alone([[65] if options else [262]], max_new_tokens=2, **options)
  (found,) = alone('a', max_new_tokens=2, logprobs=259, logit_bias={65: 2.0})
  assert all(
    sorted(id_ for id_, _ in likeliest) == list(range(259)) for likeliest in found.alternatives
  )
  assert np.isfinite([value for likeliest in found.alternatives for _, value in likeliest]).all()
