"""Which commands of convert.py make a run smaller, and say what that cost? Their options, and who
does the work, which is imported when it is asked for.
"""

import functools
from collections.abc import Callable

import commands
import names

_log = functools.partial(print, flush=True)


def take_options(command: Callable) -> None:
  """The commands that make a run smaller, and say what that cost."""
  made = command('quantise', _quantise, 'a run -> one with its matrices in codes')
  made.add_argument('--workdir', required=True, metavar='RUN')
  made.add_argument('--to', required=True, metavar='RUN2')
  made.add_argument(
    '--scheme',
    default='',
    help='of all matrices but tables, head and routers: int8, int8:group=128, int4:group=64 '
    '(:asymmetric, :double), nf4:group=64 (:double), fp8 (:tensor, :block=128)',
  )
  made.add_argument(
    '--store',
    action='append',
    default=[],
    metavar='PATTERN=SCHEME',
    help='of parameters whose names match, before --scheme; again for more; head=int8, '
    "'*.down=keep'",
  )
  made.add_argument(
    '--method',
    default='',
    help='rtn rounds, mse clips where that is nearer; gptq, awq and smoothquant look at text; '
    'default: mse where all is fp8, else rtn',
  )
  made.add_argument(
    '--act_order', action='store_true', help='gptq: inputs that weigh most are rounded first'
  )
  names.imported('workdir.calibrated.take_options')(made)
  names.imported('compression.bounded.take_options')(made, 'how many kinds of matrices take 4 bits')
  made.add_argument('--checkpoint', default='last', help="'last', 'best', or a step")
  made = command('prune', _prune, 'a run -> one with fewer numbers, heads or layers')
  names.imported('workdir.prune_request.take_options')(made)
  made = command('judge', _judge, 'what it cost to make a run smaller')
  made.add_argument('original', metavar='RUN')
  made.add_argument('smaller', metavar='RUN2')
  made.add_argument(
    '--text',
    action='append',
    default=[],
    metavar='FILE',
    help="what both read; again for more; default: held-out modules of Python's own library",
  )
  made.add_argument('--limit', type=int, default=64, help='texts (default: %(default)s); 0: all')
  made.add_argument(
    '--by_layer',
    type=int,
    default=0,
    metavar='TOKENS',
    help='read so many tokens once for each matrix of each layer, to see what it costs alone',
  )
  made.add_argument(
    '--topology',
    action='append',
    default=[],
    metavar='KIND:SHAPE',
    help='predict the time of a token there, as plan.py does; again for more',
  )


def _quantise(options) -> None:
  entries = [*options.store, *([f'*={options.scheme}'] if options.scheme else [])]
  bound = names.imported('compression.bounded.from_options')(options)
  calibration = names.imported('workdir.calibrated.from_options')(options)
  if bool(entries) == bool(bound):
    raise ValueError('give --scheme=int4:group=64, or --store=PATTERN=SCHEME, or a bound: --max_kl')
  if bound and options.act_order:
    raise ValueError(
      '--act_order is of --method=gptq, by which no bound is searched; leave it out, or give '
      '--scheme'
    )
  if bound:
    find = names.imported('workdir.bounded_codes.entries')
    method = options.method or 'rtn'
    entries = find(options.workdir, options.checkpoint, method, bound, calibration, _log)
    calibration = None
  method = options.method or names.imported('compression.quantise.usual')(entries)
  run = names.imported('workdir.compressed.quantise')
  run(
    options.workdir,
    options.to,
    entries,
    method,
    options.checkpoint,
    _log,
    calibration,
    options.act_order,
  )


def _prune(options) -> None:
  asked = names.imported('workdir.prune_request.from_options')(options)
  calibration = names.imported('workdir.calibrated.from_options')(options)
  run = names.imported('workdir.pruned.prune')
  run(options.workdir, options.to, asked, options.checkpoint, calibration, _log)


def _judge(options) -> None:
  run = names.imported('workdir.judged.judge')
  asked = options.limit, options.by_layer, options.topology
  with commands.mendable(ImportError):  # of a topology whose compiler is not here
    run(options.original, options.smaller, options.text, *asked, _log)
