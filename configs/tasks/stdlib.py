"""Bits per byte of modules of the interpreter's library that training holds out; no data is needed."""

from evaluation.library import modules
from evaluation.task import Perplexity, Task


def get_task() -> Task:
  return Task(Perplexity(), modules, prompt='{{ text }}')
