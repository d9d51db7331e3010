"""Qwen3 30B-A3B: 30,532,122,624 parameters.

    python train.py --config=configs/models/qwen3_30b_a3b.py --workdir=runs/qwen3_30b_a3b

Sizes: arXiv:2505.09388, table 2, and the config.json that the Qwen team released. What training
does with them are Tandem's defaults, not the authors' recipe. The tokenizer is read from
tokenizers/qwen3_30b_a3b (a directory with the model's tokenizer.json; --config.data.tokenizer.path
names another). Hardware: parameters, gradients and AdamW's moments in f32 take 489 GB, split over
all chips (fsdp). Cost and loss are not known: it was not trained at this size here.
"""

from data.config import DataConfig, TokenizerConfig
from model.config import ModelConfig, MoEConfig, RopeConfig
from model.execution import ExecutionConfig
from parallel.mesh import MeshConfig
from training.config import Config

TOPOLOGY = 'v5p:4x4x4'  # what docs/plans.md plans it on, and tests compile it for


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      vocabulary=151_936,
      width=2048,
      layers=48,
      heads=32,
      kv_heads=4,
      head_width=128,
      feed_forward=6144,
      max_length=40_960,
      norm_epsilon=1e-6,
      qk_norm=True,
      rope=RopeConfig(base=1e6),
      moe=MoEConfig(experts=128, per_token=8, feed_forward=768, balance_loss=0.001),
      execution=ExecutionConfig(
        dtype='bfloat16',
        remat='full',
        remat_save=('query', 'key', 'value', 'attention', 'attention_out'),
      ),
    ),
    data=DataConfig(
      sequence_length=4096,
      batch_size=256,
      tokenizer=TokenizerConfig(kind='huggingface', path='tokenizers/qwen3_30b_a3b'),
    ),
    mesh=MeshConfig(data=1, fsdp=-1, expert=8),
  )
