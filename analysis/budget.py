"""Which model should a budget train, on how many tokens, and what does that cost?
Scaling laws and prices.

    python -m analysis.budget --flops 5.76e23 [--chip 'TPU v5p' --chips 1024 --mfu 0.4 --rate 4.2]
    python -m analysis.budget --flops 5.76e23 --plot budget.png
    python -m analysis.budget --hours 720 --chip 'H100 SXM' --chips 64 [--rate 2.5]
    python -m analysis.budget --dollars 10000 --chip 'H100 SXM' --chips 8 --rate 2.5

N parameters · D tokens · C FLOPs = 6 N D. The laws were fitted to one family of models on one
corpus (MassiveText): the sizes carry over to others better than the loss does.
"""

import argparse
import dataclasses
import io
import math
from collections.abc import Sequence

import commands
import files
import names
from analysis import hardware

CHIPS = {chip.name: chip for chip in hardware.CHIPS}
SPAN = 20  # how far a plot goes beyond the optima, as a factor
FLOPS_PER_PARAMETER_AND_TOKEN = 6  # 2 forward, 4 backward; attention's own products are not in it


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingLaw:
  """Loss in nats per token, L(N, D) = E + A / N^alpha + B / D^beta,
  of models of N parameters trained on D tokens.
  """

  E: float
  A: float
  B: float
  alpha: float
  beta: float

  def loss(self, parameters: float, tokens: float) -> float:
    """Predicted nats per token. Raises ValueError for sizes that are not positive."""
    _check(parameters=parameters, tokens=tokens)
    return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

  def optimum(self, flops: float) -> tuple[float, float]:
    """Parameters and tokens of the least loss with 6 N D = flops
    (Hoffmann et al., arXiv:2203.15556, equation 4):

        N = G (C / 6)^(beta / (alpha + beta))      G = (alpha A / (beta B))^(1 / (alpha + beta))
        D = (C / 6) / N

    Raises ValueError for a budget that is not positive.
    """
    _check(flops=flops)
    product, exponent = flops / FLOPS_PER_PARAMETER_AND_TOKEN, 1 / (self.alpha + self.beta)
    parameters = (self.alpha * self.A / (self.beta * self.B)) ** exponent * product ** (
      self.beta * exponent
    )
    return parameters, product / parameters


