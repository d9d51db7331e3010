"""Are the numbers of lm_eval through our engine those of its own transformers backend, and is it
said what went wrong?
"""

import functools
import json
import math
import sys

import jax
import numpy as np
import pytest

from data import tokenizers
from decode.generator import Generator
from evaluation import harness
from evaluation.harness import HarnessSettings
from model import checkpoint
from parallel.mesh import MeshConfig, make_mesh
from tests.goldens import ours
from tests.test_commands import ROOT

pytestmark = pytest.mark.oracle
pytest.importorskip('lm_eval', reason='lm_eval is not installed')

LLAMA = dict(
  model_type='llama',
  architectures=['LlamaForCausalLM'],
  vocab_size=259,  # what the tokenizer has: others would have a share of probability there
  hidden_size=32,
  intermediate_size=64,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=128,
  bos_token_id=257,
  eos_token_id=256,
)
T5 = dict(
  model_type='t5',
  architectures=['T5ForConditionalGeneration'],
  vocab_size=259,  # what the tokenizer has: others would have a share of probability there
  d_model=32,
  d_kv=8,
  d_ff=64,
  num_layers=2,
  num_heads=4,
  decoder_start_token_id=258,
  pad_token_id=258,
  eos_token_id=256,
)
CHAT = (
  "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
  '{% if add_generation_prompt %}<assistant>{% endif %}'
)
WORDS = ['red', 'green', 'blue', 'über', 'a  b', 'no', '日本', 'yes, please']
ASKED = 'dataset_path: json\ntest_split: test\n'
TASKS = {
  'choices': 'output_type: multiple_choice\ndoc_to_text: "Q: {{q}}\\nA:"\ndoc_to_choice: "{{c}}"\n'
  'doc_to_target: a\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n',
  'long': 'output_type: multiple_choice\ndoc_to_text: "{{q * 12}} "\ndoc_to_choice: "{{c}}"\n'
  'doc_to_target: a\nmetric_list: [{metric: acc}, {metric: acc_bytes}]\n',
  'bare': 'output_type: multiple_choice\ndoc_to_text: ""\ntarget_delimiter: ""\n'
  'doc_to_choice: "{{c}}"\ndoc_to_target: a\nmetric_list: [{metric: acc}]\n',
  'last': 'output_type: loglikelihood\ndoc_to_text: "{{q}}"\ndoc_to_target: " {{c[a]}}"\n'
  'metric_list: [{metric: perplexity}, {metric: acc}]\n',
  'rolling': 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{q * 9}}"\n'
  'metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n',
  'writes': 'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{c[a]}}"\n'
  'generation_kwargs: {until: ["e"], max_gen_toks: 12}\n'
  'metric_list: [{metric: exact_match}, {metric: chrf}]\n',
}
SHOWN = 'fewshot_split: test\nnum_fewshot: 2\nfewshot_config: {sampler: first_n}\n'


GROUPS = {
  'inner': 'group: our_inner\ntask: [our_choices, our_few]\n'
  'aggregate_metric_list: [{metric: acc, weight_by_size: false}]\n',
  'outer': 'group: our_outer\ntask: [our_inner, our_bare]\n'
  'aggregate_metric_list: [{metric: acc}, {metric: acc_norm, weight_by_size: true}]\n',
}
# One that reads what is not there, one that asks for what would be passed over, one of PyPI's.
OTHERS = {
  'few': TASKS['choices'],
  'lost': TASKS['choices'],
  'strict': TASKS['writes'].replace('{until', '{top_p: 0.5, until'),
  'measured': TASKS['writes'].replace(
    '[{metric: exact_match}, {metric: chrf}]',
    '[{metric: DIRECTORY/letters, hf_evaluate: true, aggregation: mean, higher_is_better: true}]',
  ),
}
LETTERS = """
import datasets
import evaluate


class Letters(evaluate.Metric):
  def _info(self):
    text = datasets.Value('string')
    features = datasets.Features({'predictions': text, 'references': text})
    return evaluate.MetricInfo(
      description='', citation='', inputs_description='', features=features
    )

  def _compute(self, predictions, references):
    return {'letters': sum(map(len, predictions)) / len(predictions)}
"""


