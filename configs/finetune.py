"""Goes on training a run's model, such as one that was imported from transformers,
on other text: here the standard library.

    python convert.py import --from path/to/hf_dir --workdir runs/llama --dtype float32
    python train.py --config=configs/finetune.py --config.init=runs/llama --workdir=runs/tuned

Model and tokenizer are those of config.init; a field of config.model that is set here or by a flag
replaces its own (remat, dtype, ...). Personal data is not masked here, as it is in pretraining:
`--config.data.clean.anonymise` names the kinds that should be. Cost and score depend on the model:
not measured.
"""

from data.config import CleanConfig, DataConfig
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig


def get_config() -> Config:
  return Config(
    init='runs/imported',
    data=DataConfig(
      # Nothing is masked: whoever tunes on answers wants their numbers and addresses as they are.
      clean=CleanConfig(anonymise=()),
      sequence_length=512,
      batch_size=8,
      validation_fraction=0.02,
    ),
    optimizer=OptimizerConfig(learning_rate=2e-5, schedule='linear', warmup_steps=20),
    train=TrainConfig(steps=200, eval_every=50, eval_batches=16, save_every=100),
  )
