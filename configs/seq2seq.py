"""A T5 at its smallest learns from pairs of a source and a target, from nothing, by bytes.

    python train.py --config=configs/seq2seq.py '--config.data.sources[0].path=dates.jsonl' \\
      --workdir=runs/dates
    python generate.py --workdir=runs/dates --temperature=0 --prompt="the 3rd of May, 2021"

Each line of the file is {"source": .., "target": ..}; other files by --config.data.sources[0].kind,
.format and .columns (data/records.py). docs/adaptation.md makes dates.jsonl. To tune a T5 that
knows something, say which by --config.init: configs/flan_t5_summarise.py.
"""

from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from model.config import ModelConfig
from objectives.seq2seq import Seq2Seq
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      width=128,
      layers=2,
      encoder_layers=2,
      heads=4,
      feed_forward=384,
      activation='gelu',
      norm_epsilon=1e-6,
      position='relative',
    ),
    objective=Seq2Seq(target_length=64),
    data=DataConfig(
      sources=(SourceConfig(kind='jsonl', path='pairs.jsonl', format='pair'),),
      clean=CleanConfig(anonymise=(), near_duplicates=0),
      tokenizer=TokenizerConfig(kind='byte'),
      sequence_length=128,
      batch_size=16,
      validation_fraction=0.05,
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, schedule='linear', warmup_steps=20),
    train=TrainConfig(steps=400, log_every=20, eval_every=100, save_every=100),
  )
