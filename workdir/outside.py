"""Can what a run reads and writes besides its directory be where its config says?"""

import pathlib

import files
from training.config import Config


def check(config: Config) -> None:
  """Raises ValueError or OSError where what the run reads and writes besides its directory cannot
  be, which would else be found out after hours.
  """
  places = {'data.cache_dir': config.data.cache_dir, 'train.spill_dir': config.train.spill_dir}
  sources = {'sources': config.data.sources, 'validation': config.data.validation}
  read = {
    f'data.{field}[{i}].path': source.path
    for field, of in sources.items()
    for i, source in enumerate(of)
  }
  for name, path in (places | read | {'data.tokenizer.path': config.data.tokenizer.path}).items():
    files.check_local(name, path)
  for directory in filter(None, places.values()):
    files.check_writable(pathlib.Path(directory) / 'writable')
