"""How does a decoder's loss run backward for some microbatches while others still run forward? Its
parts, for a 1F1B pipeline.

B batch · T length · D width
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from data.batch import Batch
from kernels.mask import Mask
from model import router
from model.attention import View
from model.transformer import Decoder, Output
from parallel import axes as ax, pipeline_1f1b


def wanted(model: Decoder) -> bool:
  """Whether the config asks for 1F1B on a mesh that has stages."""
  return model.config.execution.pipeline.schedule == '1f1b' and ax.size('layers') > 1


def value(
  model: Decoder, batch: Batch, zigzag: int, score, plain
) -> tuple[Float[Array, ''], dict[str, Float[Array, '...']]]:
  """plain(model, batch), differentiable in the model by the 1F1B schedule, which finds the
  gradients along with the value.

  Args:
    zigzag: of kernels.context, how the rows are laid out.
    score: (model, hidden states [B, T, D], batch) -> (loss, sums), sums over rows: what plain makes
      of the final hidden states.
    plain: (model, batch) -> (loss, sums), with the losses and reports of experts.
  """

  @jax.custom_vjp
  def run(model, batch):
    return plain(model, batch)

  def backward(gradients, cotangents):
    return jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), gradients), None

  run.defvjp(lambda model, batch: _forward(model, batch, zigzag, score), backward)
  return run(model, batch)


def _forward(model, batch, zigzag, score):
  def first(rest, part):
    return rest.embedding(part.tokens, part.positions, None)

  def layers(blocks, x, part):
    mask = Mask(causal=model.config.causal, zigzag=zigzag).of_segments(part.segments)
    x, _, reports = model.stack.scan(blocks, x, View(mask, *model.angles(part.positions)))
    losses = (
      value.sum() for report in reports for name, value in report.items() if name.endswith('loss')
    )
    return x, sum(losses, start=jnp.float32(0)), reports

  def last(rest, y, part):
    return score(rest, rest.scaled(Output(rest.stack.normed(y), None, None)).hidden, part)

  rest = jax.tree.map(lambda x: x, model)  # a copy, without what the stages hold
  rest.stack.blocks = nnx.List([])
  (total, sums, reports), (d_rest, d_blocks) = pipeline_1f1b.gradients(
    first, layers, last, rest, tuple(model.stack.blocks), batch, model.config.execution.pipeline
  )
  d_rest.stack.blocks = nnx.List(d_blocks)
  return (total, sums | router.summed(router.in_order(reports)) if reports else sums), d_rest
