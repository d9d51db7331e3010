"""A reward model: a tuned model learns to say how good an answer is, from pairs of a better and a
worse one.

    python train.py --config=configs/reward.py --config.init=runs/tuned \\
      '--config.data.sources[0].path=pairs.jsonl' --workdir=runs/reward
    python evaluate.py --workdir=runs/reward

Each line of pairs.jsonl is {"prompt": .., "chosen": .., "rejected": ..}, perhaps with a "margin":
texts, or a prompt of messages (data/records.py). Model, tokenizer and chat template are those of
config.init. The second command says how often it is right, with an interval, draws its calibration,
and sets the scale of its rewards (docs/alignment.md). Cost and score depend on the model.
"""

from data.config import CleanConfig, DataConfig, SourceConfig
from objectives.reward import Reward
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig


def get_config() -> Config:
  return Config(
    init='runs/tuned',
    objective=Reward(centring=0.01),
    data=DataConfig(
      sources=(SourceConfig(kind='jsonl', path='pairs.jsonl', format='preference'),),
      # Nothing of a record is masked: whoever tunes on answers wants their numbers as they are.
      clean=CleanConfig(anonymise=(), near_duplicates=0),
      sequence_length=1024,
      batch_size=16,
      validation_fraction=0.05,
    ),
    optimizer=OptimizerConfig(
      learning_rate=1e-5, schedule='linear', warmup_fraction=0.05, weight_decay=0.01
    ),
    train=TrainConfig(steps=0, epochs=1, eval_every=50, save_every=100),
  )
