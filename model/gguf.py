"""How does a GGUF file read as a checkpoint of transformers? Its keys as a config.json, its tensors
under transformers' names, in transformers' order and as plain numbers.

What differs: names; rows of Llama's q and k, which lie in the order of interleaved rotary pairs;
types of blocks, which become float32 (a scale of 16 bits times a code has more digits than bfloat16
keeps) unless a model keeps their codes (model.quantised_files.ggml); and that a head is tied to the
embedding where the file has none.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from data.gguf import GGUF, StoredTensor
from model.layers import rope_frequencies
from model.parts import RopeConfig
from model.quantised_files import ggml
from model.tensorfiles import DTYPES, Tensor, read_into

# Theirs -> transformers'. {} is the layer.
NAMES = {
  'token_embd': 'model.embed_tokens',
  'output_norm': 'model.norm',
  'output': 'lm_head',
  'blk.{}.attn_norm': 'model.layers.{}.input_layernorm',
  'blk.{}.attn_q': 'model.layers.{}.self_attn.q_proj',
  'blk.{}.attn_k': 'model.layers.{}.self_attn.k_proj',
  'blk.{}.attn_v': 'model.layers.{}.self_attn.v_proj',
  'blk.{}.attn_output': 'model.layers.{}.self_attn.o_proj',
  'blk.{}.attn_q_norm': 'model.layers.{}.self_attn.q_norm',
  'blk.{}.attn_k_norm': 'model.layers.{}.self_attn.k_norm',
  'blk.{}.ffn_norm': 'model.layers.{}.post_attention_layernorm',
  'blk.{}.ffn_gate': 'model.layers.{}.mlp.gate_proj',
  'blk.{}.ffn_up': 'model.layers.{}.mlp.up_proj',
  'blk.{}.ffn_down': 'model.layers.{}.mlp.down_proj',
}
ARCHITECTURES = ('llama', 'qwen2', 'qwen3')  # of the same names in transformers
PERMUTED = 'llama'
ROPE_FACTORS = 'rope_freqs.weight'  # Llama 3.1's scaling, as factors of its frequencies
# Of a file's keys, without its architecture's name -> config.json's.
KEYS = {
  'context_length': 'max_position_embeddings',
  'embedding_length': 'hidden_size',
  'block_count': 'num_hidden_layers',
  'feed_forward_length': 'intermediate_size',
  'attention.head_count': 'num_attention_heads',
  'attention.head_count_kv': 'num_key_value_heads',
  'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
  'rope.freq_base': 'rope_theta',
}
# Read in other ways, or known to change nothing.
OTHER_KEYS = frozenset(
  '''vocab_size rope.dimension_count attention.key_length attention.value_length
  rope.scaling.type rope.scaling.factor rope.scaling.finetuned'''.split()
)


class GGUFTensors:
  """A GGUF file with what model.tensorfiles.TensorFiles has, and a config.json.

  Attributes:
    directory: the file. config: what a config.json would say.
    tensors: name in transformers -> Tensor, whose kind is that of what `read` gives.
    coded: the same -> Coded, of matrices in blocks.
    kinds: types in the file.

  Raises: ValueError for a file that is damaged, or lacks what is needed; NotImplementedError for an
    architecture or a type that is not read. Both name the file.
  """

  def __init__(self, gguf: GGUF):
    self.gguf, self.directory = gguf, gguf.path
    self.config, self._heads = _config(gguf)
    self.kinds = sorted({place.kind for place in gguf.tensors.values()})
    self._places, self.tensors = {}, {}
    for theirs, place in gguf.tensors.items():
      if theirs != ROPE_FACTORS:
        name = _name(theirs)
        kind = place.kind if place.kind in DTYPES else 'F32'
        self._places[name] = place
        self.tensors[name] = Tensor(gguf.path, kind, place.shape, place.offset)
    self.coded = {
      name: ggml.coded(place.kind, self.tensors[name], functools.partial(self._blocks, name))
      for name, place in self._places.items()
      if place.kind not in DTYPES and len(place.shape) == 2
    }
    if {place.kind for place in gguf.tensors.values()} - DTYPES.keys():
      _library()  # said before there is anything to undo

  def read(self, name: str, start: int, stop: int) -> np.ndarray:
    """Rows `start` to `stop` of a tensor's first dimension."""
    return self._ordered(name, start, stop, self._rows)

  def _ordered(self, name: str, start: int, stop: int, read: Callable) -> np.ndarray:
    """What `read` gives of (name, rows), in transformers' order."""
    if not (heads := self._permuted(name)):
      return read(name, start, stop)
    # A head's rows lie as its pairs do, (0, H/2), (1, H/2 + 1), ..: whole heads are put in order.
    width = self.tensors[name].shape[0] // heads
    first, last = start // width * width, -(-stop // width) * width
    rows = read(name, first, last)
    pairs = rows.reshape(-1, width // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)[start - first : stop - first]

  def _permuted(self, name: str) -> int:
    """How many heads a tensor's rows are of, where their order is not transformers'; else 0."""
    match = re.search(r'\.([qk])_proj\.', name)
    return self._heads[match[1]] if match and self.config['model_type'] == PERMUTED else 0

  def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
    place = self._places[name]
    if len(place.shape) == 1:
      # Within the only row: types of blocks have no vectors, but in a hostile file.
      whole = self._decoded(name, place.offset, (place.row_bytes,))
      return whole[start:stop]
    row = place.bytes // place.shape[0]
    shape = (stop - start, *place.shape[1:-1], place.row_bytes)
    return self._decoded(name, place.offset + start * row, shape)

  def _blocks(self, name: str, start: int, stop: int) -> np.ndarray:
    """Bytes of rows of a matrix, [rows, blocks, bytes of one]."""
    place = self._places[name]
    size = place.row_bytes // (place.shape[1] // ggml.ENTRIES[place.kind])

    def read(name, start, stop):
      each = np.empty((stop - start, place.row_bytes // size, size), np.uint8)
      read_into(self.directory, place.offset + start * place.row_bytes, each, name)
      return each

    return self._ordered(name, start, stop, read)

  def _decoded(self, name: str, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    place, kind = self._places[name], self.tensors[name].kind
    codes = np.empty(shape, np.uint8)
    read_into(self.directory, offset, codes, name)
    if place.kind in DTYPES:
      return codes.view(DTYPES[kind].newbyteorder('<'))
    quants, types = _library()
    with np.errstate(all='ignore'):  # of blocks of zeros, and of infinite scales
      return quants.dequantize(codes, types[place.kind])


@functools.cache
def _library():
  """Its module with `dequantize`, and its types by name."""
  try:
    from gguf import quants
    from gguf.constants import GGMLQuantizationType
  except ImportError as error:
    raise ValueError(
      'types of blocks (Q4_0, ..) are read by the package gguf: pip install gguf (the extra '
      'tandem[gguf])'
    ) from error
  return quants, GGMLQuantizationType


def _name(theirs: str) -> str:
  """A tensor's name in transformers; its own where it has none, for lists of what is extra."""
  stem, _, ending = theirs.rpartition('.')
  layer = re.match(r'blk\.(\d+)\.', stem)
  if layer:
    stem = f'blk.{{}}.{stem[layer.end() :]}'
  if stem not in NAMES or ending not in ('weight', 'bias'):
    return theirs
  return f'{NAMES[stem]}.{ending}'.format(layer[1] if layer else '')


def _config(gguf: GGUF) -> tuple[dict[str, Any], dict[str, int]]:
  """A config.json, and how many heads q and k have."""
  kind = gguf.get('general.architecture', str)
  if kind not in ARCHITECTURES:
    raise NotImplementedError(
      f'{gguf.path}: general.architecture={kind!r} is not read; these are: '
      f'{", ".join(ARCHITECTURES)}'
    )
  count = gguf.get('split.count', int, 1)
  if count > 1:
    raise NotImplementedError(
      f'{gguf.path} is one of split.count={count} files; join them with '
      "llama.cpp's llama-gguf-split --merge"
    )

  given = {
    name.removeprefix(kind + '.'): _shortest(value)
    for name, value in gguf.keys.items()
    if name.startswith(kind + '.')
  }
  config = {'model_type': kind}
  for theirs, ours in KEYS.items():
    if theirs in given:
      config[ours] = given[theirs]
    elif theirs not in ('attention.head_count_kv', 'rope.freq_base'):
      raise ValueError(f'{gguf.path} has no key {kind}.{theirs}, and it cannot be guessed')
  # What nothing is known of is shown to the family, which refuses it, or is told to ignore it.
  config |= {f'{kind}.{name}': given[name] for name in given if name not in {*KEYS, *OTHER_KEYS}}
  if gguf.get(f'{kind}.expert_count', int, 1) == 0:
    config = {name: value for name, value in config.items() if '.expert_' not in name}

  for name in KEYS.values():
    number = (int, float) if name in ('rms_norm_eps', 'rope_theta') else int
    if name in config and not (isinstance(config[name], number) and config[name] > 0):
      raise ValueError(f'{gguf.path}: {name}={config[name]!r} must be a number above 0')
  if config['num_hidden_layers'] > len(gguf.tensors):
    raise ValueError(
      f'{gguf.path}: {kind}.block_count={given["block_count"]} is more than its '
      f'{len(gguf.tensors)} tensors'
    )
  heads = config['num_attention_heads']
  config |= _widths(gguf, kind, config)
  config |= _rope(gguf, kind, config)
  return config, {'q': heads, 'k': config.get('num_key_value_heads', heads)}


def _widths(gguf: GGUF, kind: str, config: dict) -> dict[str, Any]:
  """What follows from tensors, and the width of a head."""
  embedding = gguf.tensors.get('token_embd.weight')
  if embedding is None:
    raise ValueError(f'{gguf.path} has no tensor token_embd.weight')
  heads, width = config['num_attention_heads'], config['hidden_size']
  head = gguf.get(f'{kind}.rope.dimension_count', int, width // heads)
  head = gguf.get(f'{kind}.attention.key_length', int, head)
  for name in ('attention.key_length', 'attention.value_length', 'rope.dimension_count'):
    if gguf.get(f'{kind}.{name}', int, head) != head:
      raise NotImplementedError(
        f'{gguf.path}: {kind}.{name}={gguf.keys[f"{kind}.{name}"]} with heads of {head} is not '
        'read: queries, keys, values and rotary positions of one width are'
      )
  if head < 2 or head % 2:
    raise ValueError(f'{gguf.path}: heads of {head} have no rotary pairs')
  made = {
    'vocab_size': embedding.shape[0],
    'tie_word_embeddings': 'output.weight' not in gguf.tensors,
    'head_dim': head,
  }
  if kind == 'llama':
    made['attention_bias'] = 'blk.0.attn_q.bias' in gguf.tensors
    made['mlp_bias'] = 'blk.0.ffn_gate.bias' in gguf.tensors
  return made


def _rope(gguf: GGUF, kind: str, config: dict) -> dict[str, Any]:
  """rope_scaling, where there is one."""
  name = f'{kind}.rope.scaling.factor'
  scaling = gguf.get(f'{kind}.rope.scaling.type', str, 'linear' if name in gguf.keys else 'none')
  if scaling not in ('none', 'linear'):
    raise NotImplementedError(
      f'{gguf.path}: {kind}.rope.scaling.type={scaling!r} is not read; none and linear are'
    )
  place = gguf.tensors.get(ROPE_FACTORS)
  if scaling == 'linear':
    if place is not None:
      raise NotImplementedError(f'{gguf.path}: {ROPE_FACTORS} beside linear scaling is not read')
    factor = gguf.get(name, (int, float))
    return {'rope_scaling': {'rope_type': 'linear', 'factor': _shortest(factor)}}
  return {} if place is None else {'rope_scaling': _llama3(gguf, place, config)}


def _llama3(gguf: GGUF, place: StoredTensor, config: dict) -> dict[str, Any]:
  """Llama 3's scaling, of which a file keeps what it makes of each frequency: the settings with
  which it makes the same.
  """
  head = config['head_dim']
  if place.kind != 'F32' or place.shape != (head // 2,):
    raise ValueError(
      f'{gguf.path}: {ROPE_FACTORS} is {place.kind} {list(place.shape)}, not F32 {[head // 2]}'
    )
  factors = np.empty(place.shape, np.float32)
  read_into(gguf.path, place.offset, factors, ROPE_FACTORS)
  base, factor = config.get('rope_theta', 10_000.0), float(factors[-1])
  plain = rope_frequencies(head, base, 'none', RopeConfig())
  # Those of Llama 3.1 to 3.3, of others by the length that they were made longer from.
  for length in (8192, *(2**i for i in range(4, 18))):
    if not (factor > 1 and math.isfinite(factor)):
      break
    rope = RopeConfig(
      base=base, scaling='llama3', factor=factor, original_length=length, low=1.0, high=4.0
    )
    if np.allclose(plain / rope_frequencies(head, base, 'llama3', rope), factors, 1e-5, 0):
      return {
        'rope_type': 'llama3',
        'factor': factor,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': length,
      }
  raise NotImplementedError(
    f'{gguf.path}: the factors in {ROPE_FACTORS}, {factors[0]} to {factors[-1]}, are not those of '
    "Llama 3's scaling of rotary positions (low_freq_factor 1, high_freq_factor 4)"
  )


def _shortest(value: Any) -> Any:
  """A float of 32 bits as it was written: 1e-05, not 9.999999747378752e-06."""
  return float(str(np.float32(value))) if isinstance(value, float) else value
