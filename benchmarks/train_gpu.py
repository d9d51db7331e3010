"""Does training on a GPU run faster than with torch, and what is our attention worth there?
A Llama of 1.1 billion parameters, in one run.

    python -m benchmarks.train_gpu [--quick] [--budget 540] [--sides=pallas_gpu,cudnn]
                                   [--json benchmarks/results/train_h100.json]
    python -m benchmarks.train_gpu --rehearse
    python -m benchmarks.train_gpu --predict

The first needs a GPU. --rehearse runs the whole harness with a toy model on this CPU: tests it,
measures nothing. --predict compiles each of our steps for an H100 that isn't here: memory and time,
predicted.

configs/bench_1b.py: bfloat16, AdamW in f32, 16k tokens a step, as 4 rows of 4k and as one of 16k.
Each side runs in a process of its own. Tandem takes the step that train.py takes, with each kernel
of attention: our own, on rows that say where documents lie, as train.py's do; cuDNN's, which
honours no segments, on rows that say nothing; XLA's dense scores and its blocks. Its peer is HF
transformers with torch's scaled_dot_product_attention in bfloat16 by autocast, and its layers
compiled. A torch side that runs out of memory is run again with its layers checkpointed, and says
so. MFU counts causal attention at half and nothing that is computed twice (model/flops.py). What
the budget in seconds leaves no time for is named.
"""

import argparse
import dataclasses
import itertools
import json
import os
import time

import commands
from benchmarks import train_step
from benchmarks.gpu_environment import LATE, lacking

LENGTHS = (4096, 16384)
TOKENS = 16384
# Sides in the order of their importance: attention backend and whether rows have segments,
# or how torch runs.
OURS = {
  'pallas_gpu': ('pallas_gpu', True),
  'cudnn': ('xla', False),
  'blocked': ('blocked', True),
  'xla': ('xla', True),
}
THEIRS = {'torch compiled': True, 'torch': False}
ORDER = ('pallas_gpu', 'cudnn', 'torch compiled', 'torch', 'blocked', 'xla')
NAMES = {
  'pallas_gpu': 'Tandem, our kernel',
  'cudnn': 'Tandem, cuDNN',
  'blocked': 'Tandem, XLA in blocks',
  'xla': 'Tandem, XLA, dense scores',
  'torch compiled': 'transformers, compiled',
  'torch': 'transformers',
}
NOT_ON_A_CPU = {
  'pallas_gpu': 'it is for GPUs',
  'cudnn': 'it is for GPUs',
  'torch compiled': 'its compiler is not rehearsed',
}
LONGEST = 240  # seconds of one side, compiling included


