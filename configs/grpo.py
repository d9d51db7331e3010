"""Group-relative policy optimisation: a tuned model learns from scores of its own answers.

    python train.py --config=configs/grpo.py --config.init=runs/tuned \\
      '--config.data.sources[0].path=questions.jsonl' --workdir=runs/grpo
    python train.py --config=configs/grpo.py --config.init=runs/tuned --config.adapter.kind=lora \\
      --config.optimizer.learning_rate=2e-5 --workdir=runs/grpo-lora

Each line of questions.jsonl is {"prompt": ..}, a text or messages, with whatever else the reward
reads: the one here, configs/rewards/arithmetic.py, wants "answer". Model, tokenizer and chat
template are those of config.init. A rollout is data.batch_size x objective.minibatches answers,
objective.group to a prompt. Others of the family: --config.objective.variant=dr_grpo, dapo, rloo,
gspo (objectives/policy.py). Cost and score depend on the model; docs/alignment.md shows what a
small one learns.
"""

from data.config import CleanConfig, DataConfig, SourceConfig
from objectives.policy import GRPO
from training.config import Config, TrainConfig
from training.optimizer import OptimizerConfig


def get_config() -> Config:
  return Config(
    init='runs/tuned',
    # A prompt is read once for its group, which is then on one device: False for more devices than
    # a batch has groups, and where mesh.context splits rows.
    objective=GRPO(reward=('configs/rewards/arithmetic.py',), shared_prompts=True),
    data=DataConfig(
      sources=(SourceConfig(kind='jsonl', path='questions.jsonl', format='prompt'),),
      # Nothing of a record is masked: a reward wants its numbers as they are.
      clean=CleanConfig(anonymise=(), near_duplicates=0),
      sequence_length=512,
      batch_size=64,
      validation_fraction=0.05,
    ),
    optimizer=OptimizerConfig(
      learning_rate=1e-6, schedule='constant', warmup_fraction=0.0, weight_decay=0.0, clip_norm=1.0
    ),
    train=TrainConfig(steps=500, eval_every=50, save_every=50, log_every=1),
  )
