"""Is a row of pairs its records: both sides, whole, once, each with a segment of its own?"""

import json

import numpy as np
import pytest

from data import packing
from data.batch import SourceBatch
from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from data.pairs import PairWriter
from data.prompts import PromptWriter
from data.records import PairRecord, PromptRecord
from data.tokenizers import CharTokenizer, build
from objectives.seq2seq import Seq2Seq
from objectives.sft import SFT

S, T = 24, 12
BYTE = TokenizerConfig(kind='byte')


def quiet(line):
  del line


def rows(count, seed=0):
  draw = np.random.default_rng(seed)
  return [
    {'source': f'{i:02}' + 's' * int(a), 'target': f'{i:02}' + 't' * int(b)}
    for i, (a, b) in enumerate(zip(draw.integers(1, 20, count), draw.integers(0, 9, count)))
  ]


def config(tmp_path, given, **fields):
  path = tmp_path / f'{len(given)}.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in given))
  return DataConfig(
    **{
      'sources': (SourceConfig(kind='jsonl', path=str(path), format='pair'),),
      'clean': CleanConfig(anonymise=(), near_duplicates=0),
      'tokenizer': BYTE,
      'sequence_length': S,
      'batch_size': 2,
      'validation_fraction': 0.2,
      'cache_dir': str(tmp_path / 'cache'),
      **fields,
    }
  )


def segments(pairs, source, length=S, target_length=T):
  """(source ids, decoder's inputs, targets, weights) of each segment of the rows, in order."""
  for row in range(len(source)):
    batch = SourceBatch.empty(1, target_length, length)
    source.fill(row, batch, 0)
    assert (batch.weights[batch.segments == 0] == 0).all()
    assert batch.segments.max() == batch.source_segments.max()
    for segment in range(1, batch.segments.max() + 1):
      read, written = batch.source_segments[0] == segment, batch.segments[0] == segment
      for positions, inside in ((batch.source_positions, read), (batch.positions, written)):
        assert (positions[0, inside] == np.arange(inside.sum())).all()
        assert (np.diff(np.flatnonzero(inside)) == 1).all()  # T5 sees distances, not positions
      yield (
        batch.source[0, read].tolist(),
        batch.tokens[0, written].tolist(),
        batch.targets[0, written].tolist(),
        batch.weights[0, written],
      )


def text(ids):
  return bytes(i - 3 for i in ids if i > 2).decode()


@pytest.mark.parametrize('packed', ['fit', 'order', 'alone'])
def test_every_pair_is_in_one_row_once_and_its_decoder_is_a_token_behind(tmp_path, packed):
  given = rows(60)
  objective = Seq2Seq(packing=packed, target_length=T, prefix='p: ')
  prepared = objective.read(config(tmp_path, given, sequence_length=S + 8), quiet)
  splits = [*prepared.train, prepared.validation]
  seen = [each for split in splits for each in segments(prepared, split, S + 8)]
  for source, inputs, targets, weights in seen:
    # Both end in eos, and the decoder begins with padding, as T5's do.
    assert (source[-1], targets[-1], inputs[0]) == (2, 2, 0)
    assert inputs[1:] == targets[:-1] and (weights == 1).all()
  made = sorted((text(source), text(targets)) for source, _, targets, _ in seen)
  assert made == sorted(('p: ' + row['source'], row['target']) for row in given)
  trained = prepared.report['sources'][0]['train']['documents']
  assert (prepared.rows == trained) == (packed == 'alone')


def test_pairs_of_examples_that_count_alike_weigh_one(tmp_path):
  prepared = Seq2Seq(target_length=T, weighting='example').read(config(tmp_path, rows(30)), quiet)
  for _, _, targets, weights in segments(prepared, prepared.train[0]):
    np.testing.assert_allclose(weights, np.full(len(targets), 1 / len(targets)), rtol=1e-6)


def test_packing_both_sides_is_first_fit_of_the_largest():
  # Worked out by hand, in rows of 10 and 6: by the share of a row, 2 (9/10), 1 (5/6), 3 (8/10), 0
  # (5/10), 4 (2/6). No two of the first four have room together; the last has beside 2.
  lengths = np.array([[5, 2], [3, 5], [9, 1], [8, 4], [1, 2]])
  order, ends = packing.pack_both(lengths, (10, 6))
  assert [order[a:b].tolist() for a, b in zip(ends, ends[1:])] == [[2, 4], [1], [3], [0]]
  order, ends = packing.pack_both_in_order(lengths, (10, 6))
  assert order.tolist() == [0, 1, 2, 3, 4] and ends.tolist() == [0, 1, 2, 3, 5]
  draw = np.random.default_rng(0)
  many = np.stack([draw.integers(1, 100, 9000), draw.integers(1, 40, 9000)], 1)
  order, ends = packing.pack_both(many, (100, 40))
  assert sorted(order.tolist()) == list(range(9000))
  sums = np.add.reduceat(many[order], ends[:-1])
  assert (sums <= (100, 40)).all()
  in_order = len(packing.pack_both_in_order(many, (100, 40))[1])
  assert len(ends) < 0.9 * in_order


