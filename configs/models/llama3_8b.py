"""Llama 3 8B: 8,030,261,248 parameters.

    python train.py --config=configs/models/llama3_8b.py --workdir=runs/llama3_8b

Sizes: arXiv:2407.21783, table 3, and the config.json that Meta released. What training does with
them are Tandem's defaults, not the authors' recipe. The tokenizer is read from tokenizers/llama3_8b
(a directory with the model's tokenizer.json; --config.data.tokenizer.path names another). Hardware:
parameters, gradients and AdamW's moments in f32 take 128 GB, split over all chips (fsdp). Cost and
loss are not known: it was not trained at this size here.
"""

from data.config import DataConfig, TokenizerConfig
from model.config import ModelConfig, RopeConfig
from model.execution import ExecutionConfig
from parallel.mesh import MeshConfig
from training.config import Config

TOPOLOGY = 'v5p:4x4x4'  # what docs/plans.md plans it on, and tests compile it for


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      vocabulary=128_256,
      width=4096,
      layers=32,
      heads=32,
      kv_heads=8,
      feed_forward=14_336,
      max_length=8192,
      norm_epsilon=1e-5,
      rope=RopeConfig(base=500_000.0),
      execution=ExecutionConfig(dtype='bfloat16', remat='full'),
    ),
    data=DataConfig(
      sequence_length=8192,
      batch_size=256,
      tokenizer=TokenizerConfig(kind='huggingface', path='tokenizers/llama3_8b'),
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
  )
