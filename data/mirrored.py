"""How is prepared data that lies in a bucket read on this machine, and how does it come there?
Whole: each machine copies it once, and maps the copy into memory; who prepares it first sends it.
"""

import pathlib
from collections.abc import Callable

import files
import names
from data import cache


def built(config_dir: str, name: str, build: Callable, log: Callable[[str], object]) -> Callable:
  """What fills a directory of the cache, for data.building.once: from the bucket where it is there,
  else by `build`, whose result is sent, its index last. Of a cache on a disk: `build`.

  config_dir: data.cache_dir. name: of the directory, below it.
  """
  if not files.remote(config_dir):
    return build
  where = files.place(config_dir) / name
  bring = names.imported('remote.local.bring')

  def fill(partial: pathlib.Path) -> None:
    index = where / cache.INDEX
    if index.is_file():
      log(f'data: copying {where} to this machine')
      bring(where, partial, [index])
      entries = cache.read_index(partial)['files']
      bring(where, partial, [where / entry['name'] for entry in entries])
      cache.check(partial, entries, contents=True)
      return
    build(partial)
    if not index.is_file():  # nobody was faster
      for entry in cache.read_index(partial)['files']:
        (where / entry['name']).send(partial / entry['name'])
      index.send(partial / cache.INDEX)
      log(f'data: sent it to {where}')

  return fill
