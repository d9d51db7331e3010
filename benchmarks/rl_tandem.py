"""What does Tandem take for a step of DPO and of GRPO? The first side of benchmarks.rl."""

import contextlib
import itertools
import pathlib
import tempfile
import time

import jax
import numpy as np

from benchmarks.rl import BETA, FIRST, OPTIMIZER, PHASES, Compared, Setting, pairs_of, prompts_of
from data.config import DataConfig
from data.packing import pack
from data.preferences import ChoiceBatch
from data.prompts import Prompt, Prompts
from data.tokenizer import Tokenizer
from decode import report
from decode.generating import in_compute_dtype
from model import checkpoint, params
from objectives.policy import GRPO
from objectives.preference import Preference
from objectives.rollout import Rollouts
from parallel import axes
from parallel.mesh import MeshConfig, make_mesh
from training.config import Config
from training.optimizer import OptimizerConfig
from training.program import begin_state, make_program, make_target
from workdir import rollouts

STRIDE = 64  # of lengths that rows may have
REWARD = """
def reward(text, record):
  return len(text) % 7
"""


class Learner:
  """A state of the weights in a directory, and a step, of a config, on the mesh in context."""

  def __init__(self, setting: Setting, directory: str, objective, data: DataConfig):
    mesh, network = jax.sharding.get_mesh(), setting.network()
    optimizer = OptimizerConfig(schedule='constant', warmup_fraction=0.0, **OPTIMIZER)
    made = Config(model=network, objective=objective, data=data, optimizer=optimizer)
    self.config = made.resolve(network.V)
    make_state, self._step = make_program(self.config)
    target = make_target(self.config, make_state, mesh, directory)
    models = {
      name: checkpoint.load(directory, self.config.model, mesh)[1]
      for name in objective.models(self.config.model)
    }
    self.state = begin_state(self.config, make_state, target, models)

  def step(self, batch) -> dict[str, float]:
    """Its metrics, on the host."""
    rows = jax.NamedSharding(jax.sharding.get_mesh(), axes.spec('batch', 'length'))
    self.state, metrics, _ = self._step(self.state, jax.device_put(batch, rows))
    return {name: float(value) for name, value in jax.device_get(metrics).items()}

  def facts(self) -> dict:
    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    return {
      'device': device.device_kind,
      'device_peak_bytes': memory.get('peak_bytes_in_use'),
      'parameters': params.count(self.state.models['policy']),
    }


class StepClock:
  """Seconds of each step, by the clock and of processors."""

  def __init__(self):
    self.steps, self.processors = [], []

  @contextlib.contextmanager
  def timed(self):
    began, used = time.perf_counter(), time.process_time()
    yield
    self.steps.append(time.perf_counter() - began)
    self.processors.append(time.process_time() - used)


def one_device():
  return jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1]))


# 1. Preferences.


def packed(pairs: list[Compared], length: int) -> ChoiceBatch:
  """Rows of these pairs, as data.preferences.ChoiceSource fills them."""
  sizes = [sum(len(half) - 1 for half in pair.halves) for pair in pairs]
  order, ends = pack(np.array(sizes), length)
  batch = ChoiceBatch.empty(len(ends) - 1, length)
  for row in range(len(ends) - 1):
    at = segment = 0
    for i in order[ends[row] : ends[row + 1]]:
      for half in pairs[i].halves:
        n, segment = len(half) - 1, segment + 1
        here = slice(at, at + n)
        batch.tokens[row, here], batch.targets[row, here] = half[:-1], half[1:]
        batch.positions[row, here], batch.segments[row, here] = np.arange(n), segment
        batch.weights[row, here] = np.arange(n) >= len(pairs[i].prompt) - 1
        at += n
  return batch


def dealt(pairs: list[Compared], length: int, shape: tuple[int, int]) -> list[ChoiceBatch] | None:
  """So many batches of so many rows of this length, or None where they are too few for all."""
  count, rows = shape
  batch = packed(pairs, length)
  more = count * rows - len(batch.tokens)
  if more < 0:
    return None
  empty = ChoiceBatch.empty(more, length)
  whole = jax.tree.map(lambda x, none: np.concatenate([x, none]), batch, empty)
  return [jax.tree.map(lambda x: x[i::count], whole) for i in range(count)]


