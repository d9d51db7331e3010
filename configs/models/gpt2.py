"""GPT-2 small: 124,439,808 parameters.

    python train.py --config=configs/models/gpt2.py --workdir=runs/gpt2

Sizes: Radford et al. 2019, table 2, and the config.json that OpenAI released. What training does
with them are Tandem's defaults, not the authors' recipe. The tokenizer is read from tokenizers/gpt2
(a directory with the model's tokenizer.json; --config.data.tokenizer.path names another). Hardware:
parameters, gradients and AdamW's moments in f32 take 2 GB, split over all chips (fsdp). Cost and
loss are not known: it was not trained at this size here.
"""

from data.config import DataConfig, TokenizerConfig
from model.config import ModelConfig
from model.execution import ExecutionConfig
from parallel.mesh import MeshConfig
from training.config import Config

TOPOLOGY = 'v5e:4x4'  # what docs/plans.md plans it on, and tests compile it for


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      vocabulary=50_257,
      width=768,
      layers=12,
      heads=12,
      feed_forward=3072,
      max_length=1024,
      gated=False,
      activation='gelu',
      norm='layer',
      norm_epsilon=1e-5,
      position='learned',
      biases='all',
      tie_embeddings=True,
      execution=ExecutionConfig(dtype='bfloat16'),
    ),
    data=DataConfig(
      sequence_length=1024,
      batch_size=256,
      tokenizer=TokenizerConfig(kind='huggingface', path='tokenizers/gpt2'),
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
  )
