"""What does an evaluation cost? lm-evaluation-harness through our engine, against its own
transformers backend; and BERTScore against bert-score.

    python -m benchmarks.evaluation [--json FILE]
    python -m benchmarks.evaluation --stream [--json FILE]

Needs torch, transformers, lm_eval and bert-score: make .venv/installed-oracle.

A Llama of bench-30M's shape (benchmarks.train_cpu) and a BERT of MiniLM's, f32, their weights
drawn, with tokenizers that are trained here on the interpreter's library, which is what is asked
about. Both sides read the same files, run the same tasks of the harness, and must come to the same
scores. Each runs in a process of its own, in turn, and does everything twice: the first time
programs are compiled, too; the second is what a longer evaluation takes.

--stream has another question: does a task of 10,000 questions take more memory than one of 1,000?
Of a Llama so small that its questions are what counts, by evaluate.py's own path.
"""

import contextlib
import json
import pathlib
import random
import tempfile
import time

import commands
from benchmarks import train_cpu, train_step

LENGTH, BATCH = 1024, 16  # positions of the model; rows that the harness's backend takes at a time
# What is asked: kind of the harness, tokens before an answer (about), questions.
TASKS = {
  'choices, long': ('multiple_choice', 400, 48),
  'choices, short': ('multiple_choice', 32, 96),
  'rolling': ('loglikelihood_rolling', 900, 24),
  'writing': ('generate_until', 64, 48),
}
CHOICES, ANSWER, WRITTEN = 4, 8, 32  # choices of a question, and tokens of an answer, about
PAIRS = 256  # of BERTScore
# Questions of --stream, words of a row, how many characters of these are asked, and of a choice.
STREAMED, WORDS, SHOWN, LEAST = (1_000, 10_000), 300, 200, 4
SIDES = {'ours': 'Tandem', 'theirs': 'lm_eval hf'}
JUDGES = {'ours': 'Tandem', 'theirs': 'bert-score'}
YAML = {
  'multiple_choice': 'doc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: truth\n'
  'metric_list: [{metric: acc}, {metric: acc_norm}]\n',
  'loglikelihood_rolling': 'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
  'metric_list: [{metric: bits_per_byte}]\n',
  'generate_until': 'doc_to_text: "{{text}}"\ndoc_to_target: "{{choices[0]}}"\n'
  f'generation_kwargs: {{until: ["</s>"], max_gen_toks: {WRITTEN}}}\n'
  'metric_list: [{metric: chrf}]\n',
}


def words() -> list[str]:
  from evaluation import library

  return ' '.join(library.held_out()).split()


