"""Are the files in launch/serve/ what their clusters accept, do their numbers fit together, and do
they start serve.py with flags that it has?
"""

import copy
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jsonschema
import pytest
import yaml
from starlette.testclient import TestClient

from serving.guard import ApiKeys
from serving.http import app
from serving.wire import Served
from tests.launch import documents
from tests.serving.test_http import service

ROOT = pathlib.Path(__file__).parents[2]
SERVE = documents.SERVE
# Of a resource of CloudFormation, beside its properties.
RESOURCE = {'Type', 'Properties', 'Condition', 'DependsOn', 'UpdatePolicy'}
PARAMETER = {'Type', 'Default', 'Description', 'AllowedPattern', 'MinValue', 'MaxValue'}
SECONDS = 5  # in which a server ends that has drained


@pytest.fixture(scope='module')
def published() -> dict:
  return json.loads((pathlib.Path(__file__).parent / 'serving_schemas.json').read_text())


def taken(schema, value):
  """A value as CloudFormation takes it: a number where a text is asked for, and the other way."""
  if not isinstance(schema, dict):
    return value
  wanted = schema.get('type')
  if isinstance(value, dict):
    known = schema.get('properties', {})
    return {name: taken(known.get(name), item) for name, item in value.items()}
  if isinstance(value, list):
    return [taken(schema.get('items'), item) for item in value]
  if wanted == 'string' and type(value) in (int, float):
    return str(value)
  if wanted in ('integer', 'number') and re.fullmatch(r'\d+', str(value)):
    return int(value)
  return value


def problems(schema: dict, value) -> list[str]:
  """What in a value its schema does not allow."""
  found = jsonschema.Draft7Validator(schema).iter_errors(value)
  return [f'{each.json_path}: {each.message}' for each in found]


def of_kubernetes() -> list[dict]:
  return [each for name in documents.KUBERNETES for each in documents.kubernetes(name)]


def kind(document) -> str:
  return f'{document["apiVersion"]} {document["kind"]}'


@pytest.mark.parametrize('document', of_kubernetes(), ids=lambda document: document['kind'])
def test_kubernetes_accepts_every_document(document, published):
  assert problems(published['kubernetes'][kind(document)], document) == []


def worked(name, **parameters) -> documents.Worked:
  return documents.Worked(documents.template(name), **parameters)


@pytest.mark.parametrize('name', documents.TEMPLATES)
def test_cloudformation_accepts_every_resource(name, published):
  made = documents.template(name)
  assert made['AWSTemplateFormatVersion'] == '2010-09-09'
  assert made.keys() <= {
    *('AWSTemplateFormatVersion', 'Description', 'Parameters', 'Conditions', 'Resources'),
    'Outputs',
  }
  for parameter, each in made['Parameters'].items():
    assert each.keys() <= PARAMETER, parameter
    value = str(each.get('Default', documents.GIVEN.get(parameter)))
    assert re.search(each.get('AllowedPattern', ''), value), parameter

  for parameters in ({}, {'ModelB': ''}) if name == 'sagemaker.yaml' else ({},):
    template = worked(name, **parameters)
    for logical, resource in template.resources.items():
      assert resource.keys() <= RESOURCE, logical
      schema = published['cloudformation'][resource['Type']]
      assert problems(schema, taken(schema, resource['Properties'])) == [], logical
      assert resource.get('DependsOn', logical) in template.resources
    # An attribute is one that a resource has, once it is there.
    for logical, attribute in template.reached:
      assert logical in template.resources, f'{logical} is not made, and is referred to'
      read = published['cloudformation'][template.resources[logical]['Type']]['readOnlyProperties']
      named = {'EndpointName', 'EndpointConfigName', 'ModelName'}
      assert not attribute or f'/properties/{attribute}' in read or attribute in named


