"""How much does a model compute that reads prompts and writes? FLOPs of programs of generation."""

from model.config import ModelConfig
from model.flops import Number, forward_flops_per_token, mean_keys


def prefill_flops(model: ModelConfig, rows: int, length: int) -> Number:
  """FLOPs of reading `rows` prompts of this length: the forward pass of every token,
  the head of the last one only.
  """
  head = 2 * model.D * model.V
  return rows * (length * (forward_flops_per_token(model, length) - head) + head)


def decode_flops(model: ModelConfig, rows: int, context: int) -> Number:
  """FLOPs of one more token of each row, which attends to `context` tokens,
  of layers with a window to no more than that.

  Raises as forward_flops_per_token does.
  """
  per_key = 2 * model.N * (model.H + model.rope_width + model.value_width)
  seen = sum(
    min(kind.window or context, context) - mean_keys(1, kind.window) for kind in model.kinds
  )
  return rows * (forward_flops_per_token(model, 1) + per_key * seen)


def read_flops(model: ModelConfig, rows: int, tokens: int, context: int) -> Number:
  """FLOPs of reading so many more tokens of each row, which attend to `context` tokens; the head is
  of the last one only.
  """
  head = 2 * model.D * model.V
  return tokens * decode_flops(model, rows, context) - (tokens - 1) * rows * head
