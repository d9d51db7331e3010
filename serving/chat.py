"""What does a browser get at `/`? A page of three files to talk to the model with; nothing of it is
fetched from elsewhere, and what a model wrote is text to it.

    for path, (kind, content) in chat.routes().items(): ...     # answered with pages.HEADERS
"""

import pathlib

HERE = pathlib.Path(__file__).parent
FILES = {
  '/': ('chat.html', 'text/html; charset=utf-8'),
  '/chat.js': ('chat.js', 'text/javascript; charset=utf-8'),
  '/chat.css': ('chat.css', 'text/css; charset=utf-8'),
}


def routes() -> dict[str, tuple[str, bytes]]:
  """path -> (content type, content) of what GET gives to anyone: there is no secret in it."""
  return {path: (kind, (HERE / name).read_bytes()) for path, (name, kind) in FILES.items()}
