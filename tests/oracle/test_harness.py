"""Are the numbers of lm_eval through our engine those of its own transformers backend?"""

import json

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
  for name, text in TASKS.items():
    where = f'dataset_kwargs: {{data_files: {{test: {directory}/rows.jsonl}}}}\n'
    (directory / f'{name}.yaml').write_text(f'task: our_{name}\n{ASKED}{where}{text}')
    if name in ('choices', 'writes'):
      shown = f'task: our_{name}_shown\n{ASKED}{where}{text}{SHOWN}'
      (directory / f'{name}_shown.yaml').write_text(shown)
  return directory


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
  for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE'):
    monkeypatch.setenv(name, '1')
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
  rows = harness.evaluate(model, settings, {}, out, print)
  assert len(rows) >= len(names)
  said = json.loads((out / 'lm_eval.json').read_text())
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
