"""How does a model read a prompt once, and all answers to it? In a row that branches
(kernels/branches.py), in the place of a row for each of them.

    a group's rows   p q A A A 0      its shared row   p | q A A | q B B
                     p q B B 0 0

The last token of a prompt is every branch's own: what stands there says the answer's first token.

B rows of a batch, an answer in each, groups of G side by side · R = B / G groups · T length
· A places of an answer · P = T - A of a prompt
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from data.config import DataConfig
from kernels.mask import Mask
from model import flops
from model.config import ModelConfig
from objectives.laws import PLACES, ROW, VECTORS, cut, logprobs_from
from objectives.rollout_rows import RolloutBatch
from parallel import axes as ax


def target_logprobs(
  model, batch: RolloutBatch, group: int, temperature: float, most: int
) -> tuple[Float[Array, 'B T'], dict | None]:
  """log p of the targets of a batch, 0 where weights are, as laws.target_logprobs; and what the
  model's router reports, or None.

  most: A, tokens of an answer; a prompt has T - A of them, at most.
  """
  length = batch.tokens.shape[1]
  trunk, begins = length - most, _begins(batch)

  def rows(tokens, segments, begins):
    return _joined(tokens, segments, begins, group, trunk, most)

  def answers(x):
    return x[:, trunk:].reshape(-1, most, x.shape[2])

  tokens, positions, segments = (
    ax.place(x, 'batch', 'length')
    for x in ax.local(rows, (PLACES, PLACES, ROW), (PLACES,) * 3)(
      batch.tokens, batch.segments, begins
    )
  )
  output = model(tokens, positions, segments, laid=Mask(branches=group, trunk=trunk))
  x = ax.local(answers, (VECTORS,), VECTORS)(ax.place(output.hidden, *VECTORS))
  with jax.named_scope('loss'):
    return logprobs_from(model, x, batch, temperature, begins), output.router


def tokens(batch: RolloutBatch, group: int) -> Int[Array, '']:
  """How many without padding the shared rows of a whole batch have."""
  begins = _begins(batch).reshape(-1, group)
  return jnp.count_nonzero(batch.segments) - begins[:, 1:].sum()


def places(objective, config: DataConfig) -> int:
  """Tokens of a shared row, P + G A."""
  return config.sequence_length + (objective.group - 1) * objective.max_new_tokens


def forward_flops(objective, network: ModelConfig, config: DataConfig) -> float:
  """FLOPs of a forward pass for each token of shared rows without padding: of a branch those of a
  row of its own, less those of its trunk. The head meets the answers only.
  """
  T, G, A = config.sequence_length, objective.group, objective.max_new_tokens
  head = 2 * network.D * network.V

  def of_text(length):
    return length * (flops.forward_flops_per_token(network, length) - head)

  trunk = of_text(T - A)
  return (trunk + G * (of_text(T) - trunk + A * head)) / places(objective, config)


def check_mesh(objective, config: DataConfig, sizes: Mapping[str, int]) -> None:
  """Raises NotImplementedError where a mesh splits rows, ValueError where it cannot."""
  length, tensor = places(objective, config), sizes['tensor']
  if sizes['context'] > 1:
    raise NotImplementedError(
      f'mesh.context={sizes["context"]} splits rows, and with objective.shared_prompts=True they '
      'are of several answers; use other axes of the mesh, or set it to False'
    )
  if length % tensor:
    raise ValueError(
      f'with objective.shared_prompts=True a prompt and its {objective.group} answers are {length} '
      f'tokens, which do not split over mesh.tensor={tensor}; make objective.max_new_tokens a '
      'multiple, or set it to False'
    )


def _begins(batch) -> Int[Array, 'B']:
  """Where the target is the first token of a row's answer; 0 of a row of padding."""
  last, lengths = batch.last.argmax(1), batch.lengths.max(1).astype(jnp.int32)
  return jnp.where(lengths > 0, last - lengths + 1, 0)


def _joined(tokens, segments, begins, group, trunk, most):
  """Tokens, positions and segments of shared rows, of rows [B, T] on one device.

  A trunk ends where branches begin: behind what fills it up.
  """

  def side_by_side(x):
    return x.reshape(-1, group * most)

  at = begins[::group, None] + jnp.arange(-trunk, 0)[None]
  there, places = at >= 0, jnp.maximum(at, 0)
  prompts = jnp.where(there, jnp.take_along_axis(tokens[::group], places, 1), 0)
  positions = begins[:, None] + jnp.arange(most)[None]
  parts = (
    (prompts, cut(tokens, begins, most)),
    (places, positions),
    (there.astype(jnp.int32), cut(segments, begins, most)),
  )
  return tuple(jnp.concatenate([of_trunk, side_by_side(own)], 1) for of_trunk, own in parts)