def tokenizer_files(directory, bos):
  import tokenizers as library

  alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
  made = library.Tokenizer(library.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
  made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = library.decoders.ByteLevel()
  made.add_special_tokens(['<end>', '<begin>', '<pad>'])
  single = {'llama': '<begin> $A', 't5': '$A <end>', '': '$A'}[bos]
  marks = [('<begin>', 257), ('<end>', 256)]
  made.post_processor = library.processors.TemplateProcessing(single=single, special_tokens=marks)
  made.save(str(directory / 'tokenizer.json'))
  tokens = {'eos_token': '<end>', 'pad_token': '<pad>', 'chat_template': CHAT}
  tokens |= {} if bos == 't5' else {'bos_token': '<begin>'}
  settings = tokens | {'tokenizer_class': 'PreTrainedTokenizerFast'}
  (directory / 'tokenizer_config.json').write_text(json.dumps(settings))


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
  """A directory of the harness's own files, one of each kind, with and without examples."""
  directory, draw = tmp_path_factory.mktemp('tasks'), np.random.default_rng(0)
  rows = []
  for i in range(24):
    choices = [WORDS[j] for j in draw.permutation(len(WORDS))[: 2 + i % 3]]
    rows.append({'q': f'Which {i}? {WORDS[i % 8]}', 'c': choices, 'a': int(i % len(choices))})
  (directory / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  (directory / 'few.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows[3:10]))
  (directory / 'letters').mkdir()
  (directory / 'letters' / 'letters.py').write_text(LETTERS)
  for name, text in GROUPS.items():
    (directory / f'{name}.yaml').write_text(text)
  for name, text in (TASKS | OTHERS).items():
    file = f'{name}.jsonl' if name in ('few', 'lost') else 'rows.jsonl'
    where = f'dataset_kwargs: {{data_files: {{test: {directory}/{file}}}}}\n'
    text = text.replace('DIRECTORY', str(directory))
    (directory / f'{name}.yaml').write_text(f'task: our_{name}\n{ASKED}{where}{text}')
    if name in ('choices', 'writes'):
      shown = f'task: our_{name}_shown\n{ASKED}{where}{text}{SHOWN}'
      (directory / f'{name}_shown.yaml').write_text(shown)
  return directory


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
  for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'HF_EVALUATE_OFFLINE'):
    monkeypatch.setenv(name, '1')
  monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))  # where PyPI's `evaluate` keeps modules
  monkeypatch.setattr('sys.path', [*sys.path])  # where it has them be imported from
  with harness.importable() as lm_eval:
    # Its own thousands of tasks take half a minute to be listed, each time, and are not asked.
    own_alone = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, 'TaskManager', own_alone)
  monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', str(tmp_path / 'cache'))


def models(directory, hf, bos, mesh):
  ours.build(hf, directory)
  tokenizer_files(directory, bos)
  model = checkpoint.load(directory, mesh=mesh)[1]
  return Generator(model, tokenizers.load(directory), mesh)


def theirs(directory, names, tasks, **options):
  """What its own backend says: {task: {metric: value}}."""
  with harness.importable() as lm_eval:
    manager = lm_eval.tasks.TaskManager(include_path=str(tasks))
    results = lm_eval.simple_evaluate(
      model='hf',
      model_args={
        'pretrained': str(directory),
        'dtype': 'float32',
        'max_length': 128,
        'backend': options.pop('backend'),
      },
      device='cpu',
      batch_size=8,
      tasks=names,
      task_manager=manager,
      bootstrap_iters=0,
      **options,
    )
  return results['results']


def check(said, expected):
  for name, task in said['tasks'].items():
    for metric, found in task['metrics'].items():
      np.testing.assert_allclose(
        found['value'], expected[name][metric], rtol=1e-5, atol=1e-6, err_msg=f'{name} {metric}'
      )
      assert found['low'] <= found['value'] <= found['high'], (name, metric, found)
  assert {*said['tasks']} == {*expected}


@pytest.mark.parametrize('kind, bos, chat', [('llama', 'llama', False), ('llama', '', True)])
def test_a_decoder_has_the_same_numbers(tmp_path, tasks, kind, bos, chat):
  names = [f'our_{name}' for name in TASKS if not chat or name in ('choices', 'writes')]
  names += ['our_choices_shown', 'our_writes_shown']
  mesh = make_mesh(MeshConfig(fsdp=2, data=2), jax.devices()[:4])
  model = models(tmp_path / 'hf', LLAMA, bos, mesh)
  out = tmp_path / 'out'
  out.mkdir()
  settings = HarnessSettings(tuple(names), str(tasks), chat=chat, system='Say it.' if chat else '')
  harness.evaluate(model, settings, {}, out, print)
  said = json.loads((out / 'lm_eval.json').read_text())
  counts = {name: each['counts'] for name, each in said['tasks'].items()}
  assert counts['our_writes']['answers'] == 24 and counts['our_writes']['failed'] == 0
  assert chat or counts['our_long']['cut'] and not counts['our_long']['nan']
  options = {'apply_chat_template': chat, 'fewshot_as_multiturn': chat}
  options |= {'system_instruction': 'Say it.'} if chat else {}
  check(said, theirs(tmp_path / 'hf', names, tasks, backend='causal', **options))
  lines = (out / 'lm_eval-our_choices.jsonl').read_text().splitlines()
  assert len(lines) == said['tasks']['our_choices']['n'] == 24


def test_an_encoder_decoder_has_the_same_numbers(tmp_path, tasks):
  names = ['our_choices', 'our_last', 'our_writes', 'our_choices_shown']
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  model = models(tmp_path / 'hf', T5, 't5', mesh)
  harness.evaluate(model, HarnessSettings(tuple(names), str(tasks)), {}, tmp_path, print)
  said = json.loads((tmp_path / 'lm_eval.json').read_text())
  check(said, theirs(tmp_path / 'hf', names, tasks, backend='seq2seq'))


@pytest.fixture
def small(tmp_path):
  return models(tmp_path / 'hf', LLAMA, 'llama', make_mesh(MeshConfig(), jax.devices()[:1]))