def config(length: int, attention: str, rehearsal: bool = False):
  from configs import bench_1b

  made = bench_1b.get_config()
  model = made.model.with_execution(attention=attention)
  if rehearsal:
    model = dataclasses.replace(
      model.with_execution(dtype='float32'),
      vocabulary=256,
      width=32,
      layers=2,
      heads=4,
      kv_heads=2,
      feed_forward=64,
    )
    length = length // 128
  data = dataclasses.replace(
    made.data,
    sequence_length=length,
    batch_size=max(1, (TOKENS // 128 if rehearsal else TOKENS) // length),
  )
  if rehearsal:
    data = dataclasses.replace(
      data, tokenizer=dataclasses.replace(data.tokenizer, kind='byte', vocabulary=0)
    )
  return dataclasses.replace(made, model=model, data=data)


def side_of(side: str, length: int, steps: int, rehearsal: bool, checkpointed: bool) -> dict:
  """What a process of one side prints. Raises RuntimeError where cuDNN would
  not be what is measured.
  """
  if side in THEIRS:
    from model import flops

    made, where = config(length, 'auto', rehearsal), 'cpu' if rehearsal else 'cuda'
    run = train_step.transformers_torch(made, steps, where, THEIRS[side], checkpointed)
    needed = flops.train_flops_per_token(made.model, made.data.sequence_length)
    return run | {'flops_per_token': needed}
  backend, packed = OURS[side]
  made = config(length, backend, rehearsal)
  if side == 'cudnn' and (reason := _refusal(made)):
    raise RuntimeError(f'cuDNN does not compute this attention: {reason}')
  return train_step.tandem(made, steps, packed)


def _refusal(made) -> str:
  import jax

  from kernels import cudnn
  from kernels.mask import Mask

  m = made.model
  q, k = (
    jax.ShapeDtypeStruct((1, made.data.sequence_length, heads, m.H), m.execution.dtype)
    for heads in (m.N, m.K)
  )
  return cudnn.refusal(q, k, k, Mask())


def device() -> tuple[str, str]:
  """Platform and kind of what jax would run on, asked of a process of its own,
  so that this one keeps off the GPU.
  """
  found = train_step.in_process('benchmarks.train_gpu', '--side', 'device', environment={})
  return found['platform'], found['kind']


def measure(side: str, length: int, options, ends: float) -> dict:
  """What a side found, or {'error': why it did not}."""
  arguments = [
    '--side',
    side,
    '--length',
    str(length),
    '--steps',
    str(options.steps),
    *(['--rehearse'] if options.rehearse else []),
  ]
  # jax and torch both take what they need and no more in advance; a GPU's memory is one process's
  # at a time.
  environment = {
    'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.95',
    'PYTORCH_CUDA_ALLOC_CONF': 'expandable_segments:True',
  }
  attempts = ([], ['--checkpointed']) if side in THEIRS else ([],)
  for flags in attempts:
    left = ends - time.time()
    if left < 10:
      return dict(LATE)
    try:
      run = train_step.in_process(
        'benchmarks.train_gpu',
        *arguments,
        *flags,
        environment=environment,
        timeout=min(left, LONGEST),
      )
      return run | {'checkpointed': bool(flags)}
    except RuntimeError as error:
      result = {'error': str(error)}
      if 'out of memory' not in str(error).lower():
        break
  return result


def predict(side: str, length: int, topology: str = 'h100:1x1x1') -> dict:
  """Bytes and seconds of one of our steps by the compiler's account, for hardware that isn't here.

  Raises ImportError where its compiler is not installed,
  NotImplementedError for a backend that is not there.
  """
  import jax

  from analysis import aot, hardware, memory, roofline
  from analysis.hlo import Module
  from model import flops, params
  from parallel.mesh import make_mesh

  backend, packed = OURS[side]
  made = config(length, backend)
  mesh = make_mesh(made.mesh, aot.topology(topology))
  chip = hardware.of_device(mesh.devices.flat[0])
  with jax.set_mesh(mesh):
    make_state, step, shapes = train_step.tandem_step(made, packed)
    compiled = step.lower(params.abstract(make_state, mesh), shapes()).compile()
  prediction = roofline.predict(Module(compiled.as_text()), mesh, chip, made.model.execution.dtype)
  rate = TOKENS / prediction.seconds
  return {
    'step_seconds': prediction.seconds,
    'device_peak_bytes': memory.parts(compiled, {}).peak,
    'tokens_per_second': rate,
    'mfu': flops.mfu(
      rate * flops.train_flops_per_token(made.model, length),
      1,
      hardware.peak(chip, made.model.execution.dtype),
    ),
    'assumptions': prediction.assumptions,
  }


def show_predictions(options) -> None:
  results, rows = {}, []
  for length, side in itertools.product(LENGTHS, OURS):
    name = f'{NAMES[side]}, {length}'
    try:
      step = results[f'{side} {length}'] = predict(side, length)
      speed = [step['step_seconds'], step['tokens_per_second'], f'{step["mfu"]:.0%}']
      rows.append([name, *speed, step['device_peak_bytes'] / 1e9])
    except Exception as error:  # of one side: the others are still wanted
      why = str(error).splitlines()[0]
      results[f'{side} {length}'] = {'error': why}
      rows.append([name, f'not predicted: {why[:80]}', '', '', ''])

  commands.table(
    'bench-1B, predicted for an H100, not measured', ['', 'step s', 'tokens/s', 'MFU', 'GB'], rows
  )
  for text in sorted({text for step in results.values() for text in step.get('assumptions', ())}):
    print(f'assumed: {text}')
  commands.write_json(options.json, 'train_gpu predicted', results)


def show(results: dict, chip_peak: float | None) -> None:
  """The table of what was measured, best first of each length, and what was not."""
  from model import flops

  for length in sorted({int(name.split()[-1]) for name in results}):
    of = {side: results[f'{side} {length}'] for side in ORDER if f'{side} {length}' in results}
    measured = {side: run for side, run in of.items() if 'error' not in run}
    needed = next(
      (run['flops_per_token'] for run in measured.values() if 'flops_per_token' in run), None
    )
    rows = []
    for side, run in sorted(measured.items(), key=lambda item: item[1]['step_seconds']):
      run['tokens_per_second'] = rate = run['tokens'] / run['step_seconds']
      run['mfu'] = mfu = flops.mfu(rate * needed, 1, chip_peak) if needed else None
      peak = run['device_peak_bytes']
      rows.append(
        [
          NAMES[side] + (', checkpointed' if run['checkpointed'] else ''),
          rate,
          '-' if mfu is None else f'{mfu:.1%}',
          '-' if peak is None else f'{peak / 1e9:.1f}',
          run['first_step_seconds'],
          f'{run["losses"][-1]:.3f}',
        ]
      )

    commands.table(
      f'{length} tokens a row',
      ['', 'tokens/s', 'MFU', 'peak GB', 'first step s', 'last loss'],
      rows,
    )
    for side, run in of.items():
      if 'error' in run:
        print(f'not measured: {NAMES[side]}, {length}: {run["error"]}')


def main() -> int:
  parser = commands.parser(__doc__)
  parser.add_argument('--quick', action='store_true', help='rows of 4k only')
  parser.add_argument('--budget', type=float, default=540, help='seconds for everything')
  parser.add_argument('--steps', type=int, default=8, help='timed steps of each side')
  parser.add_argument('--sides', default=','.join(ORDER), help='with commas between')
  parser.add_argument(
    '--rehearse', action='store_true', help='a toy model on this CPU, to test the harness'
  )
  parser.add_argument(
    '--predict', action='store_true', help='compile for an H100 that is not here; measure nothing'
  )
  for flag in ('--side', '--length', '--checkpointed'):  # of a process that runs one side
    parser.add_argument(
      flag, help=argparse.SUPPRESS, **({'action': 'store_true'} if flag == '--checkpointed' else {})
    )
  options = parser.parse_args()
  for side in options.sides.split(','):
    if side not in ORDER:
      parser.error(f'--sides: {side!r} is none of {", ".join(ORDER)}')
  if options.rehearse or options.predict:
    os.environ['JAX_PLATFORMS'] = 'cpu'
  if options.side == 'device':
    import jax

    print(json.dumps({'platform': jax.devices()[0].platform, 'kind': jax.devices()[0].device_kind}))
    return 0
  if options.side:
    length, steps = int(options.length), options.steps
    run = side_of(options.side, length, steps, options.rehearse, options.checkpointed)
    print(json.dumps(run))
    return 0
  if options.predict:
    show_predictions(options)
    return 0

  ends = time.time() + options.budget
  platform, kind = device()
  if lacking(kind, platform, options.rehearse):
    return 1
  from analysis import hardware

  results = {}

  def keep(sides, **how):
    whole = {'rehearsal': options.rehearse, 'device': kind, 'sides': sides}
    commands.write_json(options.json, 'train_gpu', whole, **how)

  for side in options.sides.split(','):
    for length in LENGTHS[: 1 if options.quick else None]:
      why = NOT_ON_A_CPU.get(side) if options.rehearse else None
      run = {'error': why} if why else measure(side, length, options, ends)
      run['tokens'] = TOKENS // 128 if options.rehearse else TOKENS
      results[f'{side} {length}'] = run
      speed = run.get('error') or f'{run["step_seconds"]:.3f} s a step'
      print(f'{side}, {length}: {speed}', flush=True)
      keep(results, partial=True)

  show(results, None if options.rehearse else hardware.peak(hardware.lookup(kind), 'bfloat16'))
  if options.rehearse:
    print('\na rehearsal: nothing here is a measurement')
  keep(results)
  return 0


if __name__ == '__main__':
  raise SystemExit(main())
