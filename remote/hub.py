"""How does what lies on Hugging Face's hub come here? By huggingface_hub, into its cache:

hf://ORG/NAME[@REVISION]                        a model
hf://ORG/NAME[@REVISION]/PATH                   a file of it, or a directory
hf://datasets/ORG/NAME[@REVISION]/PATTERN       files of a dataset
"""

import glob
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

# What tells of a model and of its tokenizer, without its weights.
SMALL = (
  '*.json',
  'chat_template.jinja',
  'additional_chat_templates/*.jinja',
  'tokenizer.model',
  'spiece.model',
  'sentencepiece*.model',
)
_ADDRESS = re.compile(r'hf://?(datasets/)?([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w.-]+))?(?:/(.*))?')


class Named(NamedTuple):
  """What an address names; kind: 'model' or 'dataset'. path: within the repository."""

  kind: str
  repository: str
  revision: str | None
  path: str


def named(address: str) -> Named:
  """Raises ValueError for an address that names nothing."""
  parsed = _ADDRESS.fullmatch(str(address))
  if not parsed:
    raise ValueError(
      f'{address} names nothing on the hub; give hf://ORG/NAME[@REVISION] for a model, or '
      'hf://datasets/ORG/NAME[@REVISION]/PATTERN for files of a dataset'
    )
  dataset, repository, revision, path = parsed.groups()
  return Named('dataset' if dataset else 'model', repository, revision, path or '')


def pattern(address: str) -> str:
  """A dataset's pattern of files as one of this machine, where those files are then."""
  of = named(address)
  if of.kind != 'dataset' or not of.path:
    raise ValueError(
      f'{address} names no files; give hf://datasets/ORG/NAME[@REVISION]/PATTERN, such as '
      'hf://datasets/ORG/NAME/data/*.parquet'
    )
  # There '*' crosses directories, and '**/' needs one. The pattern passes over what is too much.
  wanted = sorted({of.path.replace('**/', some) for some in ('', '*/')})
  directory = brought(of, wanted, remedy='bring the files into a directory, and give that')
  return f'{glob.escape(str(directory))}/{of.path}'


def here(address: str) -> pathlib.Path:
  """What a repository, or a directory of it, tells of its model and its tokenizer (SMALL), or the
  file of it.
  """
  of = named(address)
  wanted = [of.path, *(f'{of.path}/{name}' for name in SMALL)] if of.path else SMALL
  remedy = "bring the tokenizer's files into a directory, and give that"
  return brought(of, wanted, remedy) / of.path


def brought(of: Named, wanted: Sequence[str], remedy: str) -> pathlib.Path:
  """The directory where huggingface_hub keeps a repository, with the files that are wanted.

  wanted: patterns; of a model without a path, of its first level only, since some keep the same
  weights again in other forms below. remedy: what to do where nothing comes.
  Raises FileNotFoundError, with that, where it cannot be had.
  """
  # Not imported with this module: it takes half a second.
  try:
    import huggingface_hub
  except ImportError as error:
    raise FileNotFoundError(
      f'{of.repository} is no directory here, and huggingface_hub, which would bring it, is not '
      f'installed: pip install huggingface_hub, or {remedy}'
    ) from error
  only = {'repo_type': 'dataset'} if of.kind == 'dataset' else {}
  if of.kind == 'model' and not of.path:
    # But for the folder of templates, of which no others are wanted.
    only = {'ignore_patterns': ['*/*.json', '*/*.model', '*/*.safetensors']}
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        of.repository, revision=of.revision, allow_patterns=[*wanted], **only
      )
    )
  except Exception as error:  # of the network, of the hub, of a cache: each library has its own
    reason = next(iter(str(error).splitlines()), '')
    raise FileNotFoundError(
      f'{of.repository} is no directory here, and did not come from the hub '
      f'({type(error).__name__}: {reason}); {remedy}'
    ) from error
