"""Is launch/ray.yaml what KubeRay's operator takes, and does it start a command that there is?"""

import copy
import json
import pathlib
import shlex

import jsonschema
import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[2] / 'launch'


@pytest.fixture(scope='module')
def job() -> dict:
  return yaml.safe_load((LAUNCH / 'ray.yaml').read_text())


@pytest.fixture(scope='module')
def published() -> dict:
  return json.loads((pathlib.Path(__file__).parent / 'rayjob.json').read_text())


def wrong(published, job) -> list[str]:
  found = jsonschema.Draft202012Validator(published['schema']).iter_errors(job)
  return [error.message for error in found]


def pods(job) -> list[dict]:
  cluster = job['spec']['rayClusterSpec']
  groups = [cluster['headGroupSpec'], *cluster['workerGroupSpecs']]
  return [group['template']['spec'] for group in groups]


def test_the_job_is_what_the_published_schema_allows(job, published):
  assert (job['apiVersion'], job['kind']) == (published['apiVersion'], published['kind'])
  assert wrong(published, job) == []


def test_faults_in_it_are_found(job, published):
  plants = (
    (lambda j: j['spec'].update(entrypiont='python'), 'entrypiont'),
    (lambda j: j['spec'].update(backoffLimit='3'), "'3' is not of type 'integer'"),
    (lambda j: j['spec']['rayClusterSpec'].pop('headGroupSpec'), 'headGroupSpec'),
    (lambda j: pods(j)[1]['containers'][0]['volumeMounts'][0].update(path='/x'), 'path'),
  )
  for plant, said in plants:
    plant(planted := copy.deepcopy(job))
    assert any(said in each for each in wrong(published, planted)), said


def test_all_of_its_machines_see_the_same_files(job):
  """Sources, cache and code, under the same names."""
  containers = [pod['containers'][0] for pod in pods(job)]
  assert len({each['image'] for each in containers}) == 1
  assert all(each['env'] == containers[0]['env'] for each in containers)
  assert all(each['volumeMounts'] == containers[0]['volumeMounts'] for each in containers)
  assert all(pod['volumes'] == pods(job)[0]['volumes'] for pod in pods(job))
  mounted = containers[0]['volumeMounts'][0]['mountPath'] + '/'
  python, dash_m, module, *arguments = shlex.split(job['spec']['entrypoint'])
  assert (python, dash_m, module) == ('python', '-m', 'data.prepare')
  places = [each for each in arguments if each.startswith(('--config=', '--config.data.cache_dir'))]
  assert len(places) == 2 and all(f'={mounted}' in each for each in places)


def test_its_flags_are_known(job):
  source = (LAUNCH.parent / 'data' / 'preparing.py').read_text()
  for argument in shlex.split(job['spec']['entrypoint'])[3:]:
    name = argument[2:].split('=')[0]
    assert name.startswith('config') or f"\n  '{name}'," in source, argument
