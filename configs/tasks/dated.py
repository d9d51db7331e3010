"""Bits per byte of texts that have a date (dated/texts.jsonl: date, text)."""

from evaluation.knowledge import dated
from evaluation.task import Perplexity, Task


def get_task() -> Task:
  return Task(Perplexity(), 'dated/texts.jsonl', prompt='{{ text }}', rows=dated, by='year')
