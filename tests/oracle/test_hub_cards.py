"""Does Hugging Face's own library read a model card as it was meant?"""

import pytest

from evaluation import card
from evaluation.running import Summary

pytestmark = pytest.mark.oracle


def test_the_hub_reads_scores_licence_and_emissions(tmp_path):
  from huggingface_hub import ModelCard

  of = {'value': 0.25, 'low': 0.1, 'high': 0.4, 'n': 40, 'method': 'wilson', 'small': False}
  metrics = {'accuracy (per byte)': of | {'lower_is_better': False}}
  settings = {'shots': 3, 'run': {'workdir': 'x', 'step': 3}}
  summary = Summary('arc', settings, 40, 'abc123', 0.25, metrics, {}, {})
  emissions = {'emissions': 12.5, 'source': 'given', 'hardware_used': '1 x cpu'}
  front = card.front('it', [(tmp_path, summary)], emissions)
  blocks = {name: '| a | b |' for name in card.BLOCKS} | {card.FRONT: front}
  text = card.written('it', blocks).replace('# license: apache-2.0', 'license: apache-2.0')
  read = ModelCard(text)
  assert read.data.license == 'apache-2.0' and read.data.library_name == 'tandem'
  assert read.data.co2_eq_emissions['emissions'] == 12.5
  (result,) = read.data.eval_results
  assert (result.task_type, result.dataset_type, result.metric_value) == (
    'text-generation',
    'arc',
    0.25,
  )
  assert result.metric_args['n'] == 40 and read.data.model_name == 'it'
  assert read.text.lstrip().startswith('# it') and '<!-- begin scores' in read.text
