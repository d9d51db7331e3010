"""How is a server doing? Numbers for Prometheus, which mean what vLLM's of the same names do, under
our prefix: what its dashboards show of them they show of ours.

Counters and gauges are the service's own, read when they are asked for; times are noted as requests
end.
"""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from serving.call import Event, Stats
from serving.service import Service
from serving.ticket import Ticket

TYPE = CONTENT_TYPE_LATEST
PREFIX = 'tandem_'
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
LONG = (*SHORT[4:], 10, 20, 40, 80, 160, 320, 640)

# name -> (kind, labels besides model_name, help). Counters have _total behind it where they are
# read, histograms _bucket, _sum and _count.
TABLE = {
  'num_requests_running': ('gauge', (), 'Rows that have a request.'),
  'num_requests_waiting': ('gauge', (), 'Samples that wait for a row.'),
  'kv_cache_usage_perc': ('gauge', (), 'Share of the tokens that rows could hold, 0 to 1.'),
  'prompt_tokens': ('counter', (), 'Tokens of prompts that were read.'),
  'generation_tokens': ('counter', (), 'Tokens that reached who asked.'),
  'prefix_cache_queries': ('counter', (), 'Tokens of prompts that were looked up.'),
  'prefix_cache_hits': ('counter', (), 'Tokens of prompts that had been read before.'),
  'num_preemptions': ('counter', (), 'Rows that had to give way.'),
  'request_success': ('counter', ('finished_reason',), 'Samples that ended, by why.'),
  'request_errors': ('counter', ('kind',), 'Samples that failed, by what failed.'),
  'requests_refused': ('counter', (), 'Requests for which there was no room in the queue.'),
  'time_to_first_token_seconds': ('histogram', (), 'From the request to its first token.'),
  'inter_token_latency_seconds': (
    'histogram',
    (),
    'Between two tokens of a sample; of a chunk of several, its time over their number.',
  ),
  'e2e_request_latency_seconds': ('histogram', (), 'From the request to its end.'),
  'request_queue_time_seconds': ('histogram', (), 'From the request to its first row.'),
  'request_prefill_time_seconds': ('histogram', (), 'From its first row to its first token.'),
  'request_decode_time_seconds': ('histogram', (), 'From its first token to its end.'),
}


class Metrics:
  """Of one server; nothing of it is global."""

  def __init__(self, service: Service, model: str):
    self._registry = CollectorRegistry()
    self._registry.register(_OfService(service, model))
    self._times = {
      name: Histogram(
        PREFIX + name,
        help,
        ['model_name'],
        registry=self._registry,
        buckets=SHORT if 'token' in name else LONG,
      ).labels(model)
      for name, (kind, _, help) in TABLE.items()
      if kind == 'histogram'
    }

  def text(self) -> bytes:
    """As Prometheus reads it."""
    return generate_latest(self._registry)

  def heard(self, since: float | None, event: Event) -> None:
    """An event of a sample, whose last tokens came at `since`."""
    if since is None or not event.ids:
      return
    each = max(event.at - since, 0.0) / len(event.ids)
    for _ in event.ids:
      self._times['inter_token_latency_seconds'].observe(each)

  def ended(self, ticket: Ticket) -> None:
    """A request, after its last event. Times that it never had are not noted."""
    times = ticket.times
    for name, begin, end in (
      ('time_to_first_token_seconds', times.asked, times.first),
      ('e2e_request_latency_seconds', times.asked, times.ended),
      ('request_queue_time_seconds', times.asked, times.began),
      ('request_prefill_time_seconds', times.began, times.first),
      ('request_decode_time_seconds', times.first, times.ended),
    ):
      if begin is not None and end is not None:
        self._times[name].observe(max(end - begin, 0.0))


class _OfService(Collector):
  """What the service counts by itself."""

  def __init__(self, service: Service, model: str):
    self._service, self._model = service, model

  def collect(self) -> Iterator[Any]:
    values = _values(self._service.stats())
    for name, (kind, labels, help) in TABLE.items():
      if kind == 'histogram':
        continue
      family = GaugeMetricFamily if kind == 'gauge' else CounterMetricFamily
      made = family(PREFIX + name, help, labels=['model_name', *labels])
      by_label = values[name] if labels else {None: values[name]}
      for label, value in by_label.items():
        made.add_metric([self._model, *([label] if labels else [])], value)
      yield made


def _values(stats: Stats) -> dict[str, Any]:
  """What the table's gauges and counters are now."""
  return {
    'num_requests_running': stats.reading + stats.writing,
    'num_requests_waiting': stats.waiting,
    'kv_cache_usage_perc': stats.tokens / stats.room if stats.room else 0.0,
    'prompt_tokens': stats.prompt_tokens,
    'generation_tokens': stats.generated_tokens,
    'prefix_cache_queries': stats.prefix_queries,
    'prefix_cache_hits': stats.prefix_hits,
    'num_preemptions': stats.preempted,
    'request_success': stats.finished,
    'request_errors': stats.errors,
    'requests_refused': stats.refused,
  }
