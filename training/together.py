"""Do the parts of a config that few runs have go together with the others?"""

import math
from collections.abc import Mapping

from kernels import attention, context
from training.config import Config


def check_adapter(config: Config) -> None:
  """Raises NotImplementedError where only a model that is trained itself would do."""
  if config.model.execution.pipeline.schedule == '1f1b':
    raise NotImplementedError(
      f"adapter.kind={config.adapter.kind!r} with model.execution.pipeline.schedule='1f1b', which "
      "finds the gradients of all weights of a stage; use 'gpipe'"
    )
  if config.optimizer.prune:
    raise ValueError(
      f'optimizer.prune={config.optimizer.prune!r} with adapter.kind={config.adapter.kind!r}: what '
      'is frozen keeps its zeros, and an adapter has none to keep; leave it out'
    )
  if config.train.offload_parameters:
    raise NotImplementedError(
      f'adapter.kind={config.adapter.kind!r} with train.offload_parameters, which is of parameters '
      "that are trained: an adapter's are few; leave it off, and use mesh.fsdp or "
      'adapter.base=int8 where the frozen model is too large'
    )


def check_best(config: Config) -> None:
  """Raises ValueError: train.best is of a task, and none is asked."""
  raise ValueError(
    f'train.best={config.train.best!r} is of a task, and evaluation.tasks names none; name it '
    'there, or take a number of the validation'
  )


def refuse_codes(config: Config) -> None:
  """Raises ValueError: numbers that lie in codes are not trained."""
  raise ValueError(
    f'model.execution.stored={config.model.execution.stored}: a model in codes is not trained '
    'itself; train an adapter on it (adapter.kind=lora), or begin with the run that it was made of'
  )


def check_offloaded(config: Config) -> None:
  """Raises ValueError or NotImplementedError where parameters that lie in the host's memory would
  come to the device all at once.
  """
  if config.model.execution.remat == 'none':
    raise ValueError(
      "train.offload_parameters with model.execution.remat='none' would keep on the device the "
      "weights of all layers, for the backward pass; use model.execution.remat='full' or 'dots'"
    )
  if config.model.execution.remat == 'sqrt':
    raise NotImplementedError(
      "train.offload_parameters with model.execution.remat='sqrt', whose groups of layers are a "
      "reshape that the compiler for TPUs does not do in the host's memory; use "
      "model.execution.remat='full'"
    )
  if config.train.accumulation > 1:
    raise NotImplementedError(
      f'train.offload_parameters with train.accumulation={config.train.accumulation}: the compiler '
      'for TPUs fails on sums of gradients in the host\'s memory; use accumulation=1, more chips'
    )
  if config.mesh.zero != 3:
    raise ValueError(
      f'train.offload_parameters with mesh.zero={config.mesh.zero}, which holds the weights of all '
      'layers on every device; use mesh.zero=3'
    )


def check_split_rows(config: Config, sizes: Mapping[str, int]) -> None:
  """Raises ValueError or NotImplementedError where rows, or heads where devices exchange tokens for
  them, do not split over a mesh of these sizes.
  """
  m, T, P, tensor = config.model, config.data.sequence_length, sizes['context'], sizes['tensor']
  strategy, backend = m.execution.context, m.execution.attention
  if config.train.dropout and config.dropout.attention:
    raise NotImplementedError(
      f'train.dropout=attention={config.dropout.attention} with mesh.context={P}: no device has '
      'all weights of a query; use data, fsdp or tensor, or leave it out'
    )
  R = P // context.degree(strategy, m.N // tensor, max(1, m.K // tensor), P)
  chunks = math.lcm(P, 2 * R) if R > 1 else P
  if T % chunks:
    raise ValueError(
      f'data.sequence_length={T} does not split into {chunks} chunks (mesh.context={P}, '
      f'model.execution.context={strategy!r}); make it a multiple'
    )
  if R > 1 and strategy != 'gather' and backend != 'auto':
    attention.check_part(backend)
