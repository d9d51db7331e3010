"""How often does a loop run, of which the compiler doesn't say so? Its counter is run.

A `while` of HLO has a state, a tuple; a condition, a computation of the state; and a body, a
computation of the next state from the state. Of the state only what the condition asks for is
evaluated: a counter that starts at a constant, and what is added to it. `module` is an
analysis.hlo.Module.
"""

import functools
import re
from collections.abc import Callable

from analysis.instruction import Instruction, dims

MOST = 1_000_000  # rounds that are tried
_AS_OPERAND = ('bitcast', 'copy', 'convert', 'reshape', 'copy-done', 'optimization-barrier')
_OPERATIONS = {
  'add': lambda i, left, right: left + right,
  'subtract': lambda i, left, right: left - right,
  'and': lambda i, left, right: left & right,
  'compare': lambda i, left, right: _compare(i, left, right),
}

# What a computation's parameter is: (its number, the path into its tuples) -> value or None.
Parameters = Callable[[int, tuple[int, ...]], int | None]


def count(module, computation: str, loop: Instruction) -> int:
  """How often a `while` of `computation` runs its body.
  Raises ValueError where that depends on more than a counter that starts at a constant.
  """
  condition = re.search(r'condition=%?([\w.-]+)', loop.attributes)[1]
  body = module.body(loop)

  def outside(number, path):
    return _invariant(module, computation, path)

  def at_start(index):
    return _scalar(module, computation, loop.operands[0], (index,), outside)

  # A round's state is found element by element from that of the round before, when it is asked
  # for; each element once.
  state = functools.cache(at_start)
  for trips in range(MOST):
    proceed = _scalar(module, condition, module.root(condition), (), _of_state(state))
    if proceed is None:
      break
    if not proceed:
      return trips
    before = _of_state(state)

    def after(index, before=before):
      return _scalar(module, body, module.root(body), (index,), before)

    state = functools.cache(after)
  raise ValueError(
    f'no trip count is to be found of {loop.name} in {computation} '
    f'({loop.scope or "no metadata"}): '
    'its condition depends on more than a counter that starts at a constant'
  )


def _of_state(state) -> Parameters:
  """A condition and a body have one parameter, the state, of which an element is a scalar."""
  return lambda number, path: state(path[0]) if len(path) == 1 else None


def _scalar(module, computation, name, path, parameters: Parameters) -> int | None:
  """Value of a scalar, or of the one at `path` in a tuple; None where it is unknown."""
  i = module[computation, name]

  def ask(operand, path=()):
    return _scalar(module, computation, operand, path, parameters)

  if i.opcode == 'constant':
    return _constant(i.arguments.strip())
  if i.opcode == 'parameter':
    return parameters(int(i.arguments), path)
  if i.opcode == 'get-tuple-element':
    return ask(i.operands[0], (i.index, *path))
  if i.opcode == 'tuple':
    return ask(i.operands[path[0]], path[1:]) if path else None
  if i.opcode in _AS_OPERAND:
    return ask(i.operands[0], path)
  if i.opcode == 'copy-start':  # a tuple, whose copy-done is the operand again
    return ask(i.operands[0])
  if i.opcode in ('fusion', 'call'):
    inner = i.called[0]
    result = module.root(inner)
    return _scalar(module, inner, result, path, lambda n, path: ask(i.operands[n], path))
  if i.opcode in _OPERATIONS and dims(i.shape) == ():
    left, right = ask(i.operands[0]), ask(i.operands[1])
    return None if left is None or right is None else _OPERATIONS[i.opcode](i, left, right)
  return None


def _invariant(module, computation, path) -> int | None:
  """A constant that a loop, of which `computation` is the body, hands unchanged from round to
  round: the state's element at `path`, where the next state has it from the state's same place.
  """
  caller, loop = module.caller(computation)
  if len(path) != 1 or loop is None or loop.opcode != 'while':
    return None
  root = module[computation, module.root(computation)]
  handed = module[computation, root.operands[path[0]]] if root.opcode == 'tuple' else None
  if handed is None or handed.opcode != 'get-tuple-element' or handed.index != path[0]:
    return None
  return _scalar(
    module,
    caller,
    loop.operands[0],
    path,
    lambda number, path: _invariant(module, caller, path),
  )


def _constant(text):
  if text in ('true', 'false'):
    return int(text == 'true')
  return int(text) if re.fullmatch(r'-?\d+', text) else None


def _compare(i, left, right):
  direction = re.search(r'direction=(\w+)', i.attributes)[1]
  results = {
    'LT': left < right,
    'LE': left <= right,
    'GT': left > right,
    'GE': left >= right,
    'EQ': left == right,
    'NE': left != right,
  }
  return int(results[direction])
