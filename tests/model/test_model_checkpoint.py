"""Do checkpoints come in and go out whole? Bits, meshes, pieces;
errors list everything and leave nothing.
"""

import dataclasses
import json
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from data import tokenizers
from model import checkpoint, families, params, rearranged, stream, tensorfiles, transformer
from model.tensorfiles import TensorFiles
from parallel.mesh import NO_MESH, MeshConfig, make_mesh
from tests.goldens import ours, tiny

LLAMA = dict(
  model_type='llama',
  architectures=['LlamaForCausalLM'],
  vocab_size=68,
  hidden_size=32,
  num_attention_heads=4,
  num_key_value_heads=2,
  intermediate_size=48,
  max_position_embeddings=64,
  num_hidden_layers=3,
  rms_norm_eps=1e-5,
  tie_word_embeddings=False,
)
T5 = dict(
  model_type='t5',
  architectures=['T5ForConditionalGeneration'],
  vocab_size=68,
  d_model=16,
  d_kv=8,
  d_ff=16,
  num_layers=1,
  num_heads=2,
  is_encoder_decoder=True,
)
DEEPSEEK = dict(tiny.LATENT, model_type='deepseek_v3', vocab_size=68)


@pytest.fixture
def llama(tmp_path):
  ours.build(LLAMA, tmp_path / 'llama')
  return tmp_path / 'llama'


def rewrite(directory, change, kind='F32'):
  """Changes the tensors of a checkpoint: `change` is given them by name."""
  tensors = ours.tensors(directory)
  change(tensors)
  for path in directory.glob('*.safetensors*'):
    path.unlink()
  tensorfiles.write(
    directory,
    {name: x.shape for name, x in tensors.items()},
    kind,
    lambda name: [tensors[name]],
    2**30,
  )


def leaves(model):
  return {name: np.asarray(x) for name, x in params.named_leaves(model).items()}


def test_how_a_model_runs_is_not_in_a_checkpoint(llama, tmp_path):
  """Nor are its layers, which lie one by one in one model and stacked in the other."""
  config, model = checkpoint.load(llama, mesh=ours.MESH)
  with jax.set_mesh(ours.MESH):
    unstacked = rearranged.unstacked(model)
  other = unstacked.config.with_execution(context='gather', remat='full')
  assert other != config and other.network == config.network
  checkpoint.save(unstacked, other, tmp_path / 'again')
  _, again = checkpoint.load(tmp_path / 'again', mesh=ours.MESH)
  for name, x in leaves(model).items():
    np.testing.assert_array_equal(leaves(again)[name], x, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
  'hf, mesh',
  [
    (LLAMA, dict(data=1, fsdp=8)),
    (LLAMA, dict(data=2, fsdp=2, tensor=2)),
    (DEEPSEEK, dict(data=1, fsdp=2)),
  ],
  ids=['llama', 'llama-replicas', 'deepseek'],
)
def test_every_device_gets_its_shard(hf, mesh, tmp_path, monkeypatch):
  ours.build(hf, tmp_path / 'model')
  _, loaded = checkpoint.load(tmp_path / 'model', mesh=ours.MESH)
  monkeypatch.setattr(checkpoint, 'PIECE', 500)  # so that pieces begin and end within shards
  mesh = make_mesh(MeshConfig(**mesh), jax.devices()[: math.prod(mesh.values())])
  _, many = checkpoint.load(tmp_path / 'model', mesh=mesh)
  for name, x in leaves(loaded).items():
    np.testing.assert_array_equal(leaves(many)[name], x, err_msg=name)
  assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(many))
  assert all(
    x.addressable_shards[0].data.size < x.size
    for x in jax.tree.leaves(many)
    if not x.sharding.is_fully_replicated
  )


@pytest.mark.costly
@pytest.mark.parametrize('piece', [1, 100, 1000])
def test_pieces_make_the_whole(llama, tmp_path, monkeypatch, piece):
  config, model = checkpoint.load(llama, mesh=ours.MESH)
  monkeypatch.setattr(checkpoint, 'PIECE', piece)
  _, again = checkpoint.load(llama, mesh=ours.MESH)
  jax.tree.map(np.testing.assert_array_equal, leaves(model), leaves(again))
  checkpoint.save(again, config, tmp_path / 'out', shard_bytes=20_000)
  assert len(list((tmp_path / 'out').glob('*.safetensors'))) > 3
  before, after = ours.tensors(llama), ours.tensors(tmp_path / 'out')
  assert before.keys() == after.keys()
  jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.costly
