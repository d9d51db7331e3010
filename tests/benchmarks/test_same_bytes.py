"""Does the check of a server's bytes see what differs, and nothing where nothing does?"""

import itertools

import pytest

from benchmarks import same_bytes
from data.tokenizers import ByteTokenizer
from serving.fake import SIZES, FakeService, echo


@pytest.mark.parametrize('writes', ['the same', 'something else in company'])
def test_what_differs_is_seen(writes):
  numbers = itertools.count()

  def write(request):
    # The twentieth row writes other ids than it is to.
    wrong = next(numbers) == 20 and writes != 'the same'
    return ((i + wrong) % 259 for i in echo(request))

  served = FakeService(ByteTokenizer(), write)
  asked = same_bytes.calls(6, 259, SIZES.capacity, 12)
  assert len({tuple(call.prompt) for call in asked}) == 6
  with served.by_itself():
    differing = same_bytes.check(served, asked)
  assert len(differing) == 1 + same_bytes.ORDERS
  assert any(differing.values()) == (writes != 'the same')
