"""How is a small GGUF file written, by the gguf package and its name map; and a damaged one?"""

import json
import pathlib
import struct

import numpy as np

from model import families
from model.layers import rope_frequencies
from model.parts import RopeConfig

TYPES = ('F32', 'F16', 'BF16', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0')  # that gguf can make
K_BYTES = {'Q2_K': 84, 'Q3_K': 110, 'Q4_K': 144, 'Q5_K': 176, 'Q6_K': 210}  # of a block of 256
HALVES = {'Q2_K': (80, 82), 'Q3_K': (108,), 'Q4_K': (0, 2), 'Q5_K': (0, 2), 'Q6_K': (208,)}


def blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
  """Random blocks of a K type, whose scales are no infinities; [.., bytes of a row]."""
  size, rng = K_BYTES[kind], np.random.default_rng(seed)
  made = rng.integers(0, 256, (*shape[:-1], shape[-1] // 256, size), np.uint8)
  for at in HALVES[kind]:
    scale = rng.normal(size=made.shape[:-1] + (1,)).astype(np.float16) * np.float16(0.003)
    made[..., at : at + 2] = scale.view(np.uint8)
  return made.reshape(*shape[:-1], -1)


def permuted(x: np.ndarray, heads: int) -> np.ndarray:
  """Rows as llama.cpp orders them (convert_hf_to_gguf.py, LlamaModel.permute)."""
  return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write(
  path: pathlib.Path,
  hf: dict,
  tensors: dict[str, np.ndarray],
  kinds: dict[str, str] | None = None,
  tokenizer: dict | None = None,
  keys: dict | None = None,
) -> None:
  """A GGUF file of a checkpoint of transformers.

  Args:
    tensors: by transformers' names. kinds: types of those that are not F32, by transformers' names;
      of a K type the values are random.
    tokenizer, keys: more keys, without and with their first parts.
  """
  import gguf

  arch = hf['model_type']
  writer = gguf.GGUFWriter(path, arch)
  network = families.read(hf, set(tensors))[1]
  writer.add_context_length(hf['max_position_embeddings'])
  writer.add_embedding_length(network.D)
  writer.add_block_count(network.L)
  writer.add_feed_forward_length(network.F)
  writer.add_head_count(network.N)
  writer.add_head_count_kv(network.K)
  writer.add_key_length(network.H)
  writer.add_value_length(network.H)
  writer.add_rope_dimension_count(network.H)
  writer.add_layer_norm_rms_eps(network.norm_epsilon)
  writer.add_rope_freq_base(network.rope.base)
  writer.add_vocab_size(network.V)
  if network.rope.scaling == 'linear':
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(network.rope.factor)
  if network.rope.scaling == 'llama3':
    arguments = (network.H, network.rope.base)
    plain = rope_frequencies(*arguments, 'none', RopeConfig())
    writer.add_tensor(
      'rope_freqs.weight', plain / rope_frequencies(*arguments, 'llama3', network.rope)
    )
  for name, value in (tokenizer or {}).items():
    _add(writer, f'tokenizer.{name}', value)
  for name, value in (keys or {}).items():
    _add(writer, name, value)

  architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
  called = gguf.get_tensor_name_map(architecture, network.L)
  for name, x in tensors.items():
    heads = {'q_proj': network.N, 'k_proj': network.K}.get(name.split('.')[-2])
    if arch == 'llama' and heads:
      x = permuted(x, heads)
    kind = (kinds or {}).get(name, 'F32')
    title = called.get_name(name, try_suffixes=('.weight', '.bias'))
    number = gguf.GGMLQuantizationType[kind]
    data = blocks(kind, x.shape) if kind in K_BYTES else gguf.quants.quantize(x, number)
    writer.add_tensor(title, data, raw_dtype=number)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _add(writer, name, value) -> None:
  import gguf

  kind = gguf.GGUFValueType
  if isinstance(value, list):
    writer.add_array(name, value)
  else:
    kinds = {bool: kind.BOOL, int: kind.UINT32, float: kind.FLOAT32, str: kind.STRING}
    writer.add_key_value(name, value, kinds[type(value)])


def tokenizer_keys(contents: dict[str, bytes], pre: str) -> dict:
  """Keys of a byte-level tokenizer.json and its settings, as llama.cpp's converter writes them."""
  definition = json.loads(contents['tokenizer.json'])
  settings = json.loads(contents['tokenizer_config.json'])
  ids = dict(definition['model']['vocab'])
  kinds = dict.fromkeys(ids, 1)
  for token in definition['added_tokens']:
    ids[token['content']] = token['id']
    kinds[token['content']] = 3 if token['special'] else 4
  tokens = sorted(ids, key=ids.get)
  merges = [m if isinstance(m, str) else ' '.join(m) for m in definition['model']['merges']]
  keys = {
    'ggml.model': 'gpt2',
    'ggml.pre': pre,
    'ggml.tokens': tokens,
    'ggml.token_type': [kinds[token] for token in tokens],
    'ggml.merges': merges,
  }
  for role, title in (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding'), ('unk', 'unknown')):
    if settings.get(f'{role}_token'):
      keys[f'ggml.{title}_token_id'] = ids[settings[f'{role}_token']]
  if 'chat_template' in settings:
    keys['chat_template'] = settings['chat_template']
  return keys


def theirs(path: pathlib.Path):
  """The model that transformers makes of a file, in float32.

  By its parts, as its `from_pretrained` asks for the package accelerate first.
  """
  import torch
  import transformers
  from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

  config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
  model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
  tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)['tensors']
  missing, extra = model.load_state_dict(tensors, strict=False)
  tied = {'lm_head.weight'} if config.tie_word_embeddings else set()
  assert {*missing} <= tied and not extra, (missing, extra)
  model.tie_weights()
  return model.eval()


# A file byte by byte, for what no writer writes.


def text(content: str | bytes) -> bytes:
  content = content.encode() if isinstance(content, str) else content
  return struct.pack('<Q', len(content)) + content


def key(name: str, kind: int, value: bytes) -> bytes:
  return text(name) + struct.pack('<I', kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
  dimensions = struct.pack(f'<{len(shape)}Q', *reversed(shape))
  return text(name) + struct.pack('<I', len(shape)) + dimensions + struct.pack('<IQ', kind, offset)


def raw(
  keys: list[bytes] = (),
  tensors: list[bytes] = (),
  data: bytes = b'',
  *,
  count: int | None = None,
  entries: int | None = None,
  version: int = 3,
) -> bytes:
  """A file of these entries; `count` tensors and `entries` keys are promised."""
  header = b'GGUF' + struct.pack(
    '<IQQ',
    version,
    len(tensors) if count is None else count,
    len(keys) if entries is None else entries,
  )
  header += b''.join(keys) + b''.join(tensors)
  return header + b'\0' * (-len(header) % 32) + data
