"""What benchmarks/train_gpu.py times: a Llama of 1,107,363,840 parameters, for one GPU of 80 GB.

    python train.py --config=configs/bench_1b.py --workdir=runs/bench_1b
    python plan.py --config=configs/bench_1b.py --topology=h100:1x1x1

Heads 128 wide, four query heads a key, 16k tokens a step: 4 rows of 4k, or a row of 16k with
--config.data.sequence_length=16384 --config.data.batch_size=1.
Hardware: parameters, gradients and AdamW's moments in f32 take 18 GB.
Cost and loss are not known: it measures speed.
"""

from data.config import DataConfig, TokenizerConfig
from model.config import ModelConfig, RopeConfig
from model.execution import ExecutionConfig
from training.config import Config
from training.optimizer import OptimizerConfig


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      vocabulary=32_768,
      width=2048,
      layers=16,
      heads=16,
      kv_heads=4,
      feed_forward=8192,
      norm_epsilon=1e-5,
      rope=RopeConfig(base=500_000.0),
      execution=ExecutionConfig(dtype='bfloat16', remat='dots', remat_save=('attention',)),
    ),
    data=DataConfig(
      sequence_length=4096, batch_size=4, tokenizer=TokenizerConfig(vocabulary=32_768)
    ),
    optimizer=OptimizerConfig(learning_rate=3e-4, schedule='constant'),
  )
