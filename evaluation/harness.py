"""What does EleutherAI's lm-evaluation-harness (lm_eval) say of a model? Its tasks and its way to
count, our engine to score and to write; the same numbers as its own transformers backend.

What the harness asks is text. It begins as the tokenizer's files say, which is what transformers
does: not always with the id that begins all texts that are trained on here. A pair is encoded as
one and cut where the context ends.

Each task is asked by itself, and kept when it ends: one that raises is named, and the others go on.
"""

import collections
import contextlib
import dataclasses
import importlib.machinery
import importlib.util
import json
import math
import pathlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import files
import names
from data.tokenizer import in_utf8
from decode.choices import PairScore, room, score_pairs
from decode.generator import Generator
from decode.request import FAILED, LENGTH
from evaluation import harness_results, writing
from evaluation.examples import chat_of, chat_settings
from evaluation.harness_results import FILE
from evaluation.running import CHANGED, ProgressLine, check_own, finite, read_lines, why
from evaluation.task import Generate

PAIRS = 1024  # that are scored between two lines of progress
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


class KeptAlready(Exception):
  """What a task asks was answered before."""


def evaluate(
  model: Generator,
  settings: HarnessSettings,
  of: Mapping[str, Any],
  output: pathlib.Path,
  log: Callable[[str], Any] = print,
) -> dict[str, Any]:
  """Runs it, and gives what lm_eval.json then has: see evaluation/harness_results.py.

  of: what is said of the model in the results. Writes, as each task ends, lm_eval.json, and of its
  documents lm_eval-TASK.jsonl; a task that is there already is not asked again. One that raises is
  named in `failed`, and so is a group of it. Raises ValueError for tasks that it does not know, and
  where the directory has another evaluation; ImportError without it.
  """
  asked = dataclasses.asdict(settings) | (chat_settings(model.tokenizer) if settings.chat else {})
  if not model.model.config.causal:
    raise ValueError('an encoder writes nothing behind a text, which is all that --lm_eval asks')
  with importable() as lm_eval:
    manager = lm_eval.tasks.TaskManager(include_path=settings.path or None)
    for name in settings.tasks:
      names.check('--lm_eval', name, manager.all_tasks)
    said = _begun(output, {'lm_eval': lm_eval.__version__, **of, 'settings': asked})
    for name in dict.fromkeys(settings.tasks):
      try:
        _seed(settings.seed)
        loaded = manager.load([name])
      except Exception as error:  # a task's files can fail in any way that a program can
        _fails(said, name, why(error), output, log)
        continue
      for task_name, task in loaded['tasks'].items():
        try:
          made = _one(model, task, settings, said['tasks'].get(task_name), output, log)
        except Exception as error:
          _fails(said, task_name, why(error), output, log)
          continue
        said['tasks'][task_name] = made
        _write(said, output)
      for group in loaded['groups'].values():
        _group(said, group, settings.seed, output, log)
  return said


def _begun(output: pathlib.Path, of: Mapping[str, Any]) -> dict[str, Any]:
  """What is there of this evaluation. Raises ValueError where it is of another one."""
  check_own(output / FILE, of)
  path = output / FILE
  kept = files.json_object(path.read_bytes(), path) if path.exists() else {}
  return {**of, 'tasks': kept.get('tasks', {}), 'groups': {}, 'failed': {}}


def _write(said: dict[str, Any], output: pathlib.Path) -> None:
  for kind in ('tasks', 'groups', 'failed'):  # the same bytes in whatever order they came
    said[kind] = finite(dict(sorted(said[kind].items())))
  files.replace(output / FILE, json.dumps(finite(said), indent=1) + '\n')


def _fails(said: dict[str, Any], name: str, reason: str, output: pathlib.Path, log) -> None:
  said['failed'][name] = reason
  log(f'ERROR: task {name}: {reason}')
  _write(said, output)


def _seed(seed: int) -> None:
  """As the harness does, for what a task draws by whatever generator."""
  from lm_eval.utils import set_torch_seed

  random.seed(seed)
  np.random.seed(seed)
  set_torch_seed(seed)


def _one(model, task, settings: HarnessSettings, kept: Mapping | None, output, log) -> dict:
  """What is said of a task, whose documents are written; of one that is there already, that.

  Raises ValueError where what is there is of other questions, FloatingPointError where the model
  has no finite score.
  """
  from lm_eval import evaluator

  def begin() -> None:  # when it is known what is asked, and before any of it is
    if kept is None:
      return
    digest = harness_results.digest_of(task.instances)
    if digest != kept['prompts']:
      raise ValueError(
        f'{output / FILE} is of other questions of {task.task_name}, {kept["n"]} with digest '
        f'{kept["prompts"]}, which is now {digest}: {CHANGED}'
      )
    raise KeptAlready

  _seed(settings.seed)
  # As lm_eval.simple_evaluate has it, which a task of no examples does not let change that.
  if task.get_config('num_fewshot') is None or (
    settings.shots is not None and task.get_config('num_fewshot') != 0
  ):
    task.set_config(key='num_fewshot', value=settings.shots or 0)
  task.set_fewshot_seed(seed=settings.seed)
  counts: collections.Counter[str] = collections.Counter()
  name = task.task_name
  try:
    results = evaluator.evaluate(
      lm=adapter(model, settings, log, counts, begin),
      task_dict={'tasks': {name: task}, 'groups': {}},
      limit=settings.limit or None,
      log_samples=True,
      bootstrap_iters=0,  # in forks, which JAX's threads do not survive; see harness_results
      apply_chat_template=settings.chat,
      fewshot_as_multiturn=settings.chat,
      system_instruction=settings.system or None,
    )
  except KeptAlready:
    log(f'{name}: is there already')
    return dict(kept)
  if counts['requests'] and counts['nan'] + counts['failed'] == counts['requests']:
    raise FloatingPointError(
      f'none of {counts["requests"]} scores is a finite number; the model is broken: take another '
      'checkpoint (--checkpoint)'
    )
  samples = results['samples'][name]
  lines = (json.dumps(finite(sample), default=str) + '\n' for sample in samples)
  files.replace(output / f'lm_eval-{name}.jsonl', ''.join(lines))
  return {
    # Of each document there is a sample for every filter.
    'n': len({sample['doc_id'] for sample in samples}),
    'metrics': harness_results.of_task(results['results'][name], samples, settings.seed),
    'prompts': harness_results.digest_of(task.instances),
    'version': results['versions'].get(name),
    'counts': dict(counts),
  }