@pytest.mark.parametrize(
  'plant, said',
  [
    (lambda d: d['spec'].update(replica=2), "'replica' was unexpected"),
    (lambda d: d['spec'].update(selector='app'), 'is not of type'),
    (lambda d: d['spec'].pop('template'), "'template' is a required property"),
    (lambda d: container(d)['ports'][0].update(containerPort='http'), "'http' is not of type"),
    (lambda d: container(d)['readinessProbe'].update(path='/health'), "'path' was unexpected"),
    (lambda d: d['spec'].update(paused=True), 'False schema'),
  ],
  ids=lambda x: x if isinstance(x, str) else '',
)
def test_faults_of_a_document_are_found(plant, said, published):
  planted = copy.deepcopy(documents.kubernetes('kubernetes.yaml')[0])
  plant(planted)
  found = problems(published['kubernetes'][kind(planted)], planted)
  assert any(said in problem for problem in found), found


@pytest.mark.parametrize(
  'name, logical, changes, said',
  [
    ('sagemaker.yaml', 'Scaled', {'MinCapacity': 'one'}, "'one' is not of type"),
    ('sagemaker.yaml', 'Endpoint', {'Config': 'x'}, "'Config' was unexpected"),
    ('sagemaker.yaml', 'Config', {'ProductionVariants': [{'VariantName': '-'}]}, 'does not match'),
    ('ec2.yaml', 'Listener', {'DefaultActions': None}, 'is not of type'),
    ('ec2.yaml', 'Group', {'MinSize': [1]}, 'is not of type'),
  ],
)
def test_faults_of_a_template_are_found(name, logical, changes, said, published):
  resource = worked(name).resources[logical]
  schema = published['cloudformation'][resource['Type']]
  found = problems(schema, taken(schema, resource['Properties'] | changes))
  assert any(said in problem for problem in found), found


def test_a_reference_to_nothing_is_found():
  made = documents.template('ec2.yaml')
  made['Resources']['Group']['Properties']['TargetGroupARNs'] = [{'Ref': 'Target'}]
  with pytest.raises(KeyError, match='Target'):
    documents.Worked(made)


def container(deployment) -> dict:
  return deployment['spec']['template']['spec']['containers'][0]


def flags(arguments) -> dict[str, str]:
  """--name=value of a command."""
  return dict(each[2:].split('=', 1) for each in arguments if each.startswith('--'))


def user_data() -> str:
  return worked('ec2.yaml').resources['Template']['Properties']['LaunchTemplateData']['UserData']


def servers() -> dict[str, dict[str, str]]:
  """The flags that each file starts serve.py with."""
  deployment, *_ = documents.kubernetes('kubernetes.yaml')
  [service] = documents.kubernetes('kserve.yaml')
  [line] = [each for each in user_data().splitlines() if each.startswith('ExecStart=/usr/bin/')]
  words = shlex.split(line.removeprefix('ExecStart='))
  return {
    'kubernetes': flags(container(deployment)['args']),
    'kserve': flags(service['spec']['predictor']['containers'][0]['args']),
    'ec2': flags(words[words.index(documents.GIVEN['Image']) + 1 :]),
  }


def test_numbers_of_kubernetes_fit_together():
  deployment, service, autoscaler, budget = documents.kubernetes('kubernetes.yaml')
  [prediction] = documents.kubernetes('kserve.yaml')
  pod, given = deployment['spec']['template'], servers()['kubernetes']
  labels = pod['metadata']['labels'].items()
  for selector in (deployment['spec']['selector'], budget['spec']['selector']):
    assert selector['matchLabels'].items() <= labels
  assert service['spec']['selector'].items() <= labels
  target = autoscaler['spec']['scaleTargetRef']
  assert kind(deployment) == f'{target["apiVersion"]} {target["kind"]}'
  assert deployment['metadata']['name'] == target['name']
  assert 'replicas' not in deployment['spec'], 'the autoscaler sets them'

  ports = {each['name']: each['containerPort'] for each in container(deployment)['ports']}
  assert ports[service['spec']['ports'][0]['targetPort']] == int(given['port'])
  for probe in ('startupProbe', 'readinessProbe', 'livenessProbe'):
    assert container(deployment)[probe]['httpGet']['port'] in ports
  mounted = {each['mountPath'] for each in container(deployment)['volumeMounts']}
  assert given['workdir'] in mounted and str(pathlib.Path(given['api_keys']).parent) in mounted
  volumes = {each['name'] for each in pod['spec']['volumes']}
  assert {each['name'] for each in container(deployment)['volumeMounts']} == volumes

  first = container(deployment)['lifecycle']['preStop']['sleep']['seconds']
  last = pod['spec']['terminationGracePeriodSeconds']
  assert first + int(given['drain_seconds']) + SECONDS <= last
  [waiting, running] = (each['pods'] for each in autoscaler['spec']['metrics'])
  assert waiting['metric']['name'] == 'tandem_num_requests_waiting'
  assert float(running['target']['averageValue']) == 0.75 * int(given['rows'])

  predictor, given = prediction['spec']['predictor'], servers()['kserve']
  assert predictor['scaleTarget'] == 0.75 * int(given['rows'])
  assert predictor['containerConcurrency'] == 2 * int(given['rows'])
  assert given['served_model_name'] == prediction['metadata']['name']
  # Knative waits as long as for an answer, and lets nobody say otherwise.
  assert int(given['drain_seconds']) + SECONDS <= predictor['timeout']
  assert 'terminationGracePeriodSeconds' not in predictor


