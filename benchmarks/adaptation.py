"""Does tuning on records waste less than transformers and PEFT do? Real tokens a second and memory,
of all parameters and of LoRA.

    python -m benchmarks.adaptation [--json FILE] [--steps 6]

Needs torch, transformers and peft: make .venv/installed-oracle.

bench-30M (benchmarks.train_cpu), f32, AdamW. The same examples on both sides, of lengths as chats
have them (log-normal, median 120, at most 512), of which the last half is learned: ours packed
into 8 rows of 512, theirs 8 at a time, padded to the longest as the usual collators do. Each side
runs in a process of its own, in turn, twice; the better run counts. Padding is no token.
"""

import itertools
import json

import numpy as np

import commands
from benchmarks import train_cpu, train_step

ROWS, LENGTH, RANK, COUNT = 8, 512, 16, 600
SIDES = {
  'ours,full': 'Tandem, all',
  'theirs,full': 'transformers, all',
  'ours,lora': 'Tandem, LoRA',
  'theirs,lora': 'transformers + PEFT, LoRA',
}


def examples() -> list[np.ndarray]:
  """Ids, int32 [n], of every example."""
  draw = np.random.default_rng(0)
  lengths = np.clip(draw.lognormal(np.log(120), 0.7, COUNT), 16, LENGTH + 1).astype(int)
  return [draw.integers(0, 8192, n, np.int32) for n in lengths]


def ours(kind: str, steps: int) -> dict:
  import dataclasses

  import jax

  from data.batch import Batch
  from data.packing import pack
  from model.adaptation import AdapterConfig
  from parallel.mesh import make_mesh
  from training.program import make_program

  config = train_cpu.config()
  if kind == 'lora':
    adapter = AdapterConfig(kind='lora', rank=RANK, alpha=2.0 * RANK)
    config = dataclasses.replace(config, adapter=adapter)
  config = config.resolve(config.model.vocabulary)
  every = examples()
  order, ends = pack(np.array([len(ids) - 1 for ids in every]), LENGTH)

  def batches():
    for first in itertools.count(step=ROWS):
      batch = Batch.empty(ROWS, LENGTH)
      for into in range(ROWS):
        row, at = (first + into) % (len(ends) - 1), 0
        for segment, i in enumerate(order[ends[row] : ends[row + 1]], 1):
          ids = every[i]
          n = len(ids) - 1
          here = slice(at, at + n)
          batch.tokens[into, here], batch.targets[into, here] = ids[:-1], ids[1:]
          batch.positions[into, here], batch.segments[into, here] = np.arange(n), segment
          batch.weights[into, here] = np.arange(n) >= n // 2
          at += n
      yield batch

  jax.set_mesh(make_mesh(config.mesh, jax.devices()[:1]))
  make_state, train_step_ = make_program(config)
  state, feed, seen = jax.jit(make_state)(), batches(), []

  def step():
    nonlocal state
    batch = next(feed)
    seen.append(int((batch.segments > 0).sum()))
    state, metrics, _ = train_step_(state, jax.device_put(batch))
    return float(metrics['loss'])

  found = train_step.timed(step, steps)
  return found | {'tokens': seen[1:], 'positions': ROWS * LENGTH}


def theirs(kind: str, steps: int) -> dict:
  import torch
  import transformers

  torch.manual_seed(0)
  made = train_step.llama(train_cpu.config().model, LENGTH, use_cache=False)
  model = transformers.AutoModelForCausalLM.from_config(
    made, attn_implementation='sdpa', dtype=torch.float32
  )
  if kind == 'lora':
    import peft

    lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules='all-linear')
    model = peft.get_peft_model(model, lora)
  model.train()
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)
  feed, seen, positions = itertools.cycle(examples()), [], []

  def step():
    some = [torch.from_numpy(next(feed)[:LENGTH]).long() for _ in range(ROWS)]
    padded = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in some], True)
    labels = padded.masked_fill(mask == 0, -100)
    for row, ids in enumerate(some):
      labels[row, : len(ids) // 2] = -100
    seen.append(int(mask.sum()))
    positions.append(mask.numel())
    loss = model(input_ids=padded, attention_mask=mask, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

  found = train_step.timed(step, steps)
  return found | {'tokens': seen[1:], 'positions': sum(positions[1:]) / steps}


def main():
  arguments = commands.parser(__doc__)
  arguments.add_argument('--steps', type=int, default=6, help='timed steps of each run')
  arguments.add_argument('--side', choices=SIDES, help='run one side in this process')
  options = arguments.parse_args()
  if options.side:
    side, kind = options.side.split(',')
    print(json.dumps({'ours': ours, 'theirs': theirs}[side](kind, options.steps)))
    return

  runs = {side: [] for side in SIDES}
  for _ in range(2):
    for side in runs:
      flags = ['--side', side, '--steps', str(options.steps)]
      environment = {'JAX_PLATFORMS': 'cpu'}
      run = train_step.in_process('benchmarks.adaptation', *flags, environment=environment)
      run['tokens_per_second'] = sum(run['tokens']) / sum(run['steps'])
      run['step_seconds'] = sum(run['steps']) / options.steps
      runs[side].append(run)

  best = {side: max(of, key=lambda run: run['tokens_per_second']) for side, of in runs.items()}
  rows = []
  for side, run in best.items():
    filled = sum(run['tokens']) / options.steps / run['positions']
    rows.append(
      [
        SIDES[side],
        run['tokens_per_second'],
        f'{filled:.0%}',
        run['step_seconds'],
        run['peak_bytes'] / 2**30,
      ]
    )
  ratios = {}
  for kind in ('full', 'lora'):
    a, b = best[f'ours,{kind}'], best[f'theirs,{kind}']
    ratios[kind] = {
      'tokens_per_second': a['tokens_per_second'] / b['tokens_per_second'],
      'memory': a['peak_bytes'] / b['peak_bytes'],
    }
    rows.append(
      [f'ratio, {kind}', ratios[kind]['tokens_per_second'], '', '', ratios[kind]['memory']]
    )
  lora, full = (best[f'ours,{kind}']['step_seconds'] for kind in ('lora', 'full'))
  ratios['step_of_lora'] = lora / full
  rows.append(['a step of LoRA, of a full one', '', '', ratios['step_of_lora'], ''])
  commands.table(
    f'bench-30M, f32, {COUNT} examples of {LENGTH + 1} tokens at most',
    ['', 'tokens/s', 'of positions', 's a step', 'peak RSS GiB'],
    rows,
  )
  commands.write_json(options.json, 'adaptation', {'best': best, 'runs': runs, 'ratios': ratios})


if __name__ == '__main__':
  main()
