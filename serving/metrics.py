"""How is a server doing? Numbers for Prometheus, which mean what vLLM's of the same names do, under
our prefix: what its dashboards show of them they show of ours.

Counters and gauges are the service's own, read when they are asked for; times are noted as requests
end.
"""

import collections
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from serving import call as calls
from serving.call import Event, Stats
from serving.service import Service
from serving.ticket import Ticket

TYPE = CONTENT_TYPE_LATEST
MODEL = ('model_name',)
KIND = (*MODEL, 'kind')
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
LONG = (*SHORT[4:], 10, 20, 40, 80, 160, 320, 640)
FIRST = (*SHORT, *LONG[-7:])  # from the fastest prompts to the longest queues

# name -> (kind, labels, help), and of a histogram the ends of its buckets, in seconds. Behind its
# name stands _bucket, _sum or _count.
TABLE = {
  'tandem_num_requests_running': ('gauge', MODEL, 'Rows that have a request.'),
  'tandem_num_requests_waiting': ('gauge', MODEL, 'Samples that wait for a row.'),
  'tandem_kv_cache_usage_perc': (
    'gauge',
    MODEL,
    'Share of the tokens for which there is memory, or of --pages, that is in use, 0 to 1.',
  ),
  'tandem_prompt_tokens_total': (
    'counter',
    MODEL,
    'Tokens of prompts, those included that had been read before.',
  ),
  'tandem_generation_tokens_total': ('counter', MODEL, 'Tokens that reached who asked.'),
  'tandem_prefix_cache_queries_total': ('counter', MODEL, 'Tokens of prompts that were looked up.'),
  'tandem_prefix_cache_hits_total': (
    'counter',
    MODEL,
    'Tokens of prompts that had been read before.',
  ),
  'tandem_spec_decode_num_draft_tokens_total': (
    'counter',
    MODEL,
    'Tokens that were drafted, of samples that have ended.',
  ),
  'tandem_spec_decode_num_accepted_tokens_total': (
    'counter',
    MODEL,
    'Of these, those that were kept.',
  ),
  'tandem_num_preemptions_total': ('counter', MODEL, 'How often a row had to wait for room.'),
  'tandem_request_success_total': (
    'counter',
    (*MODEL, 'finished_reason'),
    'Samples that ended, by why.',
  ),
  'tandem_request_errors_total': (
    'counter',
    (*MODEL, 'kind'),
    'Samples that failed, by what failed.',
  ),
  'tandem_requests_refused_total': (
    'counter',
    MODEL,
    'Requests for which there was no room in the queue.',
  ),
  'tandem_http_requests_total': (
    'counter',
    (*MODEL, 'status'),
    'Requests, by what they were answered with; 499: whoever asked had gone.',
  ),
  'tandem_num_jobs_waiting': (
    'gauge',
    MODEL,
    'Texts to be embedded, and prompts to be scored, that wait.',
  ),
  'tandem_jobs_done_total': ('counter', KIND, 'Of these, those that are done, by what they were.'),
  'tandem_jobs_failed_total': ('counter', KIND, 'Those that have failed.'),
  'tandem_job_tokens_total': ('counter', KIND, 'Tokens of those that are done.'),
  'tandem_job_seconds_total': (
    'counter',
    KIND,
    'That those that are done took together, from when each was asked for.',
  ),
  'tandem_time_to_first_token_seconds': (
    'histogram',
    MODEL,
    'From the request to its first token.',
    FIRST,
  ),
  'tandem_inter_token_latency_seconds': (
    'histogram',
    MODEL,
    'Between two tokens of a sample; of a chunk of several, its time over their number.',
    SHORT,
  ),
  'tandem_e2e_request_latency_seconds': ('histogram', MODEL, 'From the request to its end.', LONG),
  'tandem_request_queue_time_seconds': (
    'histogram',
    MODEL,
    'From the request to its first row.',
    LONG,
  ),
  'tandem_request_prefill_time_seconds': (
    'histogram',
    MODEL,
    'From its first row to its first token.',
    LONG,
  ),
  'tandem_request_decode_time_seconds': (
    'histogram',
    MODEL,
    'From its first token to its end.',
    LONG,
  ),
}


