"""What does it cost to train a language model of 125M to 175B parameters, beside what papers print?

    python -m benchmarks.cost [--chip 'H100 SXM'] [--mfu 0.4] [--rate 2.5] [--json FILE]

Memory is read off the shapes, dtypes and shardings of the real model, gradients and AdamW state,
traced on an abstract mesh (benchmarks.zero); hours, dollars and kWh follow from FLOPs counted by
model.flops, with a utilisation, a price and a power that are assumed. Nothing is measured: the
assumptions are printed.
"""

import dataclasses
import functools
from collections.abc import Sequence

import commands
import names
from analysis.budget import CHIPS, Fleet
from benchmarks.zero import State, formula, measure, setting
from configs.models import gpt2
from model import flops
from model.config import ModelConfig
from model.execution import ExecutionConfig
from parallel.mesh import MeshConfig

TOKENS_PER_PARAMETER = 20  # Hoffmann et al., arXiv:2203.15556
CHIPS_SHOWN = (8, 64)
MOST_CHIPS = 4096
ROOM = (
  0.9  # of a chip's memory for state and activations; a block's own working memory has the rest
)
BYTES_TAUGHT = 16  # of a parameter, ZeRO paper (arXiv:1910.02054), section 3.1: 2 + 2 + 12


def gpt3(width: int, layers: int, heads: int) -> ModelConfig:
  """Brown et al., arXiv:2005.14165, table 2.1: GPT-2's block, rows of 2048 tokens."""
  return dataclasses.replace(
    gpt2.get_config().model,
    width=width,
    layers=layers,
    heads=heads,
    feed_forward=4 * width,
    max_length=2048,
  )


def llama2(width: int, layers: int, heads: int, kv_heads: int, feed_forward: int) -> ModelConfig:
  """Touvron et al., arXiv:2307.09288, and the config.json of each size."""
  return ModelConfig(
    vocabulary=32_000,
    width=width,
    layers=layers,
    heads=heads,
    kv_heads=kv_heads,
    feed_forward=feed_forward,
    max_length=4096,
    execution=ExecutionConfig(dtype='bfloat16'),
  )


# GPT-3 XL (1.3B) has 16 heads of 128 here: the 24 that the paper's table prints are wider than
# its model.
MODELS = {
  '125M (GPT-3)': gpt3(768, 12, 12),
  '350M (GPT-3)': gpt3(1024, 24, 16),
  '1.3B (GPT-3)': gpt3(2048, 24, 16),
  '7B (Llama 2)': llama2(4096, 32, 32, 32, 11_008),
  '13B (Llama 2)': llama2(5120, 40, 40, 40, 13_824),
  '70B (Llama 2)': llama2(8192, 80, 64, 8, 28_672),
  '175B (GPT-3)': gpt3(12_288, 96, 96),
}


@functools.cache
def state(model: ModelConfig, chips: int, stage: int) -> State:
  """What training holds on each chip at a stage of ZeRO; 0: a whole copy on each.

  One sequence a chip, remat 'full'. Raises ValueError where the model does not split over the
  chips.
  """
  config = setting(model, chips, zero=stage or 3)
  if stage == 0:
    config = dataclasses.replace(config, mesh=MeshConfig(data=chips, fsdp=1))
  return measure(config, chips)


def taught(parameters: int, chips: int, stage: int) -> float:
  """Bytes on each chip as the ZeRO paper counts them (figure 1), without activations."""
  split = {0: 0, 1: 12, 2: 14, 3: 16}[stage]
  return (BYTES_TAUGHT - split + split / chips) * parameters


def least_chips(model: ModelConfig, parameters: int, memory: float) -> int:
  """The least power of two of chips on which state and activations fit with ZeRO-3.

  By benchmarks.zero.formula, which its tests hold to what is traced. memory: bytes of a chip.
  Raises ValueError where MOST_CHIPS are not enough.
  """
  chips = 1
  while chips <= MOST_CHIPS:
    if sum(formula(setting(model, chips), chips, parameters).values()) <= ROOM * memory:
      return chips
    chips *= 2
  raise ValueError(
    f'{MOST_CHIPS} chips of {memory / 1e9:.0f} GB do not hold the model with one sequence each; '
    'split it by mesh.tensor, too'
  )


def memory_table() -> dict:
  """Prints, and returns, GB on each chip by stage, of each model."""
  results, rows = {}, []
  for name, model in MODELS.items():
    for chips in CHIPS_SHOWN:
      states = [state(model, chips, stage) for stage in range(4)]
      count, kept = states[0].count, states[3].parts['activations']
      formulas = [taught(count, chips, stage) for stage in range(4)]
      results[f'{name} {chips}'] = [
        dict(parts=at.parts, sum=at.chip, taught=by_hand)
        for at, by_hand in zip(states, formulas, strict=True)
      ]
      cells = [
        f'{_gb(at.chip - at.parts["activations"])} ({_gb(by_hand)})'
        for at, by_hand in zip(states, formulas, strict=True)
      ]
      rows.append([name, f'{count / 1e9:.3f}', chips, *cells, _gb(kept)])
  commands.table(
    "GB on each chip: parameters, gradients, AdamW (in brackets: the ZeRO paper's formula)",
    ['', '1e9 parameters', 'chips', *(f'ZeRO-{stage}' for stage in range(4)), 'activations'],
    rows,
  )
  return results


