"""What does TRL take for a step of DPO and of GRPO? The other side of benchmarks.rl, whose weights
it writes, too.
"""

import time

import tokenizers
import torch
import transformers
import trl
from datasets import Dataset

from benchmarks import train_step
from benchmarks.rl import BETA, EOS, FIRST, OPTIMIZER, PHASES, Setting, pairs_of, prompts_of

END = '</s>'


def weights(setting: Setting, directory: str) -> dict:
  """Writes a random model of the setting's shape, in f32."""
  torch.manual_seed(0)
  length = max(setting.length, setting.prompt + setting.new)
  made = train_step.llama(setting.network(), length, use_cache=True)
  model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
  model.generation_config.eos_token_id = model.config.eos_token_id = None
  model.save_pretrained(directory)
  return {'parameters': model.num_parameters()}


def texts(ids: list[int], end: int) -> str:
  """What `tokenizer` reads as these ids."""
  return ' '.join(END if i == end else f'w{i}' for i in ids)


def tokenizer(V: int, end: int):
  """One word an id; `end` is what ends a text."""
  words = {f'w{i}': i for i in range(FIRST, V)} | {'<pad>': 0, '<s>': 1, END: end}
  table = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<s>'))
  table.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=table, pad_token='<pad>', unk_token='<s>', eos_token=END
  )


class StepCallback(transformers.TrainerCallback):
  """Seconds of each step, by the clock and of processors, which ends when the device has done it;
  and what is logged of it.
  """

  def __init__(self):
    self.seconds, self.processors, self.logged = [], [], []

  def on_step_begin(self, args, state, control, **_):
    self._began, self._used = time.perf_counter(), time.process_time()

  def on_step_end(self, args, state, control, **_):
    if torch.cuda.is_available():
      torch.cuda.synchronize()
    self.seconds.append(time.perf_counter() - self._began)
    self.processors.append(time.process_time() - self._used)

  def on_log(self, args, state, control, logs, **_):
    self.logged.append(logs)


def arguments(setting: Setting, directory: str, batch: int, steps: int) -> dict:
  """Of both trainers."""
  gpu, o = torch.cuda.is_available(), OPTIMIZER
  return dict(
    output_dir=f'{directory}/trl',
    use_cpu=not gpu,
    bf16=setting.network().execution.dtype == 'bfloat16',
    per_device_train_batch_size=batch,
    max_steps=steps,
    learning_rate=o['learning_rate'],
    adam_beta1=o['b1'],
    adam_beta2=o['b2'],
    adam_epsilon=o['epsilon'],
    weight_decay=o['weight_decay'],
    max_grad_norm=o['clip_norm'],
    lr_scheduler_type='constant',
    gradient_checkpointing=False,
    report_to=[],
    save_strategy='no',
    logging_steps=1,
    disable_tqdm=True,
    dataloader_pin_memory=gpu,
  )


def loaded(directory: str):
  return transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32, attn_implementation='sdpa'
  )


def facts() -> dict:
  gpu = torch.cuda.is_available()
  return {
    'device': torch.cuda.get_device_name() if gpu else 'cpu',
    'device_peak_bytes': torch.cuda.max_memory_allocated() if gpu else None,
  }


# 1. Preferences.


def dpo(setting: Setting, directory: str) -> dict:
  V, end = setting.network().V, EOS
  first, others = pairs_of(setting)
  rows = [
    {
      'prompt': texts(pair.prompt, end),
      # Its tokenizer reads a prompt with an answer as one text.
      'chosen': ' ' + texts(pair.chosen, end),
      'rejected': ' ' + texts(pair.rejected, end),
    }
    for pair in [*first, *first, *others]
  ]
  steps = StepCallback()
  trainer = trl.DPOTrainer(
    model=loaded(directory),
    args=trl.DPOConfig(
      beta=BETA,
      max_length=None,
      train_sampling_strategy='sequential',
      **arguments(setting, directory, setting.pairs, 2 + setting.steps),
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer(V, end),
    callbacks=[steps],
  )
  if trainer.ref_model is None:
    raise RuntimeError('TRL keeps no reference')
  trainer.train()
  B = setting.pairs
  batches = [others[i : i + B] for i in range(0, len(others), B)]
  halves = [[len(half) for pair in batch for half in pair.halves] for batch in batches]
  return facts() | {
    'steps': steps.seconds[2:],
    'processors': steps.processors[2:],
    'tokens': sum(map(sum, halves)),
    'positions': sum(len(of) * max(of) for of in halves),
    'logp_chosen': steps.logged[0]['logps/chosen'],
    'losses': [logs['loss'] for logs in steps.logged[:2]],
  }


# 2. Rewards.


def reward(completions: list[str], **_) -> list[float]:
  return [float(len(text) % 7) for text in completions]


def grpo(setting: Setting, directory: str) -> dict:
  V = setting.network().V
  rows = [{'prompt': texts(ids, V)} for ids in prompts_of(setting)]
  steps, generating = StepCallback(), []
  trainer = trl.GRPOTrainer(
    model=loaded(directory),
    reward_funcs=reward,
    args=trl.GRPOConfig(
      beta=0.0,
      num_generations=setting.answers,
      num_iterations=1,
      max_completion_length=setting.new,
      loss_type='grpo',
      shuffle_dataset=False,
      **arguments(setting, directory, setting.batch, 1 + setting.steps),
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer(V, V),
    callbacks=[steps],
  )
  generate = trainer._generate_single_turn

  def timed(*given, **named):
    began = time.perf_counter()
    ids, scores = generate(*given, **named)  # on the host
    generating.append(time.perf_counter() - began)
    if any(len(answer) != setting.new for answer in ids) or len(ids) != setting.batch:
      raise RuntimeError(f'an answer is not of {setting.new} tokens: {[*map(len, ids)]}')
    return ids, scores

  trainer._generate_single_turn = timed
  trainer.train()
  phases = dict.fromkeys(PHASES, None) | {'generate': sum(generating[1:])}
  return facts() | {
    'steps': steps.seconds[1:],
    'processors': steps.processors[1:],
    'first_step_seconds': steps.seconds[0],
    'phases': phases | {'other': sum(steps.seconds[1:]) - phases['generate']},
  }