def _group(said: dict[str, Any], group, seed: int, output: pathlib.Path, log) -> None:
  """Adds what the harness makes of a group's tasks, where it makes something of them."""
  if not group.has_aggregation:
    return

  def documents(name: str) -> list:
    return [*read_lines(output / f'lm_eval-{name}.jsonl')]

  names_of = [task.task_name for task in group.get_all_tasks()]
  lost = [name for name in names_of if name in said['failed'] or name not in said['tasks']]
  if lost:
    reason = f'its score is of all its tasks, and {", ".join(lost)} failed'
    _fails(said, group.name, reason, output, log)
    return
  said['groups'][group.name] = harness_results.of_group(group, said['tasks'], documents, seed)
  _write(said, output)


def adapter(
  model: Generator,
  settings: HarnessSettings,
  log: Callable[[str], Any] = print,
  counts: collections.Counter[str] | None = None,
  begin: Callable[[], None] = lambda: None,
):
  """The model as the harness takes it, an lm_eval.api.model.TemplateLM; within `importable`.

  counts: where it is counted what it is asked, and harness_results.COUNTED of that. begin: is
    called before anything is scored or written.
  """
  from lm_eval.api.model import TemplateLM

  counts = collections.Counter() if counts is None else counts

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
      begin()
      pairs = [(context, continuation) for _, context, continuation in requests]
      return [(score.logprob, score.greedy) for score in scored(model, pairs, log, counts)]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      from lm_eval import utils

      begin()
      pairs, sizes = [], []
      for request in requests:
        windows = utils.get_rolling_token_windows(
          self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
        )
        parts = [utils.make_disjoint_window(window) for window in windows]
        pairs += parts
        sizes.append(len(parts))
      scores = iter(scored(model, pairs, log, counts))
      return [sum(next(scores).logprob for _ in range(size)) for size in sizes]

    def generate_until(self, requests, disable_tqdm=False):
      begin()
      asked = [request.args for request in requests]
      return written(model, asked, self.tok_encode, settings, log, counts)

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
  """Ids of a text, in which names of control tokens are those tokens, as transformers takes them,
  where the tokenizer has names for them: one that was trained here has none.

  marked: with what begins a text, or ends one that an encoder reads.
  """
  tokenizer = model.tokenizer
  ids = list(tokenizer.encode(in_utf8(text), special=bool(tokenizer.special_tokens)))
  if not marked:
    return ids
  if model.model.config.encoder_layers:
    return [*ids, tokenizer.eos]
  return ids if not bos or ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids]


def scored(
  model: Generator,
  pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
  log: Callable[[str], Any],
  counts: collections.Counter[str],
) -> list[PairScore]:
  """Of (context, continuation) pairs, of whose contexts the last tokens are kept that there is room
  for.
  """
  fitted = []
  for context, continuation in pairs:
    limit = room(model, len(continuation))
    counts['cut'] += len(context) > limit
    fitted.append((context[-limit:] if limit < len(context) else context, continuation))
  progress, scores = ProgressLine('pairs', len(pairs), 0, log), []
  for first in range(0, len(fitted), PAIRS):
    here = fitted[first : first + PAIRS]
    scores += score_pairs(model, *([pair[side] for pair in here] for side in (0, 1)))
    progress.at(len(scores))
  progress.end()
  counts['nan'] += sum(not math.isfinite(score.logprob) for score in scores)
  counts.update(requests=len(pairs), pairs=len(pairs))
  return scores


def written(
  model: Generator,
  requests: Sequence[tuple[str, Mapping]],
  encode: Callable[[str], list[int]],
  settings: HarnessSettings,
  log: Callable[[str], Any],
  counts: collections.Counter[str],
) -> list[str]:
  """Answers to (text, what is said of generation), in their order."""
  ways: dict[str, list[int]] = {}
  for i, (_, options) in enumerate(requests):
    ways.setdefault(json.dumps(options, sort_keys=True), []).append(i)
  answers, progress = [''] * len(requests), ProgressLine('answers', len(requests), 0, log)
  done = 0
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
    counts['cut'] += sum(len(ids) > limit for ids in prompts)
    prompts = [ids[-limit:] for ids in prompts]
    for i, (reply,) in zip(indices, writing.answers(model, prompts, kind, settings.seed)):
      answers[i] = reply.text
      counts['empty'] += not reply.text.strip()
      counts['endless'] += reply.finish == LENGTH
      counts['failed'] += reply.finish == FAILED
      done += 1
      progress.at(done)
  progress.end()
  counts.update(requests=len(requests), answers=len(requests))
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
