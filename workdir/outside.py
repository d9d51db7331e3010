"""Can what a run reads and writes besides its directory be where its config says?"""

import os

import files
from training.config import Config


def check(config: Config, workdir: str | os.PathLike) -> None:
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
    files.check_local(name, path, buckets=name != 'train.spill_dir', hub=name not in places)
  if config.train.offload_optimizer == 'disk' and files.remote(workdir):
    raise NotImplementedError(
      f"train.offload_optimizer='disk' copies files into checkpoints, and {workdir} is in a "
      "bucket; offload to 'host', or give a --workdir on a disk"
    )
  for directory in filter(None, places.values()):
    files.check_writable(files.place(directory) / 'writable')
