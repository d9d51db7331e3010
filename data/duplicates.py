"""Which documents resemble an earlier one?"""

import functools
import zlib
from collections.abc import Callable, Iterator

import numpy as np

# FineWeb (arXiv:2406.17557, section 3.3): 5-grams, 112 hashes. Its 14 bands of 8 meet in 77% of the
# pairs at its threshold of 0.75; here the bands follow from the threshold, see `bands`.
SHINGLE_WORDS, HASHES = 5, 112
RECALL = 0.995  # of pairs exactly at the threshold
SMALL = 32  # documents that share a band, of which all pairs are compared at once
LARGE = 4096  # from here on they are divided by finer bands first
LINKS = 2**20  # pairs held until clusters are joined by them


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

  return MinHash(num_perm=HASHES, seed=1, scheme='affine32').permutations


def minhash(words: list[bytes]) -> np.ndarray:
  """MinHash (Broder 1997) of the set of 5-word shingles, uint32 [HASHES].

  Shingles are hashed here, in numpy; datasketch's own loop calls SHA-1 for each of them,
  which takes four times as long.
  """
  from datasketch import MinHash

  hashes = np.fromiter(map(zlib.crc32, words), np.uint32, len(words)).astype(np.uint64)
  grams = ngram_hashes(hashes, min(SHINGLE_WORDS, len(words)))
  unique = np.unique((grams >> np.uint64(16)).astype(np.uint32))
  sketch = MinHash(num_perm=HASHES, permutations=_permutations(), scheme='affine32', hashfunc=int)
  # Blocks of 4096 x 112 values stay in the processor's cache.
  for start in range(0, len(unique), 4096):
    sketch.update_batch(unique[start : start + 4096].tolist())
  return sketch.hashvalues


def bands(threshold: float, recall: float = RECALL) -> tuple[int, int]:
  """(number of bands, values in each): the widest bands, which bring the fewest documents together,
  of which two with a similarity of `threshold` share at least one with a probability of `recall`.
  """
  for values in range(HASHES, 1, -1):
    number = HASHES // values
    if 1 - (1 - threshold**values) ** number >= recall:
      return number, values
  return HASHES, 1


def near_duplicates(signatures: np.ndarray, threshold: float) -> np.ndarray:
  """Finds documents that resemble an earlier one.

  Locality-sensitive hashing (Leskovec, Rajaraman & Ullman, "Mining of Massive Datasets", section
  3.4): documents that agree on all values of a band are compared, each with each; a pair counts
  when the share of equal values (the estimated Jaccard similarity) is at least `threshold`. At
  least 99% of all such pairs are found: RECALL of those exactly at it, more of those above. Pairs
  are closed transitively; each cluster keeps its first document. The bands are sorted one at a time
  rather than kept in dictionaries: 30 bytes per document, not kilobytes.

  Args:
    signatures: uint32 [documents, HASHES], in memory or memory-mapped.
    threshold: in (0, 1].

  Returns:
    bool [documents]: True for those to drop.
  """
  count = len(signatures)
  firsts = np.arange(count)  # of each document's cluster, as far as it is known
  number, values = bands(threshold)
  for band in range(number if count > 1 else 0):
    keys = band_keys(signatures[:, band * values : (band + 1) * values])
    firsts = clustered(signatures, keys, firsts, threshold)
  return firsts != np.arange(count)


def clustered(
  signatures: np.ndarray, keys: np.ndarray, firsts: np.ndarray, threshold: float
) -> np.ndarray:
  """The first documents of the clusters, once those that share a key and are alike count, too.

  Args:
    signatures: uint32 [documents, HASHES], or what gives rows of it.
    keys: uint64 [documents], of one band.
    firsts: int64 [documents], of each document's cluster as far as it is known.
    threshold: as of near_duplicates.
  """
  groups, links, waiting = Groups(keys), [], 0
  # At most LINKS are held: of many copies each pair is one.
  for found in _found(signatures, groups, lambda: firsts, threshold):
    links.append(found)
    waiting += len(found)
    if waiting >= LINKS:
      firsts, links, waiting = _joined(firsts, links), [], 0
  return _joined(firsts, links)


def _found(
  signatures: np.ndarray, groups: 'Groups', firsts: Callable[[], np.ndarray], threshold: float
) -> Iterator[np.ndarray]:
  for pairs in groups.pairs():
    yield _alike(signatures, pairs, firsts(), threshold)
  for members in groups.beyond(SMALL):
    yield from _links(signatures, members, threshold)


