"""Is a run with rollouts that is killed, wherever it is, one that was not?"""

import pytest

from tests.test_commands import Process
from tests.training.test_rollouts import FAMILY, asked, assert_same_runs, config
from training import config as configs
from workdir import rollouts
from workdir.checkpoint import Checkpoints

STEPS, SAVED, SEEN = 12, 6, 9  # of rollouts of four steps


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path):
  """Within its third rollout, whose line it has written, from a checkpoint within the second."""
  made = config(asked(tmp_path), FAMILY, train={'steps': STEPS, 'save_every': SAVED})
  configs.save(made, tmp_path)
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'

  def start(workdir, **how):
    flags = f'--config={tmp_path / configs.FILE}', f'--workdir={workdir}'
    return Process(tmp_path, 'train.py', *flags, **how)

  done = start(whole).end()
  assert done.code == 0, done.error

  process, checkpoints = start(killed, hold=f'step {SEEN}/{STEPS}'), Checkpoints(killed)
  shown = process.until(lambda: f'step {SEEN}/{STEPS}' in process.out())
  saved = process.until(lambda: checkpoints.latest() == SAVED)
  process.process.kill()
  done = process.end()
  assert shown and saved, done
  lines = rollouts.read(killed / rollouts.FILE)
  position = checkpoints.record(SAVED)['data']
  assert [line['rollout'] for line in lines] == [0, 1, 2]
  assert position['rollouts'] == 2 and len(position['left']) == 2

  done = start(killed).end()
  assert done.code == 0 and f'going on from checkpoint {SAVED}' in done.out, done
  assert f'1 lines of {killed / rollouts.FILE} are dropped, of rollouts from 2' in done.out
  assert_same_runs(made, STEPS, whole, killed)
