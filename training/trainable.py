"""Which parameters does a run train? Those that a rule over `name.path` picks; the rest is frozen,
and stays where it lies.

A tree of models falls into two of the same structure, with None in place of what the other one has:
gradients, the optimizer's state, offloading and checkpoints are of the trained one; the other is an
argument of the step that is neither differentiated nor donated.
"""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import jax

from model.params import is_param, name_of, named_leaves


@dataclasses.dataclass(frozen=True)
class Rule:
  """Trained is what any of `trained` matches and none of `frozen` does.

  Attributes:
    trained, frozen: patterns of fnmatch over names such as 'policy.stack.blocks.0.attention.q',
      where '*' also matches dots.
    models: names of models that the objective freezes whole.
  """

  trained: tuple[str, ...] = ('*',)
  frozen: tuple[str, ...] = ()
  models: tuple[str, ...] = ()

  @property
  def everything(self) -> bool:
    """Whether nothing is frozen, whatever the models."""
    return self.trained == ('*',) and not self.frozen and not self.models

  def trains(self, name: str) -> bool:
    """Whether the parameter of this name is trained."""
    return (
      name.split('.')[0] not in self.models
      and any(fnmatch.fnmatchcase(name, pattern) for pattern in self.trained)
      and not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.frozen)
    )

  def check(self, models: Mapping[str, Any]) -> None:
    """Raises ValueError for a pattern that matches no parameter, with the nearest names, and where
    nothing is trained.
    """
    known = list(_named(models))
    for field in ('trained', 'frozen'):
      for pattern in getattr(self, field):
        if not fnmatch.filter(known, pattern):
          raise ValueError(
            f'train.{field}: no parameter is named like {pattern!r}; near it: '
            f'{", ".join(_near(pattern, known))}'
          )
    if not any(map(self.trains, known)):
      raise ValueError(
        f'train.trained={self.trained} and train.frozen={self.frozen} leave no parameter to train '
        f'(frozen as a whole: {", ".join(self.models) or "no model"}); let a pattern of '
        'train.trained match some'
      )

  def parted(self, models: Mapping[str, Any]) -> tuple[dict, dict]:
    """(trained, frozen), each with None in place of the other's; what is None in `models` is None
    in both.
    """
    return divided(models, lambda name: self.everything or self.trains(name))


def divided(models: Mapping[str, Any], pick: Callable[[str], bool]) -> tuple[dict, dict]:
  """(those whose name is picked, the others), each with None in place of what the other has."""
  parameters, structure = jax.tree.flatten(dict(models), is_leaf=_is_parameter)
  mask = [pick(name) for name in _named(models)]

  def those(picked):
    kept = [p if wanted == picked else None for p, wanted in zip(parameters, mask, strict=True)]
    return jax.tree.unflatten(structure, kept)

  return those(True), those(False)


def joined(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict:
  """The models that fell into these two."""

  def either(a, b):
    return b if a is None else a

  return jax.tree.map(either, dict(trained), dict(frozen), is_leaf=_is_parameter)


def shared(models: dict[str, Any], sources: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
  """The models with what is frozen and equal in one place: of two with the same source, the later
  takes the earlier one's arrays.

  sources: of each model, what its frozen parameters are known by: equal where they are equal. None
    for those that have none.
  """
  kept: dict[tuple, jax.Array] = {}
  _, frozen = rule.parted(models)

  def place(name, x):
    model, _, path = name.partition('.')
    if x is None or sources.get(model) is None:
      return x
    return kept.setdefault((sources[model], path, x.shape, x.dtype, x.sharding), x)

  leaves = {name: place(name, x) for name, x in named_leaves(frozen).items()}
  merged = [leaves.get(name, x) for name, x in named_leaves(models).items()]
  return jax.tree.unflatten(jax.tree.structure(models), merged)


def _is_parameter(x) -> bool:
  return x is None or is_param(x)


def _named(models) -> dict[str, Any]:
  """Parameters by name, holes among them; what stores one in several arrays (int8) is one all the
  same.
  """
  return {
    name_of(path): p
    for path, p in jax.tree_util.tree_leaves_with_path(dict(models), is_leaf=_is_parameter)
  }


def _near(pattern: str, known: list[str]) -> list[str]:
  """Names that a pattern may have meant: those with a part that is like one of its own, else the
  first.
  """
  bare = pattern.strip('*.')
  near = [name for name in known if bare and bare in name] or (
    difflib.get_close_matches(bare, known, 3, 0.4)
  )
  return (near or known)[:3]
