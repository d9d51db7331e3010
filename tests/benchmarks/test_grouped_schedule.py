"""Is the experts' kernel scheduled as plans believe, and is what they believe of all models?"""

import itertools
import json

import pytest

from benchmarks import grouped_schedule
from kernels import tuning


def cells(models=tuple(grouped_schedule.MODELS), backend='pallas_tpu', share=0.8):
  return [
    {'topology': 'v6e:1x1', 'model': model, 'outer': outer, 'direction': direction}
    | {'backend': backend, 'kind': 'TPU v6 lite', 'share': share}
    for model, outer, direction in itertools.product(
      models, (False, True), grouped_schedule.KERNELS
    )
  ]


def test_the_smallest_share_of_all_models_is_what_plans_believe(tmp_path, monkeypatch):
  path = tmp_path / 'grouped.json'
  path.write_text(json.dumps({'shares': {'TPU v5': {'grouped_rows': 0.5}}}))
  monkeypatch.setattr(tuning, 'GROUPED_TABLE', path)
  found = cells() + cells(backend='megablox', share=0.1)
  found[4]['share'] = 0.7  # of rows
  grouped_schedule.write(found)
  shares = json.loads(path.read_text())['shares']
  assert shares['TPU v5'] == {'grouped_rows': 0.5}
  assert shares['TPU v6 lite'] == {
    'grouped_forward': 0.8,
    'grouped_rows': 0.7,
    'grouped_matrices': 0.8,
  }

  # Of a part the smallest would be too good, and so where one does not compile.
  before = path.read_text()
  failed = cells()
  del failed[0]['share']
  for part in (cells(['qwen3_30b_a3b']), failed, cells(backend='megablox')):
    with pytest.raises(ValueError, match='topology v6e:1x1, model .* is missing; leave --models'):
      grouped_schedule.write(part)
  assert path.read_text() == before


@pytest.mark.slow
def test_plans_believe_what_the_compiler_gives(topology):
  """On a v6e, of the products whose shares are the smallest. Else the table is of another kernel,
  or of another libtpu: python -m benchmarks.grouped_schedule --write.
  """
  topology('v6e:1x1')
  smallest = [
    ('forward', 'qwen3_30b_a3b', True),
    ('rows', 'qwen3_30b_a3b', False),
    ('matrices', 'mixtral_8x7b', False),
  ]
  jobs = [
    dict(topology='v6e:1x1', model=model, outer=outer, direction=way, backend='pallas_tpu')
    for way, model, outer in smallest
  ]
  for job in grouped_schedule.measure(jobs):
    kernel = grouped_schedule.KERNELS[job['direction']][0]
    tabled = tuning.grouped_share('TPU v6 lite', kernel)
    assert 'error' not in job and job['share'] == pytest.approx(tabled, rel=0.02), kernel
