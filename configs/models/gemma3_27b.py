"""The text model of Gemma 3 27B: 27,009,346,304 parameters.

    python train.py --config=configs/models/gemma3_27b.py --workdir=runs/gemma3_27b

Sizes: arXiv:2503.19786, table 1, and the config.json that Google released. What training does with
them are Tandem's defaults, not the authors' recipe. The tokenizer is read from
tokenizers/gemma3_27b (a directory with the model's tokenizer.json; --config.data.tokenizer.path
names another). Hardware: parameters, gradients and AdamW's moments in f32 take 432 GB, split over
all chips (fsdp). Cost and loss are not known: it was not trained at this size here.
"""

from data.config import DataConfig, TokenizerConfig
from model.config import ModelConfig, RopeConfig
from model.execution import ExecutionConfig
from parallel.mesh import MeshConfig
from training.config import Config

TOPOLOGY = 'v6e:16x16'  # what docs/plans.md plans it on, and tests compile it for


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      vocabulary=262_208,
      width=5376,
      layers=62,
      heads=32,
      kv_heads=16,
      head_width=128,
      feed_forward=21_504,
      max_length=131_072,
      norm_epsilon=1e-6,
      norm_offset=True,
      norm_placement='both',
      activation='gelu',
      window=1024,
      global_every=6,
      qk_norm=True,
      attention_scale=168**-0.5,
      embedding_scale=True,
      tie_embeddings=True,
      rope=RopeConfig(base=1e6, local_base=1e4, scaling='linear', factor=8.0),
      execution=ExecutionConfig(dtype='bfloat16', remat='full'),
    ),
    data=DataConfig(
      sequence_length=4096,
      batch_size=256,
      tokenizer=TokenizerConfig(kind='huggingface', path='tokenizers/gemma3_27b'),
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
  )
