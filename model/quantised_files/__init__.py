"""Which checkpoints of transformers in codes can be read? A table of their methods, and the tensors
of one: numbers for whoever asks for numbers, and codes (`coded`) for a model that keeps them.

A method is a function of (quantization_config, Found) that tells of each matrix what it lies in:
see coded.py. What of them a weight of ours can hold is fitted.py's.
"""

from typing import Any

import numpy as np

import names
from model.quantised_files import integers, scaled, tables
from model.quantised_files.coded import Coded, Found
from model.tensorfiles import Tensor, TensorFiles

KEY = 'quantization_config'
METHODS = {
  'compressed-tensors': scaled.compressed_tensors,
  'gptq': integers.gptq,
  'awq': integers.awq,
  'bitsandbytes': tables.bitsandbytes,
  'mxfp4': tables.mxfp4,
  'fp8': scaled.fp8,
  'fbgemm_fp8': scaled.fp8,
}


class QuantisedTensors:
  """A checkpoint in codes, with what model.tensorfiles.TensorFiles has.

  Attributes:
    tensors: name in transformers -> Tensor, of the shape of its numbers; those in codes are F32.
    coded: the same -> Coded. notes: lines about what is not as the checkpoint has it.
    kinds: in the files, and by which method.

  Raises: ValueError or NotImplementedError for what is damaged or not read; it names the tensor.
  """

  def __init__(self, files: TensorFiles, settings: Any):
    method = method_of(settings)
    found = Found(files)
    METHODS[method](settings, found)
    if not found.coded:
      raise ValueError(
        f'{files.directory}: config.json says that it is quantised by {method}, and no tensor in '
        f'the files is; remove {KEY} from config.json where they hold numbers'
      )
    self.files, self.directory, self.notes = files, files.directory, found.notes
    self.coded: dict[str, Coded] = found.coded
    self.kinds = [*files.kinds, f'{method}']
    self.tensors = {
      name: tensor for name, tensor in files.tensors.items() if name not in found.used
    }
    for name, coded in found.coded.items():
      self.tensors[name] = Tensor(coded.tensor.path, 'F32', coded.shape, coded.tensor.offset)

  def read(self, name: str, start: int, stop: int) -> np.ndarray:
    """Rows `start` to `stop` of a tensor's first dimension, in numbers."""
    if name in self.coded:
      return self.coded[name].piece(start, stop).numbers()
    return self.files.read(name, start, stop)


def method_of(settings: Any) -> str:
  """Of a quantization_config. Raises ValueError for one that is not read."""
  if not isinstance(settings, dict):
    raise ValueError(f'{KEY}={settings!r} in config.json must be an object')
  loaded = settings.get('load_in_4bit') or settings.get('load_in_8bit')
  method = settings.get('quant_method') or ('bitsandbytes' if loaded else None)
  return names.check(f'{KEY}.quant_method of config.json', method, METHODS)
