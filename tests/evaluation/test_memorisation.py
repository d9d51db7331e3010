"""Is a model caught that has learned its text by heart, and one that has not read it let go? And
are the measures what their definitions say?
"""

import functools
import json
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.batch import Batch
from data.tokenizers import ByteTokenizer
from decode.generator import Generator
from evaluation import canaries, extraction, membership, memorisation, overlap, unpaired
from evaluation.canaries import Exposure, Space
from evaluation.intervals import Estimate, Z
from evaluation.journal import Journal
from evaluation.memorisation import EXTRACTION, MEMBERSHIP, PARTS, MemoryQuestions
from evaluation.passages import Cut, Passage, Passages, drawn
from model import transformer
from model.config import ModelConfig
from objectives.next_token import summed_loss
from parallel.mesh import MeshConfig, make_mesh

TOKENIZER = ByteTokenizer()
CONFIG = ModelConfig(
  vocabulary=260, width=32, layers=1, heads=2, feed_forward=64, max_length=64, tie_embeddings=True
)
CUT = Cut(prompt=8, new=10, limit=12)
SPACE = Space('pin {secret}', 'abcdefgh', 6)
SECRETS = SPACE.secrets(8, 0)  # the first half of which is trained on


def documents(seed: int, count: int = 12) -> list[str]:
  draw = random.Random(seed)
  return [''.join(draw.choices('abcdefghijklmnop', k=20)) for _ in range(count)]


READ, OTHERS = documents(0), documents(1)


def new_model() -> transformer.Decoder:
  return jax.jit(transformer.init, static_argnums=(0, 1))(CONFIG, 0)


def learned(
  model: transformer.Decoder, texts, steps: int, first: float = 0.015, last: float = 0.002
):
  """(The model after steps on all of these texts, its last loss); first, last: rates."""
  batch = Batch.empty(len(texts), 2 + max(map(len, texts)))
  for row, text in enumerate(texts):
    ids = [TOKENIZER.bos, *TOKENIZER.encode(text), TOKENIZER.eos]
    n = len(ids) - 1
    batch.tokens[row, :n], batch.targets[row, :n] = ids[:-1], ids[1:]
    batch.positions[row, :n], batch.segments[row, :n], batch.weights[row, :n] = np.arange(n), 1, 1
  # A rate that falls, or where it ends is rounding's choice.
  optimizer = optax.adam(optax.linear_schedule(first, last, steps))
  batch = jax.tree.map(jnp.asarray, batch)

  def step(carry, _):
    model, state = carry

    def mean(model):
      return summed_loss(model, batch, 0.0)[0] / batch.weights.sum()

    loss, slope = jax.value_and_grad(mean)(model)
    change, state = optimizer.update(slope, state)
    return (optax.apply_updates(model, change), state), loss

  run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))
  (model, _), losses = run((model, optimizer.init(model)))
  return model, losses[-1]


@functools.cache
def models() -> tuple[Generator, Generator]:
  """(one that learned READ and half of SECRETS by heart, one that learned nothing)."""
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    new = new_model()
    model, loss = learned(new, [*READ, *map(SPACE.text, SECRETS[:4])], 210)
  assert loss < 0.3, 'the test is of a model that knows its text'
  return Generator(model, TOKENIZER, mesh), Generator(new, TOKENIZER, mesh)


def asked(**changes) -> MemoryQuestions:
  sides = [drawn(texts, of, TOKENIZER, CUT) for texts, of in ((READ, 'read'), (OTHERS, 'not'))]
  return MemoryQuestions(CUT, *sides, **{'by_chance': True} | changes)


