"""Goes on training all parameters of a run's model, such as one that was imported from
transformers, on other text: here the standard library.

    python convert.py import --from path/to/hf_dir --workdir runs/llama --dtype float32
    python train.py --config=configs/finetune.py --config.init=runs/llama --workdir=runs/tuned

The recipe: a rate of 2e-5 (1e-5 to 5e-5 are usual; larger models take less), warmed up over 6% of
the steps and decayed to 0, weight decay of 0.01, and an end after three evaluations without a
better loss. The checkpoint with the lowest validation loss is kept: generate.py --checkpoint=best.

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
    optimizer=OptimizerConfig(
      learning_rate=2e-5, schedule='linear', warmup_fraction=0.06, weight_decay=0.01
    ),
    train=TrainConfig(steps=200, eval_every=25, eval_batches=16, save_every=100, patience=3),
  )
