"""Classification by prompting: which word follows a text? Asked without examples, with some, and of
a model that was tuned by the same template.

    python convert.py import --from smollm2 --workdir runs/smollm2
    python evaluate.py --config=configs/classify.py --workdir=runs/smollm2 --shots=0,4 \\
      '--config.data.sources[0].path=sentiment.csv'
    python train.py --config=configs/classify.py --config.init=runs/smollm2 \\
      --workdir=runs/classifier '--config.data.sources[0].path=sentiment.csv' \\
      --config.adapter.kind=lora --config.optimizer.learning_rate=1e-3
    python evaluate.py --workdir=runs/classifier

sentiment.csv has columns text and label (others by --config.data.sources[0].columns). The template
(--config.objective.template) has the pattern, and the words of every label. All three hold out the
same records. docs/classification.md has what SmolLM2 gets.
"""

from data.config import CleanConfig, DataConfig, SourceConfig
from objectives.classify import Classify
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig


def get_config() -> Config:
  return Config(
    objective=Classify(template='configs/templates/sentiment.toml'),
    data=DataConfig(
      sources=(SourceConfig(kind='csv', path='sentiment.csv', format='label'),),
      clean=CleanConfig(anonymise=(), near_duplicates=0),
      sequence_length=256,
      batch_size=4,
      validation_fraction=0.33,
    ),
    optimizer=OptimizerConfig(
      learning_rate=2e-5, schedule='linear', warmup_fraction=0.1, weight_decay=0.01
    ),
    train=TrainConfig(steps=0, epochs=2, eval_every=20, save_every=100),
  )
