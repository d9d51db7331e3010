"""How does a tokenizer get ids that no text has? Behind its own: for what training puts into rows
besides text, sentinels and masks.
"""

import copy
from collections.abc import Sequence

from data.tokenizer import Tokenizer


def extended(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
  """The same tokenizer with an id more for each name, in order, behind its own. They decode to
  nothing, and no text has them; `save` keeps them.

  Raises ValueError for names that are no texts, or that it has already.
  """
  if not names:
    return tokenizer
  wrong = [
    name for name in names if not isinstance(name, str) or id_of(tokenizer, name) is not None
  ]
  if wrong or len(set(names)) < len(names):
    raise ValueError(f'extra ids of a tokenizer have names of their own, not {wrong or [*names]}')
  if tokenizer.kind == 'huggingface':
    return tokenizer.extended(names)
  made = copy.copy(tokenizer)
  made.token_bytes = tokenizer.token_bytes + [b''] * len(names)
  made.extra = tokenizer.extra | {name: tokenizer.vocabulary + i for i, name in enumerate(names)}
  return made


def id_of(tokenizer: Tokenizer, name: str) -> int | None:
  """The id of this name, extra or the tokenizer's own control token; None without one."""
  if tokenizer.kind == 'huggingface' and tokenizer.control_names.fullmatch(name):
    (index,) = tokenizer.encode(name, special=True)
    return index
  return tokenizer.extra.get(name)


def same_ids(base: Tokenizer, tokenizer: Tokenizer) -> bool:
  """Whether ids mean the same to a model of `base` as in data of the other. Ids that no text has
  may be left out there: those of bytes are, behind sentinels that pretraining put there.
  """
  known = [*base.token_bytes]
  if not tokenizer.extra:
    known = known[: len(known) - len(base.extra)]
  elif tokenizer.extra != base.extra:
    return False
  return known == [*tokenizer.token_bytes] and base.eos == tokenizer.eos
