"""What does EleutherAI's lm-evaluation-harness (lm_eval) say of a model? Its tasks and its way to
count, our engine to score and to write; the same numbers as its own transformers backend.

What the harness asks is text. It begins as the tokenizer's files say, which is what transformers
does: not always with the id that begins all texts that are trained on here. A pair is encoded as
one and cut where the context ends.
"""

import contextlib
import dataclasses
import hashlib
import importlib.machinery
import importlib.util
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import files
import names
from data.tokenizer import in_utf8
from decode.choices import PairScore, room, score_pairs
from decode.generator import Generator
from evaluation import writing
from evaluation.examples import chat_of, chat_settings
from evaluation.intervals import bootstrap, wilson
from evaluation.running import ProgressLine, check_own, finite
from evaluation.task import Generate

FILE = 'lm_eval.json'
PAIRS = 1024  # that are scored between two lines of progress
RESAMPLES = 200  # of documents, whose metric may take long
NEW = 256  # tokens of an answer whose task names no other number, as there
# What a task may say of generation; all else would change answers, and is refused.
KNOWN = ('until', 'do_sample', 'temperature', 'max_gen_toks')
ROOT = pathlib.Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def importable() -> Iterator[Any]:
  """The harness, as `lm_eval`. What it imports by the name of our evaluate.py is PyPI's library.

  Raises ImportError that names the extra.
  """
  places = [place for place in sys.path if pathlib.Path(place or '.').resolve() != ROOT]
  before = sys.modules.pop('evaluate', None)
  spec = importlib.machinery.PathFinder.find_spec('evaluate', places)
  try:
    if spec is not None:
      module = sys.modules['evaluate'] = importlib.util.module_from_spec(spec)
      spec.loader.exec_module(module)
    try:
      import lm_eval
      import lm_eval.tasks
    except ImportError as error:
      raise ImportError(
        f"--lm_eval needs the lm-evaluation-harness ({error}); pip install 'tandem[lm_eval]'"
      ) from error
    yield lm_eval
  finally:
    for name in [name for name in sys.modules if name.split('.')[0] == 'evaluate']:
      del sys.modules[name]
    if before is not None:
      sys.modules['evaluate'] = before


@dataclasses.dataclass(frozen=True)
class HarnessSettings:
  """What of the harness's is to be run, and how.

  Attributes:
    tasks: its names for them. path: a directory of more tasks, YAML files; '': only its own.
    shots: examples before each question; None: as each task says.
    limit: the first documents of each task; 0: all. seed: of the examples, and of intervals.
    chat: whether questions are turns by the chat template, examples too. system: what comes first.
    bos: whether a text begins with the tokenizer's `bos`; None: as its files say.
  """

  tasks: tuple[str, ...]
  path: str = ''
  shots: int | None = None
  limit: int = 0
  seed: int = 0
  chat: bool = False
  system: str = ''
  bos: bool | None = None


def evaluate(
  model: Generator,
  settings: HarnessSettings,
  of: Mapping[str, Any],
  output: pathlib.Path,
  log: Callable[[str], Any] = print,
) -> list[list[str]]:
  """Runs it; rows of a table: task, metric, score with its interval, documents.

  of: what is said of the model in the results. Writes lm_eval.json, and of each task's documents
  lm_eval-TASK.jsonl. Raises ValueError for tasks that it does not know, and where the directory has
  another evaluation; ImportError without it.
  """
  asked = dataclasses.asdict(settings) | (chat_settings(model.tokenizer) if settings.chat else {})
  check_own(output / FILE, {**of, 'settings': asked})
  if not model.model.config.causal:
    raise ValueError('an encoder writes nothing behind a text, which is all that --lm_eval asks')
  with importable() as lm_eval:
    manager = lm_eval.tasks.TaskManager(include_path=settings.path or None)
    for name in settings.tasks:
      names.check('--lm_eval', name, manager.all_tasks)
    results = lm_eval.simple_evaluate(
      model=adapter(model, settings, log),
      tasks=[*settings.tasks],
      task_manager=manager,
      num_fewshot=settings.shots,
      limit=settings.limit or None,
      log_samples=True,
      bootstrap_iters=0,  # in forks, which JAX's threads do not survive; see `estimated`
      random_seed=settings.seed,
      numpy_random_seed=settings.seed,
      torch_random_seed=settings.seed,
      fewshot_random_seed=settings.seed,
      apply_chat_template=settings.chat,
      fewshot_as_multiturn=settings.chat,
      system_instruction=settings.system or None,
    )
    version = lm_eval.__version__
  return _written(results, version, asked, of, output)