class Metrics:
  """Of one server; nothing of it is global."""

  def __init__(self, service: Service, model: str):
    self._registry = CollectorRegistry()
    self._answers: collections.Counter[str] = collections.Counter()
    self._registry.register(_OfService(service, model, self._answers))
    self._times = {
      name: Histogram(name, help, labels, registry=self._registry, buckets=buckets).labels(model)
      for name, (_, labels, help, *ends) in TABLE.items()
      for buckets in ends
    }

  def text(self) -> bytes:
    """As Prometheus reads it."""
    return generate_latest(self._registry)

  def answered(self, status: int) -> None:
    """A request, whatever it was."""
    self._answers[str(status)] += 1

  def heard(self, since: float | None, event: Event) -> None:
    """An event of a sample, whose last tokens came at `since`."""
    if since is None or not event.ids:
      return
    each = max(event.at - since, 0.0) / len(event.ids)
    for _ in event.ids:
      self._times['tandem_inter_token_latency_seconds'].observe(each)

  def ended(self, ticket: Ticket) -> None:
    """A request, after its last event. Times that it never had are not noted."""
    times = ticket.times
    for name, begin, end in (
      ('tandem_time_to_first_token_seconds', times.asked, times.first),
      ('tandem_e2e_request_latency_seconds', times.asked, times.ended),
      ('tandem_request_queue_time_seconds', times.asked, times.began),
      ('tandem_request_prefill_time_seconds', times.began, times.first),
      ('tandem_request_decode_time_seconds', times.first, times.ended),
    ):
      if begin is not None and end is not None:
        self._times[name].observe(max(end - begin, 0.0))


class _OfService(Collector):
  """What the service counts by itself, and answers by their status."""

  def __init__(self, service: Service, model: str, answers: Mapping[str, int]):
    self._service, self._model, self._answers = service, model, answers

  def collect(self) -> Iterator[Any]:
    values = _values(self._service.stats())
    values['tandem_http_requests_total'] = dict(self._answers)
    for name, (kind, labels, help, *_) in TABLE.items():
      if kind == 'histogram':
        continue
      family = GaugeMetricFamily if kind == 'gauge' else CounterMetricFamily
      made = family(name, help, labels=labels)
      value = values[name]
      if len(labels) == 1:
        made.add_metric([self._model], value)
      else:
        for label, each in value.items():
          made.add_metric([self._model, label], each)
      yield made


def _values(stats: Stats) -> dict[str, Any]:
  """What the table's gauges and counters are now."""
  return {
    'tandem_num_requests_running': stats.reading + stats.writing,
    'tandem_num_requests_waiting': stats.waiting,
    'tandem_kv_cache_usage_perc': stats.tokens / stats.room if stats.room else 0.0,
    'tandem_prompt_tokens_total': stats.prompt_tokens + stats.prefix_hits,
    'tandem_generation_tokens_total': stats.generated_tokens,
    'tandem_prefix_cache_queries_total': stats.prefix_queries,
    'tandem_prefix_cache_hits_total': stats.prefix_hits,
    'tandem_spec_decode_num_draft_tokens_total': stats.drafted,
    'tandem_spec_decode_num_accepted_tokens_total': stats.accepted,
    'tandem_num_preemptions_total': stats.preempted,
    'tandem_request_success_total': {k: n for k, n in stats.finished.items() if k != calls.FAILED},
    'tandem_request_errors_total': stats.errors,
    'tandem_requests_refused_total': stats.refused,
    'tandem_num_jobs_waiting': stats.jobs_waiting,
    'tandem_jobs_done_total': {kind: each.done for kind, each in stats.jobs.items()},
    'tandem_jobs_failed_total': {kind: each.failed for kind, each in stats.jobs.items()},
    'tandem_job_tokens_total': {kind: each.tokens for kind, each in stats.jobs.items()},
    'tandem_job_seconds_total': {kind: each.seconds for kind, each in stats.jobs.items()},
  }
