"""DeepSeek-V3, without the module that predicts a second token: 671,026,419,200 parameters.

    python train.py --config=configs/models/deepseek_v3.py --workdir=runs/deepseek_v3

Sizes: arXiv:2412.19437, section 4.2, and the config.json that DeepSeek released. What training does
with them are Tandem's defaults, not the authors' recipe. The tokenizer is read from
tokenizers/deepseek_v3 (a directory with the model's tokenizer.json; --config.data.tokenizer.path
names another). Hardware: parameters, gradients and AdamW's moments in f32 take 10,736 GB, split
over all chips (fsdp). Cost and loss are not known: it was not trained at this size here.
"""

import math

from data.config import DataConfig, TokenizerConfig
from model.config import LatentConfig, ModelConfig, MoEConfig, RopeConfig
from model.execution import ExecutionConfig
from parallel.mesh import MeshConfig
from training.config import Config

TOPOLOGY = 'v5p:4x8x8'  # what docs/plans.md plans it on, and tests compile it for


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      vocabulary=129_280,
      width=7168,
      layers=61,
      heads=128,
      head_width=128,
      feed_forward=18_432,
      max_length=163_840,
      norm_epsilon=1e-6,
      latent=LatentConfig(width=512, query_width=1536, rope_width=64, value_width=128),
      rope=RopeConfig(
        scaling='yarn', factor=40.0, original_length=4096, low=1.0, high=32.0, attention_factor=1.0
      ),
      attention_scale=192**-0.5 * (0.1 * math.log(40) + 1) ** 2,
      moe=MoEConfig(
        experts=256,
        per_token=8,
        feed_forward=2048,
        shared_feed_forward=2048,
        first=3,
        router='sigmoid',
        groups=8,
        groups_per_token=4,
        scale=2.5,
        selection_bias=True,
        bias_rate=0.001,
        balance_loss=0.0001,
      ),
      execution=ExecutionConfig(
        dtype='bfloat16', remat='full', remat_save=('attention', 'attention_out')
      ),
    ),
    data=DataConfig(
      sequence_length=4096,
      batch_size=256,
      tokenizer=TokenizerConfig(kind='huggingface', path='tokenizers/deepseek_v3'),
    ),
    mesh=MeshConfig(data=1, fsdp=-1, expert=16),
  )
