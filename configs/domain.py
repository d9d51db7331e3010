"""Domain adaptation: a model goes on pretraining on the text of a domain, and on some of what it
knew, so that it forgets less of that, and one sees how much.

    python convert.py import --from path/to/hf_dir --workdir runs/base --dtype float32
    python train.py --config=configs/domain.py --config.init=runs/base --workdir=runs/domain \\
      '--config.data.sources[0].path=domain/**/*.txt' \\
      '--config.data.sources[1].path=general/**/*.txt'

Three rows of four are of the domain, one is general, and the rate is warmed up again and decays
again (both after Ibrahim et al., arXiv:2403.08763). What is held out of each source is evaluated
apart, by the name of its file or folder: `validation_loss/domain` is to fall,
`validation_loss/general` not to rise; loss.png shows both. Cost and score depend on the model.
"""

from data.config import CleanConfig, DataConfig, SourceConfig
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig


def get_config() -> Config:
  return Config(
    init='runs/base',
    data=DataConfig(
      sources=(
        SourceConfig(kind='text', path='domain/**/*.txt', weight=0.75),
        SourceConfig(kind='text', path='general/**/*.txt', weight=0.25),
      ),
      clean=CleanConfig(anonymise=()),
      sequence_length=1024,
      batch_size=8,
      validation_fraction=0.02,
    ),
    optimizer=OptimizerConfig(
      learning_rate=5e-5, schedule='cosine', warmup_fraction=0.02, weight_decay=0.1
    ),
    train=TrainConfig(steps=1000, eval_every=100, eval_batches=32, save_every=200),
  )
