"""Which run does a command open, and how does its model lie in memory? The flags of all commands
that open one.
"""

from typing import NamedTuple

from absl import flags

# What is defined here is, for --help, of the command that asks for it.
flags.disclaim_key_flags()


class Opening(NamedTuple):
  """The holders of the flags of these names."""

  workdir: flags.FlagHolder
  checkpoint: flags.FlagHolder
  mesh: flags.FlagHolder
  weights: flags.FlagHolder


def define(required: bool = True) -> Opening:
  """Defines them, for the module that calls. required: whether --workdir is."""
  return Opening(
    flags.DEFINE_string('workdir', None, 'Directory of a run of train.py.', required=required),
    flags.DEFINE_string('checkpoint', 'last', "'last', 'best', or a step."),
    flags.DEFINE_string(
      'mesh', 'data=1', "Over this machine's devices: sizes of axes, as in data=2,tensor=4."
    ),
    flags.DEFINE_string(
      'weights',
      '',
      'Holds matrices in codes, by a scheme of model/weights/scheme.py: int8, int4:group=64, '
      'nf4:group=64, fp8, ...; less exact, and smaller.',
    ),
  )
