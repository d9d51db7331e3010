"""Kahneman-Tversky optimisation: a tuned model learns from answers that were judged one by one.

    python train.py --config=configs/kto.py --config.init=runs/tuned \\
      '--config.data.sources[0].path=judged.jsonl' --workdir=runs/kto

Each line of judged.jsonl is {"prompt": .., "completion": .., "label": true}: texts, or a prompt of
messages (data/records.py). Model, tokenizer and chat template are those of config.init; the
reference is that model as it began, under an adapter for nothing. The statistic that rewards are
compared with is of a batch: make it as large as it can be. Where there are more of one kind of
answers, set config.objective.wanted_weight or unwanted_weight. Cost and score depend on the model.
"""

from data.config import CleanConfig, DataConfig, SourceConfig
from objectives.kto import KTO
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig


def get_config() -> Config:
  return Config(
    init='runs/tuned',
    objective=KTO(),
    data=DataConfig(
      sources=(SourceConfig(kind='jsonl', path='judged.jsonl', format='judged'),),
      # Nothing of a record is masked: whoever tunes on answers wants their numbers as they are.
      clean=CleanConfig(anonymise=(), near_duplicates=0),
      sequence_length=1024,
      batch_size=16,
      validation_fraction=0.05,
    ),
    optimizer=OptimizerConfig(
      learning_rate=5e-7, schedule='linear', warmup_fraction=0.1, weight_decay=0.0
    ),
    train=TrainConfig(steps=0, epochs=1, eval_every=50, save_every=100),
  )
