"""How is a run opened that trained a reward model, and what are its rewards worth? Of mean 0 and
standard deviation 1 over texts that it was judged by, which evaluate.py finds and keeps with the
run.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

import files
from data.rewarded import held_out
from data.tokenizer import Tokenizer
from decode.loaded import LoadedModel
from evaluation import rewards
from evaluation.heads import scores_of
from evaluation.intervals import Estimate
from model import heads
from parallel.mesh import MeshConfig
from training.config import Config
from workdir.checkpoint import Checkpoints
from workdir.head import restored
from workdir.open import config_of, open_run, step_of

FILE = 'reward.json'  # in the run's directory: what `normalise` found


@dataclasses.dataclass(frozen=True)
class RewardModel:
  """A reward model on a mesh: reward = gain * what its head says + bias.

  Attributes:
    model, head: on the mesh. gain, bias: 1 and 0 before it is normalised.
    digest: of the checkpoint that it is.
  """

  model: LoadedModel
  head: heads.Head
  digest: str
  gain: float = 1.0
  bias: float = 0.0

  @property
  def tokenizer(self) -> Tokenizer:
    return self.model.tokenizer

  @property
  def of(self) -> dict[str, Any]:
    """What rewards of a text are a function of, JSON-able."""
    return {'digest': self.digest, 'gain': self.gain, 'bias': self.bias}

  def scores(self, ids: Sequence[Sequence[int]]) -> Float[np.ndarray, 'N']:
    """As `said`. Raises FloatingPointError where a reward is not finite, besides."""
    scores = self.said(ids)
    if not np.isfinite(scores).all():
      which = int(np.flatnonzero(~np.isfinite(scores))[0])
      raise FloatingPointError(f'the reward of text {which} is {scores[which]}')
    return scores

  def said(self, ids: Sequence[Sequence[int]]) -> Float[np.ndarray, 'N']:
    """Rewards of texts, each the ids of a prompt with its answer and the end of it, f64, whatever
    they are. What a text is worth depends on nothing but itself.

    Raises ValueError for texts that are longer than the model reads.
    """
    longest = max(map(len, ids))
    if longest > self.model.context:
      raise ValueError(
        f'a text of {longest} tokens is longer than the {self.model.context} that the reward model '
        'reads; cut it where its prompt begins, or train one with a larger model.max_length'
      )
    return self.gain * scores_of(self.model, self.head, ids)[:, 0] + self.bias


def open_reward(
  workdir: str | os.PathLike,
  mesh: jax.sharding.Mesh | MeshConfig = MeshConfig(data=1),
  checkpoint: str = 'last',
  normalised: bool = True,
) -> RewardModel:
  """The reward model of a run, frozen, on a mesh: the one that a policy is trained on.

  normalised: whether its rewards are to be of mean 0 and standard deviation 1, by what `normalise`
    has kept.
  Raises ValueError for a run of another kind, and where what was found is not there, or of another
  checkpoint; FileNotFoundError where there is none.
  """
  config = config_of(workdir)
  if not getattr(config.objective, 'gives_rewards', False):
    raise ValueError(
      f'{workdir} was trained with objective.kind={config.objective.kind!r} and gives no rewards; '
      f'train one with --config=configs/reward.py'
    )
  checkpoints = Checkpoints(workdir)
  step = step_of(checkpoints, checkpoint)
  reference = checkpoints.reference(step)
  scale = _scale(files.place(workdir), reference) if normalised else {}
  run = open_run(workdir, str(step), mesh)
  model = LoadedModel(run.model, run.tokenizer, run.mesh)
  roles = config.objective.models(config.model)
  name = next(name for name, role in roles.items() if role.made)
  head = restored(config, checkpoints, step, name, run.mesh)
  return RewardModel(model, head, reference['digest'], **scale)


def _scale(workdir: pathlib.Path, checkpoint: dict) -> dict[str, float]:
  path, remedy = workdir / FILE, f'run python evaluate.py --workdir={workdir}'
  if not path.exists():
    raise ValueError(f'{path} is not there: rewards of this run have no scale yet; {remedy}')
  found = files.unsealed(files.json_object(path.read_bytes(), path), path, remedy)
  if found['digest'] != checkpoint['digest']:
    raise ValueError(
      f'{path} is of checkpoint {found["step"]}, and this is {checkpoint["step"]}: their rewards '
      f'have other scales; {remedy} --output=DIRECTORY'
    )
  return {'gain': found['gain'], 'bias': found['bias']}


@dataclasses.dataclass(frozen=True)
class Judged:
  """What is said of a reward model.

  Attributes:
    metrics: see evaluation.rewards.compared, of rewards before they are normalised.
    differences: of chosen less rejected rewards, [pairs].
    lines: what is said of each pair, JSON-able (evaluation.rewards.lines).
    scale: what `FILE` holds. prompts: digest of the exact texts.
  """

  metrics: dict[str, Estimate]
  differences: np.ndarray
  lines: list[dict]
  scale: dict[str, Any]
  prompts: str


def judge(
  config: Config,
  workdir: str | os.PathLike,
  mesh: MeshConfig,
  checkpoint: str,
  limit: int,
  seed: int,
  log: Callable[[str], Any],
) -> Judged:
  """Judges a run's reward model by the pairs that a config holds out, and normalises it by their
  answers, chosen and rejected alike; limit: of the first ones only, 0: all.

  Raises as open_reward, and ValueError where all answers have one reward.
  """
  model = open_reward(workdir, mesh, checkpoint, normalised=False)
  with jax.set_mesh(model.model.mesh):
    prepared = config.objective.read(config.data, log)
  pairs = held_out(prepared, config.data.sequence_length)[: limit or None]
  scores = model.scores([ids for pair in pairs for ids in pair]).reshape(-1, 2)
  mean, std = float(scores.mean()), float(scores.std())
  if not std:
    raise ValueError(
      f'{workdir}: all {scores.size} answers have the reward {mean}; train it longer'
    )
  checkpoints = Checkpoints(workdir)
  reference = checkpoints.reference(step_of(checkpoints, checkpoint))
  prompts = hashlib.blake2b(json.dumps(pairs).encode(), digest_size=16).hexdigest()
  scale = {
    'gain': 1 / std,
    'bias': -mean / std,
    'texts': scores.size,
    'prompts': prompts,
    'step': reference['step'],
    'digest': reference['digest'],
  }
  differences = scores[:, 0] - scores[:, 1]
  lines = rewards.lines(pairs, scores, model.tokenizer.decode)
  return Judged(rewards.compared(differences, seed), differences, lines, scale, prompts)


def normalise(workdir: str | os.PathLike, judged: Judged) -> None:
  """Keeps the scale with the run."""
  files.replace(files.place(workdir) / FILE, json.dumps(files.sealed(judged.scale)) + '\n')
