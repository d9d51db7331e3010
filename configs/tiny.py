"""The smallest run that does everything: a byte-level-exact BPE model
of the interpreter's own standard library.

python train.py --config=configs/tiny.py --workdir=runs/tiny
"""

from data.config import DataConfig, TokenizerConfig
from model.config import ModelConfig
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      width=128, layers=4, heads=4, kv_heads=2, feed_forward=384, tie_embeddings=True
    ),
    data=DataConfig(
      sequence_length=128,
      batch_size=16,
      validation_fraction=0.02,
      tokenizer=TokenizerConfig(vocabulary=2048),
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
    train=TrainConfig(steps=200, log_every=10, eval_every=100, eval_batches=8, save_every=100),
  )
