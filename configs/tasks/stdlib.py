"""Bits per byte of the interpreter's library, modules that training holds out; without any data."""

from evaluation.library import modules
from evaluation.task import Perplexity, Task


def get_task() -> Task:
  return Task(Perplexity(), modules, prompt='{{ text }}')
