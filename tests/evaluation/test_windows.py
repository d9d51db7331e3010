"""Is a text foretold alike however it goes through windows, up to what a window does not show?"""

import jax
import numpy as np
import pytest

from decode.generator import Generator
from evaluation import scoring
from evaluation.examples import Manner, examples
from evaluation.scoring import scorer
from evaluation.task import Perplexity, Task
from model.params import is_param
from tests.evaluation.test_label_scores import MASKED, generator, logits_of

TEXTS = ('He was here, and she was not.', 'x', 'All of it, or nothing of it at all?')
WHOLE = 64  # a window that every text fits into


def foretold(model, window: int, stride: int = 0) -> list[float]:
  """Nats of each text."""
  rows = [{'text': text} for text in TEXTS]
  task = Task(Perplexity(window, stride), lambda: iter(rows), prompt='{{ text }}')
  scored = scorer(model, task, Manner(), examples(task, 0, Manner()))
  lines = [line for some in scored.lines() for line in some]
  assert [line['tokens'] for line in lines] == [len(text) for text in TEXTS]
  return [line['nats'] for line in lines]


def by_hand(model, text: str, window: int, stride: int) -> float:
  """Each token by a forward pass over what its window shows before it."""
  whole, nats = [model.tokenizer.bos, *model.tokenizer.encode(text)], 0.0
  for t in range(1, len(whole)):
    # The window in which it is new is the first, or the first of those that reach it.
    more = -(-(t - window) // stride) if t > window else 0
    first = max(0, min(len(whole) - 1, window + more * stride) - window)
    logits = logits_of(model, whole[first:t])[t - first - 1, : MASKED.vocabulary]
    nats -= float(jax.nn.log_softmax(logits)[whole[t]])
  return nats


@pytest.mark.parametrize('window, stride', [(8, 8), (8, 3), (5, 1), (WHOLE, WHOLE)])
def test_windows_are_the_forward_passes_over_what_they_show(window, stride):
  """The last one is a pass over the whole text."""
  model = generator('llama')
  expected = [by_hand(model, text, window, stride) for text in TEXTS]
  np.testing.assert_allclose(foretold(model, window, stride), expected, atol=1e-4)


def without_context(model: Generator) -> Generator:
  """A model that knows the last token alone: what its attention gives is nothing."""

  def put(path, leaf):
    keys = [str(getattr(key, 'name', getattr(key, 'key', key))) for key in path]
    return jax.tree.map(lambda x: x * 0, leaf) if keys[-2:] == ['attention', 'o'] else leaf

  made = jax.tree_util.tree_map_with_path(put, model.model, is_leaf=is_param)
  return Generator(made, model.tokenizer, model.mesh)


def check_sizes_alike(model: Generator) -> None:
  expected = foretold(model, WHOLE)
  for window, stride in ((8, 8), (8, 3), (24, 10), (3, 1)):
    np.testing.assert_allclose(foretold(model, window, stride), expected, atol=1e-4)


def test_where_context_says_nothing_windows_of_every_size_are_alike(monkeypatch):
  """And where it does they are not; nor where a window's last token is left out."""
  model = without_context(generator('llama'))
  check_sizes_alike(model)
  with pytest.raises(AssertionError):
    check_sizes_alike(generator('llama'))
  windows = scoring.windows
  monkeypatch.setattr(
    scoring, 'windows', lambda *given: [(a, b[:-1] or b) for a, b in windows(*given)]
  )
  with pytest.raises(AssertionError):
    check_sizes_alike(model)