@pytest.mark.parametrize(
  'kind, stored, dtype',
  [('BF16', 'bfloat16', 'bfloat16'), ('F16', 'float16', 'float32'), ('F32', 'float32', 'float32')],
)
def test_dtypes(llama, tmp_path, kind, stored, dtype, capsys):
  rewrite(llama, lambda tensors: None, kind)
  config, model = checkpoint.load(llama, mesh=ours.MESH)
  assert config.execution.parameter_dtype == config.execution.dtype == dtype
  assert all(x.dtype == dtype for x in jax.tree.leaves(model))
  assert ('float16' in capsys.readouterr().out) == (kind == 'F16')
  checkpoint.save(model, config, tmp_path / 'out', dtype=stored)
  for name, x in ours.tensors(llama).items():
    np.testing.assert_array_equal(ours.tensors(tmp_path / 'out')[name], x, err_msg=name)
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['torch_dtype'] == stored


def test_what_steps_move_by_little_is_written_as_it_is(tmp_path):
  """DeepSeek-V3's bias of choices, which transformers keeps in f32, too."""
  ours.build(DEEPSEEK, tmp_path / 'a')
  config, model = checkpoint.load(tmp_path / 'a', mesh=ours.MESH)
  parameters = params.by_name(model)
  (bias,) = [name for name in parameters if name.endswith('.selection_bias')]
  parameters[bias].set_value(parameters[bias].get_value() + jnp.float32(0.501))
  checkpoint.save(model, config, tmp_path / 'b', dtype='bfloat16')
  written = [x for name, x in ours.tensors(tmp_path / 'b').items() if 'correction_bias' in name]
  assert written and all(x.dtype == np.float32 for x in written)
  _, again = checkpoint.load(tmp_path / 'b', mesh=ours.MESH)
  found = params.by_name(again)[bias].get_value()
  np.testing.assert_array_equal(found, parameters[bias].get_value())


def test_a_parameter_without_a_place_is_no_checkpoint(tmp_path):
  """As a head of its own, of a family whose head is the table."""
  hf = dict(model_type='bert', architectures=['BertForMaskedLM'], vocab_size=67, hidden_size=32)
  hf |= dict(num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
  ours.build(hf | dict(max_position_embeddings=64), tmp_path / 'bert')
  config, _ = checkpoint.load(tmp_path / 'bert', mesh=ours.MESH)
  untied = dataclasses.replace(config, tie_embeddings=False)
  with jax.set_mesh(ours.MESH):
    model = jax.jit(transformer.init, static_argnums=(0, 1))(untied, 0)
  with pytest.raises(ValueError, match='cannot express'):
    checkpoint.save(model, untied, tmp_path / 'out')
  with pytest.raises(RuntimeError, match=r'has no place for .*head.tokens'):
    checkpoint.write_files(model, untied, tmp_path, families.FAMILIES['bert'], 'float32', 9, {})


def test_dtypes_that_are_asked_for(llama, capsys):
  config, model = checkpoint.load(llama, mesh=ours.MESH, dtype='bfloat16', compute_dtype='float32')
  assert (config.execution.parameter_dtype, config.execution.dtype) == ('bfloat16', 'float32')
  _, exact = checkpoint.load(llama, mesh=ours.MESH)
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)),
    leaves(model),
    leaves(exact),
  )


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_shard_is_written_in_place(dtype):
  filling = stream.Filling(
    jax.ShapeDtypeStruct((4, 1000), dtype, sharding=jax.NamedSharding(ours.MESH, jax.P()))
  )
  with jax.set_mesh(NO_MESH):
    pointers = set()
    for i in range(4):
      filling.put(np.full(1000, i, np.float32), ((i, i + 1), (0, 1000)))
      pointers |= {shard.unsafe_buffer_pointer() for shard in filling._shards.values()}
  assert len(pointers) == 1
  np.testing.assert_array_equal(filling.array(), np.arange(4.0)[:, None].repeat(1000, 1))


