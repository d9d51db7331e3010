"""Are the sizes that a budget should buy those of the least loss, and are hours,
dollars and energy one account?
"""

import json
import math

import pytest
from hypothesis import given, strategies as st

from analysis import budget, hardware
from analysis.budget import LAWS, Fleet, ScalingLaw

BUDGETS = st.floats(18, 27).map(lambda exponent: 10**exponent)
laws = pytest.mark.parametrize('law', LAWS.values(), ids=LAWS)
H100 = next(chip for chip in hardware.CHIPS if chip.name == 'H100 SXM')


def least(law, flops):
  """By halving the slope's interval in ln N, knowing nothing of the closed form;
  the loss along 6 N D = C has one minimum.
  """
  low, high = 0.0, math.log(flops / 6)

  def loss(x):
    return law.A * math.exp(-law.alpha * x) + law.B * math.exp(law.beta * (x - math.log(flops / 6)))

  for _ in range(200):
    left, right = low + (high - low) / 3, high - (high - low) / 3
    low, high = (low, right) if loss(left) < loss(right) else (left, high)
  return math.exp((low + high) / 2)


@laws
@given(flops=BUDGETS)
def test_the_closed_form_is_the_numeric_minimum(law, flops):
  parameters, tokens = law.optimum(flops)
  assert 6 * parameters * tokens == pytest.approx(flops, rel=1e-9)
  assert parameters == pytest.approx(least(law, flops), rel=1e-5)


@laws
@given(flops=BUDGETS)
def test_the_optimum_is_a_stationary_point(law, flops):
  """Along 6 N D = C the slope of the loss, d loss / d ln N, vanishes there,
  and is far from it at half and twice the size.
  """
  parameters, tokens = law.optimum(flops)

  def slope(factor, h=1e-3):
    def of(x):
      return law.loss(parameters * factor * x, tokens / factor / x) - law.E

    return (of(math.exp(h)) - of(math.exp(-h))) / (2 * h) / of(1)

  assert abs(slope(1)) < 1e-5 and slope(0.5) < -0.03 and slope(2) > 0.03


def test_what_the_papers_say():
  """Chinchilla's own budget: 67 B and 1.5 T by approach 1 (table 3), which the corrected constants
  agree with; 40 B by approach 3 (figure 4), which the rounded constants miss by a fifth. Loss of
  Chinchilla, 70 B and 1.4 T: 1.94 (by equation 10).
  """
  parameters, tokens = LAWS['besiroglu'].optimum(5.76e23)
  assert parameters == pytest.approx(67e9, rel=0.12) and tokens == pytest.approx(1.5e12, rel=0.12)
  assert tokens / parameters == pytest.approx(20, rel=0.15)  # "about twenty tokens a parameter"
  parameters, tokens = LAWS['hoffmann'].optimum(5.76e23)
  assert parameters == pytest.approx(40e9, rel=0.25) and 2e12 < tokens < 3.2e12
  assert LAWS['hoffmann'].loss(70e9, 1.4e12) == pytest.approx(1.937, abs=1e-3)
  small = LAWS['besiroglu'].optimum(1.92e19)  # table 3: 400 M parameters, 8 B tokens
  assert small == (pytest.approx(400e6, rel=0.2), pytest.approx(8e9, rel=0.2))


def test_a_symmetric_law_splits_evenly():
  law = ScalingLaw(E=0, A=3, B=3, alpha=0.5, beta=0.5)
  assert law.optimum(6e10) == (pytest.approx(1e5), pytest.approx(1e5))


def test_hours_dollars_and_energy_are_one_account():
  fleet = Fleet(chip=H100, chips=8, mfu=0.5, rate=2.0, pue=1.25)
  hours = fleet.hours_for(1600)
  assert hours == 100 and fleet.dollars(hours) == 1600
  assert fleet.flops(hours) == pytest.approx(100 * 3600 * 8 * 989.4e12 * 0.5)
  assert fleet.hours(fleet.flops(hours)) == pytest.approx(hours)
  assert fleet.kwh(hours) == pytest.approx(8 * 100 * 0.7 * 1.25)
  unknown = Fleet(chip=next(chip for chip in hardware.CHIPS if chip.watts is None))
  assert unknown.kwh(1) is None and unknown.dollars(1) is None
  assert Fleet(chip=unknown.chip, watts=300).kwh(10) == 3


