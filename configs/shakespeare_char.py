"""nanoGPT's CPU setting on tinyshakespeare: characters, 4 layers, 4 heads,
width 128, context 64, batch 12, 2,000 steps.

    python train.py --config=configs/shakespeare_char.py --workdir=runs/shakespeare \\
      '--config.data.sources[0].path=input.txt'

The text is data/tinyshakespeare/input.txt of karpathy/char-rnn (1.1 MB);
the path is where you keep it.

nanoGPT's README gives a validation loss of 1.88 nats.
Here 1.676, in 132 s from start to end on two CPU cores (AMD EPYC, Zen 5).
"""

from data.config import CleanConfig, DataConfig, SourceConfig, TokenizerConfig
from model.config import ModelConfig
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      width=128,
      layers=4,
      heads=4,
      gated=False,
      activation='gelu',
      norm='layer',
      tie_embeddings=True,
    ),
    data=DataConfig(
      sources=(SourceConfig(kind='text', path='input.txt'),),
      clean=CleanConfig(anonymise=(), exact_duplicates=False, near_duplicates=0.0),
      tokenizer=TokenizerConfig(kind='char'),
      split='tail',
      validation_fraction=0.1,
      sequence_length=64,
      batch_size=12,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, b2=0.99),
    train=TrainConfig(steps=2000, log_every=100, eval_every=500, save_every=1000),
  )
