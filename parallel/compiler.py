"""What is the compiler asked for? Options that go with a program, each with its reason.

Those of generation are passed over by platforms that do not know them. Those of a training step are
a table by chip generation and kind of mesh, which `train.compiler` overrides and switches off.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

import names
from parallel import target
from parallel.mesh import AXES

# A step of generation is hundreds of kernels of a few microseconds. As CUDA graphs, its loop and
# branches included, the GPU starts them itself: bench_1b, one row, on an H200, 1.82 to 1.39 ms a
# token (XLA's own default is the list without the last two).
GENERATION = {
  'xla_gpu_enable_command_buffer': 'FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,'
  'WHILE,CONDITIONAL'
}


class CompilerOption(NamedTuple):
  """An option of XLA:TPU, what it is set to, and why."""

  name: str
  value: str
  why: str


# A core of a v6e has 128 MiB, one of a v5p 64, which this passes. There libtpu 0.0.42 gives five
# products of Llama 3 8B's shapes the same cycles with 64 MiB as with 96 (with 48 one has 0.8%
# more): what is beyond a core is not counted on. On no chip was any of it run yet.
VMEM = CompilerOption(
  'xla_tpu_scoped_vmem_limit_kib',
  '98304',
  'an operation may hold 96 MiB of vector memory, or what a core has: larger tiles, fewer passes',
)
# A collective is carried by the products beside it, a part in each.
FUSED = (
  CompilerOption(
    'xla_tpu_enable_async_collective_fusion_fuse_all_gather',
    'true',
    'the gather of the next weights goes on within the fusions of products before it',
  ),
  CompilerOption(
    'xla_tpu_enable_async_collective_fusion_multiple_steps',
    'true',
    'over several of them, where one is shorter than the gather',
  ),
)
# A collective is the SparseCore's work, beside all that the TensorCore does.
OFFLOADED = (
  CompilerOption(
    'xla_tpu_enable_sparse_core_collective_offload_all_gather',
    'true',
    'the SparseCore gathers weights while the TensorCore multiplies',
  ),
  CompilerOption(
    'xla_tpu_enable_sparse_core_collective_offload_reduce_scatter',
    'true',
    'and scatters gradients, which cannot be fused',
  ),
  CompilerOption(
    'xla_tpu_enable_sparse_core_collective_offload_all_reduce',
    'true',
    'and sums what replicas have',
  ),
  CompilerOption(
    'xla_tpu_enable_async_all_to_all',
    'true',
    'tokens are on their way to experts and back while what does not need them is computed',
  ),
)
AUTO, NONE = 'auto', 'none'
TABLES = {'vmem': (VMEM,), 'fused': (VMEM, *FUSED), 'offloaded': (VMEM, *OFFLOADED)}

REASONS = {(option.name, option.value): option.why for table in TABLES.values() for option in table}

# jax's names of chips that the tables are for, and those whose SparseCores one is for.
GENERATIONS = {
  'TPU v4': 'v4',
  'TPU v5 lite': 'v5e',
  'TPU v5e': 'v5e',
  'TPU v5': 'v5p',
  'TPU v5p': 'v5p',
  'TPU v6 lite': 'v6e',
  'TPU v6e': 'v6e',
  'TPU7x': 'tpu7x',
}
SPARSE = ('v5p', 'v6e', 'tpu7x')
# The best table by the compiler's schedule, of Llama 3 8B, and where experts are split of Mixtral,
# Qwen3-30B-A3B and DeepSeek-V3 (docs/plans.md); of a generation and a kind of mesh that are not
# here, none: what was not tried is left as it comes.
BEST: dict[tuple[str, str], str] = {
  ('v5p', 'fsdp'): 'offloaded',
  ('v5p', 'fsdp x expert'): 'offloaded',
  ('v6e', 'fsdp'): 'offloaded',
}


class ChosenOptions(NamedTuple):
  """What holds for a chip and a mesh: the table's name, and the options with changes made."""

  table: str
  options: Mapping[str, str]


