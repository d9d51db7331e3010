"""What does pretraining minimise? The cross-entropy of every next token within its document."""
import jax
from jaxtyping import Array, Float

from data.batch import Batch
from model import loss
from model.params import use
from model.transformer import Decoder


def pretrain(model: Decoder, batch: Batch, z_loss: float) -> tuple[Float[Array, ''], loss.Sums]:
  """Sum of the loss over the batch's targets, and the sums of loss.cross_entropy; divide by `tokens` for means."""
  x, _ = model(batch.tokens, batch.positions, batch.segments)
  with jax.named_scope('loss'):
    head = use(model.output_embedding, model.config.dtype)
    return loss.cross_entropy(x, head, batch.targets, z_loss, model.config.logit_softcap)
