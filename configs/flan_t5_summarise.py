"""Flan-T5 learns to summarise dialogues: Chung et al., arXiv:2210.11416, with the settings of the
usual exercise: a rate of 3e-5, 4 microbatches a step, activations made again in the backward pass,
float16 with a loss scale that moves.

    python convert.py import --from google/flan-t5-base --workdir runs/flan_t5
    python train.py --config=configs/flan_t5_summarise.py --config.init=runs/flan_t5 \\
      '--config.data.sources[0].path=train.csv' --workdir=runs/summaries
    python generate.py --workdir=runs/summaries --temperature=0 --prompt="summarize: ..."

The files are of rows with a dialogue and its summary: columns 'dialogue' and 'section_text', as
those of MTS-Dialog (CC BY) are called; '--config.data.sources[0].columns' names others. Sizes are
flan-t5-base's, 248 M parameters; `--config=configs/flan_t5_summarise.py:small`, `large` and `xl`
are the others'. Longer dialogues: --config.data.sequence_length and --config.model.max_length.

In float16 the outputs of T5's feed-forwards pass 65,504: they and the residual stream are kept in
f32 (ModelConfig.stream_dtype). Where the hardware has bfloat16, take that:
--config.model.execution.dtype=bfloat16. A step needs 16 bytes a parameter, 4 GB, and activations of
one layer. Cost and scores are not known: T5's weights cannot be had where this was written.
"""

from data.config import CleanConfig, DataConfig, SourceConfig
from model.config import ModelConfig
from model.execution import ExecutionConfig
from objectives.seq2seq import Seq2Seq
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig

# D, L, N, F; heads are of 64.
SIZES = {
  'small': (512, 8, 6, 1024),
  'base': (768, 12, 12, 2048),
  'large': (1024, 24, 16, 2816),
  'xl': (2048, 24, 32, 5120),
}


def get_config(size: str = 'base') -> Config:
  width, layers, heads, feed_forward = SIZES[size]
  return Config(
    init='runs/flan_t5',
    model=ModelConfig(
      vocabulary=32_128,
      width=width,
      layers=layers,
      encoder_layers=layers,
      heads=heads,
      head_width=64,
      feed_forward=feed_forward,
      activation='gelu',
      norm_epsilon=1e-6,
      position='relative',
      attention_scale=1.0,
      execution=ExecutionConfig(dtype='float16', remat='full'),
    ),
    objective=Seq2Seq(
      prefix='summarize: ', target_length=256, too_long='right', target_too_long='right'
    ),
    data=DataConfig(
      sources=(
        SourceConfig(
          kind='csv',
          path='dialogues.csv',
          format='pair',
          columns=('source=dialogue', 'target=section_text'),
        ),
      ),
      # Nothing of a record is masked: a summary without names and numbers is none.
      clean=CleanConfig(anonymise=(), near_duplicates=0),
      sequence_length=512,
      batch_size=32,
      validation_fraction=0.05,
    ),
    optimizer=OptimizerConfig(learning_rate=3e-5, schedule='linear', weight_decay=0.01),
    train=TrainConfig(steps=0, epochs=3, accumulation=4, eval_every=50, save_every=100),
  )