def test_numbers_of_amazon_fit_together():
  made, given = worked('ec2.yaml').resources, servers()['ec2']
  text, port = user_data(), given['port']
  assert f'-p {port}:{port}' in text and f'localhost:{port}/metrics' in text
  assert int(port) == made['Targets']['Properties']['Port']
  assert made['Targets']['Properties']['HealthCheckPath'] == '/health'
  [into] = made['Inside']['Properties']['SecurityGroupIngress']
  assert into['FromPort'] == into['ToPort'] == int(port)
  drain = int(given['drain_seconds']) + SECONDS
  assert int(re.search(r'--stop-timeout=(\d+)', text)[1]) >= drain
  attributes = made['Targets']['Properties']['TargetGroupAttributes']
  attributes = {each['Key']: each['Value'] for each in attributes}
  assert int(attributes['deregistration_delay.timeout_seconds']) >= drain
  scaling = made['Scaling']['Properties']['TargetTrackingConfiguration']
  assert scaling['TargetValue'] == 0.75 * int(given['rows'])
  metric = scaling['CustomizedMetricSpecification']
  assert f'--namespace {metric["Namespace"]} --metric-name {metric["MetricName"]}' in text
  assert 'Stack=chat' in text and metric['Dimensions'] == [{'Name': 'Stack', 'Value': 'chat'}]

  made = worked('sagemaker.yaml').resources
  variants = made['Config']['Properties']['ProductionVariants']
  assert [each['VariantName'] for each in variants] == ['A', 'B']
  alone = worked('sagemaker.yaml', ModelB='').resources
  assert [v['VariantName'] for v in alone['Config']['Properties']['ProductionVariants']] == ['A']
  assert made['Scaled']['Properties']['ResourceId'] == 'endpoint/chat/variant/A'
  alarms = made['Endpoint']['Properties']['DeploymentConfig']['AutoRollbackConfiguration']['Alarms']
  assert {each['AlarmName'] for each in alarms} == {'Errors', 'Slow'} <= made.keys()


