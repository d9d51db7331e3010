"""A Ray cluster writes what one process does, whichever of its workers die."""

import contextlib
import os
import pathlib
import random
import signal
import sys

import pytest

from data.config import TokenizerConfig
from tests.data.test_corpus import alone, config, small, together  # noqa: F401


def workers_of_ray(process='self'):
  """Numbers of the processes below this one that do tasks."""
  found = []
  for children in pathlib.Path(f'/proc/{process}/task').glob('*/children'):
    with contextlib.suppress(OSError):  # it has ended
      for child in children.read_text().split():
        title = pathlib.Path(f'/proc/{child}/cmdline').read_bytes()
        found += (
          [int(child)]
          if title.startswith((b'ray::outcome', b'ray::IDLE'))
          else workers_of_ray(child)
        )
  return found


@pytest.mark.slow
def test_a_cluster_whose_workers_die_writes_the_same(tmp_path, small, monkeypatch):  # noqa: F811
  from data.on_ray import RayEngine

  class Dying(RayEngine):
    """Kills some worker behind every tenth task."""

    killed, given = 0, 0

    def submit(self, number, task):
      super().submit(number, task)
      self.given += 1
      if self.given % 10 == 0 and (running := workers_of_ray()):
        self.killed += 1
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
          os.kill(random.Random(self.given).choice(running), signal.SIGKILL)

  monkeypatch.setenv('RAY_AUTH_MODE', 'disabled')
  monkeypatch.setenv('PYTHONPATH', str(pathlib.Path(__file__).parents[2]))
  made = config(tmp_path, tokenizer=TokenizerConfig(kind='byte'))
  expected = alone(made, tmp_path / 'alone')
  with contextlib.closing(Dying('', 2)) as by:
    assert together(made, tmp_path / 'ray', by) == expected
    assert by.killed > 2, by.given


def test_without_ray_the_extra_is_named(monkeypatch):
  from data.on_ray import RayEngine

  monkeypatch.setitem(sys.modules, 'ray', None)
  with pytest.raises(ValueError, match=r'--engine=ray needs Ray: pip install -e .\[ray\]'):
    RayEngine('', 2)