def adapter(model: Generator, settings: HarnessSettings, log: Callable[[str], Any] = print):
  """The model as the harness takes it, an lm_eval.api.model.TemplateLM; within `importable`."""
  from lm_eval.api.model import TemplateLM

  class Tandem(TemplateLM):
    """Attributes: those that the harness reads of a model."""

    backend = 'seq2seq' if model.model.config.encoder_layers else 'causal'
    tokenizer_name = model.tokenizer.kind
    eot_token_id = model.tokenizer.eos
    prefix_token_id = model.tokenizer.eos if backend == 'seq2seq' else model.tokenizer.bos
    max_length, max_gen_toks = model.context, NEW
    begins = getattr(model.tokenizer, 'begins', True) if settings.bos is None else settings.bos

    def tok_encode(self, string, add_special_tokens=None, **_):
      return encoded(model, string, self.begins, add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests, **_):
      pairs = [(context, continuation) for _, context, continuation in requests]
      return [(score.logprob, score.greedy) for score in scored(model, pairs, log)]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      from lm_eval import utils

      pairs, counts = [], []
      for request in requests:
        windows = utils.get_rolling_token_windows(
          self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
        )
        parts = [utils.make_disjoint_window(window) for window in windows]
        pairs += parts
        counts.append(len(parts))
      scores = iter(scored(model, pairs, log))
      return [sum(next(scores).logprob for _ in range(count)) for count in counts]

    def generate_until(self, requests, disable_tqdm=False):
      return written(model, [request.args for request in requests], self.tok_encode, settings, log)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
      if not add_generation_prompt:
        raise ValueError(
          'a task begins the answer itself (gen_prefix), which is not asked with --chat; leave it '
          'out'
        )
      return chat_of(model.tokenizer).render(chat_history, add_generation_prompt=True)

    def chat_template(self, chat_template=False):
      return chat_of(model.tokenizer).source if chat_template else ''

  return Tandem()


def encoded(model: Generator, text: str, bos: bool, marked: bool) -> list[int]:
  """Ids of a text, in which names of control tokens are those tokens, as transformers takes them.

  marked: with what begins a text, or ends one that an encoder reads.
  """
  tokenizer = model.tokenizer
  ids = list(tokenizer.encode(in_utf8(text), special=True))
  if not marked:
    return ids
  if model.model.config.encoder_layers:
    return [*ids, tokenizer.eos]
  return ids if not bos or ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids]


def scored(
  model: Generator, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], log: Callable[[str], Any]
) -> list[PairScore]:
  """Of (context, continuation) pairs, of whose contexts the last tokens are kept that there is room
  for.
  """
  fitted, cut = [], 0
  for context, continuation in pairs:
    limit = room(model, len(continuation))
    cut += len(context) > limit
    fitted.append((context[-limit:] if limit < len(context) else context, continuation))
  if cut:
    log(f'NOTE: {cut} of {len(pairs)} contexts were cut on the left to fit the model')
  progress, scores = ProgressLine('pairs', len(pairs), 0, log), []
  for first in range(0, len(fitted), PAIRS):
    here = fitted[first : first + PAIRS]
    scores += score_pairs(model, *([pair[side] for pair in here] for side in (0, 1)))
    progress.at(len(scores))
  progress.end()
  return scores


def written(
  model: Generator,
  requests: Sequence[tuple[str, Mapping]],
  encode: Callable[[str], list[int]],
  settings: HarnessSettings,
  log: Callable[[str], Any],
) -> list[str]:
  """Answers to (text, what is said of generation), in their order."""
  ways: dict[str, list[int]] = {}
  for i, (_, options) in enumerate(requests):
    ways.setdefault(json.dumps(options, sort_keys=True), []).append(i)
  answers, progress = [''] * len(requests), ProgressLine('answers', len(requests), 0, log)
  done = cut = 0
  for way, indices in ways.items():
    kind = generation(json.loads(way))
    limit = model.context
    if not model.model.config.encoder_layers:
      limit = model.context - kind.max_new_tokens
    if limit < 1:
      raise ValueError(
        f'max_gen_toks={kind.max_new_tokens} leaves no room for a question in '
        f'{model.plain.limit}; lower it in the task'
      )
    prompts = [encode(requests[i][0]) for i in indices]
    cut += sum(len(ids) > limit for ids in prompts)
    prompts = [ids[-limit:] for ids in prompts]
    for i, (reply,) in zip(indices, writing.answers(model, prompts, kind, settings.seed)):
      answers[i] = reply.text
      done += 1
      progress.at(done)
  progress.end()
  if cut:
    log(f'NOTE: {cut} of {len(requests)} questions were cut on the left to fit the model')
  return answers


