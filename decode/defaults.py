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
  if given.get('stop_strings'):
    options['stop'] = given['stop_strings']

  known = {*OURS, *SILENT, 'stop_strings'}
  # 0, 1 and nothing are what all others are where they are not used.
  left = [
    f'{key}={value!r}'
    for key, value in given.items()
    if key not in known and value not in (0, 1, '', [], {})
  ]
  return options, left
