"""How does an answer become bytes while others are answered? On another thread, and part by part:
one call of json's encoder keeps Python's lock to its end, and an answer may have 100 MB.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

from starlette.responses import Response

# Of an answer that are written part by part. What lies below, a token with its alternatives or the
# numbers of a vector, is written at once.
LEVELS = 5
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(',', ':'))


async def json_response(make: Callable[[], Any]) -> Response:
  """What `make` gives, as JSON; it is made on another thread, too."""

  def rendered() -> Response:
    content = ''.join(json_parts(make())).encode()
    return Response(content, media_type='application/json')

  return await asyncio.to_thread(rendered)


def json_parts(value: Any, levels: int = LEVELS) -> Iterator[str]:
  """JSON of a value in parts, which other threads run between."""
  within = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
  if not levels or not any(isinstance(each, (dict, list)) for each in within):
    yield _ENCODER.encode(value)
    return
  named = isinstance(value, dict)
  yield '{' if named else '['
  for place, each in enumerate(value):
    yield ',' if place else ''
    if named:
      yield f'{_ENCODER.encode(each)}:'
    yield from json_parts(value[each] if named else each, levels - 1)
  yield '}' if named else ']'