@pytest.mark.parametrize('then', ['drop', 'left', 'right'])
def test_what_is_too_long_on_a_side_is_dropped_or_cut_and_counted(tmp_path, then):
  given = [
    {'source': 'a' * 20 + 'z' * 20, 'target': 'long source'},
    {'source': 'long target', 'target': 'b' * 10 + 'y' * 10},
    *rows(12),
  ]
  said = []
  objective = Seq2Seq(target_length=T, prefix='p:', too_long=then, target_too_long=then)
  prepared = objective.read(config(tmp_path, given), said.append)
  counts = prepared.report['sources'][0]
  splits = [*prepared.train, prepared.validation]
  seen = [each for split in splits for each in segments(prepared, split)]
  made = {text(source): (source, targets) for source, _, targets, _ in seen}
  if then == 'drop':
    assert counts['dropped'] == {'source_too_long': 1, 'target_too_long': 1}
    assert counts['truncated'] == 0 and len(made) == 12
  else:
    # The prefix and the end of a source stay, whichever side is cut.
    kept = 'a' + 'z' * 20 if then == 'left' else 'a' * 20 + 'z'
    source, targets = made['p:' + kept]
    assert len(source) == S and source[-1] == 2 and targets[-1] == 2
    _, targets = made['p:long target']
    wanted = 'y' * 10 if then == 'left' else 'b' * 10 + 'yy'
    assert text(targets)[-len(wanted) :] == wanted and len(targets) == T
    # A target that is cut on its right did not end there.
    assert (targets[-1] == 2) == (then == 'left')
    assert counts['truncated'] == 2 and not counts['dropped']
    assert counts['cut'] == {'source tokens': 1, 'target tokens': 1}
  longest = {side: lengths['longest'] for side, lengths in counts['lengths'].items()}
  assert longest == {'source tokens': 43, 'target tokens': 21}
  assert any('source tokens: shortest' in line and 'longest 43' in line for line in said)


def test_fill_and_lengths_are_of_what_rows_hold(tmp_path):
  said = []
  prepared = Seq2Seq(target_length=T).read(config(tmp_path, rows(60)), said.append)
  (split,) = prepared.train
  batch = SourceBatch.empty(len(split), T, S)
  for row in range(len(split)):
    split.fill(row, batch, row)
  read, written = batch.source_segments > 0, batch.segments > 0
  assert prepared.fills == pytest.approx({'sources': read.mean(), 'targets': written.mean()})
  both = (read.sum() + written.sum()) / (len(split) * (S + T))
  assert prepared.report['packing']['train'][0]['fill'] == pytest.approx(both)
  assert said[-1] == (
    f'data: rows of {S}x{T} are filled with sources {read.mean():.1%}, targets {written.mean():.1%}'
  )
  # What a token sees, counted pair by pair.
  lengths = prepared.document_length
  seen = batch.source_segments[:, :, None] == batch.source_segments[:, None]
  crossed = batch.segments[:, :, None] == batch.source_segments[:, None]
  seen, crossed = (seen & read[:, :, None]).sum(), (crossed & written[:, :, None]).sum()
  assert lengths.source == pytest.approx(read.sum() / len(split))
  assert lengths.source_seen == pytest.approx(seen / read.sum())
  assert lengths.source_crossed == pytest.approx(crossed / written.sum())


def test_what_changes_pairs_changes_the_key(tmp_path):
  given = config(tmp_path, rows(30))
  kinds = [
    Seq2Seq(target_length=T),
    Seq2Seq(target_length=T + 1),
    Seq2Seq(target_length=T, prefix='p'),
    Seq2Seq(target_length=T, too_long='left'),
    Seq2Seq(target_length=T, target_too_long='left'),
    Seq2Seq(target_length=T, packing='alone'),
    Seq2Seq(target_length=T, weighting='example'),
  ]
  assert len({kind.read(given, quiet).key for kind in kinds}) == len(kinds)
  assert kinds[0].read(given, quiet).key == kinds[0].read(given, quiet).key


def test_what_has_no_ids_is_named_with_its_place():
  tokenizer = CharTokenizer('abc')
  with pytest.raises(ValueError, match='a.jsonl:7: '):
    PairWriter(tokenizer).example('a.jsonl:7', PairRecord('a', 'z'))
  with pytest.raises(ValueError, match='a.jsonl:7: '):
    PromptWriter(tokenizer).prompt('a.jsonl:7', PromptRecord('z', None, {}))


def test_a_prefix_is_encoded_with_what_follows():
  """As generation encodes a prompt that holds both."""
  tokenizer = build(BYTE, (), ())
  made = PairWriter(tokenizer, 'sum: ').example('a:1', PairRecord('text', 'x'))
  assert made.ids.tolist() == [*tokenizer.encode('sum: text'), 2, *tokenizer.encode('x'), 2]
  assert made.kept == 5 and made.scored.tolist() == [False] * 10 + [True] * 2


@pytest.mark.parametrize(
  'change, words',
  [
    ({'row': {'source': 'a'}}, "jsonl:1: field 'target' of format 'pair' must be a text"),
    ({'row': {'source': 'a', 'target': ''}}, 'jsonl:1: the target is empty'),
    ({'objective': SFT()}, "format='pair' is not of the records that objective.kind='sft'"),
    ({'objective': Seq2Seq(prefix='p' * S, too_long='left')}, 'no room for a source behind a pre'),
    ({'data': {'split': 'tail'}}, 'would cut a record in two'),
  ],
)
def test_what_cannot_be_is_said(tmp_path, change, words):
  row = change.get('row', {'source': 'a' * 30, 'target': 'b'})
  given = config(tmp_path, [row], **change.get('data', {}))
  with pytest.raises(ValueError, match=words):
    change.get('objective', Seq2Seq()).read(given, quiet)
  said = rf'sequence_length={S} has no room for a source behind 5 soft tokens .*prefix of {S - 5}'
  with pytest.raises(ValueError, match=said):
    pairs = config(tmp_path, [{'source': 'a' * 30, 'target': 'b'}])
    Seq2Seq(prefix='p' * (S - 5), too_long='left').read(pairs, quiet, range(300, 305))
  with pytest.raises(ValueError, match='target_length=-1'):
    Seq2Seq(target_length=-1)
  with pytest.raises(ValueError, match='known|one of|target_too_long'):
    Seq2Seq(target_too_long='middle')
