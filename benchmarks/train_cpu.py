"""Does training use the CPU better than torch does? The same Llama-shaped model, trained by us and by HF transformers.

    python -m benchmarks.train_cpu [--json FILE] [--steps 8]        (needs torch and transformers: make .venv/installed-oracle)

bench-30M: vocabulary 8192, width 512, 8 layers, 8 heads, 4 kv heads, head width 64, feed-forward 1408, f32, batch 8 x 512,
AdamW, clipping. Each side runs in a process of its own, in turn, twice, with the same allocator settings (parallel/hosts.py);
the better run counts. The machine's own f32 GEMM rate, the faster library's, is the physical limit that both are held to.
"""
import json
import os
import subprocess
import sys
import time

from benchmarks import common
from parallel import hosts

V, D, L, N, K, H, F, B, T = 8192, 512, 8, 8, 4, 64, 1408, 8, 512


def ours(steps: int) -> dict:
  """Seconds to the first completed step (imports included) and of each later one."""
  import jax
  import numpy as np

  import train
  from data.batch import Batch
  from data.config import DataConfig
  from model import params, transformer
  from model.config import ModelConfig
  from parallel.mesh import MeshConfig, make_mesh
  from training import config as configs
  from training import state as states
  from training.optimizer import OptimizerConfig, make_optimizer

  model = ModelConfig(vocabulary=V, width=D, layers=L, heads=N, kv_heads=K, head_width=H, feed_forward=F, max_length=T, remat='dots')
  config = configs.Config(model=model, data=DataConfig(sequence_length=T, batch_size=B), optimizer=OptimizerConfig(schedule='constant'))
  mesh = make_mesh(MeshConfig())
  jax.set_mesh(mesh)
  optimizer = make_optimizer(config.optimizer, 100, params.specs(jax.eval_shape(lambda: transformer.init(model, 0))))
  state = jax.jit(lambda: states.init(config, optimizer))()
  tokens = np.random.default_rng(0).integers(0, V, (B, T + 1)).astype(np.int32)
  positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
  sharding = jax.NamedSharding(mesh, train.axes.spec('batch', 'length'))
  batch = jax.device_put(Batch(tokens[:, :-1], tokens[:, 1:], positions, np.ones((B, T), np.int32)), sharding)
  train_step = train.make_train_step(config, optimizer)

  def step():
    nonlocal state
    state, metrics, _ = train_step(state, batch)
    return float(metrics['loss'])
  return timed(step, steps) | {'parameters': params.count(state.model),
                               'flops_per_token': train.flops.train_flops_per_token(model, T), 'gemm': gemm_jax()}


def theirs(steps: int) -> dict:
  """The same with transformers' Llama and torch's AdamW."""
  import torch
  import transformers
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
      vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=N, num_key_value_heads=K, head_dim=H, intermediate_size=F,
      max_position_embeddings=T, tie_word_embeddings=False)
  model = transformers.LlamaForCausalLM(config)
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
  tokens = torch.randint(0, V, (B, T))

  def step():
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
  found = timed(step, steps) | {'parameters': sum(p.numel() for p in model.parameters())}
  a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
  a @ b
  return found | {'gemm': 2 * 2048**3 / common.seconds(lambda: a @ b, 20)}


def timed(step, steps: int) -> dict:
  """First step from the start of the process, then the median of the others."""
  step()
  first = time.time() - float(os.environ['BENCHMARK_STARTED'])
  seconds = []
  for _ in range(steps):
    began = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - began)
  return {'first_step_seconds': first, 'step_seconds': sorted(seconds)[len(seconds) // 2], 'steps': seconds}


def gemm_jax() -> float:
  """f32 FLOP/s of a 2048^3 product."""
  import jax
  import jax.numpy as jnp
  a, b = (jax.random.normal(jax.random.key(i), (2048, 2048)) for i in range(2))
  product = jax.jit(jnp.matmul)
  product(a, b).block_until_ready()
  return 2 * 2048**3 / common.seconds(lambda: product(a, b).block_until_ready(), 20)


def in_process(side: str, steps: int) -> dict:
  """Runs one side in a fresh process; adds its peak resident memory."""
  environment = os.environ | {'BENCHMARK_STARTED': str(time.time()), 'JAX_PLATFORMS': 'cpu', 'GLIBC_TUNABLES': hosts.TUNABLES}
  process = subprocess.Popen([sys.executable, '-m', 'benchmarks.train_cpu', '--side', side, '--steps', str(steps)],
                             env=environment, stdout=subprocess.PIPE, text=True)
  with common.PeakMemory(process.pid) as memory:
    printed, _ = process.communicate()
  if process.returncode:
    raise RuntimeError(f'{side} ended with code {process.returncode}')
  return json.loads(printed.splitlines()[-1]) | {'peak_bytes': memory.peak}


def main():
  arguments = common.parser(__doc__)
  arguments.add_argument('--steps', type=int, default=8, help='timed steps of each run')
  arguments.add_argument('--side', choices=('ours', 'theirs'), help='run one side in this process')
  options = arguments.parse_args()
  if options.side:
    print(json.dumps({'ours': ours, 'theirs': theirs}[options.side](options.steps)))
    return
  runs = {'ours': [], 'theirs': []}
  for _ in range(2):
    for side in runs:
      runs[side].append(in_process(side, options.steps))
  best = {side: min(of, key=lambda run: run['step_seconds']) for side, of in runs.items()}
  gemm, needed = max(run['gemm'] for of in runs.values() for run in of), best['ours']['flops_per_token']
  rows = []
  for side, name in (('ours', 'Tandem'), ('theirs', 'transformers + torch')):
    run = best[side]
    run['tokens_per_second'] = B * T / run['step_seconds']
    run['share_of_gemm'] = run['tokens_per_second'] * needed / gemm
    rows.append([name, run['tokens_per_second'], f'{run["share_of_gemm"]:.0%}', run['gemm'] / 1e9, run['peak_bytes'] / 2**30,
                 run['first_step_seconds']])
  a, b = rows
  rows.append(['ratio', a[1] / b[1], '', a[3] / b[3], a[4] / b[4], a[5] / b[5]])
  common.table(f'bench-30M, {best["ours"]["parameters"]:,} parameters, f32, batch {B} x {T}',
               ['', 'tokens/s', 'of the fastest GEMM', 'own GEMM GFLOP/s', 'peak RSS GiB', 'first step s'], rows)
  common.write_json(options.json, 'train_cpu', {'best': best, 'runs': runs, 'ratio': a[1] / b[1], 'memory_ratio': a[4] / b[4]})


if __name__ == '__main__':
  main()
