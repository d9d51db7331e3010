"""What works, and would work better otherwise? Said before a run begins, or at its first step."""

import math
from collections.abc import Mapping

from kernels import attention, context
from objectives.objective import Objective
from parallel import axes
from training.config import Config


def hint(config: Config) -> str:
  """What to say of a config where another one would do the same better; '' where nothing is."""
  model = config.model
  if not (model.encoder_layers and model.execution.dtype == 'float16'):
    return ''
  return (
    "WARNING: model.execution.dtype='float16' for an encoder-decoder: T5's feed-forwards pass "
    '65,504, so that they and the residual stream are kept in f32, and the loss is scaled; where '
    'the hardware has it, --config.model.execution.dtype=bfloat16 needs neither'
  )


def worse_than_guessing(done: Mapping | None, config) -> str:
  """What to say of a model that was tuned and is worse, at its first step, than one that knows
  nothing: of another tokenizer, or of another template. '' where there is nothing to say.
  """
  guess = math.log(config.model.V)
  of_tokens = config.objective.loss_unit == Objective.loss_unit
  if done is None or done['step'] != 1 or not config.init or not of_tokens:
    return ''
  begins = done.get('cross_entropy', done['loss'])  # of the text, where the loss is of more
  if not begins > guess:
    return ''
  return (
    f'WARNING: the loss begins at {begins:.2f}, above the {guess:.2f} of guessing among '
    f'{config.model.V:,} tokens: is the tokenizer, and the chat template, that of {config.init}? '
    '--show=3 prints what it learns from'
  )


def described(config: Config, cost) -> str:
  """The line of the log about the model, which costs a train.RunCost."""
  model = config.model
  chosen = model.execution.attention
  if chosen == 'auto':
    in_parts = context.in_parts(model.execution.context, model.N, model.K)
    few = attention.too_few(config.objective.longest_row(config.data))
    chosen = attention.choose(model.attention_spec, in_parts=in_parts, without=few)
  split = f', rows split by {model.execution.context!r}' if axes.size('length') > 1 else ''
  return (
    f'model: {cost.parameters:,} parameters, {cost.flops_per_token:.3g} training FLOPs a token, '
    f'attention {chosen!r}{split}'
  )
