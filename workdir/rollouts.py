"""What does a run's rollout write with, and who judges it? The run's own models on its mesh, the
reward functions and reward models that the config names, and a journal of what was written,
rollouts.jsonl.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import files
from data.extra import same_ids
from data.prompts import Prompts
from decode.generating import generating, generating_model
from model import params
from objectives.actor import Actor
from objectives.judges import FileJudge, Judges, ModelJudge, is_file
from objectives.rollout import WHOLE, Question
from objectives.rollout_rows import RolloutBatch
from parallel import axes, hosts
from parallel.gathering import everywhere
from training import state as states
from training.config import Config
from workdir.reward import open_reward

FILE = 'rollouts.jsonl'


def staged(config: Config, prepared: Prompts, workdir, log: Callable[[str], Any]) -> 'RunStage':
  """The prompts with all that rollouts of the run need, on the mesh in context.

  Raises NotImplementedError and ValueError for what a policy cannot write with, rewards that cannot
  be read, reward models of another tokenizer, or that read too little, and a journal that is none.
  """
  _check(config)
  read(files.place(workdir) / FILE)
  mesh = jax.sharding.get_mesh()
  judges = Judges(
    [_judge(config, reward, prepared, mesh) for reward in config.objective.reward],
    config.objective.reward_weights or [1.0] * len(config.objective.reward),
  )
  return RunStage(config, prepared, mesh, judges, files.place(workdir), log)


class RunStage:
  """See objectives.rollout.Stage. What prompts say of themselves, it says, too."""

  def __init__(self, config, prompts, mesh, judges, workdir, log):
    objective, data = config.objective, config.data
    self.prompts, self.judges, self.log = prompts, judges, log
    self.seed, self.dtype = config.train.seed, config.model.execution.dtype
    self._config, self._mesh = config, mesh
    self._journal = RolloutJournal(workdir / FILE, log)
    self._writing, written_by = _writing(config, mesh)
    self._actor = Actor(
      written_by,
      mesh,
      prompts.tokenizer,
      rows=objective.rollout_rows or data.batch_size * objective.minibatches,
      prompt=objective.longest_prompt(data),
      new=objective.max_new_tokens,
      group=objective.group,
      temperature=objective.temperature,
    )
    rows = jax.NamedSharding(mesh, axes.spec('batch', 'length'))
    form = objective.answer_rows(data, prompts.tokenizer.pad)
    self._put = hosts.RowShards(rows, (data.batch_size, form.length))

    @functools.partial(jax.jit, static_argnums=2)
    def said(models, batch, names_):
      return objective.said(states.applied(config, models), batch, names_)

    self._said = said

  def __getattr__(self, name):
    return getattr(self.prompts, name)

  def answers(self, models: Mapping[str, Any], asked: Sequence[Question]) -> Iterator:
    with jax.set_mesh(self._mesh):
      weights = self._writing(models)
    return self._actor(weights, asked)

  def text(self, ids: Sequence[int]) -> str:
    tokenizer = self.prompts.tokenizer
    return tokenizer.decode([i for i in ids if i < tokenizer.vocabulary])

  def said(self, models, batch: RolloutBatch, names_: tuple[str, ...]) -> dict[str, np.ndarray]:
    with jax.set_mesh(self._mesh):
      return everywhere(self._said(models, self._put(batch.cut(self._put.rows)), names_))

  def note(self, rollout: int, content: dict) -> None:
    if not jax.process_index():
      self._journal.note(rollout, content)


class RolloutJournal:
  """What a run has written of its rollouts, and goes on with from whatever checkpoint."""

  def __init__(self, path: pathlib.Path, log: Callable[[str], Any]):
    self._path, self._log, self._begun = path, log, False

  def note(self, rollout: int, content: dict) -> None:
    """Another line, of a rollout behind all before. What the file has of this one and later ones
    is another history's, and goes.
    """
    if not self._begun:
      lines = read(self._path)
      kept = [line for line in lines if line['rollout'] < rollout]
      if len(kept) < len(lines):
        self._log(
          f'{len(lines) - len(kept)} lines of {self._path} are dropped, of rollouts from {rollout} '
          'on: this run goes on from before them, or begins them anew with other prompts or rewards'
        )
      files.replace(self._path, ''.join(json.dumps(line) + '\n' for line in kept))
      self._begun = True
    with self._path.open('a') as file:
      file.write(json.dumps(content) + '\n')


def read(path: pathlib.Path) -> list[dict]:
  """The lines of a journal; a last one that was cut short is left out.

  Raises ValueError for a file that holds something else.
  """
  lines = path.read_text().split('\n')[:-1] if path.exists() else []
  journal = []
  for i, line in enumerate(lines, 1):
    said = files.json_object(line, f'{path}, line {i}')
    if not isinstance(said.get('rollout'), int):
      raise ValueError(f'{path}, line {i} names no rollout: {line[:80]!r}; remove it to go on')
    journal.append(said)
  return journal


def _writing(config: Config, mesh):
  """(models of the state -> weights of the policy, its adapter on it, as generation takes them; the
  config that these have).
  """
  main, whole = config.objective.main, config.objective.rollout_weights == WHOLE
  writing = dataclasses.replace(config, model=generating(config.model))
  with jax.set_mesh(mesh):
    base = params.abstract(lambda: states.new_model(writing, main), mesh)
    written_by = jax.eval_shape(generating_model, base).config
  structure = jax.tree.structure(base)

  @jax.jit
  def make(models):
    own = {name: models[name] for name in (main, states.ADAPTER) if name in models}
    own[main] = jax.tree.unflatten(structure, jax.tree.leaves(own[main]))
    return generating_model(states.applied(writing, own)[main], whole=whole)

  return make, written_by


def _judge(config: Config, reward: str, prepared: Prompts, mesh):
  if is_file(reward):
    return FileJudge(reward, config.objective.reward_timeout)
  if config.objective.of_sources:
    raise NotImplementedError(
      f'objective.reward={reward} judges an answer behind its prompt, and with objective.kind='
      f'{config.objective.kind!r} the prompt is a source, which ends before it; give a Python file '
      'with a function reward(text, record)'
    )
  model = open_reward(reward, mesh)
  if not same_ids(model.tokenizer, prepared.tokenizer):
    raise ValueError(
      f'the tokenizer of objective.reward={reward} ({model.tokenizer.kind}, '
      f'{model.tokenizer.vocabulary:,} ids) is not that of the policy ({prepared.tokenizer.kind}, '
      f'{prepared.tokenizer.vocabulary:,} ids); train a reward model from the same model'
    )
  if model.model.context < config.data.sequence_length:
    raise ValueError(
      f'objective.reward={reward} reads {model.model.context} tokens, and a prompt with its answer '
      f'has up to data.sequence_length={config.data.sequence_length}; lower that, or train it with '
      'a larger model.max_length'
    )
  return ModelJudge(reward, model.said, model.of)


def _check(config: Config) -> None:
  """Raises NotImplementedError for runs whose policy cannot write while it is trained."""
  kind = config.objective.kind
  if config.train.offload_parameters:
    raise NotImplementedError(
      f'objective.kind={kind!r} with train.offload_parameters, which keeps the weights in the '
      'memory of the host, where nothing writes; use mesh.fsdp, an adapter, or '
      'train.offload_optimizer'
    )
  if config.adapter.soft:
    raise NotImplementedError(
      f'objective.kind={kind!r} with adapter.kind={config.adapter.kind!r}, whose soft tokens would '
      "stand before every prompt: that is not there yet; use adapter.kind='lora'"
    )
  if config.draws:
    raise NotImplementedError(
      f'objective.kind={kind!r} with dropout (train.dropout, adapter.dropout): what is trained '
      'would not be what wrote the answers, whose ratio is then no 1; set it to 0'
    )
