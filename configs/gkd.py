"""On-policy distillation: a small model learns what a large one says of the text that the small one
writes.

    python train.py --config=configs/gkd.py --config.init=runs/small \\
      --config.objective.teacher=runs/large '--config.data.sources[0].path=prompts.jsonl' \\
      --workdir=runs/student

Each line of prompts.jsonl is {"prompt": ..}, a text or messages. Both models know the same ids.
--config.objective.divergence=reverse_kl keeps to what the teacher would say. Cost and score depend
on the models: a step writes data.batch_size answers, and goes forward through both.
"""

from data.config import CleanConfig, DataConfig, SourceConfig
from objectives.gkd import GKD
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig


def get_config() -> Config:
  return Config(
    init='runs/small',
    objective=GKD(teacher='runs/large'),
    data=DataConfig(
      sources=(SourceConfig(kind='jsonl', path='prompts.jsonl', format='prompt'),),
      clean=CleanConfig(anonymise=(), near_duplicates=0),
      sequence_length=512,
      batch_size=32,
      validation_fraction=0.05,
    ),
    optimizer=OptimizerConfig(
      learning_rate=1e-5, schedule='constant', warmup_fraction=0.0, weight_decay=0.0
    ),
    train=TrainConfig(steps=500, eval_every=50, save_every=100),
  )
