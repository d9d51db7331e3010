"""What did NVIDIA's assembler make of a kernel?
Its registers, spills and warnings, on a machine without a GPU.
"""

import dataclasses
import pathlib
import re


@dataclasses.dataclass(frozen=True)
class Report:
  """Of one kernel. spilled: bytes that a thread stores for lack of registers. warnings: of
  performance, as 'C7512 wgmma serialized ..'.
  """

  spilled: int
  warnings: tuple[str, ...]


def environment(directory: str) -> dict[str, str]:
  """Environment variables with which jax writes what `reports` reads,
  for every kernel of Mosaic GPU that it compiles.
  """
  return {'MOSAIC_GPU_DUMP_PTXAS': '1', 'MOSAIC_GPU_DUMP_TO': directory}


def reports(directory: str) -> dict[str, Report]:
  """The reports that are in a directory, by the kernel's name and number.
  Raises FileNotFoundError where there is none.
  """
  reported = {}
  for path in sorted(pathlib.Path(directory).glob('*.ptxas')):
    text = path.read_text()
    stores = re.findall(r'(\d+) bytes spill stores', text)
    if not stores:
      raise ValueError(f'{path.name} does not say what was spilled; it begins with {text[:100]!r}')
    warnings = sorted(set(re.findall(r'C7[5-9]\d\d[^\n]*', text)))
    reported[path.stem] = Report(max(map(int, stores)), tuple(warnings))
  if not reported:
    raise FileNotFoundError(
      f'{directory} holds no .ptxas file; were the variables of ptxas.environment set while '
      'kernels were compiled?'
    )
  return reported
