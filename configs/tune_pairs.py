"""An encoder-decoder that was trained here or imported goes on with pairs of a source and a target:
what it is tuned on, and, as a second source, what it is to keep.

    python train.py --config=configs/tune_pairs.py --config.init=runs/flan_t5 \\
      '--config.data.sources[0].path=dialogues.jsonl' --workdir=runs/tuned

Each line of the file is {"source": .., "target": ..}; other files by --config.data.sources[0].kind,
.format and .columns (data/records.py). A second file, to be replayed so that less is forgotten, is
--config.data.sources[1].kind=jsonl, .format=pair, .path and .weight, beside 1 of the first. Model
and tokenizer are those of config.init. `python -m evaluation.flan_t5_exercise` tunes by it at
several rates, and shows what each forgets. Cost and score depend on the model.
"""

from data.config import CleanConfig, DataConfig, SourceConfig
from objectives.seq2seq import Seq2Seq
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig


def get_config() -> Config:
  return Config(
    init='runs/flan_t5',
    objective=Seq2Seq(target_length=96),
    data=DataConfig(
      sources=(SourceConfig(kind='jsonl', path='pairs.jsonl', format='pair'),),
      # Nothing of a record is masked, and rows that are alike are not one row.
      clean=CleanConfig(anonymise=(), exact_duplicates=False, near_duplicates=0),
      sequence_length=128,
      batch_size=32,
      validation_fraction=0.02,
    ),
    optimizer=OptimizerConfig(learning_rate=3e-4, schedule='linear', warmup_fraction=0.05),
    train=TrainConfig(steps=200, eval_every=100, eval_batches=8, save_every=100),
  )