class Groups:
  """Documents that have a key in common.

  Args:
    keys: uint64 [documents].
  """

  def __init__(self, keys: np.ndarray):
    # The documents by their keys; where each key's begin, and how many they are.
    self._order = np.argsort(keys, kind='stable')
    changes = keys[self._order[1:]] != keys[self._order[:-1]]
    self._begins = np.flatnonzero(np.append(True, changes))
    self._sizes = np.diff(np.append(self._begins, len(keys)))

  def pairs(self) -> Iterator[np.ndarray]:
    """All pairs [pairs, 2] within the groups of at most SMALL, by their distance in the order: the
    next neighbours of all groups, then those after next.
    """
    ends = np.repeat(np.where(self._sizes <= SMALL, self._begins + self._sizes, 0), self._sizes)
    for distance in range(1, SMALL):
      here = np.flatnonzero(np.arange(len(ends)) + distance < ends)
      if not here.size:
        return
      yield np.stack([self._order[here], self._order[here + distance]], axis=1)

  def beyond(self, size: int) -> Iterator[np.ndarray]:
    """The documents of each group that has more of them than that."""
    for group in np.flatnonzero(self._sizes > size):
      begin = self._begins[group]
      yield self._order[begin : begin + self._sizes[group]]


def _alike(
  signatures: np.ndarray, pairs: np.ndarray, firsts: np.ndarray, threshold: float
) -> np.ndarray:
  """Those of some pairs that are alike and not in one cluster yet, in blocks that fit into
  memory.
  """
  pairs = pairs[firsts[pairs[:, 0]] != firsts[pairs[:, 1]]]
  same = [np.zeros(0, bool)]
  for block in np.array_split(pairs, len(pairs) // 65536 + 1):
    agreed = signatures[block[:, 0]] == signatures[block[:, 1]]
    same.append(agreed.mean(axis=1) >= threshold)
  return pairs[np.concatenate(same)]


def _links(signatures: np.ndarray, members: np.ndarray, threshold: float) -> list[np.ndarray]:
  """Pairs, each [pairs, 2], that join those of the members that are alike.

  Who is linked asks in turn, and who has been linked is asked no more: copies of a document, which
  most large groups consist of, take one comparison each, and only members unlike one another take
  one for each pair. Thousands of those have a phrase in common and little else (a template's
  beginning): finer bands, which hardly a pair escapes, part them first.
  """
  if len(members) <= LARGE:
    return _links_within(signatures, members, threshold)
  links = []
  number, values = bands(threshold, recall=0.9999)
  for band in range(number):
    own = signatures[members, band * values : (band + 1) * values]
    for part in Groups(band_keys(own)).beyond(1):
      links += _links_within(signatures, members[part], threshold)
  return links


def _links_within(
  signatures: np.ndarray, members: np.ndarray, threshold: float
) -> list[np.ndarray]:
  own = np.asarray(signatures[members])
  waiting = np.arange(len(members))
  links = []
  while waiting.size:
    asking, waiting = [waiting[0]], waiting[1:]
    while asking and waiting.size:
      member = asking.pop()
      same = (own[waiting] == own[member]).mean(axis=1) >= threshold
      linked = waiting[same]
      waiting = waiting[~same]
      asking += linked.tolist()
      if linked.size:
        links.append(np.stack([np.full(len(linked), members[member]), members[linked]], axis=1))
  return links


def _joined(firsts: np.ndarray, links: list[np.ndarray]) -> np.ndarray:
  """The first documents of the clusters, once these links count, too."""
  from scipy.sparse import coo_array
  from scipy.sparse.csgraph import connected_components

  pairs = np.concatenate([np.zeros((0, 2), np.int64), *links])
  if not len(pairs):
    return firsts
  count = len(firsts)
  rows = np.append(np.arange(count), pairs[:, 0])
  columns = np.append(firsts, pairs[:, 1])
  graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(count, count))
  _, cluster = connected_components(graph, directed=False)
  _, first = np.unique(cluster, return_index=True)
  return first[cluster]


def join(earlier: np.ndarray, links: np.ndarray) -> None:
  """Joins clusters by links, in place.

  Args:
    earlier: int64 [documents], for each document one that is earlier in its cluster; the first of a
      cluster has itself. May be memory-mapped: what is read and written are the links' own.
    links: int64 [links, 2].
  """
  firsts = _first_of(earlier, links.reshape(-1)).reshape(-1, 2)
  earlier[links] = firsts  # shortens the way for those that come
  firsts = firsts[firsts[:, 0] != firsts[:, 1]]
  known, places = np.unique(firsts, return_inverse=True)
  clusters = _joined(np.arange(len(known)), [places.reshape(-1, 2)])
  earlier[known] = known[clusters]


def _first_of(earlier: np.ndarray, documents: np.ndarray) -> np.ndarray:
  while True:
    before = earlier[documents]
    if (before == documents).all():
      return documents
    documents = before


def band_keys(values: np.ndarray) -> np.ndarray:
  """One uint64 key per document from the values of a band, [documents, values]:
  a random linear hash modulo 2^64.
  """
  draws = np.random.default_rng(0).integers(1, 2**63, values.shape[1], np.uint64)
  multipliers = draws * np.uint64(2) + np.uint64(1)  # odd
  blocks = range(0, len(values), 65536)
  return np.concatenate(
    [(values[start : start + 65536] * multipliers).sum(axis=1, dtype=np.uint64) for start in blocks]
  )
