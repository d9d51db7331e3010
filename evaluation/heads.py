"""What does a model with a head say of texts? Scores of labels, in the form that those of a model
have that is asked (evaluation/classify.py), so that one way of counting serves both.

B rows of a batch · T length · L labels
"""

import hashlib
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from data.classes import ids_of, within
from data.records import LabelRecord
from data.template import Template
from decode.loaded import LoadedModel
from decode.loop import last
from evaluation.classify import CONTENT_FREE, Scores, check_finite
from model import heads
from model.vocabulary import TOKENS
from parallel import axes as ax

ROWS = 16  # that are read side by side, at most


def scored(
  model: LoadedModel,
  head: heads.Head,
  template: Template,
  records: Sequence[tuple[str, LabelRecord]],
  side: str = 'right',
) -> Scores:
  """Scores of records, each behind its place; what was asked is their plain texts.

  head: on the model's mesh. template: whose labels these are. side: 'left' or 'right', which end of
    a text is cut off that the model has no positions for.
  Raises ValueError, naming the place, for a label that the template does not have.
  """
  if not records:
    raise ValueError('there are no records to classify; see data.validation_fraction')
  truth = np.array([template.number(place, record) for place, record in records])
  causal = model.model.config.causal
  texts = [*(record.text for _, record in records), *CONTENT_FREE]
  whole = [ids_of(text, model.tokenizer, causal) for text in texts]
  ids = [within(each, model.context, side, causal) for each in whole]
  digest = hashlib.blake2b(digest_size=16)
  asked = ['head', template.labels, texts[: len(records)], truth.tolist()]
  digest.update(json.dumps(asked).encode())

  scores = scores_of(model, head, ids)
  check_finite(scores, records)
  n = len(records)
  cut = sum(len(a) < len(b) for a, b in zip(ids, whole))
  return Scores(scores[:n], scores[n:], truth, digest.hexdigest(), cut)


def scores_of(model: LoadedModel, head: heads.Head, ids: Sequence[Sequence[int]]) -> np.ndarray:
  """What a head says of texts of these ids, [texts, L] f64; texts of about the same length are read
  together.
  """
  labels = head['bias'][...].shape[0]
  size = -(-min(ROWS, len(ids)) // model.parts) * model.parts
  order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
  scores = np.zeros((len(ids), labels))
  for first in range(0, len(order), size):
    here = order[first : first + size]
    rows = [ids[i] for i in here]
    rows += [rows[-1]] * (size - len(rows))  # that fill the batch up
    tokens, lengths = model.padded(rows)
    with jax.set_mesh(model.mesh):
      arrays = map(model.put, (tokens, lengths))
      scores[here] = np.asarray(_of_batch(model.model, head, *arrays))[: len(here)]
  return scores


@jax.jit
def _of_batch(model, head, tokens, lengths):
  """[B, L] f32 of tokens [B, T], the first lengths [B] of each."""
  real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
  with ax.whole_rows(tokens.shape[1] % ax.size('length') > 0):
    tokens = ax.place(tokens, *TOKENS)
    segments = ax.place(real.astype(jnp.int32), *TOKENS)
    x = ax.place(model(tokens, segments=segments).hidden, 'batch', None, None)
  pooled = last(x, lengths if model.config.causal else jnp.ones_like(lengths))
  with ax.whole_rows(True):  # of one vector a row, which the mesh does not split
    logits = heads.scores(model, head, pooled[:, None])
  return ax.place(logits, 'batch', None, None)[:, 0]
