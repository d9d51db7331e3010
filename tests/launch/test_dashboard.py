"""Does every query of the dashboard and of the autoscaler name what /metrics has?"""

import json
import re

from serving import metrics
from tests.launch import documents

# Functions, words and labels of PromQL, and of Grafana's own.
WORDS = {'sum', 'avg', 'count', 'by', 'rate', 'histogram_quantile', 'le', 'label_values'}


def dashboard() -> dict:
  return json.loads((documents.SERVE / 'dashboard.json').read_text())


def queries() -> list[str]:
  """Every query of the dashboard."""
  made = dashboard()
  asked = [target['expr'] for panel in made['panels'] for target in panel['targets']]
  return asked + [each['query'] for each in made['templating']['list'] if each['type'] == 'query']


def names_of(query: str) -> set[str]:
  """The series that a query reads."""
  bare = re.sub(r'\{[^}]*\}|\[[^\]]*\]|by \([^)]*\)', ' ', query)
  return set(re.findall(r'[a-z_]\w+', bare)) - WORDS - {'model_name'}


def labels_of(query: str) -> set[str]:
  """Labels that a query chooses or groups by, but those that Prometheus adds to a pod's."""
  matched = re.findall(r'(\w+)=~?"', query)
  grouped = [name for each in re.findall(r'by \(([^)]*)\)', query) for name in each.split(', ')]
  return {*matched, *grouped} - {'pod', 'namespace', 'le'}


def test_names_are_found_in_a_query():
  query = 'sum by (le, kind) (rate(a_total{model_name=~"$model"}[$__rate_interval])) / avg (b_c)'
  assert names_of(query) == {'a_total', 'b_c'}
  assert labels_of(query) == {'kind', 'model_name'}


def test_panels_are_of_one_source_and_do_not_overlap():
  cells = set()
  for panel in dashboard()['panels']:
    assert panel['datasource'] == {'type': 'prometheus', 'uid': '${source}'}
    place = panel['gridPos']
    taken = {
      (x, y)
      for x in range(place['x'], place['x'] + place['w'])
      for y in range(place['y'], place['y'] + place['h'])
    }
    assert not cells & taken and place['x'] + place['w'] <= 24
    cells |= taken


def exported() -> dict[str, set[str]]:
  """The series that a server exports, with their labels."""
  ends = {'histogram': ('_bucket', '_sum', '_count'), 'counter': ('_total',), 'gauge': ('',)}
  return {
    name.removesuffix('_total') + end: set(labels)
    for name, (kind, labels, *_) in metrics.TABLE.items()
    for end in ends[kind]
  }


def test_every_query_names_what_is_exported():
  series = exported()
  autoscaler = documents.kubernetes('kubernetes.yaml')[2]
  asked = [each['pods']['metric']['name'] for each in autoscaler['spec']['metrics']]
  for query in [*queries(), *asked]:
    names = names_of(query)
    assert names and names <= series.keys(), query
    for name in names:
      assert labels_of(query) <= series[name], query
