"""Which documents resemble an earlier one?"""

import functools
import zlib

import numpy as np

SHINGLE_WORDS = 5  # FineWeb (arXiv:2406.17557, section 3.3): 5-grams, 112 hashes in 14 bands of 8
BANDS, ROWS = 14, 8


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
  """Hashes of all n consecutive words, uint64 [words - n + 1]:
  a polynomial in an odd multiplier, modulo 2^64.
  """
  count = len(hashes) - n + 1
  grams = np.zeros(count, np.uint64)
  for i in range(n):
    grams = grams * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + count]
  return grams ^ (grams >> np.uint64(32))


@functools.cache
def _permutations() -> np.ndarray:
  from datasketch import MinHash

  return MinHash(num_perm=BANDS * ROWS, seed=1, scheme='affine32').permutations


def minhash(words: list[bytes]) -> np.ndarray:
  """MinHash (Broder 1997) of the set of 5-word shingles, uint32 [BANDS * ROWS].

  Shingles are hashed here, in numpy; datasketch's own loop calls SHA-1 for each of them,
  which takes four times as long.
  """
  from datasketch import MinHash

  hashes = np.fromiter(map(zlib.crc32, words), np.uint32, len(words)).astype(np.uint64)
  grams = ngram_hashes(hashes, min(SHINGLE_WORDS, len(words)))
  unique = np.unique((grams >> np.uint64(16)).astype(np.uint32))
  sketch = MinHash(
    num_perm=BANDS * ROWS, permutations=_permutations(), scheme='affine32', hashfunc=int
  )
  # Blocks of 4096 x 112 values stay in the processor's cache.
  for start in range(0, len(unique), 4096):
    sketch.update_batch(unique[start : start + 4096].tolist())
  return sketch.hashvalues


def near_duplicates(signatures: np.ndarray, threshold: float) -> np.ndarray:
  """Finds documents that resemble an earlier one.

  Locality-sensitive hashing (Leskovec, Rajaraman & Ullman, "Mining of Massive Datasets", section
  3.4): documents that agree on all ROWS values of a band are candidates; a candidate pair counts
  when the share of equal values (the estimated Jaccard similarity) is at least `threshold`. Pairs
  are closed transitively; each cluster keeps its first document. The bands are sorted one at a time
  rather than kept in dictionaries: 30 bytes per document, not kilobytes.

  Args:
    signatures: uint32 [documents, BANDS * ROWS], in memory or memory-mapped.
    threshold: in (0, 1].

  Returns:
    bool [documents]: True for those to drop.
  """
  from scipy.sparse import coo_array
  from scipy.sparse.csgraph import connected_components

  count = len(signatures)
  if count < 2:
    return np.zeros(count, bool)

  # Candidates: neighbours among the documents sorted by a band's key, where the key is the same.
  pairs = [np.zeros((0, 2), np.int64)]
  for band in range(BANDS):
    keys = _band_keys(signatures[:, band * ROWS : (band + 1) * ROWS])
    order = np.argsort(keys, kind='stable')
    same = keys[order[1:]] == keys[order[:-1]]
    pairs.append(np.stack([order[:-1][same], order[1:][same]], axis=1))
  pairs = np.unique(np.concatenate(pairs), axis=0)

  # Those whose signatures agree in enough of their values, in blocks that fit into memory.
  alike = [np.zeros(0, bool)]
  for block in np.array_split(pairs, len(pairs) // 65536 + 1):
    same = signatures[block[:, 0]] == signatures[block[:, 1]]
    alike.append(same.mean(axis=1) >= threshold)
  links = pairs[np.concatenate(alike)]

  # Of each connected cluster the first document stays.
  graph = coo_array(
    (np.ones(len(links), np.int8), (links[:, 0], links[:, 1])), shape=(count, count)
  )
  _, cluster = connected_components(graph, directed=False)
  _, first = np.unique(cluster, return_index=True)
  drop = np.ones(count, bool)
  drop[first] = False
  return drop


def _band_keys(values: np.ndarray) -> np.ndarray:
  """One uint64 key per document from the ROWS values of a band, [documents, ROWS]:
  a random linear hash modulo 2^64.
  """
  draws = np.random.default_rng(0).integers(1, 2**63, ROWS, np.uint64)
  multipliers = draws * np.uint64(2) + np.uint64(1)  # odd
  blocks = range(0, len(values), 65536)
  return np.concatenate(
    [(values[start : start + 65536] * multipliers).sum(axis=1, dtype=np.uint64) for start in blocks]
  )
