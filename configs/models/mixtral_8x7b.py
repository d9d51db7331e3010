"""Mixtral 8x7B: 46,702,792,704 parameters.

    python train.py --config=configs/models/mixtral_8x7b.py --workdir=runs/mixtral_8x7b

Sizes: arXiv:2401.04088, table 1, and the config.json that Mistral AI released. What training does
with them are Tandem's defaults, not the authors' recipe. The tokenizer is read from
tokenizers/mixtral_8x7b (a directory with the model's tokenizer.json; --config.data.tokenizer.path
names another). Hardware: parameters, gradients and AdamW's moments in f32 take 747 GB, split over
all chips (fsdp). Cost and loss are not known: it was not trained at this size here.
"""

from data.config import DataConfig, TokenizerConfig
from model.config import ModelConfig, MoEConfig, RopeConfig
from model.execution import ExecutionConfig
from parallel.mesh import MeshConfig
from training.config import Config

TOPOLOGY = 'v5p:4x4x8'  # what docs/plans.md plans it on, and tests compile it for


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      vocabulary=32_000,
      width=4096,
      layers=32,
      heads=32,
      kv_heads=8,
      feed_forward=14_336,
      max_length=32_768,
      norm_epsilon=1e-5,
      rope=RopeConfig(base=1e6),
      moe=MoEConfig(experts=8, per_token=2, balance_loss=0.02),
      execution=ExecutionConfig(dtype='bfloat16', remat='full'),
    ),
    data=DataConfig(
      sequence_length=4096,
      batch_size=256,
      tokenizer=TokenizerConfig(kind='huggingface', path='tokenizers/mixtral_8x7b'),
    ),
    mesh=MeshConfig(data=1, fsdp=-1, expert=8),
  )