def generation(options: Mapping) -> Generate:
  """What a task says of generation. Raises ValueError for what would be passed over."""
  options = dict(options)
  for alias in ('max_new_tokens', 'max_tokens', 'max_completion_tokens'):
    if alias in options:
      options.setdefault('max_gen_toks', options.pop(alias))
  for name in options:
    names.check('a setting of generation in a task', name, KNOWN)
  until = options.get('until') or []
  stops = [until] if isinstance(until, str) else [text for text in until if text]
  temperature = float(options.get('temperature', 0.0))
  sampled = options.get('do_sample', temperature > 0)
  if sampled and not temperature:
    temperature = 1.0
  return Generate(
    references='answers',
    stops=tuple(stops),
    max_new_tokens=int(options.get('max_gen_toks', NEW)),
    temperature=temperature if sampled else 0.0,
  )


# What is said of it.


def _written(results, version, asked, of, output) -> list[list[str]]:
  tasks, rows = {}, []
  for name, samples in sorted(results['samples'].items()):
    metrics = {}
    for key, value in results['results'][name].items():
      metric, _, way = key.partition(',')
      if way and not metric.endswith('_stderr') and isinstance(value, int | float):
        metrics[key] = estimated(value, metric, way, samples, asked['seed'])
        rows.append([name, key, shown(metrics[key]), str(metrics[key]['n'])])
    documents = {json.dumps(sample['arguments'], default=str) for sample in samples}
    digest = hashlib.blake2b(''.join(sorted(documents)).encode(), digest_size=16).hexdigest()
    version_of = results['versions'].get(name)
    # Of each document there is a sample for every filter.
    n = len({sample['doc_id'] for sample in samples})
    tasks[name] = {'n': n, 'metrics': metrics, 'prompts': digest, 'version': version_of}
    lines = (json.dumps(finite(sample), default=str) + '\n' for sample in samples)
    files.replace(output / f'lm_eval-{name}.jsonl', ''.join(lines))
  said = {'lm_eval': version, **of, 'settings': asked, 'tasks': tasks}
  files.replace(output / FILE, json.dumps(finite(said), indent=1) + '\n')
  return rows


def estimated(value: float, metric: str, way: str, samples: Sequence[Mapping], seed: int) -> dict:
  """The harness's value with a 95% interval: Wilson's of rates; the bootstrap's, over documents, of
  means, and of what the harness's own function for that metric makes of them (BLEU, perplexity).
  Of a task's own function there is none: method 'none'.
  """
  each = [
    sample[metric] for sample in samples if sample.get('filter', way) == way and metric in sample
  ]
  if each and all(isinstance(x, int | float | np.number) for x in each):
    x = np.array(each, np.float64)
    if np.isclose(x.mean(), value, rtol=1e-9, atol=1e-12):
      rate = np.isin(x, (0, 1)).all()
      of_mean = wilson(int(x.sum()), len(x)) if rate else None
      return (of_mean or bootstrap(lambda i: float(x[i].mean()), len(x), seed)).values()
  of_all = registered(metric)
  if each and of_all is not None and np.isclose(of_all(each), value, rtol=1e-9, atol=1e-12):
    of = bootstrap(lambda i: of_all([each[j] for j in i]), len(each), seed, RESAMPLES)
    return of.values()
  return {'value': value, 'low': None, 'high': None, 'n': len(each), 'method': 'none'}


def registered(metric: str) -> Callable[[Sequence], float] | None:
  """What the harness makes of a metric of all documents, where it knows one."""
  from lm_eval.api import registry

  return registry.get_metric_aggregation(metric)


def shown(metric: Mapping[str, Any]) -> str:
  """A score with its interval."""
  if metric['low'] is None:
    return f'{metric["value"]:.4g}'
  return f'{metric["value"]:.4g} [{metric["low"]:.4g}, {metric["high"]:.4g}]'
