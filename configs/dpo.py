"""Direct preference optimisation: a tuned model learns which of two answers is the better one.

    python train.py --config=configs/dpo.py --config.init=runs/tuned \\
      '--config.data.sources[0].path=pairs.jsonl' --workdir=runs/dpo
    python train.py --config=configs/dpo.py --config.init=runs/tuned \\
      '--config.data.sources[0].path=pairs.jsonl' --config.adapter.kind=lora \\
      --config.optimizer.learning_rate=1e-4 --workdir=runs/dpo

Each line of pairs.jsonl is {"prompt": .., "chosen": .., "rejected": ..}: texts, or a prompt of
messages (data/records.py). Model, tokenizer and chat template are those of config.init. The
reference is that model as it began: a second copy, or under an adapter the base, for nothing;
--config.objective.stored_reference=True asks it once, and no step holds it.
Another loss: --config.objective.variant=ipo (objectives/compared.py). Cost and score depend on the
model; a step is four forward passes and a backward one.
"""

from data.config import CleanConfig, DataConfig, SourceConfig
from objectives.preference import Preference
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig


def get_config() -> Config:
  return Config(
    init='runs/tuned',
    objective=Preference(),
    data=DataConfig(
      sources=(SourceConfig(kind='jsonl', path='pairs.jsonl', format='preference'),),
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