def test_one_error_lists_all_tensors_that_do_not_fit(llama):
  def spoil(tensors):
    del tensors['model.norm.weight'], tensors['model.layers.1.mlp.up_proj.weight']
    tensors['model.layers.0.mlp.up_proj.weight'] = np.zeros((32, 48), np.float32)
    tensors['model.layers.0.self_attn.q_proj.lora_A'] = np.zeros(3, np.float32)

  rewrite(llama, spoil)
  with pytest.raises(ValueError) as error:
    checkpoint.load(llama)
  for line in (
    'missing: model.norm.weight',
    'missing: model.layers.1.mlp.up_proj.weight',
    'extra: model.layers.0.self_attn.q_proj.lora_A [3]',
    'mis-shaped: model.layers.0.mlp.up_proj.weight is [32, 48], config.json makes it [48, 32]',
    '--ignore',
  ):
    assert line in str(error.value)


def test_extra_tensors_can_be_left_out(llama):
  rewrite(
    llama,
    lambda tensors: tensors.update(
      {'vision.x': np.zeros(3, np.float32), 'model.rotary_emb.inv_freq': np.zeros(4, np.float32)}
    ),
  )
  checkpoint.load(llama, ignore=r'vision\..*', mesh=ours.MESH)
  with pytest.raises(ValueError, match='matches no tensor'):
    checkpoint.load(llama, ignore='vision')


def test_a_tied_head_must_be_the_embedding(llama):
  (llama / 'config.json').write_text(json.dumps(LLAMA | {'tie_word_embeddings': True}))
  with pytest.raises(ValueError, match='lm_head.weight differs from model.embed_tokens.weight'):
    checkpoint.load(llama)
  rewrite(
    llama, lambda tensors: tensors.update({'lm_head.weight': tensors['model.embed_tokens.weight']})
  )
  config, _ = checkpoint.load(llama, mesh=ours.MESH)
  assert config.tie_embeddings


def test_names_without_their_prefix(tmp_path):
  hf = dict(model_type='gpt2', vocab_size=67, n_embd=32, n_layer=2, n_head=4, n_positions=64)
  ours.build(hf, tmp_path / 'gpt2')
  _, model = checkpoint.load(tmp_path / 'gpt2', mesh=ours.MESH)

  def rename(tensors):
    for name in list(tensors):
      tensors[name.removeprefix('transformer.')] = tensors.pop(name)
    tensors['h.0.attn.bias'] = np.zeros((1, 1, 64, 64), np.float32)

  rewrite(tmp_path / 'gpt2', rename)
  _, again = checkpoint.load(tmp_path / 'gpt2', mesh=ours.MESH)
  jax.tree.map(np.testing.assert_array_equal, leaves(model), leaves(again))


def test_berts_first_names_of_norms(tmp_path):
  hf = dict(model_type='bert', vocab_size=67, hidden_size=32, num_hidden_layers=2)
  hf |= dict(num_attention_heads=4, intermediate_size=48, max_position_embeddings=64)
  ours.build(hf, tmp_path / 'bert')
  _, model = checkpoint.load(tmp_path / 'bert', mesh=ours.MESH)

  def rename(tensors):
    for name in list(tensors):
      for new, old in (('LayerNorm.weight', 'gamma'), ('LayerNorm.bias', 'beta')):
        if name.endswith(new):
          tensors[name.replace(new, f'LayerNorm.{old}')] = tensors.pop(name)

  rewrite(tmp_path / 'bert', rename)
  _, again = checkpoint.load(tmp_path / 'bert', mesh=ours.MESH)
  jax.tree.map(np.testing.assert_array_equal, leaves(model), leaves(again))


def header(path):
  data = path.read_bytes()
  length = struct.unpack('<Q', data[:8])[0]
  return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path, entries, rest):
  encoded = json.dumps(entries).encode()
  path.write_bytes(struct.pack('<Q', len(encoded)) + encoded + rest)