def kind_of(sizes: Mapping[str, int]) -> str:
  """The kind of a mesh: the axes along which it splits anything, in their order."""
  return ' x '.join(axis for axis in AXES if sizes.get(axis, 1) > 1) or 'one device'


def parsed(entries: tuple[str, ...]) -> tuple[str, dict[str, str]]:
  """Of train.compiler the table's name and what is changed in it, by name; '' takes an option out.
  Raises ValueError for a name that is none.
  """
  table, changes = AUTO, {}
  for place, entry in enumerate(entries):
    name, equals, value = entry.partition('=')
    if equals and re.fullmatch(r'xla_\w+', name):
      changes[name] = value
    elif equals or place:
      raise ValueError(
        f'train.compiler={",".join(entries)}: {entry!r} is neither a table in the first place nor '
        "an option; write 'fused', or 'fused,xla_tpu_scoped_vmem_limit_kib=65536', or an option "
        'alone'
      )
    else:
      table = names.check('train.compiler', entry, (AUTO, NONE, *TABLES))
  return table, changes


def chosen(entries: tuple[str, ...], device_kind: str, sizes: Mapping[str, int]) -> ChosenOptions:
  """What train.compiler stands for on a mesh of these sizes and devices.

  Raises ValueError for a table that is not for them.
  """
  table, changes = parsed(entries)
  generation = GENERATIONS.get(device_kind)
  if table == AUTO:
    table = BEST.get((generation, kind_of(sizes)), NONE)
  elif table != NONE and generation is None:
    raise ValueError(
      f"train.compiler={table!r} has options of XLA:TPU, and a {device_kind} is none; use 'auto', "
      'which has none for it'
    )
  elif {*TABLES.get(table, ())} & {*OFFLOADED} and generation not in SPARSE:
    raise ValueError(
      f'train.compiler={table!r} is for the SparseCores of {", ".join(SPARSE)}, not for a '
      f"{generation}: a v5e has none, and on a v4's it was not tried; use 'fused'"
    )
  options = {option.name: option.value for option in TABLES.get(table, ())} | changes
  return ChosenOptions(table, {name: value for name, value in options.items() if value})


def here(entries: tuple[str, ...]) -> ChosenOptions:
  """The same of the mesh in context."""
  return chosen(entries, target.kind(), jax.sharding.get_abstract_mesh().shape)


def options(entries: tuple[str, ...]) -> dict[str, str]:
  """Compiler options of a step on the mesh in context."""
  return dict(here(entries).options)


def tell(entries: tuple[str, ...], log: Callable[[str], None]) -> None:
  """Logs what the step is compiled with on the mesh in context, where anything is asked for.
  Raises ValueError for what the compiler does not know.
  """
  asked = here(entries)
  if asked.options:
    check(asked.options)
    log(said(asked))


def said(asked: ChosenOptions) -> str:
  """What a step is compiled with, an option a line, and why."""
  if not asked.options:
    return f'compiler: {asked.table!r}, as it comes'
  lines = [f'compiler: {asked.table!r} (--config.train.compiler=none: as it comes)']
  for name, value in asked.options.items():
    lines.append(f'  {name}={value}: {REASONS.get((name, value), "asked for by train.compiler")}')
  return '\n'.join(lines)


def check(options: Mapping[str, str]) -> None:
  """Asks the compiler of the mesh in context whether it knows these options, by a program that
  does nothing. Raises ValueError, with what it says, where it does not.
  """
  if options:
    _check(tuple(sorted(options.items())), jax.sharding.get_mesh())


@functools.cache
def _check(pairs, mesh):
  x = jax.ShapeDtypeStruct((), 'float32', sharding=NamedSharding(mesh, PartitionSpec()))
  lowered = jax.jit(lambda x: x, compiler_options=dict(pairs)).lower(x)
  try:
    lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    message = str(error).splitlines()[0].removeprefix('INVALID_ARGUMENT: ')
    raise ValueError(
      f'train.compiler: {message.strip().rstrip(":")}; correct it, take it out (NAME= takes one '
      'out of a table), or use none'
    ) from error
