"""When does cuDNN compute attention, and how is it asked to? Backend `xla` is cuDNN's flash
attention on a GPU where `refusal` finds no reason against it, and what XLA makes of dense scores
everywhere else.

What decides is known when a program is traced: what it is compiled for, types, sizes, and the parts
of the mask. So the same command always runs the same kernel, and plan.py compiles, ahead of time,
the one that a run will have (it then prints 'cuDNN attention'). Where cuDNN has no plan XLA fails
to compile the program, and nothing falls back (jax's tests saw that under CUDA 13.0, jax issue
32430): model.execution.attention='blocked' does without cuDNN. Segments, positions and a prefix
would need a dense bias, [B, 1, T, S], whose gradient jax 0.10 asks cuDNN for, which has none for
most shapes (jax issue 30593). What training packs into rows has segments. A remat policy that saves
'attention' keeps the mixed values only, from which the backward pass cannot start: the forward
kernel runs again.

B batch · T query length · S key length · N query heads · K key/value heads · H head width
"""

import functools

import jax

from parallel import axes as ax, mesh

FIELDS = {'causal', 'window'}  # that a mask may have
LEAST = (8, 0)  # compute capability, NVIDIA's "Attention" page of cuDNN 9.18, as are the widths
WIDEST, WIDEST_ON_HOPPER = 128, 256
# GPUs that are compiled for without being here (analysis.aot): compute capability, and version of
# cuDNN.
ELSEWHERE = {'NVIDIA H100 80GB HBM3': ((9, 0), 91200)}


def refusal(q, k, v, mask) -> str:
  """Why cuDNN does not compute attention of these arrays, in a few words; '' where it does.

  It does on NVIDIA GPUs of compute capability 8.0 or later, for bfloat16 or float16, heads up to
  256 wide on Hopper and 128 on others, in multiples of 8, and a mask of FIELDS only, whose window
  looks back.
  """
  H, widest = q.shape[3], WIDEST
  if mesh.platform() != 'gpu':
    return f'it is for GPUs, not a {mesh.platform()}'
  if (found := capability()) < LEAST:
    return f'compute capability {found} is below {LEAST}, or not known'
  if found[0] == 9:
    widest = WIDEST_ON_HOPPER
  if len(types := {x.dtype.name for x in (q, k, v)}) > 1 or not types <= {'bfloat16', 'float16'}:
    return f'{" and ".join(sorted(types))}, not bfloat16 or float16'
  if H > widest or H % 8 or v.shape[3] != H:
    return f'heads {H} and {v.shape[3]} wide, not the same multiple of 8 up to {widest}'
  if extra := mask.fields() - FIELDS:
    return f'a mask with {" and ".join(sorted(extra))}'
  if mask.window and not mask.causal:
    return 'a window that looks ahead as well'
  return ''


def attention(q, k, v, scoring):
  """The mixed values, each device on its own rows and heads; for what `refusal` has nothing
  against.
  """
  if jax.default_backend() != 'gpu':
    _answer(*ELSEWHERE[_kind()])
  mask = scoring.mask
  window = (mask.window - 1, 0) if 0 < mask.window < k.shape[1] else None
  run = functools.partial(
    jax.nn.dot_product_attention,
    scale=scoring.scale,
    is_causal=mask.causal,
    local_window_size=window,
    implementation='cudnn',
  )

  def heads_of(name):
    return ('batch', 'length', name, 'head_width')

  k_heads = ax.whole_or('kv_heads', k.shape[2])
  return ax.local(
    run, (heads_of('heads'), heads_of(k_heads), heads_of(k_heads)), heads_of('heads')
  )(q, k, v)


def _kind() -> str:
  """Of the GPU that is compiled for."""
  target = jax.sharding.get_abstract_mesh().abstract_device
  return jax.local_devices()[0].device_kind if target is None else target.device_kind


def capability() -> tuple[int, ...]:
  """Compute capability of the GPU that is compiled for; (0,) of one that is not known or not
  NVIDIA's.
  """
  here = [device for device in jax.local_devices() if device.device_kind == _kind()]
  if not here:
    return ELSEWHERE.get(_kind(), ((0,), 0))[0]
  found = str(getattr(here[0], 'compute_capability', ''))
  return tuple(map(int, found.split('.'))) if found.replace('.', '').isdigit() else (0,)


def _answer(capability, version) -> None:
  """What jax asks of the GPU at hand, while tracing and again while it differentiates, is answered
  for one that isn't here.
  """
  from jax._src.cudnn import fused_attention_stablehlo as asking

  def of(text):
    return tuple(map(int, text.split('.')))

  answers = {
    'check_cudnn_version': lambda: version,
    'check_compute_capability': lambda least: capability >= of(least),
    'is_cuda_compute_capability_equal': lambda exact: capability == of(exact),
  }
  if unknown := [name for name in answers if not hasattr(asking, name)]:
    raise NotImplementedError(
      f"jax {jax.__version__} has no {unknown} in {asking.__name__}: cuDNN's attention cannot be "
      "compiled without a GPU; use model.execution.attention='blocked' to plan"
    )
  for name, answer in answers.items():
    setattr(asking, name, answer)
