"""Does `auto` find, for every spec and platform, the fastest backend that honours it?"""

import functools
import itertools

import jax.numpy as jnp
import pytest
from rows import draw

from kernels import attention as dispatch, cudnn
from kernels.attention import HONOURS, attention
from kernels.mask import Mask
from kernels.scoring import Scoring


def inputs(T, N, H):
  return draw(2, T, N, H), draw(2, T, N, H, seed=1), draw(2, T, N, H, seed=2)


def test_auto_says_once_what_it_is(capsys):
  q, k, v = inputs(4, 2, 4)
  dispatch._said.cache_clear()
  for _ in range(2):
    attention(q, k, v, Scoring())
  assert capsys.readouterr().err == "attention: 'auto' is 'blocked' on a cpu\n"


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
def test_auto_finds_a_backend_for_every_spec(platform):
  for size in range(len(HONOURS['reference']) + 1):
    for spec in itertools.combinations(sorted(HONOURS['reference']), size):
      chosen = dispatch.choose(set(spec), platform)
      assert set(spec) <= HONOURS[chosen]
      faster = {
        'cpu': ('blocked',),
        'gpu': ('blocked', 'xla', 'pallas_gpu'),
        'tpu': ('blocked', 'xla', 'pallas_tpu'),
      }[platform]
      assert (chosen in faster) == any(set(spec) <= HONOURS[name] for name in faster)


def test_auto_on_a_tpu_is_our_kernel_but_for_few_queries(monkeypatch):
  """By the queries that a row has: training and prefill, against a token at a time, whose positions
  no flag of xla's can say.
  """
  assert (
    dispatch.choose({'causal', 'segments'}, 'tpu')
    == dispatch.choose({'causal', 'positions', 'softcap', 'sinks'}, 'tpu')
    == 'pallas_tpu'
  )
  assert dispatch.choose({'causal', 'positions'}, 'tpu', without=frozenset({'pallas_tpu'})) == 'xla'
  assert (
    dispatch.choose({'causal', 'positions', 'softcap'}, 'tpu', without=frozenset({'pallas_tpu'}))
    == 'blocked'
  )
  monkeypatch.setattr(dispatch.mesh, 'platform', lambda: 'tpu')
  ran = []

  def run(name, q, k, v, scoring, **options):
    return (ran.append(name), (q, q[..., 0]))[1]

  monkeypatch.setattr(dispatch.flash, 'attention', run)
  monkeypatch.setattr(dispatch, 'xla', functools.partial(run, 'xla'))
  q, k, v = inputs(256, 2, 4)

  def at(queries):
    return Mask(
      **{
        f'{side}_positions': jnp.arange(256 - n, 256)[None]
        for side, n in (('query', queries), ('key', 256))
      }
    )

  for queries in (256, 128, 127, 1):
    attention(q[:, -queries:], k, v, Scoring(at(queries)))
  assert ran == ['pallas_tpu', 'pallas_tpu', 'xla', 'xla']


def test_auto_on_a_hopper_gpu_is_cudnn_where_it_can_and_our_kernel_where_it_cannot(monkeypatch):
  monkeypatch.setattr(dispatch.mesh, 'platform', lambda: 'gpu')
  ran = []

  def run(name, q, k, v, scoring, **options):
    return (ran.append(name), (q, q[..., 0]))[1]

  monkeypatch.setattr(dispatch.flash, 'attention', run)
  monkeypatch.setattr(dispatch, 'xla', functools.partial(run, 'xla'))
  q, k, v = (x.astype(jnp.bfloat16) for x in inputs(256, 2, 64))
  packed = Mask(**{f'{side}_segments': jnp.zeros((1, 256), jnp.int32) for side in ('query', 'key')})
  for capability in ((9, 0), (8, 0), (10, 0)):
    monkeypatch.setattr(cudnn, 'capability', lambda: capability)
    for mask in (Mask(), packed):
      attention(q[:1], k[:1], v[:1], Scoring(mask))
  attention(q[:1], *(x[:1].astype(jnp.bfloat16) for x in (k, v)), Scoring(packed))
  monkeypatch.setattr(cudnn, 'capability', lambda: (9, 0))
  attention(*(x[:1].astype(jnp.float32) for x in (q, k, v)), Scoring(packed))
  attention(
    q[:1, :1],
    k[:1, :1],
    v[:1, :1],
    Scoring(
      Mask(**{f'{side}_segments': jnp.zeros((1, 1), jnp.int32) for side in ('query', 'key')})
    ),
  )
  assert ran == ['xla', 'pallas_gpu', 'xla', 'xla', 'xla', 'xla', 'xla', 'xla', 'xla']


def test_auto_on_a_hopper_gpu_is_our_kernel_for_scores_that_cudnn_has_not(monkeypatch):
  """A cap and sinks are no part of the mask that cuDNN is asked about."""
  monkeypatch.setattr(dispatch.mesh, 'platform', lambda: 'gpu')
  monkeypatch.setattr(cudnn, 'capability', lambda: (9, 0))
  ran = []

  def run(name, q, k, v, scoring, **options):
    return (ran.append(name), (q, q[..., 0]))[1]

  monkeypatch.setattr(dispatch.flash, 'attention', run)
  monkeypatch.setattr(dispatch, 'xla', functools.partial(run, 'xla'))
  q, k, v = (x[:1].astype(jnp.bfloat16) for x in inputs(256, 2, 64))
  for more in ({}, {'softcap': 50.0}, {'sinks': jnp.zeros(2)}):
    attention(q, k, v, Scoring(Mask(), **more))
  assert ran == ['xla', 'pallas_gpu', 'pallas_gpu']


def test_auto_says_where_gradients_are_not_the_same_bits_every_time(monkeypatch, capsys):
  monkeypatch.setattr(dispatch.mesh, 'platform', lambda: 'gpu')
  for chosen in ('pallas_gpu', 'xla'):
    dispatch._said.cache_clear()
    dispatch._said(chosen)
    said = capsys.readouterr().err
    remedy = (
      'model.execution.attention=pallas_gpu and model.execution.attention_blocks.deterministic=True'
    )
    assert (remedy in said) == (chosen == 'pallas_gpu')
  dispatch._said.cache_clear()
