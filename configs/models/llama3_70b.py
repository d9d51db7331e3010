"""Llama 3 70B: 70,553,706,496 parameters.

    python train.py --config=configs/models/llama3_70b.py --workdir=runs/llama3_70b

Sizes: arXiv:2407.21783, table 3, and the config.json that Meta released. What training does with
them are Tandem's defaults, not the authors' recipe. The tokenizer is read from
tokenizers/llama3_70b (a directory with the model's tokenizer.json; --config.data.tokenizer.path
names another). Hardware: parameters, gradients and AdamW's moments in f32 take 1,129 GB, split over
all chips (fsdp). Cost and loss are not known: it was not trained at this size here.
"""

from data.config import DataConfig, TokenizerConfig
from model.config import ModelConfig, RopeConfig
from model.execution import ExecutionConfig
from parallel.mesh import MeshConfig
from training.config import Config

TOPOLOGY = 'v5p:4x8x8'  # what docs/plans.md plans it on, and tests compile it for


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      vocabulary=128_256,
      width=8192,
      layers=80,
      heads=64,
      kv_heads=8,
      feed_forward=28_672,
      max_length=8192,
      norm_epsilon=1e-5,
      rope=RopeConfig(base=500_000.0),
      execution=ExecutionConfig(dtype='bfloat16', remat='full'),
    ),
    data=DataConfig(
      sequence_length=8192,
      batch_size=256,
      tokenizer=TokenizerConfig(kind='huggingface', path='tokenizers/llama3_70b'),
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
  )
