"""What do general compressors make of a text, which a model is to beat?"""

import concurrent.futures
import gzip
import itertools
import lzma
import threading
from collections.abc import Callable, Iterable

# Bytes of documents, about, that are compressed in a run: xz takes minutes for them.
LARGEST = 2**28


def beside(prepared, log: Callable[[str], object]) -> Callable[[], dict[str, float]]:
  """Begins to compress held-out documents, in a thread beside what else is done, and gives what
  waits for it: {} where there are none, else as `compression_baselines`.

  Of more than LARGEST bytes it takes every so many documents, and says so.
  """
  future: concurrent.futures.Future = concurrent.futures.Future()

  def compress():
    try:
      documents = iter(prepared.validation_documents())
      first = next(documents, None)
      every = 1 if first is None else -(-prepared.validation_bytes // LARGEST) or 1
      of = itertools.islice(itertools.chain([first], documents), 0, None, every)
      future.set_result((every, {} if first is None else compression_baselines(of)))
    except BaseException as error:
      future.set_exception(error)

  def waited() -> dict[str, float]:
    if not future.done():
      log('waiting for what gzip and xz make of the held-out documents')
    every, baselines = future.result()
    if every > 1:
      log(
        f'gzip_bits_per_byte and xz_bits_per_byte are of one of {every} held-out documents: all '
        f'are {prepared.validation_bytes / 1e6:,.0f} MB, and {LARGEST / 1e6:,.0f} are compressed'
      )
    return baselines

  # A run that is stopped does not wait for it.
  threading.Thread(target=compress, name='compress', daemon=True).start()
  return waited


def compression_baselines(documents: Iterable[str]) -> dict[str, float]:
  """What general compressors make of the documents, one by one: {'gzip': bits/byte, 'xz':
  bits/byte} at level 9.

  8 x (sum of compressed sizes, headers included) / (sum of UTF-8 sizes). Raises ValueError when
  there is no text.
  """
  raw = packed_gzip = packed_xz = 0
  for document in documents:
    data = document.encode()
    raw += len(data)
    packed_gzip += len(gzip.compress(data, 9, mtime=0))
    # Preset 9 clears a 64 MiB dictionary per document; one that holds the document gives the same
    # size, 18x sooner.
    dictionary = min(64 * 2**20, max(4096, 1 << len(data).bit_length()))
    packed_xz += len(
      lzma.compress(data, filters=[{'id': lzma.FILTER_LZMA2, 'preset': 9, 'dict_size': dictionary}])
    )
  if not raw:
    raise ValueError('there are no bytes to compress; give documents that are not all empty')
  return {'gzip': 8 * packed_gzip / raw, 'xz': 8 * packed_xz / raw}
