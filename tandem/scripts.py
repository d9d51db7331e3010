"""How is a command started that was installed? As its file would be: `tandem-train` is train.py."""

import runpy

import tandem


def train() -> None:
  """tandem-train"""
  _run('train')


def generate() -> None:
  """tandem-generate"""
  _run('generate')


def evaluate() -> None:
  """tandem-evaluate"""
  _run('evaluate')


def serve() -> None:
  """tandem-serve"""
  _run('serve')


def plan() -> None:
  """tandem-plan"""
  _run('plan')


def convert() -> None:
  """tandem-convert"""
  _run('convert')


def _run(command: str) -> None:
  runpy.run_path(str(tandem.ROOT / f'{command}.py'), run_name='__main__')
