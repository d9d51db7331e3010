"""With which options do a model's authors generate? Those of its generation_config.json
(`tokenizer.generation`), as transformers reads them: without do_sample, greedily.
"""

from collections.abc import Mapping
from typing import Any

from decode.options import DRAWING

OURS = (*DRAWING, 'repetition_penalty', 'max_new_tokens')
# Ids, and what says nothing of a text.
SILENT = frozenset(
  '''
    bos_token_id eos_token_id pad_token_id decoder_start_token_id do_sample transformers_version
    _from_model_config use_cache cache_implementation output_attentions output_hidden_states
    output_scores output_logits return_dict_in_generate trust_remote_code
'''.split()
)

# What others are where they are not used, besides 0, False and nothing.
IDLE = {
  'diversity_penalty': 0.0,
  'encoder_repetition_penalty': 1.0,
  'guidance_scale': 1.0,
  'length_penalty': 1.0,
  'max_length': 20,
  'num_beam_groups': 1,
  'num_beams': 1,
  'num_return_sequences': 1,
  'typical_p': 1.0,
}


def model_defaults(generation: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
  """Options of a call by name, and 'key=value' of each setting that is not among them.

  A setting that is not there keeps its default here, which is none (transformers would take top_k
  for 50).
  """
  given = {key: value for key, value in generation.items() if value is not None}
  if given.get('do_sample'):
    options = {key: given[key] for key in OURS if key in given}
  else:
    options = {'temperature': 0.0}
    options |= {key: given[key] for key in OURS if key in given and key not in DRAWING}
  if stops := given.get('stop_strings'):
    options['stop'] = [stops] if isinstance(stops, str) else list(stops)

  known = {*OURS, *SILENT, 'stop_strings'}
  left = [
    f'{key}={value!r}'
    for key, value in given.items()
    if key not in known and not _says_nothing(value, IDLE.get(key))
  ]
  return options, left


def _says_nothing(value: Any, idle: Any) -> bool:
  """Whether a setting is as where it is not used. (True is 1 to Python, and no 1 here.)"""
  if isinstance(value, bool):
    return not value
  return value in (0, '', [], {}, idle)