def test_damaged_files_are_named(llama):
  path = llama / 'model.safetensors'
  whole = path.read_bytes()
  entries, rest = header(path)
  first = next(name for name in entries if name != '__metadata__')
  spoiled = {
    'cut': whole[:-10],
    'short': whole[:20],
    'empty': b'',
    'longer': whole + b'x',
    'length': struct.pack('<Q', 2**60) + whole[8:],
    'json': whole[:8] + b'?' + whole[9:],
  }
  for name, data in spoiled.items():
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r'model\.safetensors is truncated or damaged'):
      checkpoint.load(llama)
  for change in (
    {'dtype': 'F31'},
    {'shape': [1]},
    {'data_offsets': [4, 8]},
    {'data_offsets': [-8, 0]},
    {'shape': None},
  ):
    write_header(path, entries | {first: entries[first] | change}, rest)
    with pytest.raises(ValueError, match='is truncated or damaged'):
      checkpoint.load(llama)
  write_header(path, entries | {first: entries[first] | {'dtype': 'I32'}}, rest)
  with pytest.raises(ValueError, match='unsupported dtype.*I32'):
    checkpoint.load(llama)


def test_what_lies_in_the_directory(llama, tmp_path):
  config, model = checkpoint.load(llama, mesh=ours.MESH)
  checkpoint.save(model, config, tmp_path / 'out', shard_bytes=20_000)
  files = sorted((tmp_path / 'out').glob('*.safetensors'))
  with pytest.raises(FileExistsError, match='is there already'):
    checkpoint.save(model, config, tmp_path / 'out')
  index = json.loads((tmp_path / 'out' / tensorfiles.INDEX).read_text())
  index['weight_map']['model.norm.weight'] = next(
    path.name for path in files if path.name != index['weight_map']['model.norm.weight']
  )
  (tmp_path / 'out' / tensorfiles.INDEX).write_text(json.dumps(index))
  with pytest.raises(ValueError, match=r'promises tensors that are not there: model\.norm\.weight'):
    TensorFiles(tmp_path / 'out')
  files[0].unlink()
  with pytest.raises(FileNotFoundError, match=files[0].name):
    TensorFiles(tmp_path / 'out')
  (tmp_path / 'out' / tensorfiles.INDEX).unlink()
  with pytest.raises(ValueError, match=f'no {tensorfiles.INDEX}'):
    TensorFiles(tmp_path / 'out')
  for path in files[1:]:
    path.unlink()
  (tmp_path / 'out' / 'pytorch_model.bin').write_bytes(b'cos\nsystem\n')
  with pytest.raises(ValueError, match='pytorch_model.bin.*pickle'):
    TensorFiles(tmp_path / 'out')
  (llama / 'config.json').unlink()
  with pytest.raises(FileNotFoundError, match='config.json'):
    checkpoint.load(llama)


def test_a_decoder_begins_with_padding_wherever_it_goes(tmp_path, monkeypatch):
  """T5's is 0; here it is another tokenizer's. What is written reads back."""
  monkeypatch.setattr(checkpoint, 'write', lambda *of: None)  # of tensors
  family, config = families.read(T5)
  for special, start in (({}, 0), ({'eos': 1, 'pad': 3}, 3)):
    checkpoint.write_files({}, config, tmp_path, family, 'float32', 1, special)
    written = checkpoint.read_json(tmp_path)
    assert written['decoder_start_token_id'] == start
    assert families.read(written)[1] == config


def test_an_error_leaves_nothing_behind(llama, tmp_path, monkeypatch):
  config, model = checkpoint.load(llama, mesh=ours.MESH)
  before = sorted(tmp_path.iterdir())

  def fail(*arguments):
    raise OSError('no space left')

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint, 'fetch', fail)
    with pytest.raises(OSError, match='no space'):
      checkpoint.save(model, config, tmp_path / 'out')
  with pytest.raises(ValueError, match='cannot express'):
    checkpoint.save(model, dataclasses.replace(config, sinks=True), tmp_path / 'out')
  (llama / 'model.safetensors').write_bytes(b'')
  with pytest.raises(SystemExit, match='error: .*truncated'):
    convert.main(['import', '--from', str(llama), '--workdir', str(tmp_path / 'run')])
  assert sorted(tmp_path.iterdir()) == before


# The command line.


