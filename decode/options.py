"""What may a call ask for? Each option once, with its type, default, range and help.

`Options` is that table: Python callers fill it in, `decode.sampling` takes types, defaults and
ranges from it, generate.py its flags, and `python -m decode.options > docs/options.md` writes it
for people.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

import names
from decode.table import (
  Option,
  Range,
  Where,
  attributes,
  law_field,
  markdown,
  option_field,
  rows_of,
)
from model.cache import APPEND

CHUNK = 16  # tokens a call to the device: the first ones come soon, and dispatch costs little
DRAFTERS = ('draft', 'lookup', 'early_exit')  # of these one can draft
DRAWING = ('temperature', 'top_k', 'top_p', 'min_p')  # what a search, which draws nothing, ignores

# One value for all rows, or a sequence of one for each; judged by `sampling.make_sampling`, whose
# errors say what to do.
PerRow = Any
Whole = int | np.integer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What one call asks for. Raises ValueError for values that make no sense, alone or together.

  Ranges of what the law of sampling reads are judged where rows are known (`sampling_of`).
  """

  max_new_tokens: Whole = option_field(
    int,
    128,
    Range(1, 2**24, '[]'),
    'Tokens to generate at most.',
    "A row ends there if it has not ended itself, and before where the model's context "
    '(model.max_length) ends, which is said then.',
  )
  temperature: PerRow = law_field(
    np.float32,
    1.0,
    Range(0, math.inf, '[)', 'must be 0 (greedy) or positive, and finite'),
    'Divides the logits; 0 is greedy.',
  )
  top_k: PerRow = law_field(
    np.int32,
    0,
    Range(0, 2**31, '[)', 'must be 0 (all tokens) or positive, whole and below 2**31'),
    'Only the k most likely tokens; 0 keeps all.',
  )
  top_p: PerRow = law_field(
    np.float32,
    1.0,
    Range(0, 1, '(]', 'must be above 0 and at most 1 (all tokens)'),
    'Only the most likely tokens of this mass; 1 keeps all.',
    'The token that reaches it is kept (nucleus sampling, Holtzman et al., arXiv:1904.09751).',
  )
  min_p: PerRow = law_field(
    np.float32,
    0.0,
    Range(0, 1, '[]', 'must be in [0, 1]; 0 keeps all tokens'),
    'Only tokens at least this times as likely as the likeliest.',
    '0 keeps all (Nguyen et al., arXiv:2407.01082).',
  )
  repetition_penalty: PerRow = law_field(
    np.float32,
    1.0,
    Range(0, math.inf, '()', 'must be positive and finite; 1 is none'),
    'Above 1, tokens that were there are less likely.',
    'Logits of tokens of the prompt and of generated ones are divided by it where positive, '
    'multiplied where negative (Keskar et al., arXiv:1909.05858).',
  )
  presence_penalty: PerRow = law_field(
    np.float32,
    0.0,
    Range(ends='()', must='must be finite; 0 is none'),
    'Subtracted from logits of tokens that were generated.',
  )
  frequency_penalty: PerRow = law_field(
    np.float32,
    0.0,
    Range(ends='()', must='must be finite; 0 is none'),
    'Subtracted from logits of generated tokens, once for every time.',
  )
  logit_bias: PerRow = law_field(
    '{id: number}',
    None,
    None,
    'id:value, added to the logit of an id; -inf forbids it.',
    'From Python a dict of id -> value, as in {13: -1.5}.',
    flag='multi_string',
  )
  seed: PerRow = law_field(
    np.uint32,
    0,
    Range(0, 2**32, '[)', 'must be in [0, 2**32) and whole'),
    'Of the draws; the same seed gives the same text.',
    'Prompt i draws with seed + i (behind 2**32 - 1 comes 0), of its samples all but the first '
    'with others that follow from that (decode.sampling.sample_seed). What a row draws depends on '
    'its seed and on positions only; a completion has it, to be asked for alone.',
  )
  num_samples: Whole = option_field(
    int,
    1,
    Range(1, 2**14, '[]'),
    'Completions of each prompt.',
    'Rows of their own that share the reading of the prompt; of a search the best ones, the best '
    'first, and fewer where a constraint or logit_bias leaves fewer.',
  )
  beams: Whole = option_field(
    int,
    1,
    Range(1, 2**10, '[]'),
    'Of a search for the likeliest texts, of which it writes num_samples; it draws nothing.',
    '2 or more search (decode.beam): temperature is 1.0 (the default) or 0.0 then, without top_k, '
    'top_p and min_p.',
  )
  length_penalty: float = option_field(
    float,
    1.0,
    Range(
      ends='()',
      must='must be a finite number; 1.0 ranks texts by the mean of their log-probabilities',
    ),
    'Of a search: above 0, longer texts score better.',
  )
  early_stopping: bool | str = option_field(
    "False, True or 'never'",
    False,
    None,
    'Of a search: when it ends, see decode.beam.',
    choices={'no': False, 'yes': True, 'never': 'never'},
    flag='enum',
  )
  stop: Any = option_field(
    'texts and ids, or one',
    (),
    None,
    'A text at which a completion ends, without it.',
    'From Python ids, too (such an id is part of the completion); None is none. A search takes ids '
    'only.',
    flag='multi_string',
  )
  logprobs: Whole = option_field(
    int,
    -1,
    Range(-1),
    'Print, or write, log-probabilities, and so many alternatives of every token.',
    '-1: nothing of the kind is printed, and no alternative reported.',
  )
  constraint: Any = option_field(
    'decode.constrain.Constraint',
    None,
    None,
    'What texts keep to; one for all prompts, or one (or None) for each.',
    per_row=True,
  )
  adapter: PerRow = option_field(
    str,
    '',
    None,
    'Which of the adapters that were loaded, soft tokens among them, writes a text; default: none.',
    'One for all prompts, or one for each; what the command reads from a file of prompts may name '
    'its own.',
    per_row=True,
  )
  chunk: Whole = option_field(
    int,
    CHUNK,
    Range(1, 2**14, '[]'),
    'Steps a call to the device, each a token, or more with drafts.',
    'Texts do not depend on it.',
  )
  cache_dtype: str = option_field(
    str,
    '',
    None,
    'Of keys and values: float32, bfloat16, int8; default: as the model computes.',
  )
  draft: Any = option_field(
    'Generator',
    None,
    None,
    'Directory of a run whose smaller model drafts, with the same tokenizer.',
    'From Python its Generator. One of draft, lookup and early_exit can draft '
    '(decode.speculative): greedy texts are those without; others have the same law, and are other '
    'draws.',
    flag='string',
  )
  lookup: Whole = option_field(
    int,
    0,
    Range(0, 2**10, '[]'),
    'Draft what followed the last so many ids where they stood before; 0: do not.',
  )
  early_exit: Whole = option_field(
    int, 0, Range(0), "Draft with so many of the model's layers; 0: do not."
  )
  draft_tokens: Whole = option_field(int, 4, Range(1, APPEND), 'Drafted at a time.')

  def __post_init__(self):
    for row in TABLE.values():
      if row.type is int:
        value = getattr(self, row.name)
        _check_whole(row, value)
        # Programs and JSON know no integers of NumPy.
        object.__setattr__(self, row.name, int(value))
    object.__setattr__(self, 'stop', _stops(self.stop))
    _check_bias(self.logit_bias)
    _check_drafts(self)
    _check_search(self)

  @classmethod
  def of(cls, given: Mapping[str, Any]) -> 'Options':
    """Options by name; an unknown one raises with the nearest that there is."""
    for name in given:
      names.check('option', name, [field.name for field in dataclasses.fields(cls)])
    return cls(**given)

  @property
  def rows(self) -> int:
    """Of each prompt when it was read: a search makes its beams of one."""
    return 1 if self.beams > 1 else self.num_samples

  def stops(self, vocabulary: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Texts and ids that end a row. Raises ValueError for what is neither."""
    for stop in self.stop:
      is_text = isinstance(stop, str) and stop != ''
      is_id = isinstance(stop, int) and not isinstance(stop, bool) and 0 <= stop < vocabulary
      if not is_text and not is_id:
        raise ValueError(
          f'stop={stop!r} must be a text that is not empty, or an id in [0, {vocabulary})'
        )
    texts = tuple(stop for stop in self.stop if isinstance(stop, str))
    ids = tuple(stop for stop in self.stop if isinstance(stop, int))
    return texts, ids


# What generate.py reads and turns into something else.
COMMAND = (
  Option(
    name='defaults',
    type='tandem or model',
    default='tandem',
    help='Of options that are not given: those below, or those of the model, which are printed.',
    more='The latter are what its generation_config.json says (decode.defaults); from Python '
    '`g(prompt, **g.defaults)`.',
    where=Where.COMMAND,
    choices={'tandem': 'tandem', 'model': 'model'},
    flag='enum',
  ),
  Option(
    name='stop_id',
    type='ids',
    default=(),
    help='An id at which a completion ends.',
    more='Becomes part of stop.',
    where=Where.COMMAND,
    flag='multi_integer',
  ),
  Option(
    name='regex',
    type=str,
    default=None,
    help='Texts match this regular expression.',
    more='Becomes constraint.',
    where=Where.COMMAND,
    flag='string',
  ),
  Option(
    name='schema',
    type=str,
    default=None,
    help='Texts are JSON of this schema: a file, or the schema itself.',
    more='Becomes constraint.',
    where=Where.COMMAND,
    flag='string',
  ),
)
TABLE = rows_of(Options)
LAW = tuple(name for name, row in TABLE.items() if row.where is Where.LAW)


def _check_whole(row: Option, value) -> None:
  least, most = row.range.least, row.range.most
  if not isinstance(value, Whole) or isinstance(value, bool) or value < least:
    raise ValueError(f'{row.name}={value!r} must be at least {least}, and whole')
  # draft_tokens, whose range is open, is judged with what drafts.
  if row.range.ends == '[]' and value > most:
    raise ValueError(
      f'{row.name}={value!r} must be at most {most}, for arrays of that size are allocated before '
      'the first token; give less, and call again for more'
    )


def _stops(given) -> tuple:
  """Options.stop as a tuple, of integers of Python."""
  if given is None:
    return ()
  if isinstance(given, str | Whole):
    given = (given,)
  if isinstance(given, bytes) or not np.iterable(given):
    raise ValueError(f'stop={given!r} must be a text, an id, or several of these')
  return tuple(int(stop) if isinstance(stop, np.integer) else stop for stop in given)


def _check_bias(given) -> None:
  for bias in given if isinstance(given, (list, tuple)) else [given]:
    if bias is not None and not isinstance(bias, Mapping):
      raise ValueError(
        f'logit_bias={given!r} must map ids to what is added to their logits, as {{13: -1.5}} '
        'does, or be a list of such, one for each prompt'
      )


def _check_drafts(options: Options) -> None:
  most = TABLE['draft_tokens'].range.most
  if options.draft_tokens >= most:
    raise ValueError(
      f'draft_tokens={options.draft_tokens} must be below {most}, which is what a cache takes at '
      'once'
    )
  drafters = [name for name in DRAFTERS if getattr(options, name)]
  if len(drafters) > 1:
    raise ValueError(f'{" and ".join(drafters)} are given: one of them can draft')
  if not drafters and options.draft_tokens != TABLE['draft_tokens'].default:
    raise ValueError(
      f'draft_tokens={options.draft_tokens}, but nothing drafts; give draft, lookup or early_exit, '
      'or leave it out'
    )


def _check_search(options: Options) -> None:
  """Raises ValueError for options of a search (decode.beam) that make no sense."""
  penalty, early = options.length_penalty, options.early_stopping
  row = TABLE['length_penalty']
  is_number = isinstance(penalty, (int, float)) and not isinstance(penalty, bool)
  if not is_number or not row.range.holds(penalty):
    raise ValueError(f'length_penalty={penalty!r} {row.range.must}')
  known = TABLE['early_stopping'].choices.values()
  if not isinstance(early, (bool, str)) or early not in known:
    raise ValueError(f"early_stopping={early!r} must be False, True or 'never'")
  if options.beams > 1:
    _check_beams(options)
  elif penalty != row.default or early is not False:
    raise ValueError(
      f'length_penalty={penalty} and early_stopping={early!r} are of a search, but beams=1; ask '
      'for 2 or more'
    )


def _check_beams(options: Options) -> None:
  """The same of options beside which 2 beams or more make no sense."""
  beams = options.beams
  for name in DRAWING:
    idle = TABLE[name].default
    # Greedy is no contradiction: a search takes the likeliest, too.
    known = (idle, 0) if name == 'temperature' else (idle,)
    value = getattr(options, name)
    if any(x not in known for x in np.ravel(value).tolist()):
      raise ValueError(
        f'{name}={value!r} with beams={beams}: a search draws nothing; leave {name} at {idle:g}, '
        'or draw with num_samples and without beams'
      )
  for name in DRAFTERS:
    if getattr(options, name):
      raise ValueError(
        f'{name} with beams={beams}: a draft guesses one text, a search follows several; leave one '
        'of the two out'
      )
  if options.num_samples > beams:
    raise ValueError(
      f'num_samples={options.num_samples} with beams={beams}: it finds as many texts as it has '
      'beams; ask for fewer'
    )
  if any(isinstance(stop, str) for stop in options.stop):
    raise ValueError(
      f'stop={options.stop!r} with beams={beams}: it ranks by ids, before a text could be cut off; '
      'give ids to stop at, or a constraint that the text keeps to'
    )


Options.__doc__ = f'{Options.__doc__}\n  Attributes:\n{attributes(TABLE.values())}\n  '

INTRODUCTION = """# Options of generation

Written by `python -m decode.options > docs/options.md` from the one table that Python, the command
line and this page read (`decode/options.py`). From Python they are arguments of a call,
`g('def main(', temperature=0.8)`; of the command, flags: `--temperature=0.8`. Those marked * may
be a sequence in Python, of one value for each prompt. The law applies its options in a fixed order:
penalties and bias, then the constraint, temperature, top_k, top_p, min_p."""


def page() -> str:
  """The table for people: docs/options.md."""
  parts = [INTRODUCTION]
  for where in Where:
    rows = [row for row in (*TABLE.values(), *COMMAND) if row.where is where]
    parts += [f'## {where.value}', markdown(rows)]
  return '\n\n'.join(parts) + '\n'


if __name__ == '__main__':
  print(page(), end='')
