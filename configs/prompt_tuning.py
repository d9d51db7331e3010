"""Prompt tuning (Lester et al., arXiv:2104.08691): a model that stays as it is, and a few vectors,
learned from records, that it reads before every text.

    python convert.py import --from smollm2 --workdir runs/smollm2
    python train.py --config=configs/prompt_tuning.py --config.init=runs/smollm2 \\
      '--config.data.sources[0].path=chats.jsonl' --workdir=runs/prompt
    python generate.py --workdir=runs/prompt --chat --prompt "Table 7 would like two soup, please."

The optimizer, its rate and the number of tokens are the paper's (section 3), which tuned T5; for a
small decoder, or few records, `--config.optimizer.name=adamw --config.optimizer.learning_rate=1e-2`
(docs/adaptation.md). `--config.adapter.initial=text '--config.adapter.text=Answer in JSON.'` begins
with words, `--config.adapter.kind=prefix` (with `--config.optimizer.learning_rate=1e-2`) learns keys
and values of every layer. What a run keeps is a few kB; it costs two thirds of tuning all
parameters. Scores depend on the model: a small one is in docs/adaptation.md.
"""

from data.config import CleanConfig, DataConfig, SourceConfig
from model.adaptation import AdapterConfig
from objectives.sft import SFT
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig


def get_config() -> Config:
  return Config(
    init='runs/smollm2',
    adapter=AdapterConfig(kind='prompt', tokens=100),
    objective=SFT(),
    data=DataConfig(
      sources=(SourceConfig(kind='jsonl', path='chats.jsonl', format='chat'),),
      # Nothing of a record is masked: whoever tunes on answers wants their numbers as they are.
      clean=CleanConfig(anonymise=(), near_duplicates=0),
      sequence_length=1024,
      batch_size=32,
      validation_fraction=0.05,
    ),
    optimizer=OptimizerConfig(
      name='adafactor', learning_rate=0.3, schedule='constant', weight_decay=1e-5
    ),
    train=TrainConfig(steps=1000, eval_every=50, save_every=100),
  )