@pytest.mark.parametrize(
  'wrong, words',
  [
    (dict(chips=0), 'chips=0 must be above 0'),
    (dict(mfu=1.2), 'mfu=1.2 is a share'),
    (dict(mfu=0), 'mfu=0 must'),
    (dict(pue=0.9), 'pue=0.9'),
    (dict(rate=-1), 'rate=-1'),
    (dict(watts=math.inf), 'watts=inf'),
  ],
)
def test_senseless_fleets_are_refused(wrong, words):
  with pytest.raises(ValueError, match=words):
    Fleet(chip=H100, **wrong)


def test_senseless_budgets_are_refused():
  law = LAWS['hoffmann']
  for run, words in (
    (lambda: law.optimum(0), 'flops=0'),
    (lambda: law.loss(-1, 1), 'parameters=-1'),
    (lambda: Fleet(chip=H100).hours_for(5), 'give rate'),
    (lambda: Fleet(chip=H100).flops(0), 'hours=0'),
  ):
    with pytest.raises(ValueError, match=words):
      run()


def test_the_command(tmp_path, capsys):
  file = tmp_path / 'budget.json'
  found = budget.main(
    [
      '--dollars',
      '10000',
      '--chip',
      'H100 SXM',
      '--chips',
      '8',
      '--rate',
      '2.5',
      '--json',
      str(file),
    ]
  )
  assert json.loads(file.read_text())['results'] == found
  assert found['fleets'][0]['dollars'] == pytest.approx(10_000) and found['fleets'][0][
    'chip_hours'
  ] == pytest.approx(4000)
  printed = capsys.readouterr().out
  assert 'besiroglu' in printed and 'H100 SXM' in printed
  assert len(budget.main(['--flops', '1e21'])['fleets']) == len(hardware.CHIPS)
  assert 'no rate given' in (printed := capsys.readouterr().out) and 'no watts known' in printed


def test_it_is_said_why_the_laws_differ_and_drawn_on_request(tmp_path, capsys):
  """The sentences' numbers are those of the laws."""
  file = tmp_path / 'budget.png'
  budget.main(['--flops', '5.76e23', '--chip', 'H100 SXM', '--plot', str(file)])
  said = capsys.readouterr().out
  assert file.read_bytes().startswith(b'\x89PNG') and f'wrote {file}' in said
  each = {name: law.optimum(5.76e23) for name, law in LAWS.items()}
  ratios = {name: tokens / parameters for name, (parameters, tokens) in each.items()}
  assert f'{ratios["hoffmann"]:.0f} tokens a parameter' in ' '.join(said.split())
  assert f'advice: {ratios["besiroglu"]:.0f}.' in ' '.join(said.split())
  law = LAWS['hoffmann']
  assert f'tokens grow as C^{law.alpha / (law.alpha + law.beta):.2f}' in said
  assert f'parameters as C^{law.beta / (law.alpha + law.beta):.2f}' in said


def test_what_is_small_is_not_0(capsys):
  budget.main(['--dollars', '8e-09', '--chip', 'H100 SXM', '--rate', '2.5'])
  assert ' 8e-09' in capsys.readouterr().out
  assert budget._number(8e-09) == '8e-09' and budget._number(12_345) == '12,345'


@pytest.mark.parametrize(
  'arguments, words',
  [
    ([], 'one of the arguments'),
    (['--flops', '1e20', '--hours', '3'], 'not allowed with'),
    (['--hours', '3'], '--hours needs --chip'),
    (['--flops', '1e20', '--rate', '1'], '--rate needs --chip'),
    (['--hours', '3', '--chip', 'H100 SMX'], "did you mean 'H100 SXM'"),
    (['--dollars', '3', '--chip', 'B200'], 'give rate'),
    (['--flops', '-1'], 'flops=-1'),
  ],
)
def test_wrong_commands_say_what_is_wrong(arguments, words, capsys):
  with pytest.raises(SystemExit):
    budget.main(arguments)
  assert words in capsys.readouterr().err
