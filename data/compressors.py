"""What do general compressors make of a text, which a model is to beat?"""

import gzip
import lzma
from collections.abc import Iterable


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
