"""How is a config.json read to its last key, so that none that changes the model is passed over?"""

import difflib
from collections.abc import Iterable
from typing import Any

# Keys of config.json that change nothing of what a model computes.
HARMLESS = frozenset(
  '''
    architectures model_type transformers_version torch_dtype dtype _name_or_path name_or_path
    auto_map tokenizer_class prefix use_cache output_attentions output_hidden_states return_dict
    torchscript use_bfloat16 chunk_size_feed_forward gradient_checkpointing attn_implementation
    _attn_implementation _attn_implementation_autoset cache_implementation pretraining_tp ep_size
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id unk_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids suppress_tokens begin_suppress_tokens num_return_sequences output_scores
    return_dict_in_generate remove_invalid_values exponential_decay_length_penalty
    task_specific_params id2label label2id num_labels problem_type finetuning_task
    classifier_dropout summary_type summary_use_proj summary_activation summary_proj_to_labels
    summary_first_dropout is_llama_config n_special predict_special_tokens
'''.split()
)
# These act in training only (whose initialisers, losses and dropout are a run's own), or on
# rounding only.
TRAINING = frozenset(
  '''
    initializer_range initializer_factor attention_dropout hidden_dropout_prob
    attention_probs_dropout_prob resid_pdrop embd_pdrop attn_pdrop dropout_rate hidden_dropout
    output_router_logits router_aux_loss_coef aux_loss_alpha seq_aux router_jitter_noise
    reorder_and_upcast_attn
'''.split()
)
HARMLESS |= TRAINING

# Keys that say something only with another value.
ABSENT = {
  'tie_encoder_decoder': False,
  'add_cross_attention': False,
  'cross_attention_hidden_size': None,
  'pruned_heads': {},
  'is_decoder': False,
  'quantization_config': None,
  'use_bidirectional_attention': False,
  'sparsity_config': None,
  'is_encoder_decoder': False,
  'use_mrope': False,
  'rope_interleaved': False,
}


NEAR = 0.8  # of difflib's ratios: a slip of the pen, no other word


class Keys:
  """A config.json that is read key by key; what nobody has read at the end is an error.

  Args:
    hf: the parsed file. defaults: what transformers takes for a key that is not there.
  """

  def __init__(self, hf: dict, **defaults):
    self._hf, self._defaults, self._read = hf, defaults, set()

  def __call__(self, *names: str) -> Any:
    """The value of these names (of one thing) that the file has, else the default.

    Raises ValueError for neither, and where two names have a value and these differ.
    """
    self._read.update(names)
    written = {name: self._hf[name] for name in names if name in self._hf}
    if written:
      said = {name: value for name, value in written.items() if value is not None}
      self._check_one(said)
      return next(iter(said.values()), None)
    if names[0] not in self._defaults:
      raise ValueError(f'config.json has no {names[0]!r}, and it cannot be guessed')
    return self._defaults[names[0]]

  def _check_one(self, said: dict[str, Any]) -> None:
    first, *others = said or [None]
    for name in others:
      if _in_one_spelling(said[name]) != _in_one_spelling(said[first]):
        raise ValueError(
          f'config.json has {first}={said[first]!r} and {name}={said[name]!r}: two names of one '
          f'thing, with other values; leave out the wrong one, --ignore_key={name} or '
          f'--ignore_key={first}'
        )

  def only(self, name: str, *allowed) -> None:
    """Raises NotImplementedError for a value that changes the computation in a way that is not
    built.
    """
    self._read.add(name)
    if name in self._hf and self._hf[name] not in allowed:
      raise unsupported(f'{name}={self._hf[name]!r}', map(repr, allowed))

  def close(self, *harmless: str) -> None:
    """Raises ValueError for keys that were never read: each may change what the model computes."""
    for name, value in ABSENT.items():
      if name not in self._read:
        self.only(name, value, None)
    known = {*self._read, *HARMLESS, *harmless}
    unknown = sorted(set(self._hf) - known)
    if unknown:
      hints = [
        f'{name}={self._hf[name]!r}'
        + (
          f' (did you mean {near[0]!r}?)'
          # Of keys that say something: another that is not looked at would not help.
          if (near := difflib.get_close_matches(name, self._read, 1, NEAR))
          else ''
        )
        for name in unknown
      ]
      raise ValueError(
        f'config.json has keys that nothing is known of: {", ".join(hints)}; if they do not change '
        'what the model computes, ignore them: '
        + ' '.join(f'--ignore_key={name}' for name in unknown)
      )


def _in_one_spelling(value):
  """Rotary parameters as they are written now: their kind was called 'type'; others as they are."""
  if not isinstance(value, dict):
    return value
  kind = value.get('rope_type', value.get('type'))
  kept = {name: x for name, x in value.items() if name != 'type' and x is not None}
  return kept if kind is None else kept | {'rope_type': kind}


def unsupported(what: str, supported: Iterable[str]) -> NotImplementedError:
  """The error for a value of config.json."""
  return NotImplementedError(
    f'{what} in config.json is not supported; supported: {", ".join(supported)}'
  )
