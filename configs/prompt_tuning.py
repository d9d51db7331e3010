"""Prompt tuning (Lester et al., arXiv:2104.08691): a model that stays as it is, and a few vectors,
learned from records, that it reads before every text.

    python convert.py import --from smollm2 --workdir runs/smollm2
    python train.py --config=configs/prompt_tuning.py --config.init=runs/smollm2 \\
      '--config.data.sources[0].path=chats.jsonl' --workdir=runs/prompt
    python generate.py --workdir=runs/prompt --chat --prompt "Table 7 would like two soup, please."

The rate is of a decoder, whose embeddings are small. The paper's, which tuned T5 by the thousand
steps, is Adafactor's at 0.3 (section 3): `--config.optimizer.name=adafactor
--config.optimizer.learning_rate=0.3 --config.optimizer.weight_decay=1e-5`, with
`--config.adapter.tokens=100`. Prompts begin with words by `--config.adapter.initial=text
'--config.adapter.text=Answer in JSON.'`; `--config.adapter.kind=prefix` learns keys and values of
every layer instead. What a run keeps is a few kB; a step costs two thirds of one that tunes all
parameters. Scores depend on the model: of a small one they are in docs/adaptation.md.
"""

from data.config import CleanConfig, DataConfig, SourceConfig
from model.adaptation import AdapterConfig
from objectives.sft import SFT
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig


def get_config() -> Config:
  return Config(
    init='runs/smollm2',
    adapter=AdapterConfig(kind='prompt', tokens=20),
    objective=SFT(),
    data=DataConfig(
      sources=(SourceConfig(kind='jsonl', path='chats.jsonl', format='chat'),),
      # Nothing of a record is masked: whoever tunes on answers wants their numbers as they are.
      clean=CleanConfig(anonymise=(), near_duplicates=0),
      sequence_length=1024,
      batch_size=8,
      validation_fraction=0.05,
    ),
    optimizer=OptimizerConfig(
      learning_rate=1e-2, schedule='linear', warmup_fraction=0.05, weight_decay=0.0
    ),
    train=TrainConfig(steps=0, epochs=5, eval_every=50, save_every=100),
  )
