"""What is in the files of launch/serve/? Documents of Kubernetes as they are, and resources of
CloudFormation's templates with their functions worked out.
"""

import pathlib
import re

import yaml

SERVE = pathlib.Path(__file__).parents[2] / 'launch' / 'serve'
KUBERNETES = ('kubernetes.yaml', 'kserve.yaml')
TEMPLATES = ('sagemaker.yaml', 'ec2.yaml')
PSEUDO = {
  'AWS::StackName': 'chat',
  'AWS::Region': 'us-east-1',
  'AWS::AccountId': '123456789012',
  'AWS::URLSuffix': 'amazonaws.com',
  'AWS::NoValue': None,
}
# Of parameters without a default.
GIVEN = {
  'Image': '123456789012.dkr.ecr.us-east-1.amazonaws.com/tandem:cuda',
  'RoleArn': 'arn:aws:iam::123456789012:role/tandem',
  'ModelA': 's3://models/a/',
  'ModelB': 's3://models/b/',
  'Model': 's3://models/a',
  'Keys': '/tandem/keys',
  'InstanceProfile': 'tandem',
  'Ami': 'ami-0123456789abcdef0',
  'Vpc': 'vpc-0123456789abcdef0',
  'Subnets': ['subnet-0123456789abcdef0', 'subnet-0123456789abcdef1'],
  'Certificate': 'arn:aws:acm:us-east-1:123456789012:certificate/x',
  'From': '10.0.0.0/8',
}
# What a reference to a resource, or to an attribute of it, may look like.
REFERENCES = {
  'AWS::EC2::SecurityGroup': 'sg-0123456789abcdef0',
  'AWS::EC2::LaunchTemplate': 'lt-0123456789abcdef0',
  'AWS::ElasticLoadBalancingV2::TargetGroup': (
    'arn:aws:elasticloadbalancing:us-east-1:123456789012:targetgroup/t/0123456789abcdef'
  ),
  'AWS::ElasticLoadBalancingV2::LoadBalancer': (
    'arn:aws:elasticloadbalancing:us-east-1:123456789012:loadbalancer/app/b/0123456789abcdef'
  ),
}


class _Loader(yaml.SafeLoader):
  """Reads !Ref and its like as their long forms."""


def _function(loader, suffix, node):
  name = suffix if suffix in ('Ref', 'Condition') else f'Fn::{suffix}'
  if isinstance(node, yaml.ScalarNode):
    value = loader.construct_scalar(node)
    return {name: value.split('.', 1) if suffix == 'GetAtt' else value}
  if isinstance(node, yaml.SequenceNode):
    return {name: loader.construct_sequence(node, deep=True)}
  return {name: loader.construct_mapping(node, deep=True)}


_Loader.add_multi_constructor('!', _function)


def kubernetes(name: str) -> list[dict]:
  """The documents of a file."""
  return [*yaml.safe_load_all((SERVE / name).read_text())]


def template(name: str) -> dict:
  """One of CloudFormation, its functions in their long forms."""
  return yaml.load((SERVE / name).read_text(), _Loader)


class Worked:
  """A template with all its functions worked out.

  Attributes:
    resources: logical name -> {'Type', 'Properties', ..}; those of a false condition are not there.
    reached: (logical name, attribute or '') of every reference to a resource.
  """

  def __init__(self, made: dict, **parameters):
    declared = made['Parameters']
    self._values = PSEUDO | {
      name: parameters.get(name, GIVEN.get(name, each.get('Default')))
      for name, each in declared.items()
    }
    self._made, self.reached = made, set()
    self._conditions = {
      name: self._truth(each) for name, each in made.get('Conditions', {}).items()
    }
    self.resources = {
      name: self._value(each)
      for name, each in made['Resources'].items()
      if 'Condition' not in each or self._conditions[each['Condition']]
    }
    self.outputs = self._value(made.get('Outputs', {}))

  def _truth(self, value) -> bool:
    [(name, of)] = value.items()
    if name == 'Fn::Not':
      return not self._truth(of[0])
    if name == 'Fn::Equals':
      return self._value(of[0]) == self._value(of[1])
    raise ValueError(f'{name} is no condition that is known here')

  def _reference(self, name: str, attribute: str = ''):
    if not attribute and name in self._values:
      return self._values[name]
    self.reached.add((name, attribute))
    kind = self._made['Resources'][name]['Type']  # a KeyError: it refers to nothing
    return '1' if attribute == 'LatestVersionNumber' else REFERENCES.get(kind, name)

  def _value(self, value):
    if isinstance(value, list):
      worked = [self._value(item) for item in value]
      return [item for item in worked if item is not None]
    if not isinstance(value, dict):
      return value
    if len(value) == 1:
      [(name, of)] = value.items()
      if name == 'Ref':
        return self._reference(of)
      if name == 'Fn::GetAtt':
        return self._reference(*of)
      if name == 'Fn::Sub':
        return re.sub(r'\$\{([\w:.]+)\}', lambda m: str(self._reference(*m[1].split('.'))), of)
      if name == 'Fn::If':
        return self._value(of[1 if self._conditions[of[0]] else 2])
      if name == 'Fn::Base64':
        return self._value(of)
      if name.startswith('Fn::'):
        raise ValueError(f'{name} is no function that is known here')
    worked = {key: self._value(item) for key, item in value.items()}
    return {key: item for key, item in worked.items() if item is not None}
