"""Supervised finetuning: a model that was trained here or imported learns from chats to answer, and
to stop.

    python convert.py import --from smollm2 --workdir runs/smollm2
    python train.py --config=configs/sft.py --config.init=runs/smollm2 \\
      '--config.data.sources[0].path=chats.jsonl' --workdir=runs/tuned
    python train.py --config=configs/sft.py --config.init=runs/smollm2 \\
      '--config.data.sources[0].path=chats.jsonl' --workdir=runs/tuned --show=3

Each line of chats.jsonl is {"messages": [{"role": "user", "content": ..}, ..]}; other files by
--config.data.sources[0].kind, .format and .columns (data/records.py). Model, tokenizer and chat
template are those of config.init. Cost and score depend on the model.
"""

from data.config import CleanConfig, DataConfig, SourceConfig
from objectives.sft import SFT
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig


def get_config() -> Config:
  return Config(
    init='runs/smollm2',
    objective=SFT(),
    data=DataConfig(
      sources=(SourceConfig(kind='jsonl', path='chats.jsonl', format='chat'),),
      # Nothing of a record is masked: whoever tunes on answers wants their numbers as they are.
      clean=CleanConfig(anonymise=(), near_duplicates=0),
      sequence_length=1024,
      batch_size=8,
      validation_fraction=0.05,
    ),
    optimizer=OptimizerConfig(
      learning_rate=2e-5, schedule='linear', warmup_fraction=0.05, weight_decay=0.01
    ),
    train=TrainConfig(steps=0, epochs=2, eval_every=50, save_every=100),
  )
