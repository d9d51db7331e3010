"""How does a person generate? Load a run's directory once, then ask it for text, whole or as it comes."""
import contextlib
import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence

import jax
import numpy as np

import names
from data import tokenizer as tokenizers
from data.chat import ChatTemplate
from decode.loop import decode_chunk, prefill
from decode.sampling import make_sampling
from decode.text import TextStream
from model import params, transformer
from model.cache import init_cache
from model.config import ModelConfig
from parallel import axes as ax
from parallel.mesh import MeshConfig, make_mesh
from training import config as configs
from training.checkpoint import Checkpoints

CHUNK = 16  # tokens a call to the device: the first ones come soon, and dispatch costs little
SMALLEST_BUCKET = 32  # prompt lengths and capacities are rounded up to powers of two from here, so that few programs compile


@dataclasses.dataclass(frozen=True)
class Completion:
  """One generated text.

  Attributes: prompt; text, without the prompt; ids of the text (with end-of-text, if it came); finish: 'stop' for
    end-of-text, 'length' for max_new_tokens.
  """
  prompt: str
  text: str
  ids: list[int]
  finish: str


class Generator:
  """A model with its tokenizer, on one device."""

  def __init__(self, model: transformer.Decoder, tokenizer: tokenizers.Tokenizer, mesh: jax.sharding.Mesh):
    self.tokenizer, self.mesh = tokenizer, mesh
    with jax.set_mesh(mesh):
      self.model = jax.jit(in_compute_dtype)(model)

  @classmethod
  def load(cls, workdir: str | os.PathLike, checkpoint: str = 'last') -> 'Generator':
    """The model of a run's directory at its 'last' or 'best' checkpoint, or at a step's.

    Raises FileNotFoundError for a directory without a run or without checkpoints, ValueError for a checkpoint that is
    not there or damaged.
    """
    config = configs.load(workdir)
    model_config = generating(config.model)
    checkpoints = Checkpoints(workdir)
    step = None
    if checkpoint != 'last':
      best = checkpoints.best()
      known = {str(s): s for s in checkpoints.steps()} | ({'best': best} if best is not None else {})
      step = known[names.check('checkpoint', checkpoint, [*known, 'last'])]
      problems = checkpoints.problems(step)
      if problems:
        raise ValueError(f'checkpoint {step} is damaged: ' + '; '.join(problems) + "; use another, or 'last'")
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    with jax.set_mesh(mesh):
      target = params.abstract(lambda: transformer.init(model_config, config.train.seed), mesh)
      model = checkpoints.model(target, step)
    return cls(model, tokenizers.load(pathlib.Path(workdir) / 'tokenizer'), mesh)

  def __call__(self, prompts: str | Sequence[str], **options) -> list[Completion]:
    """Completions of the prompts, generated side by side; options as for `ids`."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    rows = [[] for _ in prompts]
    with contextlib.closing(self.ids(prompts, **options)) as chunks:
      for chunk in chunks:
        for row, new in zip(rows, chunk, strict=True):
          row.extend(new)
    eos = self.tokenizer.eos
    # Not tokenizer.decode, which takes rows for whole texts: some tokenizers drop the space that a text begins with.
    text = lambda row: self.tokenizer.decode_bytes(row).decode('utf-8', errors='replace')
    return [Completion(prompt, text(row), row, 'stop' if row and row[-1] == eos else 'length')
            for prompt, row in zip(prompts, rows, strict=True)]

  def stream(self, prompt: str, **options) -> Iterator[str]:
    """Pieces of one completion's text as they come, whole characters each; options as for `ids`."""
    return self._pieces(self.ids([prompt], **options))  # not a generator itself: bad options raise here and now

  def _pieces(self, chunks):
    text = TextStream(self.tokenizer)
    with contextlib.closing(chunks):
      for (ids,) in chunks:
        if piece := text.add(ids):
          yield piece
    if rest := text.end():
      yield rest

  def chat(self, messages: Sequence[dict[str, str]], **options) -> Iterator[str]:
    """Pieces of the assistant's next turn, after messages of {'role': .., 'content': ..}; options as for `ids`.

    Raises ValueError where the tokenizer has no chat template. The names of control tokens in a message become those tokens.
    """
    text = ChatTemplate.of(self.tokenizer).render(messages, add_generation_prompt=True)
    return self._pieces(self.ids([self.tokenizer.encode(text, special=True)], **options))

  def ids(self, prompts: Sequence[str | Sequence[int]], *, max_new_tokens: int = 128, temperature: float = 1.0, top_k: int = 0,
          top_p: float = 1.0, seed: int = 0, chunk: int = CHUNK) -> Iterator[list[list[int]]]:
    """New ids of every row, a chunk at a time, until all rows have ended. Chunk k + 1 runs while chunk k is read.

    Args:
      prompts: texts, which begin as documents do, or ids, which are taken as they are.
      max_new_tokens: a row ends there if it has not ended itself. temperature, top_k, top_p, seed: see decode.sampling.
      chunk: tokens a call to the device; the text does not depend on it.
    Raises ValueError for no prompts, options that make no sense, and lengths beyond the model's.
    """
    if not prompts:
      raise ValueError('there are no prompts; give at least one (it may be empty text)')
    if not all(isinstance(prompt, str) or len(prompt) for prompt in prompts):
      raise ValueError('a prompt has no ids; give at least one')
    for name, value in (('max_new_tokens', max_new_tokens), ('chunk', chunk)):
      if value < 1:
        raise ValueError(f'{name}={value} must be at least 1')
    config, bos, eos = self.model.config, self.tokenizer.bos, self.tokenizer.eos
    if not config.causal:
      raise ValueError('model.causal=False: an encoder writes no text')
    start, end = ([], [eos]) if config.encoder_layers else ([bos], [])
    encoded = [[*start, *self.tokenizer.encode(prompt), *end] if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    if config.encoder_layers:  # the prompt is what the encoder reads; the decoder starts with padding, as T5's
      source, encoded = self._padded(encoded), [[self.tokenizer.pad]] * len(prompts)
    else:
      source = None
    longest, limit = max(map(len, encoded)), config.max_length or sys.maxsize
    if longest + max_new_tokens > limit:
      raise ValueError(f'a prompt of {longest} tokens and max_new_tokens={max_new_tokens} pass model.max_length={limit}; '
                       'shorten the prompt or ask for fewer')
    sampling = make_sampling(len(prompts), temperature, top_k, top_p, seed)
    capacity = min(limit, _bucket(longest + max_new_tokens))
    return self._chunks(self._padded(encoded), source, capacity, max_new_tokens, sampling, chunk)

  def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as one array [B, bucket], and their lengths. Raises ValueError for a row that the model has no positions for."""
    lengths, limit = np.array([len(ids) for ids in rows], np.int32), self.model.config.max_length or sys.maxsize
    if lengths.max() > limit:
      raise ValueError(f'a prompt of {lengths.max()} tokens passes model.max_length={limit}; shorten it')
    tokens = np.full((len(rows), min(limit, _bucket(int(lengths.max())))), self.tokenizer.pad, np.int32)
    for row, ids in zip(tokens, rows, strict=True):
      row[:len(ids)] = ids
    return tokens, lengths

  def _chunks(self, prompts, source, capacity, max_new_tokens, sampling, chunk):
    tokens, lengths = prompts
    # A table of embeddings may have more rows than there are tokens.
    vocabulary = self.tokenizer.vocabulary
    advance = lambda state: decode_chunk(self.model, state, sampling, steps=chunk, eos=self.tokenizer.eos, pad=self.tokenizer.pad,
                                         vocabulary=vocabulary)
    put = lambda x: jax.device_put(x, jax.NamedSharding(self.mesh, ax.spec('batch', *(None,) * (np.ndim(x) - 1))))
    with jax.set_mesh(self.mesh):
      sampling = jax.tree.map(put, sampling)
      cache = init_cache(self.model.config, len(tokens), capacity)
      if source is not None:
        ids, counts = source
        source = put(ids), put((np.arange(ids.shape[1])[None] < counts[:, None]).astype(np.int32))
      state = prefill(self.model, put(tokens), put(lengths), cache, put(lengths + max_new_tokens), source,
                      vocabulary=vocabulary)
      done = np.zeros(len(tokens), bool)
      state, *ahead = advance(state)
    left = max_new_tokens
    while not done.all():
      ids, real = ahead
      left -= chunk
      if left > 0:
        with jax.set_mesh(self.mesh):
          state, *ahead = advance(state)
      ids, real = np.asarray(ids), np.asarray(real)
      yield [row[flags].tolist() for row, flags in zip(ids, real, strict=True)]
      done = ~real[:, -1] | (ids[:, -1] == self.tokenizer.eos) | (left <= 0)


def _bucket(tokens: int) -> int:
  return max(SMALLEST_BUCKET, 1 << (tokens - 1).bit_length())


def generating(config: ModelConfig) -> ModelConfig:
  """The config with which a trained model generates."""
  # Which backend trained is indifferent to the parameters, and not every one of them can attend to a cache. What an expert has
  # no room for would depend on a row's neighbours.
  moe = dataclasses.replace(config.moe, dispatch='dropless') if config.moe.dispatch == 'capacity' else config.moe
  return dataclasses.replace(config, attention='auto', moe=moe)


def in_compute_dtype(model: transformer.Decoder) -> transformer.Decoder:
  """The model as generation holds it: cast once, as `params.use` would at every token; norms and biases keep their own precision."""
  cast = lambda p: p.replace(p[...].astype(model.config.dtype)) if p.kind != 'vector' else p
  return jax.tree.map(cast, model, is_leaf=lambda x: isinstance(x, params.nnx.Param))
