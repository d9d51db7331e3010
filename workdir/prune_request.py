"""What is to go of a run, and how is it chosen? The options of pruning, read and checked."""

import argparse
import dataclasses
import functools
from collections.abc import Mapping

from flax import nnx

import names
from compression import bounded, structured
from compression.bounded import QualityBound
from compression.prune import METHODS, Pattern
from model.weights.scheme import parsed, rule_of
from workdir import calibrated

BLOCKS = '*.blocks.*'


@dataclasses.dataclass(frozen=True)
class PruneRequest:
  """What is to go, and how it is chosen.

  Attributes:
    scheme: as 2:4, 2:4+int8, 0.5, heads=6,channels=1024,layers=20.
    method: of compression.prune. scope: of its Pattern; '': the method's.
    keep: patterns of parameters that stay as they are. bound: in the place of a scheme, what it may
      cost.

  Raises ValueError for what does not go together.
  """

  scheme: str
  method: str = 'magnitude'
  scope: str = ''
  keep: tuple[str, ...] = ()
  bound: QualityBound | None = None

  def __post_init__(self):
    names.check('--method', self.method, METHODS)
    if bool(self.scheme) == bool(self.bound):
      raise ValueError(
        f'--scheme={self.scheme}: give one, as 2:4 or 0.5, or a bound that finds the share of '
        'numbers that go (--max_kl, --max_perplexity_increase), and not both'
      )
    if self.units:
      if self.scope or self.keep or self.method == 'sparsegpt':
        raise ValueError(
          f'--scheme={self.scheme} takes parts of all layers by --method=magnitude or wanda, '
          'without --scope and --keep; leave those out'
        )
      return
    pattern = self.pattern
    if pattern.sparse and self.scope:
      raise ValueError(f'--scope={self.scope}: {self.scheme} is of groups; leave it out')
    if pattern.scope == 'global' and self.method != 'magnitude':
      raise ValueError(
        f'--scope=global with --method={self.method}, whose scores are of one matrix; use layer or '
        'row'
      )

  @functools.cached_property
  def units(self) -> dict[str, int]:
    """Parts that stay, by name; {} where numbers go."""
    return structured.parse(self.scheme)

  @functools.cached_property
  def pattern(self) -> Pattern:
    """Of the numbers that go."""
    scope = self.scope or ('row' if self.method == 'wanda' else 'layer')
    text, plus, _ = (self.scheme or '0.5').partition('+')
    pattern = Pattern.parse(text, scope)
    if plus and not pattern.sparse:
      raise ValueError(
        f'--scheme={self.scheme}: only what is left of N:M is stored by another scheme; prune '
        'first, and quantise the run'
      )
    return pattern

  @property
  def calibrated(self) -> bool:
    """Whether rows are needed."""
    return self.method != 'magnitude' or self.bound is not None or 'layers' in self.units

  @property
  def entries(self) -> tuple[str, ...]:
    """Of model.execution.stored."""
    kept = [f'{pattern}=keep' for pattern in self.keep]
    return (*kept, f'{BLOCKS}={self.scheme}') if self.pattern.sparse else ()

  def goes(self, name: str, p) -> bool:
    """Whether numbers of a parameter go: it is a matrix of a block, and no router."""
    rule = rule_of(name, p, self._rules)
    return rule is not None and bool(rule[1].sparse)

  def check_keep(self, named: Mapping[str, nnx.Param]) -> None:
    """Raises ValueError for a pattern of `keep` that keeps no matrix of a model's parameters."""
    rules = [rule_of(name, p, self._rules) for name, p in named.items()]
    holds = {rule[0] for rule in rules if rule}
    for pattern in self.keep:
      if pattern not in holds:
        raise ValueError(
          f'--keep={pattern} holds of no matrix: none has such a name (routers, norms, biases and '
          'tables stay as they are), or patterns before it match first; mend it, or leave it out'
        )

  @functools.cached_property
  def _rules(self):
    entries = [*(f'{pattern}=keep' for pattern in self.keep), f'{BLOCKS}=1:2']
    return parsed(entries)


def take_options(made: argparse.ArgumentParser) -> None:
  """What the command takes."""
  made.add_argument('--workdir', required=True, metavar='RUN')
  made.add_argument('--to', required=True, metavar='RUN2')
  made.add_argument(
    '--scheme',
    default='',
    help='2:4, packed, also as 2:4+int8; 0.5, the share of numbers that go; what stays of '
    'heads=6,channels=1024,layers=20',
  )
  made.add_argument(
    '--method',
    default='magnitude',
    help='magnitude, the smallest go; wanda, those that add least; sparsegpt, and others make up '
    'for them',
  )
  made.add_argument(
    '--scope',
    default='',
    help='a share is of each row (output), of each layer (matrix), or global; default: row of '
    'wanda, else layer',
  )
  made.add_argument(
    '--keep', action='append', default=[], metavar='PATTERN', help="parameters to keep; '*.down'"
  )
  bounded.take_options(made, 'the share of numbers that go')
  calibrated.take_options(made)
  made.add_argument('--checkpoint', default='last', help="'last', 'best', or a step")


def from_options(options) -> PruneRequest:
  """Of a command line's options."""
  bound = bounded.from_options(options)
  return PruneRequest(options.scheme, options.method, options.scope, tuple(options.keep), bound)
