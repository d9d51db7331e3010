"""What do transformers' models compute? Writes a file of results for each case:

    python -m tests.goldens.make [NAME ...]

Needs torch and transformers. tests/model/test_families.py compares with the files,
tests/oracle/test_transformers.py with the models themselves; both know the weights by their names
(tests.goldens.tiny).
"""

import os
import pathlib
import sys
import tempfile

os.environ['HF_HUB_OFFLINE'] = '1'

import numpy as np
import torch
import transformers

from model.tensorfiles import TensorFiles, write
from tests.goldens import tiny

HERE = pathlib.Path(__file__).parent
NEW_TOKENS = 20


def build(name: str, directory: pathlib.Path):
  """transformers' model of a case, with our weights, saved to a directory and loaded from there."""
  transformers.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  title, arguments = tiny.CASES[name]
  cls = getattr(transformers, title)
  model = cls(cls.config_class(**arguments))
  if name == 't5_v1_1':  # its class ties the head, its checkpoints do not
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
  model.save_pretrained(directory)
  shapes = {name: tensor.shape for name, tensor in TensorFiles(directory).tensors.items()}
  write(directory, shapes, 'F32', lambda name: [tiny.weight(name, shapes[name])], 2**30)
  return load(name, directory)


def load(name: str, directory: pathlib.Path):
  """The model in a directory, for inference, attention and experts in their plainest form."""
  cls = getattr(transformers, tiny.CASES[name][0])
  return cls.from_pretrained(
    directory, attn_implementation='eager', experts_implementation='eager'
  ).eval()


def forward(model, tokens, source=None, types=None, mask=None, source_mask=None):
  """Hidden states (of BertModel) or logits, [B, T, _] with gradients,
  and the pooler's output or None.
  """

  def put(x):
    return None if x is None else torch.tensor(np.asarray(x, np.int64))

  if source is not None:
    out = model(
      input_ids=put(source),
      attention_mask=put(source_mask),
      decoder_input_ids=put(tokens),
      decoder_attention_mask=put(mask),
    )
  elif types is not None:
    out = model(input_ids=put(tokens), attention_mask=put(mask), token_type_ids=put(types))
  else:
    out = model(input_ids=put(tokens), attention_mask=put(mask))
  return (out.logits, None) if 'logits' in out else (out.last_hidden_state, out.pooler_output)


def loss(name: str, scores, pooled, targets):
  """The sum over tokens of the cross-entropy; of a model without a head,
  hidden states seen from a direction.
  """
  if pooled is None:
    return torch.nn.functional.cross_entropy(
      scores.flatten(0, 1), torch.tensor(targets).long().flatten(), reduction='sum'
    )
  return sum(
    (x * torch.tensor(tiny.direction(what, tuple(x.shape)))).sum()
    for what, x in (('hidden', scores), ('pooled', pooled))
  )


def save_gradients(model, directory: pathlib.Path) -> None:
  """Writes the gradients as transformers would write the parameters:
  with the same names and shapes.
  """
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    for buffer in model.buffers():
      buffer.zero_()
  model.save_pretrained(directory)


def generate(model, name: str, row: int) -> np.ndarray:
  """The tokens that the model goes on with after a third of a row,
  the most likely one each time.
  """
  given = tiny.inputs(name)

  def put(x):
    return torch.tensor(x[None].astype(np.int64))

  options = dict(
    do_sample=False,
    max_new_tokens=NEW_TOKENS,
    min_new_tokens=NEW_TOKENS,
    eos_token_id=None,
    pad_token_id=0,
  )
  prompt = given['tokens'][row, :8]
  if 'source' in given:
    prompt = np.concatenate([[0], prompt[1:]])
    out = model.generate(
      input_ids=put(given['source'][row]), decoder_input_ids=put(prompt), **options
    )
  else:
    out = model.generate(
      input_ids=put(prompt), attention_mask=torch.ones(1, 8, dtype=torch.long), **options
    )
  return out[0, 8:].numpy().astype(np.int32)


def main():
  for name in sys.argv[1:] or tiny.CASES:
    with tempfile.TemporaryDirectory() as directory:
      directory = pathlib.Path(directory)
      model = build(name, directory / 'model')
      given = tiny.inputs(name)
      targets = given.pop('targets')
      scores, pooled = forward(model, **given)
      greedy = [] if name.startswith('bert') else [generate(model, name, row) for row in range(2)]
      total = loss(name, scores, pooled, targets)
      total.backward()
      save_gradients(model, directory / 'gradients')
      files = TensorFiles(directory / 'gradients')
      names = sorted(files.tensors)
      gradients = [files.read(name, 0, files.tensors[name].shape[0]) for name in names]
      np.savez_compressed(
        HERE / f'{name}.npz',
        config=(directory / 'model' / 'config.json').read_text(),
        names=names,
        shapes=[' '.join(map(str, x.shape)) for x in gradients],
        scores=scores.detach().numpy(),
        loss=total.item(),
        greedy=np.array(greedy),
        pooled=np.zeros(0) if pooled is None else pooled.detach().numpy(),
        norms=[np.linalg.norm(x) for x in gradients],
        products=[np.sum(x * tiny.direction(name, x.shape)) for name, x in zip(names, gradients)],
      )
      print(f'{name}: {(HERE / f"{name}.npz").stat().st_size:,} bytes')


if __name__ == '__main__':
  main()
