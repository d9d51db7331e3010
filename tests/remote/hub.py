"""As much of the hub as its library asks for, of repositories that are directories here."""

import hashlib
import http.server
import json
import pathlib
import threading

COMMIT = '5' * 40


class Hub(http.server.ThreadingHTTPServer):
  """Serves `root`/models/ORG/NAME and `root`/datasets/ORG/NAME. seen: files that were sent."""

  daemon_threads = True

  def __init__(self, root: pathlib.Path):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.root, self.seen = root, []
    threading.Thread(target=self.serve_forever, daemon=True).start()

  @property
  def url(self) -> str:
    return f'http://127.0.0.1:{self.server_address[1]}'


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def do_GET(self):
    parts = self.path.split('?')[0].strip('/').split('/')
    if parts[0] == 'api':
      self._api(parts[1], '/'.join(parts[2:4]), parts[4:])
      return
    kind = 'datasets' if parts[0] == 'datasets' else 'models'
    parts = parts[kind == 'datasets' :]
    path = self.server.root / kind / '/'.join(parts[:2]) / '/'.join(parts[4:])
    if parts[2] != 'resolve' or not path.is_file():
      self._send(404, b'')
      return
    content = path.read_bytes()
    if self.command == 'GET':
      self.server.seen.append(path.name)
    self._send(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')

  do_HEAD = do_GET

  def _api(self, kind: str, repository: str, more: list[str]) -> None:
    root = self.server.root / kind / repository
    if not root.is_dir():
      self._send(404, b'{"error": "Repository not found"}')
      return
    paths = sorted(path for path in root.rglob('*') if path.is_file())
    names = [str(path.relative_to(root)) for path in paths]
    if more[:1] == ['tree']:
      answer = [
        {'type': 'file', 'path': name, 'size': path.stat().st_size, 'oid': '0' * 40}
        for name, path in zip(names, paths, strict=True)
      ]
    else:
      answer = {
        'id': repository,
        'sha': COMMIT,
        'private': False,
        'siblings': [{'rfilename': name} for name in names],
      }
    self._send(200, json.dumps(answer).encode())

  def _send(self, status: int, content: bytes, **headers) -> None:
    self.send_response_only(status)
    headers |= {'Content-Length': str(len(content)), 'X-Repo-Commit': COMMIT}
    for name, value in headers.items():
      self.send_header(name, value)
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(content)

  def log_message(self, *_):
    pass
