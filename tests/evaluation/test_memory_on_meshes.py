"""Are measures of memory the same on every mesh, however many rows are filled up?"""

import functools

import numpy as np
import pytest

from evaluation import extraction, membership
from evaluation.canaries import Space, _logprobs, exposures
from evaluation.passages import Passage
from tests.evaluation.test_label_scores import MASKED, generator

MESHES = {'data': dict(data=8), 'data and tensor': dict(data=4, tensor=2)}
SPACE = Space('pin {secret}', 'abcdefgh', 4)
SECRETS = SPACE.secrets(3, 0)
CANDIDATES = 20  # with the secrets a number that no mesh divides


def passages(count: int) -> list[Passage]:
  """Of different lengths."""
  draw = np.random.default_rng(2)
  rows = [tuple(draw.integers(60, 120, 12 + i).tolist()) for i in range(count)]
  return [Passage(f'p:{i}', (MASKED.bos, *row[:6]), row[6:]) for i, row in enumerate(rows)]


@functools.cache
def measured(mesh: str | None):
  """Scores of passages, what was written behind, log-probabilities and exposures of canaries."""
  model = generator('llama', **MESHES.get(mesh, {}))
  texts = [SPACE.text(secret) for secret in SPACE.secrets(CANDIDATES + 3, 1)]
  return (
    membership.scored(model, passages(membership.ROWS + 3), 20.0),
    extraction.recalled(model, passages(5)),
    _logprobs(model, texts),
    exposures(model, SPACE, SECRETS, CANDIDATES, 0),
  )


@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES)
def test_memory_is_the_same_on_every_mesh(mesh):
  (scores, written, logs, exposed), (alike, again, logs_there, exposed_there) = (
    measured(None),
    measured(mesh),
  )
  assert scores.keys() == alike.keys()
  for name, of in scores.items():
    np.testing.assert_allclose(alike[name], of, atol=1e-3, err_msg=name)
  assert again == written
  np.testing.assert_allclose(logs_there, logs, atol=1e-3)
  assert exposed_there == exposed