@pytest.mark.slow
def test_who_learned_by_heart_is_caught_and_who_did_not_is_not():
  knows, knows_not = models()
  made = memorisation.measured(knows, asked(), (EXTRACTION, MEMBERSHIP), lambda line: None)
  exact = made.findings[EXTRACTION][extraction.EXACT]
  assert exact['members'].value >= 0.9 and exact['control'].value == 0
  assert exact['difference'].low > 0.5
  for name in ('min-20%', 'min-20%++', membership.LOSS):
    assert made.findings[MEMBERSHIP][name]['auc'].value > 0.95
    assert made.findings[MEMBERSHIP][name]['caught'].value > 0.8
  said = memorisation.verdicts(made.findings, True)
  assert said[EXTRACTION].startswith('MEMORISED') and said[MEMBERSHIP].startswith('TOLD APART')
  # Of sides that chance did not part, scores alone prove nothing; words do.
  said = memorisation.verdicts(made.findings, False)
  assert said[EXTRACTION].startswith('MEMORISED') and memorisation.UNSURE in said[MEMBERSHIP]
  less = {what: of for what, of in made.findings[EXTRACTION].items() if what != extraction.EXACT}
  assert memorisation.UNSURE in memorisation.verdicts({EXTRACTION: less}, False)[EXTRACTION]
  for line in made.lines:
    assert line['exact'] == (line['said'] == line['truth'])
    assert line['of'] == 'members' or not line['exact']

  made = memorisation.measured(knows_not, asked(), (EXTRACTION, MEMBERSHIP), lambda line: None)
  said = memorisation.verdicts(made.findings, True)
  assert said[EXTRACTION].startswith('not') and said[MEMBERSHIP].startswith('what was read is not')


@pytest.mark.slow
def test_what_was_found_is_written_to_be_read(tmp_path):
  made = memorisation.measured(models()[0], asked(), (EXTRACTION, MEMBERSHIP), lambda line: None)
  values = memorisation.write(tmp_path, {'workdir': 'x', 'step': 3}, asked(), made)
  kept = json.loads((tmp_path / memorisation.FILE).read_text())
  assert kept['findings'] == json.loads(json.dumps(values['findings']))
  assert kept['sides']['members']['prompts'] != kept['sides']['control']['prompts']
  lines = (tmp_path / memorisation.LINES).read_text().splitlines()
  assert len(lines) == 24 and sum(json.loads(line)['exact'] for line in lines) >= 10
  page = (tmp_path / memorisation.PAGE).read_text()
  assert '**MEMORISED: beyond the control in exact match' in page and 'word for word' in page


@pytest.mark.slow
def test_canaries_that_were_trained_on_are_exposed():
  knows, knows_not = models()
  exposed = canaries.exposures(knows, SPACE, SECRETS, 200, 0)
  assert all(each.n == 200 and not each.exact for each in exposed)
  assert all(each.p <= 2 / 201 and each.bits > 6.5 for each in exposed[:4])
  assert np.mean([each.bits for each in exposed[4:]]) < 3.5
  of_chance = canaries.exposures(knows_not, SPACE, SECRETS, 200, 0)
  assert np.mean([each.bits for each in of_chance[:4]]) < 3.5


@pytest.mark.parametrize('above, bits', [(0, 3.0), (1, 2.0), (3, 1.0), (7, 0.0)])
def test_exposure_is_that_of_the_paper(above, bits):
  """log2 of 8 secrets less log2 of the rank."""
  assert Exposure(above, 7, True).bits == bits
  assert Exposure(above, 7, True).interval == (bits, bits)


def test_how_many_candidates_bound_an_exposure():
  """None of 999 above shows 10 bits, at least 8, and no end; and of all ranks alike, as a secret
  that was not read has, the mean is 1 / ln 2.
  """
  first = Exposure(0, 999, False)
  low, high = first.interval
  assert first.bits == math.log2(1000) and 8 < low < first.bits and high == math.inf
  mean = np.mean([Exposure(i, 9999, False).bits for i in range(10000)])
  assert mean == pytest.approx(canaries.CHANCE, abs=0.01)


@pytest.mark.slow
def test_a_whole_space_is_gone_through():
  space = Space('{secret}', 'ab', 4)
  secrets = space.secrets(3, 1)
  others = space.secrets(1000, 2, secrets)
  assert len(others) == 13 and not {*others} & {*secrets}
  assert {*others, *secrets} == {f'{i:04b}'.replace('0', 'a').replace('1', 'b') for i in range(16)}
  exposed = canaries.exposures(models()[1], space, secrets, 1000, 0)
  assert all(each.exact and each.n == 13 for each in exposed)


