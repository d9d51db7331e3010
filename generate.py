"""Writes text: python generate.py --workdir=runs/tiny --prompt "def main(" --max_new_tokens=64 --temperature=0.8 --seed=1

From Python or Colab: `from generate import Generator; g = Generator.load('runs/tiny'); g('def main(', max_new_tokens=64)[0].text`.
"""
from parallel import hosts

if __name__ == '__main__':
  hosts.use_huge_pages()

import pathlib
import sys

from absl import app, flags, logging

import names
from decode.generator import Generator
from training import config as configs

WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of a run of train.py.', required=True)
PROMPT = flags.DEFINE_multi_string('prompt', [''], 'Text to go on from; repeat the flag for several.')
CHAT = flags.DEFINE_bool('chat', False, "Each prompt is a user's message, put into the tokenizer's chat template.")
CHECKPOINT = flags.DEFINE_string('checkpoint', 'last', "'last', 'best', or a step.")
MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 128, 'Tokens to generate at most.', lower_bound=1)
TEMPERATURE = flags.DEFINE_float('temperature', 1.0, 'Divides the logits; 0 is greedy.', lower_bound=0)
TOP_K = flags.DEFINE_integer('top_k', 0, 'Only the k most likely tokens; 0 keeps all.', lower_bound=0)
TOP_P = flags.DEFINE_float('top_p', 1.0, 'Only the most likely tokens of this mass; 1 keeps all.')
SEED = flags.DEFINE_integer('seed', 0, 'Of the draws; the same seed gives the same text.', lower_bound=0)


def main(arguments):
  names.only_flags(arguments, '--prompt="def main("')
  logging.set_verbosity(logging.WARNING)
  try:
    hosts.cache_compilations(pathlib.Path(configs.load(WORKDIR.value).data.cache_dir) / 'xla')
    generator = Generator.load(WORKDIR.value, CHECKPOINT.value)
    options = dict(max_new_tokens=MAX_NEW_TOKENS.value, temperature=TEMPERATURE.value, top_k=TOP_K.value, top_p=TOP_P.value)
    streams = [generator.chat([{'role': 'user', 'content': prompt}], seed=SEED.value + i, **options) if CHAT.value
               else generator.stream(prompt, seed=SEED.value + i, **options) for i, prompt in enumerate(PROMPT.value)]
  except (FileNotFoundError, ValueError) as error:
    sys.exit(f'error: {error}')
  for prompt, pieces in zip(PROMPT.value, streams, strict=True):
    print(prompt, end='\n' if CHAT.value else '', flush=True)
    for piece in pieces:
      print(piece, end='', flush=True)
    print(flush=True)


if __name__ == '__main__':
  app.run(main)