def _gb(size: float) -> str:
  """Bytes as GB, with two or three digits."""
  size /= 1e9
  return f'{size:,.0f}' if size >= 100 else f'{size:.1f}' if size >= 1 else f'{size:.2g}'


def price_table(fleet: Fleet) -> dict:
  """Prints, and returns, what training on TOKENS_PER_PARAMETER takes, of each model."""
  results, rows = {}, []
  for name, model in MODELS.items():
    count = state(model, CHIPS_SHOWN[-1], 3).count
    tokens = TOKENS_PER_PARAMETER * count
    spent = tokens * flops.train_flops_per_token(model, model.max_length)
    hours = fleet.hours(spent)
    row = results[name] = dict(
      parameters=count,
      least_chips=least_chips(model, count, fleet.chip.hbm_bytes),
      tokens=tokens,
      flops=spent,
      six_nd=flops.six_nd(count, tokens),
      chip_hours=hours,
      dollars=fleet.dollars(hours),
      kwh=fleet.kwh(hours),
    )
    rows.append(
      [
        name,
        row['least_chips'],
        tokens / 1e9,
        f'{spent:.2e}',
        f'{spent / row["six_nd"]:.2f}',
        hours,
        hours / CHIPS_SHOWN[-1],
        row['dollars'],
        'no watts known' if row['kwh'] is None else row['kwh'],
      ]
    )
  watts = fleet.chip.watts if fleet.watts is None else fleet.watts
  commands.table(
    f'{TOKENS_PER_PARAMETER} tokens a parameter: {fleet.chip.name}, MFU {fleet.mfu:g}, '
    f'{fleet.rate:g} dollars a chip-hour, {watts or "unknown"} W a chip, no cooling',
    [
      '',
      'least chips',
      '1e9 tokens',
      'FLOPs',
      'of 6ND',
      'chip-hours',
      f'hours on {CHIPS_SHOWN[-1]}',
      'dollars',
      'kWh',
    ],
    rows,
  )
  return results


@dataclasses.dataclass(frozen=True)
class Printed:
  """A run that a paper tells of, with its FLOPs and A100-hours, None where it gives none."""

  source: str
  parameters: float
  tokens: float
  flops: float | None = None
  gpu_hours: float | None = None


PRINTED = (
  Printed('GPT-3 175B (arXiv:2005.14165, table D.1)', 174.6e9, 300e9, flops=3.14e23),
  Printed(
    'Megatron-LM, GPT-3 175B (arXiv:2104.04473, section 5.1)',
    175e9,
    300e9,
    gpu_hours=1024 * 34 * 24,
  ),
  Printed('Chinchilla 70B (arXiv:2203.15556)', 70e9, 1.4e12, flops=5.76e23),
  Printed('Llama 2 7B (arXiv:2307.09288, table 2)', 6.74e9, 2e12, gpu_hours=184_320),
  Printed('Llama 2 13B', 13.02e9, 2e12, gpu_hours=368_640),
  Printed('Llama 2 70B', 68.98e9, 2e12, gpu_hours=1_720_320),
)


def printed_table(mfu: float) -> list[dict]:
  """Prints, and returns, what papers give, beside 6 N D and its A100-hours at this utilisation."""
  fleet = Fleet(chip=CHIPS['A100 80GB SXM'], mfu=mfu)
  results, rows = [], []
  for run in PRINTED:
    estimate = flops.six_nd(run.parameters, run.tokens)
    hours = fleet.hours(estimate)
    implied = run.gpu_hours and hours * mfu / run.gpu_hours
    results.append(dataclasses.asdict(run) | dict(six_nd=estimate, hours=hours, mfu=implied))
    rows.append(
      [
        run.source,
        f'{run.flops:.3g}' if run.flops else '-',
        f'{estimate:.3g}',
        f'{run.gpu_hours:,.0f}' if run.gpu_hours else '-',
        f'{hours:,.0f}',
        f'{implied:.1%}' if implied else '-',
      ]
    )
  commands.table(
    f'What papers print, and what 6 N D on A100s of 312 TFLOP/s at MFU {mfu:g} makes of it',
    [
      '',
      'FLOPs printed',
      '6 N D',
      'A100-hours printed',
      f'at MFU {mfu:g}',
      'MFU of the printed hours',
    ],
    rows,
  )
  return results


def main(arguments: Sequence[str] | None = None) -> dict:
  """The command; returns what the three tables show."""
  parser = commands.parser(__doc__.splitlines()[0])
  parser.add_argument('--chip', default='H100 SXM', help=f'one of {", ".join(CHIPS)}')
  parser.add_argument('--mfu', type=float, default=0.4, help='model FLOPs utilisation, 0 to 1')
  parser.add_argument('--rate', type=float, default=2.5, help='dollars per chip-hour')
  parser.add_argument('--watts', type=float, help="of a chip; default: the maker's most")
  options = parser.parse_args(arguments)
  try:
    names.check('chip', options.chip, CHIPS)
    fleet = Fleet(chip=CHIPS[options.chip], mfu=options.mfu, rate=options.rate, watts=options.watts)
  except ValueError as error:
    parser.error(str(error))
  results = dict(
    memory=memory_table(), price=price_table(fleet), printed=printed_table(options.mfu)
  )
  commands.write_json(options.json, 'cost', results)
  return results


if __name__ == '__main__':
  main()
