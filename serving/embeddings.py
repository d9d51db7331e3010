"""How does a client of OpenAI's have texts embedded? Each becomes a vector of length 1."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.fields import Denied, mapping, one_of, text, whole
from serving.reader import Reader, refusing
from serving.service import Service
from serving.wire import prompts_of

TEXTS = 2048  # of one request

_FIELDS = mapping(
  {
    'model': text,
    'input': prompts_of(TEXTS),
    'encoding_format': one_of('float', 'base64'),
    'dimensions': whole(1, 2**20),
  },
  ('input',),
  {
    'user': 'keys say who asks',
    'truncate_prompt_tokens': 'what is too long is refused; shorten it',
    'input_type': 'say it in the text',
    'task': 'say it in the text',
  },
)


class AskedEmbeddings:
  """A request.

  Attributes:
    model: as it named it. adapter: of that. texts: ids of each. tokens: of all of them.
  """

  def __init__(self, values: dict, service: Service, reader: Reader):
    """Raises Denied."""
    given = _FIELDS('', values)
    if not service.embeds:
      raise Denied(
        'this server embeds no texts; one of a decoder does, with --pooling=last or mean',
        status=404,
        code='unsupported',
      )
    self._given: Mapping[str, Any] = given
    if (dimensions := given.get('dimensions', 1)) > service.width:
      raise Denied(f'dimensions={dimensions}, and the model has {service.width}', 'dimensions')
    self.adapter = reader.adapter(given)
    self.model = given.get('model', reader.models[0])
    with refusing():
      self.texts = [service.encoded(each) for each in given['input']]
    self.tokens = sum(map(len, self.texts))

  def answer(self, vectors: np.ndarray) -> dict:
    """vectors: [texts, D]. Raises Denied for those that are not finite."""
    vectors = vectors[:, : self._given.get('dimensions')].astype(np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    if not np.isfinite(vectors).all():
      raise Denied('the model has no finite vector of a text', status=500, code='broken')
    return {
      'object': 'list',
      'model': self.model,
      'data': [
        {'object': 'embedding', 'index': i, 'embedding': self._written(vector)}
        for i, vector in enumerate(vectors.astype('<f4'))
      ],
      'usage': {'prompt_tokens': self.tokens, 'total_tokens': self.tokens},
    }

  def _written(self, vector: np.ndarray) -> list[float] | str:
    if self._given.get('encoding_format') == 'base64':
      return base64.b64encode(vector.tobytes()).decode()
    return vector.tolist()