def test_a_machine_sets_itself_up_and_counts_who_waits(tmp_path):
  """What EC2 runs is bash, with the programs that it writes; the last one adds up the gauges."""
  text = user_data()
  scripts = re.findall(r"cat > (\S+) <<'END'\n(.*?)\nEND\n", text, re.S)
  [program] = [body for path, body in scripts if path.endswith('/tandem-metrics')]
  for script in (text, program):
    subprocess.run(['bash', '-n'], input=script, text=True, check=True)
  (tmp_path / 'curl').write_text(
    '#!/bin/bash\nprintf \'# HELP tandem_num_requests_waiting x\\ntandem_num_requests_waiting'
    '{model_name="a b"} 3.0\\ntandem_num_requests_running{model_name="a"} 4.0\\n'
    'tandem_num_requests_running_else 9\\n\'\n'
  )
  (tmp_path / 'aws').write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/said\n')
  for name in ('curl', 'aws'):
    (tmp_path / name).chmod(0o755)
  (tmp_path / 'keys').write_text('first\nsecond\n')
  program = program.replace('/keys/keys', str(tmp_path / 'keys'))
  environment = os.environ | {'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
  subprocess.run(['bash', '-c', program], env=environment, check=True)
  assert (tmp_path / 'said').read_text().endswith('--dimensions Stack=chat --value 7\n')


def probed() -> set[str]:
  """Paths that clusters and balancers ask to know how a server is."""
  deployment, *_ = documents.kubernetes('kubernetes.yaml')
  [service] = documents.kubernetes('kserve.yaml')
  every = [container(deployment), service['spec']['predictor']['containers'][0]]
  found = {
    each[probe]['httpGet']['path']
    for each in every
    for probe in ('startupProbe', 'readinessProbe', 'livenessProbe')
    if probe in each
  }
  return found | {worked('ec2.yaml').resources['Targets']['Properties']['HealthCheckPath'], '/ping'}


def test_probes_are_answered_by_an_address_and_without_a_key(tmp_path):
  keys = tmp_path / 'keys'
  keys.write_text('k' * 20)
  served = service()
  made = app(served, Served(name='m'), hosts=['chat.example.org'], keys=ApiKeys(keys))
  client = TestClient(made, base_url='http://10.1.2.3:8000')
  assert client.get('/v1/models').status_code == 421
  with served.by_itself():
    assert {path: client.get(path).status_code for path in probed()} == dict.fromkeys(probed(), 200)
    served.drain(0)
    served.closed()
  # What has drained is not ready, and is not to be killed for that.
  alive = {path for path in probed() if client.get(path).status_code == 200}
  assert alive == {'/v2/health/live'}


def test_whom_others_reach_asks_for_keys_and_takes_any_name():
  for name, given in servers().items():
    assert given['host'] == '0.0.0.0' and given['hosts'] == '*' and given['api_keys'], name


@pytest.mark.slow
def test_the_server_has_every_flag():
  done = subprocess.run(
    [sys.executable, 'serve.py', '--help'],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )
  for name, given in servers().items():
    for flag in given:
      assert f'--{flag}' in done.stdout, f'{name}: --{flag}'


def test_images_install_what_is_offered_and_start_the_server():
  text = (SERVE / 'Dockerfile').read_text()
  setup = (ROOT / 'setup.cfg').read_text()
  extras = set(','.join(re.findall(r'-e \.\[([\w,]+)\]', text)).split(','))
  assert extras == {'tpu', 'cuda', 'serve'}
  assert all(re.search(rf'^{extra} =', setup, re.M) for extra in extras - {'serve'})
  assert re.findall(r'^FROM \S+ AS (\w+)', text, re.M) == ['base', 'tpu', 'cuda', 'cpu']
  # Not through a shell, which would keep SIGTERM to itself.
  assert json.loads(re.search(r'^ENTRYPOINT (.*)', text, re.M)[1]) == ['python', 'serve.py']
  assert {given['port'] for given in servers().values()} == {'8000'}
  assert re.search(r'^EXPOSE (.*)', text, re.M)[1].split() == ['8000', '8080']


def test_the_adapter_serves_what_the_autoscaler_asks_for():
  deployment, _, autoscaler, _ = documents.kubernetes('kubernetes.yaml')
  told = yaml.safe_load((SERVE / 'prometheus.yaml').read_text())
  [rule], [job] = told['rules'], told['scrape_configs']
  names = re.search(r'__name__=~"([^"]+)"', rule['seriesQuery'])[1]
  for metric in autoscaler['spec']['metrics']:
    assert re.fullmatch(names, metric['pods']['metric']['name'])
  [keep] = [each for each in job['relabel_configs'] if each.get('action') == 'keep']
  label = deployment['spec']['template']['metadata']['labels']['app']
  port = container(deployment)['ports'][0]['name']
  assert re.fullmatch(keep['regex'], f'{label};{port}')
  targets = {each.get('target_label') for each in job['relabel_configs']}
  assert rule['resources']['overrides'].keys() <= targets
