"""How fast and how exact is torch's attention? A peer of benchmarks.attention.

B batch · T length · N heads · H head width
"""

import statistics

import torch
from torch.nn import attention as kinds
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention_cases import (
  REPEATS,
  Case,
  Job,
  as_rows,
  attempt,
  both,
  probe,
  report,
  seconds_of,
)


class Torch:
  """The cases of a job, by torch on its GPU; of a rehearsal on the CPU, in f32."""

  def __init__(self, job: Job):
    self.job = job
    self.device = 'cpu' if job.rehearsal else 'cuda'
    self.dtype = torch.float32 if job.rehearsal else torch.bfloat16
    self.kernel = {
      'torch flash': kinds.SDPBackend.FLASH_ATTENTION,
      'torch cudnn': kinds.SDPBackend.CUDNN_ATTENTION,
    }.get(job.peer)

  def attention_of(self, case: Case):
    """scaled_dot_product_attention by the flash or cuDNN kernel, or compiled flex_attention, of
    (q, k, v) [B, T, N, H]; or why there is none.
    """
    if self.kernel is None:
      return self.flex(case)
    if case.window:
      return 'it has no window'

    def attend(*x):
      heads_first = (y.transpose(1, 2) for y in x)
      out = scaled_dot_product_attention(*heads_first, is_causal=case.mask != 'full')
      return out.transpose(1, 2)

    return as_rows(attend, case)

  def flex(self, case: Case):
    from torch.nn.attention import flex_attention as flex

    blocks = flex.create_block_mask(
      lambda b, h, q, k: case.visible(q, k),
      None,
      None,
      case.length,
      case.length,
      device=self.device,
    )
    run = torch.compile(flex.flex_attention, dynamic=False)
    return lambda *x: run(*(y.transpose(1, 2) for y in x), block_mask=blocks).transpose(1, 2)

  def measure(self, case: Case) -> None:
    attend = self.attention_of(case)
    if isinstance(attend, str):
      return report(case=case.name, error=attend)
    *inputs, d_out = (
      torch.from_numpy(x).to(self.device, self.dtype) for x in self.job.arrays(case)
    )
    for x in inputs:
      x.requires_grad_(True)

    def timed(direction, names, run):
      torch.full((4 * d_out.numel(),), float('nan'), device=self.device)
      outputs = {
        name: x.detach()[probe(case)].double().cpu().numpy() for name, x in zip(names, run())
      }
      return _events(run, case.calls(direction), self.device), outputs

    def forward():
      return timed('forward', ['out'], lambda: [attend(*inputs)])

    def backward():
      out = attend(*inputs)
      return timed(
        'backward',
        ['dq', 'dk', 'dv'],
        lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True),
      )

    both(self.job, case, forward, backward)

  def run(self) -> None:
    for case in self.job.cases:
      if not self.job.late():
        with kinds.sdpa_kernel(self.kernel) if self.kernel is not None else torch.enable_grad():
          attempt(case, self.measure, case)


def _events(run, n: int, device: str) -> float:
  """Seconds of a call: the median of several rows of n, between two events on the GPU."""

  def all_of_them():
    for _ in range(n):
      run()

  if device == 'cpu':
    return seconds_of(all_of_them, lambda _: None) / n
  taken = []
  for _ in range(REPEATS):
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    all_of_them()
    ended.record()
    torch.cuda.synchronize()
    taken.append(began.elapsed_time(ended) / 1e3 / n)
  return statistics.median(taken)
