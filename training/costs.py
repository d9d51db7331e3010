"""What does a chip cost? The rates that a report multiplies hours with."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
  """Rates for the report's costs. A rate of 0 is unknown, and what needs it has no row there.

  Attributes:
    dollars_per_chip_hour: price of a chip, while the run holds it.
    watts_per_chip: mean draw of a chip with its share of the host.
    kilograms_co2_per_kwh: carbon intensity of the grid.
    pue: power usage effectiveness, the data centre's draw per watt of its machines; 1 leaves
      cooling out.

  Raises ValueError for negative or non-finite rates and a pue below 1.
  """

  dollars_per_chip_hour: float = 0.0
  watts_per_chip: float = 0.0
  kilograms_co2_per_kwh: float = 0.0
  pue: float = 1.0

  def __post_init__(self):
    for field, least in (
      ('dollars_per_chip_hour', 0),
      ('watts_per_chip', 0),
      ('kilograms_co2_per_kwh', 0),
      ('pue', 1),
    ):
      value = getattr(self, field)
      if not least <= value < math.inf:
        raise ValueError(
          f'report.{field}={value} must be a number from {least} up' + (' (0: unknown)', '')[least]
        )
