"""BERT's pretraining at its smallest: an encoder of the interpreter's own standard library, which
guesses what is masked.

    python train.py --config=configs/mlm.py --workdir=runs/mlm
    python convert.py export --workdir runs/mlm --to out/  # BertForMaskedLM for transformers

Two CPU cores (AMD EPYC, Zen 5) that other work kept busy (a load of 9): 200 steps in 8.5 minutes,
after which the validation loss is 6.41 nats a masked token, where ln V is 7.63, and 4% of them are
guessed right: of a few hundred masked tokens a step it has learned how frequent tokens are, and
little of their company yet.
"""

from data.config import DataConfig, TokenizerConfig
from model.config import ModelConfig
from objectives.denoise import MaskedLM
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      causal=False,
      width=128,
      layers=4,
      heads=4,
      feed_forward=512,
      gated=False,
      activation='gelu_exact',
      norm='layer',
      norm_placement='post',
      norm_epsilon=1e-12,
      position='learned',
      biases='all',
      token_types=2,
      tie_embeddings=True,
      head='mlm',
    ),
    objective=MaskedLM(),
    data=DataConfig(
      sequence_length=128,
      batch_size=32,
      validation_fraction=0.02,
      tokenizer=TokenizerConfig(vocabulary=2048),
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=40),
    train=TrainConfig(steps=200, log_every=10, eval_every=100, eval_batches=8, save_every=100),
  )
