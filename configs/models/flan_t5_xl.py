"""Flan-T5 XL (T5 1.1): 2,849,757,184 parameters.

    python train.py --config=configs/models/flan_t5_xl.py \\
      --config.objective.kind=span_corruption --workdir=runs/flan_t5_xl

Sizes: the config.json that Google released; arXiv:2210.11416. What training does with them are
Tandem's defaults, not the authors' recipe. The tokenizer is read from tokenizers/flan_t5_xl (a
directory with the model's tokenizer.json; --config.data.tokenizer.path names another). Hardware:
parameters, gradients and AdamW's moments in f32 take 46 GB, split over all chips (fsdp). Cost and
loss are not known: it was not trained at this size here. Its parameters can be imported and
generate; with --config.objective.kind=span_corruption, which 1.1 was pretrained with, train.py goes
on training it (the default objective is for decoders, and refused).
"""

from data.config import DataConfig, TokenizerConfig
from model.config import ModelConfig
from model.execution import ExecutionConfig
from parallel.mesh import MeshConfig
from training.config import Config


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      vocabulary=32_128,
      width=2048,
      layers=24,
      encoder_layers=24,
      heads=32,
      head_width=64,
      feed_forward=5120,
      activation='gelu',
      norm_epsilon=1e-6,
      position='relative',
      attention_scale=1.0,
      execution=ExecutionConfig(dtype='bfloat16', remat='full'),
    ),
    data=DataConfig(
      sequence_length=512,
      batch_size=256,
      tokenizer=TokenizerConfig(kind='huggingface', path='tokenizers/flan_t5_xl'),
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
  )