# Constants: Hoffmann et al., equation 10 (approach 3), and Besiroglu et al., arXiv:2404.10102,
# table 1, who fitted the same runs again.
WHY = """\
The two laws are fits to the same runs. hoffmann's constants are published rounded (0.34 and 0.28),
and their optimum is sensitive to that: tokens grow as C^0.55 and parameters as C^0.45, which at
5.76e23 FLOPs asks for 93 tokens a parameter, against the paper's own advice of about 20 (its
approaches 1 and 2, and Chinchilla itself: 70 B on 1.4 T). besiroglu, the refit, agrees with that
advice: 18. Where they differ, trust besiroglu."""
LAWS = {
  'hoffmann': ScalingLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
  'besiroglu': ScalingLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fleet:
  """What computes, and at what price.

  Attributes:
    chip: of analysis.hardware.
    chips: how many.
    mfu: share of their bfloat16 peak that becomes model FLOPs.
    rate: dollars per chip-hour; None: unknown, and so is what follows from it.
    watts: of a chip with its share of the host; None likewise.
    pue: power usage effectiveness of the data centre.
  Raises ValueError for values that make no sense.
  """

  chip: hardware.Chip
  chips: int = 1
  mfu: float = 0.4
  rate: float | None = None
  watts: float | None = None
  pue: float = 1.0

  def __post_init__(self):
    _check(
      chips=self.chips,
      mfu=self.mfu,
      **{
        name: getattr(self, name) for name in ('rate', 'watts') if getattr(self, name) is not None
      },
    )
    if self.mfu > 1:
      raise ValueError(f'mfu={self.mfu} is a share of the peak, above 0 and at most 1')
    if not 1 <= self.pue < math.inf:
      raise ValueError(f'pue={self.pue} must be at least 1 (which leaves cooling out), and finite')

  def hours(self, flops: float) -> float:
    """Hours that all chips together take."""
    return flops / (self.chips * self.chip.bfloat16 * self.mfu * 3600)

  def flops(self, hours: float) -> float:
    """Model FLOPs of so many hours. Raises ValueError for hours that are not positive."""
    _check(hours=hours)
    return hours * self.chips * self.chip.bfloat16 * self.mfu * 3600

  def hours_for(self, dollars: float) -> float:
    """Hours that so many dollars pay for. Raises ValueError without a rate."""
    _check(dollars=dollars)
    if self.rate is None:
      raise ValueError(f'dollars={dollars} need a price: give rate, in dollars per chip-hour')
    return dollars / (self.chips * self.rate)

  def dollars(self, hours: float) -> float | None:
    """What the chips cost, None where the rate is unknown."""
    return None if self.rate is None else hours * self.chips * self.rate

  def kwh(self, hours: float) -> float | None:
    """What they draw: as given, or at the most that the maker states;
    None where neither is known.
    """
    watts = self.chip.watts if self.watts is None else self.watts
    return None if watts is None else hours * self.chips * watts * self.pue / 1000


def _check(**values: float) -> None:
  for name, value in values.items():
    if not 0 < value < math.inf:
      raise ValueError(f'{name}={value} must be above 0, and finite')


def _number(value: float) -> str:
  """1.5e12 as '1.5 T'."""
  for factor, letter in ((1e12, ' T'), (1e9, ' B'), (1e6, ' M')):
    if value >= factor:
      return f'{value / factor:.3g}{letter}'
  return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def report(flops: float, fleets: Sequence[Fleet]) -> dict:
  """Prints, and returns, what each law makes of the budget, and what each fleet takes for it."""
  return {'flops': flops, 'laws': _laws(flops), 'fleets': _fleets(flops, fleets)}


def _laws(flops: float) -> dict:
  optima, rows = {}, []
  for name, law in LAWS.items():
    parameters, tokens = law.optimum(flops)
    loss = law.loss(parameters, tokens)
    half, double = (law.loss(parameters * factor, tokens / factor) for factor in (0.5, 2))
    optima[name] = dict(parameters=parameters, tokens=tokens, loss=loss)
    losses = [f'{loss:.3f}', f'{half:.3f}', f'{double:.3f}']
    rows.append([name, _number(parameters), _number(tokens), tokens / parameters, *losses])
  commands.table(
    f'{flops:.3g} FLOPs: the size of the least loss',
    ['law', 'parameters', 'tokens', 'tokens/parameter', 'nats/token', 'half the size', 'twice'],
    rows,
  )
  print(f'\n{WHY}')
  return optima


def plot(flops: float) -> bytes:
  """A PNG of what each law says of models of every size within the budget, their optima marked."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8, 4.5), dpi=150, layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  optima = {name: law.optimum(flops) for name, law in LAWS.items()}
  smallest = min(parameters for parameters, _ in optima.values()) / SPAN
  largest = max(parameters for parameters, _ in optima.values()) * SPAN
  sizes = [smallest * (largest / smallest) ** (i / 200) for i in range(201)]
  for (name, law), color in zip(LAWS.items(), ('tab:red', 'tab:blue'), strict=True):
    losses = [law.loss(size, flops / FLOPS_PER_PARAMETER_AND_TOKEN / size) for size in sizes]
    axes.plot(sizes, losses, color=color, label=name)
    parameters, tokens = optima[name]
    label = (
      f'{_number(parameters)} parameters, {_number(tokens)} tokens: '
      f'{tokens / parameters:.3g} a parameter'
    )
    axes.plot(parameters, law.loss(parameters, tokens), 'o', color=color, label=label)
  axes.set(
    title=f'Which size for {flops:.3g} training FLOPs? (6 FLOPs a parameter and token)',
    xlabel='parameters',
    ylabel='predicted loss (nats per token)',
    xscale='log',
  )
  axes.grid(alpha=0.25, linewidth=0.6)
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False)
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png')
  return buffer.getvalue()


def _fleets(flops: float, fleets: Sequence[Fleet]) -> list[dict]:
  costs, rows = [], []
  for fleet in fleets:
    hours = fleet.hours(flops)
    cost = dict(
      chip=fleet.chip.name,
      chips=fleet.chips,
      mfu=fleet.mfu,
      hours=hours,
      chip_hours=hours * fleet.chips,
      kwh=fleet.kwh(hours),
      dollars=fleet.dollars(hours),
    )
    costs.append(cost)
    energy = 'no watts known' if cost['kwh'] is None else cost['kwh']
    price = 'no rate given' if cost['dollars'] is None else cost['dollars']
    rows.append([cost['chip'], f'{cost["chips"]:,}', hours, cost['chip_hours'], energy, price])
  commands.table(
    f'its time and cost at MFU {fleets[0].mfu:g}',
    ['chip', 'chips', 'hours', 'chip-hours', 'kWh', 'dollars'],
    rows,
  )
  return costs


def _parser() -> argparse.ArgumentParser:
  parser = commands.parser(__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  budget = parser.add_mutually_exclusive_group(required=True)
  budget.add_argument('--flops', type=float, help='the budget as FLOPs')
  budget.add_argument('--hours', type=float, help='the budget as hours of --chips; needs --chip')
  budget.add_argument(
    '--dollars', type=float, help='the budget as dollars; needs --chip and --rate'
  )
  parser.add_argument(
    '--chip', default='', help=f'one of {", ".join(CHIPS)}; default: each of them'
  )
  parser.add_argument('--chips', type=int, default=1)
  parser.add_argument('--mfu', type=float, default=0.4, help='model FLOPs utilisation, 0 to 1')
  parser.add_argument('--rate', type=float, help='dollars per chip-hour; needs --chip')
  parser.add_argument(
    '--watts',
    type=float,
    help="of a chip with its share of the host; default: the maker's most for a chip",
  )
  parser.add_argument(
    '--pue', type=float, default=1.0, help="the data centre's draw per watt of its machines"
  )
  parser.add_argument(
    '--plot', default='', metavar='FILE', help="draw the laws' losses by size into this PNG"
  )
  return parser


def main(arguments: Sequence[str] | None = None) -> dict:
  """The command; returns what `report` found."""
  parser = _parser()
  options = parser.parse_args(arguments)
  needs = [
    name for name in ('hours', 'dollars', 'rate', 'watts') if getattr(options, name) is not None
  ]
  if needs and not options.chip:
    parser.error(f'--{needs[0]} needs --chip: one of {", ".join(CHIPS)}')

  try:
    if options.chip:
      names.check('chip', options.chip, CHIPS)
    fleets = [
      Fleet(
        chip=chip,
        chips=options.chips,
        mfu=options.mfu,
        rate=options.rate,
        watts=options.watts,
        pue=options.pue,
      )
      for name, chip in CHIPS.items()
      if options.chip in ('', name)
    ]
    if options.flops is None:
      hours = options.hours if options.dollars is None else fleets[0].hours_for(options.dollars)
      options.flops = fleets[0].flops(hours)
    results = report(options.flops, fleets)
  except ValueError as error:
    parser.error(str(error))
  if options.plot:
    files.replace(options.plot, plot(options.flops))
    print(f'\nwrote {options.plot}')
  commands.write_json(options.json, 'budget', results)
  return results


if __name__ == '__main__':
  main()