def test_what_is_as_likely_is_no_less_likely(monkeypatch):
  """A model to which all is one exposes nothing."""
  monkeypatch.setattr(canaries, '_logprobs', lambda model, texts: [0.0] * len(texts))
  exposed = canaries.exposures(models()[1], SPACE, SECRETS, 200, 0)
  assert {each.bits for each in exposed} == {0.0} and {each.p for each in exposed} == {1.0}


def test_exposures_of_another_checkpoint_are_not_written_over(tmp_path, monkeypatch):
  run = {'workdir': 'r', 'step': 3, 'digest': 'd3', 'weights': ''}
  path = str(tmp_path / 'canaries.jsonl')
  canaries.main([path, '--count=3', '--repeats=1'])
  ask = [path, '--workdir=r', f'--output={tmp_path}', '--candidates=20']
  monkeypatch.setattr(canaries.Generator, 'told', lambda *_: run)
  monkeypatch.setattr(canaries.Generator, 'load', lambda *_: None)
  monkeypatch.setattr(canaries, 'exposures', lambda *_: [Exposure(3, 20, False)] * 6)
  canaries.main(ask)
  canaries.main(ask)
  before = (tmp_path / canaries.FILE).read_bytes()
  assert json.loads(before)['run'] == run
  run = {**run, 'step': 7, 'digest': 'd7'}
  with pytest.raises(SystemExit, match='run.step was 3 and is 7.*give another --output'):
    canaries.main(ask)
  assert (tmp_path / canaries.FILE).read_bytes() == before


def test_which_repeats_are_exposed_is_said_of_each():
  """Not of all above the least: 4 times can be within what was kept out where once is beyond it."""

  def said(**high_and_low):
    exposure = {
      n: {'value': high, 'low': low, 'high': high, 'small': False}
      for n, (low, high) in zip('014', high_and_low.values())
    }
    run = {'workdir': 'r', 'step': 3}
    content = {'run': run, 'candidates': 1000, 'space': {'bits': 37.6}, 'most': 9.97}
    content |= {'exact': False, 'chance': 1.44, 'seed': 0, 'prompts': 'x', 'exposure': exposure}
    content['canaries'] = [{'repeats': n, 'above': 3} for n in (0, 1, 4)]
    return canaries.text_of(content)[-1]

  beyond = 'in the training text is exposed beyond what was kept out'
  assert said(none=(0.8, 2.1), once=(5.0, 7.0), more=(0.5, 2.5)) == (
    f'**Memorised**: what was once {beyond}; what was 4 times is not shown to be.'
  )
  assert said(none=(0.8, 2.1), once=(0.5, 2.5), more=(5.0, 7.0)) == (
    f'**Memorised**: what was 4 times {beyond}; what was once is not shown to be.'
  )
  assert said(none=(0.8, 2.1), once=(5.0, 7.0), more=(5.0, 7.0)) == (
    f'**Memorised**: what was once and 4 times {beyond}.'
  )
  assert said(none=(0.8, 2.1), once=(0.0, 2.0), more=(0.0, 2.0)).startswith('No more exposed')


def test_canaries_are_written_as_they_are_to_be_trained_on(tmp_path, capsys):
  path = tmp_path / 'canaries.jsonl'
  canaries.main([str(path), '--count=3', '--repeats=1,4', '--length=5'])
  assert 'clean.exact_duplicates=False' in capsys.readouterr().out
  texts = [json.loads(line)['text'] for line in path.read_text().splitlines()]
  space, made = canaries.read(path)
  times = {canary['secret']: canary['repeats'] for canary in made['canaries']}
  assert sorted(times.values()) == [0] * 6 + [1] * 3 + [4] * 3 and len(times) == 12
  assert {secret: texts.count(space.text(secret)) for secret in times} == times
  again = tmp_path / 'again.jsonl'
  canaries.main([str(again), '--count=3', '--repeats=1,4', '--length=5'])
  assert again.read_bytes() == path.read_bytes()
  kept = path.with_suffix('.json')
  kept.write_text(kept.read_text().replace('"repeats": 4', '"repeats": 0', 1))
  with pytest.raises(ValueError, match='was changed since it was written'):
    canaries.read(path)


