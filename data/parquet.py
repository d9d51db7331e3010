"""How is a Parquet file read, row by row? By pyarrow, a few thousand rows at a time."""

from collections.abc import Iterator
from typing import Any

import files

ROWS = 4096  # in memory


def rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """Rows as Python's values, each behind its place; columns that are nested become lists and dicts.

  Raises ValueError where pyarrow is missing, and for a file that is no Parquet.
  """
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise ValueError(f'{path} needs pyarrow: pip install -e .[parquet]') from error
  number = 0
  try:
    with pyarrow.parquet.ParquetFile(files.stream(path)) as file:
      for batch in file.iter_batches(ROWS):
        for row in batch.to_pylist():
          number += 1
          yield f'{path}:row {number}', row
  except pyarrow.ArrowException as error:
    raise ValueError(f'{path} is no Parquet file that can be read: {error}') from error