def batches_of(setting: Setting) -> tuple[ChoiceBatch, list[ChoiceBatch]]:
  """The one that is not timed and those that are, in the shortest rows that have room for all."""
  first, others = pairs_of(setting)
  most = max(sum(len(half) - 1 for half in pair.halves) for pair in [*first, *others])
  for length in itertools.count(-(-most // STRIDE) * STRIDE, STRIDE):
    warm = dealt(first, length, (1, setting.rows))
    timed_ = dealt(others, length, (setting.steps, setting.rows))
    if warm and timed_:
      return warm[0], timed_


def dpo(setting: Setting, directory: str) -> dict:
  warm, batches = batches_of(setting)
  rows, length = warm.tokens.shape
  steps = StepClock()
  with one_device():
    data = DataConfig(sequence_length=length, batch_size=rows)
    run = Learner(setting, directory, Preference(beta=BETA), data)
    before = [run.step(warm) for _ in range(2)]
    for batch in batches:
      with steps.timed():
        run.step(batch)
    facts = run.facts()
  answers = warm.weights * (warm.segments % 2)
  return facts | {
    **vars(steps),
    'tokens': sum(int((batch.segments > 0).sum()) for batch in batches),
    'positions': sum(batch.tokens.size for batch in batches),
    # Of a whole answer, in the mean, as TRL says it.
    'logp_chosen': before[0]['logprob_chosen'] * float(answers.sum()) / setting.pairs,
    'losses': [metrics['loss'] for metrics in before],
  }


# 2. Rewards.


class Identity(Tokenizer):
  """The model's own ids, and one behind them, with which therefore no answer ends."""

  kind = 'ids'

  def __init__(self, V: int):
    super().__init__([b''] * FIRST + [b'w%d ' % i for i in range(FIRST, V)] + [b''], eos=V)


def prepared(setting: Setting) -> Prompts:
  """What data.prompts.prepare would give."""
  tokenizer = Identity(setting.network().V)
  prompts = tuple(
    Prompt(f'prompts:{i}', tuple(ids), tokenizer.decode(ids), {'prompt': i})
    for i, ids in enumerate(prompts_of(setting))
  )
  return Prompts('benchmark', tokenizer, prompts, prompts[:1], len(prompts) * setting.answers)


def read_bytes(policy, setting: Setting) -> float:
  """Of weights and cached tokens, that writing one token of every answer reads, in the mean."""
  m, cached = policy.config, setting.batch * (setting.prompt + setting.new / 2)
  one = 2 * m.L * m.K * m.H * np.dtype(m.execution.dtype).itemsize
  return report.weight_bytes(in_compute_dtype(policy)) + cached * one


def grpo(setting: Setting, directory: str) -> dict:
  bandwidth = report.bandwidth()  # first: its array is gone when memory is at its peak
  reward = pathlib.Path(directory) / 'reward.py'
  reward.write_text(REWARD)
  objective = GRPO(
    reward=(str(reward),),
    group=setting.answers,
    max_new_tokens=setting.new,
    shared_prompts=True,
  )
  data = DataConfig(sequence_length=setting.prompt + setting.new, batch_size=setting.batch)
  steps, learning = StepClock(), StepClock()
  with one_device(), tempfile.TemporaryDirectory() as workdir:
    run = Learner(setting, directory, objective, data)
    stage = rollouts.staged(run.config, prepared(setting), workdir, lambda line: None)
    with contextlib.closing(stage.judges):
      source = Rollouts(stage, run.config.objective, run.config.data, range(setting.batch))
      for _ in range(1 + setting.steps):
        with steps.timed():
          batch = source.take(run.state)
          with learning.timed():
            run.step(batch)
    notes = rollouts.read(pathlib.Path(workdir) / rollouts.FILE)
    facts = run.facts()
  if any(note['tokens'] != setting.batch * setting.new for note in notes):
    raise RuntimeError(f'an answer is not of {setting.new} tokens: {notes}')
  phases = dict.fromkeys(PHASES, 0.0)
  for note, step, whole in [*zip(notes, learning.steps, steps.steps, strict=True)][1:]:
    of = note['seconds'] | {'step': step}
    of['other'] = whole - sum(of.values())
    phases = {name: phases[name] + of[name] for name in PHASES}
  return facts | {
    'steps': steps.steps[1:],
    'processors': steps.processors[1:],
    'first_step_seconds': steps.steps[0],
    'phases': phases,
    'bandwidth': bandwidth,
    'read_bytes': setting.steps * setting.new * read_bytes(run.state.models['policy'], setting),
  }