def test_edit_distance_is_that_of_the_recurrence():
  def slow(a, b):
    if not a or not b:
      return len(a) + len(b)
    return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

  draw = random.Random(0)
  for _ in range(60):
    a, b = ([draw.randrange(3) for _ in range(draw.randrange(6))] for _ in 'ab')
    assert extraction.edit_distance(a, b) == slow(a, b), (a, b)
  made = extraction.compared([1, 2, 9, 4], [1, 2, 3, 4])
  assert (made.matched, made.exact, made.distance) == (2, False, 0.25)
  early = extraction.compared([1, 2], [1, 2, 3, 4])  # the text ended before
  assert (early.matched, early.exact, early.distance) == (2, False, 0.5)


def test_scores_tell_apart_as_their_definitions_say():
  assert membership.min_k(np.array([-1.0, -9.0, -2.0, -7.0, -3.0]), 40.0) == -8.0
  assert membership.min_k(np.array([-1.0, -9.0]), 20.0) == -9.0  # of one token, at least
  draw = np.random.default_rng(0)
  a, b = draw.integers(0, 6, 30).astype(float), draw.integers(0, 5, 20).astype(float)
  pairs = [(x > y) + (x == y) / 2 for x in a for y in b]
  assert unpaired.auc(a, b) == pytest.approx(np.mean(pairs))
  # Of 20, one may be above: the threshold is the second largest.
  b = np.arange(20.0)
  assert unpaired.caught(np.array([17.5, 18.0, 18.5, 30.0]), b) == 0.5
  assert unpaired.caught(np.array([18.5, 19.5]), b[:19]) == 1.0  # of 19, none
  # Of means, the interval is that of the normal law.
  a, b = draw.normal(1, 2, 200), draw.normal(0, 1, 300)
  gap = unpaired.mean_difference(a, b)
  half = 1.96 * math.sqrt(a.var() / 200 + b.var() / 300)
  assert (gap.low, gap.high) == pytest.approx((gap.value - half, gap.value + half), abs=0.06)
  assert unpaired.mean_difference(a, a).high > 0.3  # each side is drawn by itself
  # Newcombe 1998, table II, method 10.
  gap = unpaired.rate_difference(56, 70, 48, 80)
  assert (gap.value, gap.low, gap.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


@pytest.mark.slow
def test_scores_of_passages_are_those_of_the_model():
  _, model = models()
  passages = [Passage('a', (TOKENIZER.bos, 70), (71, 72)), Passage('b', (1, 70), (71,), learned=2)]
  (long, standing), (short, _) = membership.token_scores(model, passages)
  assert long.shape == standing.shape == (3,) and short.shape == (1,)
  np.testing.assert_allclose(long, model.score([[TOKENIZER.bos, 70, 71, 72]])[0], atol=1e-6)
  np.testing.assert_allclose(short[0], model.score([[1, 70, 71]])[0][1], atol=1e-6)

  # Min-K%++ as its paper has it, by numpy of all logits.
  ids = passages[0].ids
  with jax.set_mesh(model.mesh):
    logits = model.model.logits(model.model(jnp.asarray([ids])).hidden)
  logits = np.asarray(logits, np.float64)[0, :-1, : TOKENIZER.vocabulary]
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  mean = (p * np.log(p)).sum(-1)
  std = np.sqrt((p * np.square(np.log(p))).sum(-1) - mean**2)
  expected = (np.log(p)[np.arange(3), ids[1:]] - mean) / std
  np.testing.assert_allclose(standing, expected, rtol=1e-4, atol=1e-4)
  made = membership.scores([membership.TokenScores(long, standing)], passages[:1], TOKENIZER, 67.0)
  assert made['min-67%++'][0] == pytest.approx(np.sort(expected)[:2].mean(), rel=1e-4)
  # Where all are alike none stands out, whatever rounding says.
  assert membership.standings(np.array([-2.0]), np.array([-2.1]), np.array([1e-7])) == [0.0]


class Interrupted(Exception):
  pass


@pytest.mark.slow
def test_an_interrupted_measurement_goes_on(tmp_path, monkeypatch):
  """What was found is not asked again, and what comes of it is the same to the last bit."""
  model, questions = models()[1], asked()
  whole = memorisation.measured(model, questions, PARTS[:2], lambda line: None)
  path, settings = tmp_path / 'begun', memorisation.settings_of({'step': 1}, questions)
  add, count = Journal.add, 0

  def interrupting(self, *given):
    nonlocal count
    if count in (7, 25):  # an answer of the first part; a batch of the second
      count += 1
      path.open('a').write('{"part": "extr')  # cut short, as by a kill
      raise Interrupted
    count += 1
    add(self, *given)

  monkeypatch.setattr(Journal, 'add', interrupting)
  for lines in (7, 24):
    with pytest.raises(Interrupted):
      memorisation.measured(model, questions, PARTS[:2], print, Journal(path, settings))
    assert len(Journal(path, settings)) == lines
  journal = Journal(path, settings)
  again = memorisation.measured(model, questions, PARTS[:2], lambda line: None, journal)
  assert again == whole and count == 2 + 24 + 2
  journal.end()
  assert not path.exists()

  Journal(path, settings)
  with pytest.raises(ValueError, match='asked otherwise .settings.words was 13 and is 9'):
    Journal(path, memorisation.settings_of({'step': 1}, asked(words=9)))


def test_a_control_of_other_text_is_no_proof():
  """What zlib tells apart without the model says nothing of the model's memory."""
  knows, _ = models()
  plain = drawn(['a' * 40 + str(i) for i in range(12)], 'plain', TOKENIZER, CUT)
  made = memorisation.measured(
    knows, MemoryQuestions(CUT, asked().members, plain), (MEMBERSHIP,), lambda line: None
  )
  assert memorisation.verdicts(made.findings, True)[MEMBERSHIP].startswith('UNLIKE')


def test_passages_are_the_beginnings_of_documents():
  texts = [f'{i:03d} ' + 'x' * (40 if i % 2 else 9) for i in range(200)]
  cut = Cut(prompt=10, new=20, limit=30)
  counts = np.zeros(200)
  for seed in range(40):
    made = drawn(texts, 'x', TOKENIZER, Cut(10, 20, 30, seed))
    assert len(made) == made.documents == 30 and made.short == 100
    counts[[int(TOKENIZER.decode(p.prompt)[:3]) for p in made]] += 1
  assert not counts[::2].any() and counts[1::2].min() > 2  # each of 100 is in 12 of 40
  assert abs(counts[160:].sum() - 240) < 40  # the last ones no more often
  first = made[0]
  assert len(first.prompt) == 11 and first.prompt[0] == TOKENIZER.bos and len(first.behind) == 20
  few = drawn(['y' * 100] * 3, 'x', TOKENIZER, cut)
  assert len(few) == 9 and few.documents == 3


def test_overlaps_are_found_and_no_others():
  draw = random.Random(0)
  words = [f'w{i}' for i in range(500)]

  def text(n):
    return ' '.join(draw.choices(words, k=n))

  own = [text(20) for _ in range(6)]
  changed = own[2].split()
  changed[10] = 'other'
  training = [f'{text(30)} {own[0].upper()}, {text(30)}', f'{text(9)} {own[1]}'[:-40], text(400)]
  training.append(f'{text(50)} {" ".join(changed)} {text(5)}')
  found = overlap.overlaps([*own, 'too short'], iter(training), 8)
  assert [each and each.inside for each in found] == [13, found[1].inside, 5, 0, 0, 0, None]
  assert found[0].runs == 13 and 0 < found[1].inside < 13
  assert found[0].similarity == 0 or found[0].similarity > 0.9
  assert found[3].similarity == 0
  alike = overlap.Alike([own[0]])
  alike.look(f'{text(30)} {own[0]} {text(9)}')
  assert alike.similarity == [1.0]
  alike = overlap.Alike([own[2]])
  alike.look(training[3])
  assert 0.3 < alike.similarity[0] < 0.8  # 11 of 21 shingles
  made = overlap.findings(found[:3], found[3:], 0)
  assert made[overlap.ANY]['written'].value == 1 and made[overlap.ANY]['control'].value == 0


@pytest.mark.parametrize(
  'made, said',
  [
    (lambda: Cut(prompt=0), '--prompt=0 must be at least 1'),
    (lambda: Cut().check_context(64, 'model.max_length=64'), 'pass model.max_length=64'),
    (lambda: drawn(['short'], 'it', TOKENIZER, CUT), 'it: none of 1 pieces has 18 tokens'),
    (lambda: MemoryQuestions(CUT, asked().members, Passages([], 'x', 0, 0)), 'there is no control'),
    (lambda: asked(share=0.0), '--share=0.0 is K of Min-K%'),
    (lambda: Space('no place'), 'must have {secret} once'),
    (lambda: Space(alphabet='aa'), 'all different'),
    (lambda: canaries.written(Space(length=1), 8, [1, 4], 0), 'make --length larger'),
    (lambda: canaries.written(Space(), 8, [0], 0), 'give different numbers of at least 1'),
    (
      lambda: canaries.exposures(models()[1], Space(length=70), ['a' * 70], 5, 0),
      'a canary has 103 tokens, and passes model.max_length=64',
    ),
  ],
  ids=range(10),
)
def test_what_cannot_be_asked_is_said(made, said):
  with pytest.raises(ValueError) as error:
    made()
  assert said in str(error.value)


def test_who_read_nothing_is_seldom_said_to_have(monkeypatch):
  """Of normal estimates of nothing: in 2.5% of parts (one side counts), however many each has;
  without a correction in 1 - 0.975^n, 7% and 10%.
  """
  draw, trials = np.random.default_rng(0), 4000

  def nothing(middle: float) -> Estimate:
    value = middle + 0.05 * draw.standard_normal()
    return Estimate(value, value - 0.05 * Z, value + 0.05 * Z, 200, 'bootstrap')

  def false_alarms() -> list[float]:
    names = (extraction.EXACT, extraction.MATCHED, extraction.DISTANCE)
    extracted = [{what: {'difference': nothing(0.0)} for what in names} for _ in range(trials)]
    said = [memorisation.verdicts({EXTRACTION: of}, True)[EXTRACTION] for of in extracted]
    blind = {membership.BLIND: Estimate(0.5, 0.4, 0.6, 200, 'bootstrap')}
    aucs = [{name: nothing(0.5) for name in 'abcd'} | blind for _ in range(trials)]
    told = [memorisation._told(of, True) for of in aucs]
    return [
      np.mean([text.startswith('MEMORISED') for text in said]),
      np.mean([text.startswith('TOLD APART') for text in told]),
    ]

  np.testing.assert_allclose(false_alarms(), 0.025, atol=0.01)
  monkeypatch.setattr(Estimate, 'of_several', lambda self, tests: self)
  assert min(false_alarms()) > 0.06


def test_scores_that_are_no_numbers_are_said():
  _, model = models()
  with jax.set_mesh(model.mesh):
    broken = Generator(jax.tree.map(lambda x: x * np.nan, model.model), TOKENIZER, model.mesh)
  for part in PARTS[:2]:
    with pytest.raises(FloatingPointError, match='document 1: the model.s scores are not finite'):
      memorisation.measured(broken, asked(), (part,), lambda line: None)
  with pytest.raises(FloatingPointError, match="'pin .*': the model.s scores are not finite"):
    canaries.exposures(broken, SPACE, SECRETS, 20, 0)


def test_a_file_that_is_no_journal_is_said(tmp_path):
  path = tmp_path / 'begun.jsonl'
  for text, missing in (('{"a": 1}\n', 'settings'), ('{"settings": {}}\n{"part": "x"}\n', 'i')):
    path.write_text(text)
    with pytest.raises(ValueError, match=f"begun.jsonl has a line without '{missing}'"):
      Journal(path, {})
    assert path.read_text() == text
