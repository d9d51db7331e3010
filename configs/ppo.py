"""Proximal policy optimisation: a tuned model learns from a reward model, with a critic beside it.

    python train.py --config=configs/reward.py --config.init=runs/tuned \\
      '--config.data.sources[0].path=pairs.jsonl' --workdir=runs/reward
    python evaluate.py --workdir=runs/reward
    python train.py --config=configs/ppo.py --config.init=runs/tuned \\
      --config.objective.reward=runs/reward '--config.data.sources[0].path=prompts.jsonl' \\
      --workdir=runs/ppo

Each line of prompts.jsonl is {"prompt": ..}, a text or messages. Model, tokenizer and chat template
are those of config.init; so are the critic's first parameters and the reference's, unless
--config.objective.critic=shared reads values off the policy, or a directory names another run. The
second command gives rewards their scale. A rollout is data.batch_size x objective.minibatches
answers, learned from objective.epochs times. Cost and score depend on the model.
"""

from data.config import CleanConfig, DataConfig, SourceConfig
from objectives.ppo import PPO
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig


def get_config() -> Config:
  return Config(
    init='runs/tuned',
    objective=PPO(reward=('runs/reward',), minibatches=4, missing_end=1.0),
    data=DataConfig(
      sources=(SourceConfig(kind='jsonl', path='prompts.jsonl', format='prompt'),),
      # Nothing of a record is masked: a reward wants its numbers as they are.
      clean=CleanConfig(anonymise=(), near_duplicates=0),
      sequence_length=512,
      batch_size=64,
      validation_fraction=0.05,
    ),
    optimizer=OptimizerConfig(
      learning_rate=3e-6, schedule='constant', warmup_fraction=0.0, weight_decay=0.0, clip_norm=1.0
    ),
    train=TrainConfig(steps=1600, eval_every=160, save_every=80, log_every=1),
  )