def said_of(small, tasks, names, output, log=print):
  """What lm_eval.json has, which is what is given."""
  output.mkdir(exist_ok=True)
  made = harness.evaluate(small, HarnessSettings(names, str(tasks)), {'step': 3}, output, log)
  assert json.loads((output / 'lm_eval.json').read_text()) == json.loads(json.dumps(made))
  return made


def test_a_group_has_the_same_number_too(tmp_path, tasks, small):
  said = said_of(small, tasks, ('our_outer',), tmp_path / 'out')
  assert {*said['tasks']} == {'our_choices', 'our_few', 'our_bare'} and not said['failed']
  expected = theirs(tmp_path / 'hf', ['our_outer'], tasks, backend='causal')
  assert {*said['groups']} == {'our_inner', 'our_outer'}
  assert {*said['groups']['our_outer']['metrics']} == {'acc,none', 'acc_norm,none'}
  for name, group in said['groups'].items():
    for metric, each in group['metrics'].items():
      assert each['value'] == pytest.approx(expected[name][metric], abs=1e-6)
      assert each['low'] < each['value'] < each['high'] and each['n'] in (31, 55)
  assert said['groups']['our_inner']['metrics']['acc,none']['method'] == 'bootstrap'
  assert said['groups']['our_outer']['metrics']['acc,none']['method'] == 'wilson'


def test_a_task_that_raises_is_named_and_others_go_on(tmp_path, tasks, small):
  names = 'our_lost', 'our_strict', 'our_few'
  said = said_of(small, tasks, names, tmp_path / 'out')
  assert [*said['tasks']] == ['our_few'] and {*said['failed']} == {'our_lost', 'our_strict'}
  assert "'top_p' is unknown" in said['failed']['our_strict']


def test_what_was_interrupted_goes_on_with_what_is_there(tmp_path, tasks, small, monkeypatch):
  names = 'our_choices', 'our_few', 'our_writes'
  whole = said_of(small, tasks, names, tmp_path / 'whole')
  with monkeypatch.context() as patch:

    def interrupted(*_):
      raise KeyboardInterrupt

    patch.setattr(harness, 'written', interrupted)
    with pytest.raises(KeyboardInterrupt):
      said_of(small, tasks, names, tmp_path / 'part')
  lines = []
  with monkeypatch.context() as patch:
    patch.setattr(harness, 'score_pairs', lambda *_: pytest.fail('is asked again'))
    assert said_of(small, tasks, names, tmp_path / 'part', lines.append) == whole
  assert lines[:2] == ['our_choices: is there already', 'our_few: is there already']
  for path in (tmp_path / 'whole').iterdir():
    assert (tmp_path / 'part' / path.name).read_bytes() == path.read_bytes(), path.name

  # Other questions of the same name are not those; nor is another model.
  text = (tasks / 'few.jsonl').read_text()
  try:
    (tasks / 'few.jsonl').write_text(text.replace('Which', 'What'))
    said = said_of(small, tasks, names, tmp_path / 'part')
  finally:
    (tasks / 'few.jsonl').write_text(text)
  assert 'is of other questions of our_few, 7 with digest' in said['failed']['our_few']
  with pytest.raises(ValueError, match='step was 3 and is 7'):
    harness.evaluate(small, HarnessSettings(names, str(tasks)), {'step': 7}, tmp_path / 'part')


def test_scores_that_are_no_numbers_are_said(tmp_path, tasks, small, monkeypatch):
  """lm_eval takes the first one for the best, which would be an accuracy like any other."""
  pairs = harness.score_pairs
  lost = lambda score: score._replace(logprob=math.nan, greedy=False)  # noqa: E731
  monkeypatch.setattr(
    harness, 'score_pairs', lambda *asked: [*map(lost, (made := pairs(*asked))[:3]), *made[3:]]
  )
  said = said_of(small, tasks, ('our_few',), tmp_path / 'some')
  assert said['tasks']['our_few']['counts']['nan'] == 3
  monkeypatch.setattr(harness, 'score_pairs', lambda *asked: [*map(lost, pairs(*asked))])
  said = said_of(small, tasks, ('our_few',), tmp_path / 'all')
  assert not said['tasks'] and 'scores is a finite number; the model' in said['failed']['our_few']


def test_a_metric_of_pypis_evaluate_is_found_beside_our_own(tmp_path, tasks, small, monkeypatch):
  """From the repository's root, where `import evaluate` is our command."""
  monkeypatch.chdir(ROOT)
  monkeypatch.syspath_prepend(str(ROOT))
  said = said_of(small, tasks, ('our_measured',), tmp_path / 'out')
  assert not said['failed']
  lines = [json.loads(line) for line in open(tmp_path / 'out' / 'lm_eval-our_measured.jsonl')]
  letters = [len(line['filtered_resps'][0]) for line in lines]
  found = said['tasks']['our_measured']['metrics']['letters,none']
  assert found['value'] == pytest.approx(np.mean(letters)) and max(letters) > 0
  assert found['low'] <= found['value'] <= found['high']
