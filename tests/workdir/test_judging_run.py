"""Does a run that judges say the same on every mesh, whatever it was trained to tell?"""

import functools
from types import SimpleNamespace as Of

import jax
import numpy as np
import pytest

from model import heads
from tests.evaluation.test_label_scores import CONFIGS, generator
from workdir import judging_run, reward
from workdir.judging_run import JudgeRequest, judge_of
from workdir.reward import RewardModel

MESHES = (dict(data=4, tensor=2), dict(fsdp=2, context=2), dict(stage=2))
# As many as no mesh divides, of different lengths, and one without an answer, which no model reads.
PROMPTS = [f'{"Why? " * (i % 3)}{i}' for i in range(20)]
ANSWERS = [f'{"so " * (i % 5)}{i}!' for i in range(19)] + [' ']
KINDS = {
  'reward': {'gives_rewards': True},
  'head': {'tells_labels': 'head', 'too_long': 'drop'},
  'words': {'tells_labels': 'words'},
}


def judged(kind: str, monkeypatch, template: str, **sizes: int):
  """(what is said of the answers, the scores that it is said by)."""
  model, seen = generator('llama', **sizes), []
  with jax.set_mesh(model.mesh):
    labels = 1 if kind == 'reward' else 2
    head = jax.jit(functools.partial(heads.new, CONFIGS['llama'], 3, labels=labels))()
  objective = Of(kind=kind, template=template, **KINDS[kind])
  monkeypatch.setattr(judging_run, 'config_of', lambda workdir: Of(objective=objective))
  monkeypatch.setattr(judging_run, 'open_reward', lambda *given: RewardModel(model, head, 'd'))
  monkeypatch.setattr(judging_run, 'head_of', lambda *given: head)
  monkeypatch.setattr(judging_run.Generator, 'load', lambda *given: model)

  def noted(of, name):
    plain = getattr(of, name)

    def call(*given):
      seen.append(plain(*given))
      return seen[-1]

    monkeypatch.setattr(of, name, call)

  with monkeypatch.context() as monkeypatch:
    for of, name in (
      (reward, 'scores_of'),
      (judging_run, 'scores_of'),
      (judging_run.classify, 'label_scores'),
    ):
      noted(of, name)
    said = judge_of(JudgeRequest('run', label='' if kind == 'reward' else 'no'))(PROMPTS, ANSWERS)
  (scores,) = seen
  return said, np.asarray(scores[0] if isinstance(scores, tuple) else scores)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_answers_are_judged_alike_on_every_mesh(kind, monkeypatch, tmp_path):
  template = tmp_path / 'template.toml'
  template.write_text('pattern = "{{ text }}"\n[words]\nyes = "it is"\nno = "I will not"\n')
  said, scores = judged(kind, monkeypatch, str(template))
  assert len(said) == len(ANSWERS) == len(scores) + 1 and said[-1] is False
  assert scores.std() > 0
  for sizes in MESHES:
    again, there = judged(kind, monkeypatch, str(template), **sizes)
    np.testing.assert_allclose(there, scores, atol=1e-4, err_msg=str(sizes))
    assert again == said
