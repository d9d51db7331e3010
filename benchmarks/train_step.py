"""What do Tandem and HF transformers take for a training step of the same Llama-shaped model? The
two sides of train_cpu and train_gpu.

Each runs in a process of its own (`in_process`), which prints what it found as its last line.
"""

import json
import os
import subprocess
import sys
import time

import numpy as np

from benchmarks import common
from parallel import hosts


def tandem_step(config, packed: bool = True):
  """What train.py runs of a config: functions that make the first state and take a step,
  and shapes of a batch, () -> Batch.

  packed: rows say where their documents lie, as train.py's do, though here they are one each;
  otherwise they say nothing.
  """
  import dataclasses

  import jax

  from data.batch import Batch
  from parallel import axes
  from training.program import make_program

  config = config.resolve(config.model.vocabulary)
  make_state, step = make_program(config)

  def shapes():
    rows = jax.NamedSharding(jax.sharding.get_mesh(), axes.spec('batch', 'length'))
    batch = Batch.abstract(config.data.batch_size, config.data.sequence_length, rows)
    return dataclasses.replace(batch, **({} if packed else {'segments': None}))

  return make_state, step, shapes


def tandem(config, steps: int, packed: bool = True) -> dict:
  """Seconds to the first completed step (imports included) and of each later one."""
  import jax

  from model import flops, params
  from parallel.mesh import make_mesh

  jax.set_mesh(make_mesh(config.mesh, jax.devices()[:1]))
  make_state, train_step, shapes = tandem_step(config, packed)
  state = jax.jit(make_state)()
  B, T = config.data.batch_size, config.data.sequence_length
  tokens = (
    np.random.default_rng(0).integers(0, config.model.vocabulary, (B, T + 1)).astype(np.int32)
  )
  values = {
    'tokens': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'positions': np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
    'segments': np.ones((B, T), np.int32),
    'weights': np.ones((B, T), np.float32),
  }
  batch = shapes()
  batch = type(batch)(
    **{name: x and jax.device_put(values[name], x.sharding) for name, x in vars(batch).items()}
  )

  def step():
    nonlocal state
    state, metrics, _ = train_step(state, batch)
    return float(metrics['loss'])

  timing = timed(step, steps) | {
    'parameters': params.count(state.models),
    'flops_per_token': flops.train_flops_per_token(config.model, T),
  }
  memory = jax.devices()[0].memory_stats() or {}
  return timing | {
    'device': jax.devices()[0].device_kind,
    'device_peak_bytes': memory.get('peak_bytes_in_use'),
  }


def transformers_torch(
  config, steps: int, device: str = 'cpu', compiled: bool = False, checkpointed: bool = False
) -> dict:
  """The same with transformers' Llama and torch's AdamW; on a GPU in bfloat16 by autocast, with
  PyTorch's scaled_dot_product_attention.

  compiled: torch.compile of each layer. checkpointed: layers are computed again
  in the backward pass.
  """
  import torch
  import transformers

  m, gpu = config.model, device == 'cuda'
  torch.manual_seed(0)
  if gpu:
    torch.set_float32_matmul_precision('high')
  with torch.device(device):
    made = llama(m, config.data.sequence_length, use_cache=False)
    model = transformers.AutoModelForCausalLM.from_config(
      made, attn_implementation='sdpa', dtype=torch.float32
    )
  model.train()
  if checkpointed:
    model.gradient_checkpointing_enable({'use_reentrant': False})
  if compiled:
    for layer in model.model.layers:
      layer.compile()
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-3, weight_decay=0.1, **({'fused': True} if gpu else {})
  )
  tokens = torch.randint(
    0, m.V, (config.data.batch_size, config.data.sequence_length), device=device
  )

  def step():
    with torch.autocast(device, torch.bfloat16, enabled=m.execution.dtype == 'bfloat16'):
      loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

  timing = timed(step, steps) | {'parameters': sum(p.numel() for p in model.parameters())}
  kind = torch.cuda.get_device_name() if gpu else 'cpu'
  return timing | {
    'device': kind,
    'device_peak_bytes': torch.cuda.max_memory_allocated() if gpu else None,
  }


def llama(m, length: int, use_cache: bool):
  """transformers' config of a Llama-shaped model."""
  import transformers

  return transformers.LlamaConfig(
    vocab_size=m.V,
    hidden_size=m.D,
    num_hidden_layers=m.L,
    num_attention_heads=m.N,
    num_key_value_heads=m.K,
    head_dim=m.H,
    intermediate_size=m.F,
    max_position_embeddings=length,
    tie_word_embeddings=m.tie_embeddings,
    rms_norm_eps=m.norm_epsilon,
    use_cache=use_cache,
  )


def timed(step, steps: int) -> dict:
  """First step from the start of the process, then the median of the others;
  and the losses of the first and the last.
  """
  losses = [step()]
  first = time.time() - float(os.environ['BENCHMARK_STARTED'])
  seconds = []
  for _ in range(steps):
    began = time.perf_counter()
    losses.append(step())
    seconds.append(time.perf_counter() - began)
  return {
    'first_step_seconds': first,
    'step_seconds': sorted(seconds)[len(seconds) // 2],
    'steps': seconds,
    'losses': [losses[0], losses[-1]],
  }


def in_process(
  module: str, *arguments: str, environment: dict[str, str], timeout: float | None = None
) -> dict:
  """What `python -m module arguments` printed last, as JSON, with its peak resident memory.

  Raises RuntimeError for one that fails, with what it said last,
  or that takes longer than `timeout` seconds.
  """
  process = subprocess.Popen(
    [sys.executable, '-m', module, *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ
    | {'BENCHMARK_STARTED': str(time.time()), 'GLIBC_TUNABLES': hosts.TUNABLES}
    | environment,
  )
  with common.PeakMemory(process.pid) as memory:
    try:
      printed, said = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
      process.kill()
      process.communicate()
      raise RuntimeError(f'took more than {timeout:.0f} s') from None
  if process.returncode:
    raise RuntimeError(f'ended with code {process.returncode}: {reason(said)}')
  return json.loads(printed.splitlines()[-1]) | {'peak_bytes': memory.peak}


def attempted(module: str, *arguments: str, environment: dict[str, str]) -> dict:
  """The same, or {'error': why it failed}: what other sides found is still wanted."""
  try:
    return in_process(module, *arguments, environment=environment)
  except RuntimeError as error:
    return {'error': str(error)}


def best_of(runs: dict[str, list[dict]], by: str) -> dict[str, dict]:
  """Of each side that was measured the run with the least `by`."""
  measured = {side: [run for run in taken if 'error' not in run] for side, taken in runs.items()}
  return {side: min(taken, key=lambda run: run[by]) for side, taken in measured.items() if taken}


def failed(runs: dict[str, list[dict]]) -> list[str]:
  """Why runs failed, a line for each reason of a side."""
  reasons = {(side, run['error']) for side, of in runs.items() for run in of if 'error' in run}
  return [f'not measured: {side}: {error}' for side, error in sorted(reasons)]


def reason(said: str) -> str:
  """The line of a traceback that says what went wrong:
  the last one that begins with the name of an error.
  """
  lines = [line.strip() for line in said.splitlines() if line.strip()]
  named = [line for line in lines if 'Error' in line.split(':')[0] or 'RESOURCE_EXHAUSTED' in line]
  return (named or lines or ['no word'])[-1][:300]
