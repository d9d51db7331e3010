"""Distillation: a small model learns what a large one says of every token.

    python train.py --config=configs/distil.py --config.init=runs/small \\
      --config.objective.teacher=runs/large --workdir=runs/student

Both know the same ids: runs/small was trained with the tokenizer of runs/large
(--config.data.tokenizer.path=runs/large/tokenizer). The data is the interpreter's own library, as
in configs/demo.py; other texts by --config.data.sources, and what an assistant says in records by
--config.objective.kind=distil_sft (docs/alignment.md). A step costs what one of the student alone
does, and a forward pass of the teacher; cost and score depend on the models.
"""

from data.config import CleanConfig, DataConfig
from objectives.distil import Distil
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig


def get_config() -> Config:
  return Config(
    init='runs/small',
    objective=Distil(teacher='runs/large', temperature=2.0, cross_entropy=0.1),
    data=DataConfig(
      sequence_length=256,
      batch_size=8,
      validation_fraction=0.02,
      clean=CleanConfig(filters='code'),
    ),
    optimizer=OptimizerConfig(
      learning_rate=1e-3, schedule='cosine', warmup_fraction=0.05, weight_decay=0.1
    ),
    train=TrainConfig(steps=500, eval_every=100, eval_batches=16, save_every=100),
  )