def write_tokenizer(directory):
  """A byte-level tokenizer of 256 bytes and an end, as Hugging Face keeps one."""
  import tokenizers

  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  made = tokenizers.Tokenizer(
    tokenizers.models.BPE({character: i for i, character in enumerate(alphabet)}, [])
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  made.add_special_tokens(['<end>'])
  made.save(str(directory / 'tokenizer.json'))
  (directory / 'tokenizer_config.json').write_text(
    json.dumps({'eos_token': '<end>', 'chat_template': '{{ messages }}'})
  )


@pytest.mark.slow
def test_a_checkpoint_becomes_a_run_and_a_checkpoint_again(tmp_path, capsys):
  """That such a run writes: tests/test_convert.py."""
  ours.build(LLAMA | {'vocab_size': 300}, tmp_path / 'hf')
  write_tokenizer(tmp_path / 'hf')
  run, out = str(tmp_path / 'runs' / 'llama'), str(tmp_path / 'out')
  convert.main(['import', '--from', str(tmp_path / 'hf'), '--workdir', run])
  assert 'llama, 42,464 parameters in float32' in capsys.readouterr().out
  assert tokenizers.load(tmp_path / 'runs' / 'llama' / 'tokenizer').kind == 'huggingface'
  with pytest.raises(SystemExit, match='error: .* is there already'):
    convert.main(['import', '--from', str(tmp_path / 'hf'), '--workdir', run])

  convert.main(['export', '--workdir', run, '--to', out])
  for name, x in ours.tensors(tmp_path / 'hf').items():
    np.testing.assert_array_equal(ours.tensors(tmp_path / 'out')[name], x)
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['eos_token_id'] == 256
  before, after = tmp_path / 'hf', tmp_path / 'out'
  assert (after / 'tokenizer.json').read_bytes() == (before / 'tokenizer.json').read_bytes()
  settings = json.loads((before / 'tokenizer_config.json').read_text())
  assert json.loads((after / 'tokenizer_config.json').read_text()) == settings | {
    'tokenizer_class': 'PreTrainedTokenizerFast'
  }
  with pytest.raises(SystemExit, match="error: .*did you mean 'mistral'"):
    convert.main(
      ['export', '--workdir', run, '--to', str(tmp_path / 'other'), '--family', 'mistrall']
    )
  with pytest.raises(SystemExit, match="error: checkpoint='3' is unknown"):
    convert.main(['export', '--workdir', run, '--to', str(tmp_path / 'other'), '--checkpoint', '3'])

  for directory in (run, out):
    capsys.readouterr()
    convert.main(['inspect', directory])
    assert 'llama, 42,464 parameters, F32 in the files' in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_needs_no_tokenizer(llama, tmp_path, capsys):
  convert.main(['import', '--from', str(llama), '--workdir', str(tmp_path / 'run')])
  assert 'holds no tokenizer' in capsys.readouterr().out
  convert.main(
    [
      'export',
      '--workdir',
      str(tmp_path / 'run'),
      '--to',
      str(tmp_path / 'out'),
      '--dtype',
      'bfloat16',
    ]
  )
  assert 'no tokenizer is written' in capsys.readouterr().out
  assert {tensor.kind for tensor in TensorFiles(tmp_path / 'out').tensors.values()} == {'BF16'}


def test_memory_is_shared_by_chips(tmp_path, capsys, monkeypatch):
  config = json.loads(json.dumps(LLAMA)) | dict(
    vocab_size=128_256,
    hidden_size=4096,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=14_336,
    num_hidden_layers=32,
  )
  (tmp_path / 'config.json').write_text(json.dumps(config))
  family, network = checkpoint.families.read(config)
  files = object.__new__(TensorFiles)
  files.directory, files.tensors = (
    tmp_path,
    {
      name: tensorfiles.Tensor(tmp_path, 'BF16', parts[0].layout.shape, 0)
      for name, parts in checkpoint.parts_of(family, network).items()
    },
  )
  monkeypatch.setattr(checkpoint, 'TensorFiles', lambda directory: files)
  convert.main(['inspect', str(tmp_path)])
  lines = capsys.readouterr().out.splitlines()
  assert '8,030,261,248 parameters' in lines[0]
  assert [float(x) for x in lines[3].split()] == [1, 14.958, 44.873]
  assert [float(x) for x in lines[6].split()] == [8, 1.870, 5.609]


def test_one_process_writes_a_directory_and_takes_away_what_a_killed_one_left(tmp_path):
  (tmp_path / '.new.partial').mkdir()
  (tmp_path / '.new.partial' / 'half').touch()
  with checkpoint.new_directory(tmp_path / 'new') as partial:
    (partial / 'whole').touch()
    with pytest.raises(ValueError, match='new is in use by this process already; wait'):
      with checkpoint.new_directory(tmp_path / 'new'):
        pass
  assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob('*'))] == [
    'new',
    'new/whole',
  ]