def build(directory: pathlib.Path) -> None:
  """Writes models, tokenizers, tasks and pairs of texts."""
  import torch
  import transformers

  torch.manual_seed(0)
  text, draw = words(), random.Random(0)
  llama = train_step.llama(train_cpu.config().model, LENGTH, use_cache=True)
  llama.bos_token_id, llama.eos_token_id = 0, 1
  model = transformers.AutoModelForCausalLM.from_config(llama, dtype=torch.float32)
  model.save_pretrained(directory / 'llama')
  _tokenizer(text, llama.vocab_size).save_pretrained(directory / 'llama')

  bert = transformers.BertConfig(
    vocab_size=8192,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
    max_position_embeddings=512,
  )
  transformers.BertModel(bert).save_pretrained(directory / 'bert')
  _word_pieces(text, bert.vocab_size).save_pretrained(directory / 'bert')

  def some(tokens):
    """Words of about so many tokens."""
    first = draw.randrange(len(text) - 2 * tokens)
    return ' '.join(text[first : first + max(1, tokens // 2)])

  for name, (kind, tokens, count) in TASKS.items():
    rows = [
      {
        'text': some(tokens),
        'choices': [some(ANSWER) for _ in range(CHOICES)],
        'truth': draw.randrange(CHOICES),
      }
      for _ in range(count)
    ]
    path = directory / f'{_named(name)}.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    head = f'task: {_named(name)}\ndataset_path: json\ntest_split: test\noutput_type: {kind}\n'
    data = f'dataset_kwargs: {{data_files: {{test: {path}}}}}\n'
    path.with_suffix('.yaml').write_text(head + data + YAML[kind])
  pairs = [(some(draw.randint(20, 160)), some(draw.randint(20, 160))) for _ in range(PAIRS)]
  (directory / 'pairs.json').write_text(json.dumps(pairs))


def _named(task: str) -> str:
  return f'bench_{task.replace(", ", "_")}'


def _tokenizer(text: list[str], vocabulary: int):
  """Byte-level, of exactly so many ids."""
  import tokenizers as library
  import transformers

  made = library.Tokenizer(library.models.BPE())
  made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = library.decoders.ByteLevel()
  alphabet = library.pre_tokenizers.ByteLevel.alphabet()
  trainer = library.trainers.BpeTrainer(
    vocab_size=vocabulary,
    special_tokens=['<s>', '</s>'],
    initial_alphabet=alphabet,
    show_progress=False,
  )
  made.train_from_iterator([' '.join(text)], trainer)
  assert made.get_vocab_size() == vocabulary, made.get_vocab_size()
  marks = [('<s>', 0)]
  made.post_processor = library.processors.TemplateProcessing('<s> $A', special_tokens=marks)
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=made, bos_token='<s>', eos_token='</s>', pad_token='</s>'
  )


def _word_pieces(text: list[str], vocabulary: int):
  import tokenizers as library
  import transformers

  made = library.BertWordPieceTokenizer()
  made.train_from_iterator([' '.join(text)], vocab_size=vocabulary, show_progress=False)
  return transformers.BertTokenizerFast(tokenizer_object=made._tokenizer, model_max_length=512)


@contextlib.contextmanager
def harness_of(side: str, directory: pathlib.Path):
  """(tasks) -> what the harness says of them, by the model of a side."""
  from evaluation import harness

  with harness.importable() as lm_eval:
    manager = lm_eval.tasks.TaskManager(include_path=str(directory))
    if side == 'ours':
      model = harness.adapter(_ours(directory / 'llama'), harness.HarnessSettings(()), lambda _: 0)
    else:
      from lm_eval.models.huggingface import HFLM

      where = {'pretrained': str(directory / 'llama'), 'dtype': 'float32', 'max_length': LENGTH}
      model = HFLM(**where, device='cpu', batch_size=BATCH)

    def run(task: str) -> dict[str, float]:
      results = lm_eval.simple_evaluate(
        model=model, tasks=[task], task_manager=manager, bootstrap_iters=0
      )
      said = results['results'][task].items()
      return {name.split(',')[0]: value for name, value in said if isinstance(value, float | int)}

    yield run


def _ours(directory: pathlib.Path):
  import jax

  from data import tokenizers
  from decode.generator import Generator
  from model import checkpoint
  from parallel.mesh import MeshConfig, make_mesh

  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  return Generator(checkpoint.load(directory, mesh=mesh)[1], tokenizers.load(directory), mesh)


def judge_of(side: str, directory: pathlib.Path):
  """(answers, references) -> precision, recall and F1 of each, [n, 3]."""
  if side == 'ours':
    from evaluation.bertscore import BertScore

    judge = BertScore(_ours(directory / 'bert'))
    return lambda said, true: judge(said, [[text] for text in true])
  import collections

  import transformers
  from bert_score import utils

  model = transformers.BertModel.from_pretrained(directory / 'bert').eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory / 'bert')
  weights = collections.defaultdict(lambda: 1.0)
  weights |= {tokenizer.sep_token_id: 0, tokenizer.cls_token_id: 0}
  return lambda said, true: utils.bert_cos_score_idf(
    model, true, said, tokenizer, weights, device='cpu', batch_size=64
  ).numpy()


def run(side: str, what: str, directory: pathlib.Path) -> dict:
  """Seconds of the first and the second time, and scores."""
  seconds, scores = [], {}
  if what == 'BERTScore':
    pairs = json.loads((directory / 'pairs.json').read_text())
    judge, texts = judge_of(side, directory), [list(part) for part in zip(*pairs)]
    for _ in range(2):
      began = time.perf_counter()
      made = judge(*texts)
      seconds.append(time.perf_counter() - began)
    scores = {f'F1 of {i}': float(x) for i, x in enumerate(made[:, 2])}
  else:
    with harness_of(side, directory) as evaluate:
      for _ in range(2):
        began = time.perf_counter()
        scores = evaluate(_named(what))
        seconds.append(time.perf_counter() - began)
  return {'first': seconds[0], 'again': seconds[1], 'scores': scores}


def build_streamed(directory: pathlib.Path) -> None:
  """Writes a Llama, a tokenizer of bytes, and files of questions. These are alike in length, so
  that a few programs answer all: what others would take is no memory of questions.
  """
  import torch
  import transformers

  torch.manual_seed(0)
  text, draw = [word for word in words() if word.isascii()], random.Random(0)
  endings = [word[:LEAST] for word in text if len(word) >= LEAST]
  config = transformers.LlamaConfig(
    vocab_size=258,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=LENGTH,
    bos_token_id=0,
    eos_token_id=1,
  )
  transformers.LlamaForCausalLM(config).save_pretrained(directory / 'llama')
  _tokenizer(text, config.vocab_size).save_pretrained(directory / 'llama')
  for count in STREAMED:
    with (directory / f'{count}.jsonl').open('w') as file:
      for _ in range(count):
        first = draw.randrange(len(text) - WORDS)
        asked = ' '.join(text[first : first + WORDS])
        row = {'text': asked, 'choices': draw.sample(endings, CHOICES), 'truth': 0}
        file.write(json.dumps(row) + '\n')


def stream(count: int, directory: pathlib.Path) -> dict:
  """Seconds of an evaluation of so many questions of CHOICES choices."""
  from evaluation import running
  from evaluation.examples import Manner
  from evaluation.task import MultipleChoice, Task

  kind = MultipleChoice('choices', 'truth')
  task = Task(kind, str(directory / f'{count}.jsonl'), prompt=f'{{{{ text[:{SHOWN}] }}}}')
  asked = {'questions': task}, [0], Manner(), {}
  output = directory / f'of {count}'
  output.mkdir()
  began = time.perf_counter()
  (summary,), failed = running.evaluate(_ours(directory / 'llama'), *asked, output, lambda _: None)
  if failed or summary.n != count:
    raise RuntimeError(f'{summary.n} of {count} questions were answered: {failed}')
  return {'seconds': time.perf_counter() - began}


def show_streamed(to: str | None) -> None:
  runs, rows = {}, []
  with tempfile.TemporaryDirectory() as directory:
    build_streamed(pathlib.Path(directory))
    for count in STREAMED:
      flags = ['--count', str(count), '--directory', directory]
      environment = {'JAX_PLATFORMS': 'cpu'}
      made = train_step.in_process('benchmarks.evaluation', *flags, environment=environment)
      runs[count] = made
      rows.append([f'{count:,}', f'{made["peak_bytes"] / 1e6:,.0f}', count / made['seconds']])
  commands.table('questions of one task', ['questions', 'peak MB', 'a second'], rows)
  commands.write_json(to, 'evaluation_stream', {'runs': runs})


def main():
  arguments = commands.parser(__doc__)
  arguments.add_argument('--stream', action='store_true', help='memory by how many questions')
  arguments.add_argument('--count', type=int, help='of these, so many in this process')
  arguments.add_argument('--side', choices=SIDES, help='run one side in this process')
  arguments.add_argument('--what', choices=[*TASKS, 'BERTScore'], help='of it, this')
  arguments.add_argument('--directory', help='with the files that were built')
  options = arguments.parse_args()
  if options.side:
    print(json.dumps(run(options.side, options.what, pathlib.Path(options.directory))))
    return
  if options.count:
    print(json.dumps(stream(options.count, pathlib.Path(options.directory))))
    return
  if options.stream:
    show_streamed(options.json)
    return

  with tempfile.TemporaryDirectory() as directory:
    build(pathlib.Path(directory))
    environment = {
      'JAX_PLATFORMS': 'cpu',
      'HF_HUB_OFFLINE': '1',
      'HF_DATASETS_OFFLINE': '1',
      'HF_DATASETS_CACHE': f'{directory}/cache',
    }
    runs = {}
    for what in [*TASKS, 'BERTScore']:
      for side in SIDES:
        flags = ['--side', side, '--what', what, '--directory', directory]
        made = train_step.in_process('benchmarks.evaluation', *flags, environment=environment)
        print(f'{what}, {side}: {made["first"]:.1f} s, again {made["again"]:.1f} s', flush=True)
        runs[f'{what}, {side}'] = made

  rows, ratios = [], {}
  for what in [*TASKS, 'BERTScore']:
    a, b = runs[f'{what}, ours'], runs[f'{what}, theirs']
    ratios[what] = {time_: b[time_] / a[time_] for time_ in ('first', 'again')}
    apart = max(abs(a['scores'][name] - value) for name, value in b['scores'].items())
    count = PAIRS if what == 'BERTScore' else TASKS[what][2]
    per_second = [count / made['again'] for made in (a, b)]
    rows.append([what, *per_second, ratios[what]['again'], ratios[what]['first'], f'{apart:.1g}'])
  headers = ['a second', 'Tandem', 'peer', 'ratio', 'with compiling', 'scores apart']
  commands.table(f'bench-30M and a BERT of MiniLM\'s shape, f32; {LENGTH} positions', headers, rows)
  commands.write_json(options.json, 'evaluation', {'runs': runs, 'ratios': ratios})


if __name__ == '__main__':
  main()
