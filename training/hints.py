"""What works, and would work better otherwise? Said before a run begins."""

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
