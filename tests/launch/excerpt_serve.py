"""How was serving_schemas.json made? python -m tests.launch.excerpt_serve DIRECTORY, in which lie
the unpacked wheels kubernetes_validate 1.37.0, kserve 0.21.0 and cfn_lint 1.58.0 of PyPI
(kserve/kserve/models, cfn_lint/cfnlint/data).

Of the published schemas of what launch/serve/ deploys, all names at every place that a file there
reaches, and the types, limits and patterns of those that it uses. What it does not use is `false`:
a file that begins to use it needs this to be run again.
"""

import ast
import json
import pathlib
import re
import sys

from tests.launch import documents

KEPT = {
  *('type', 'required', 'enum', 'const', 'pattern', 'minLength', 'maxLength', 'minimum', 'maximum'),
  *('minItems', 'maxItems', 'uniqueItems', 'dependentRequired', 'readOnlyProperties'),
}
SOURCES = {
  'kubernetes': 'kubernetes-validate 1.37.0 on PyPI, of Kubernetes 1.37: The Kubernetes Authors, '
  'Apache License 2.0',
  'kserve': 'kserve 0.21.0 on PyPI, its generated models: The KServe Authors, Apache License 2.0',
  'cloudformation': 'cfn-lint 1.58.0 on PyPI, schemas of us-east-1: Amazon.com, Inc. or its '
  'affiliates, MIT-0',
}


def excerpt(schema, values: list, resolve):
  """What of a schema values reach. resolve: gives the schema that a $ref names."""
  if not isinstance(schema, dict):
    return schema
  if '$ref' in schema:
    return excerpt(resolve(schema['$ref']), values, resolve)
  kept = {name: schema[name] for name in sorted(KEPT & schema.keys())}
  if r'\p{' in kept.get('pattern', ''):
    del kept['pattern']  # of another dialect than Python's
  objects = [value for value in values if isinstance(value, dict)]
  items = [item for value in values if isinstance(value, list) for item in value]

  known = schema.get('properties', {})
  if known:
    kept['properties'] = {}
    for name in sorted(known):
      below = [value[name] for value in objects if name in value]
      kept['properties'][name] = excerpt(known[name], below, resolve) if below else False
  rest = [item for value in objects for name, item in value.items() if name not in known]
  for name in ('additionalProperties', 'items'):
    if name in schema:
      kept[name] = excerpt(schema[name], rest if name != 'items' else items, resolve)
  for name in ('anyOf', 'oneOf', 'allOf'):
    if name in schema:
      kept[name] = [excerpt(each, values, resolve) for each in schema[name]]
  return kept


# 1. Kubernetes.


class Kubernetes:
  """Its definitions, by what refers to them."""

  def __init__(self, directory: pathlib.Path):
    [found] = directory.rglob('v1.37.0-local-strict/_definitions.json')
    self.definitions = json.loads(found.read_text())['$defs']

  def __call__(self, reference: str) -> dict:
    return self.definitions[reference.rpartition('/')[2]]

  def of(self, version: str, kind: str) -> dict:
    """The schema of what says that it is of this version and kind."""
    for schema in self.definitions.values():
      known = schema.get('properties', {})
      if [kind] == known.get('kind', {}).get('enum') and [version] == known.get(
        'apiVersion', {}
      ).get('enum'):
        return schema
    raise KeyError(f'{version} {kind}')

  def core(self, name: str) -> str:
    """A reference to io.k8s.api.core.v1.NAME, or where else that name is."""
    for room in ('api.core.v1', 'apimachinery.pkg.apis.meta.v1'):
      if f'io.k8s.{room}.{name}' in self.definitions:
        return f'#/$defs/io.k8s.{room}.{name}'
    raise KeyError(name)


# 2. KServe, whose package has types of fields.

SIMPLE = {'int': 'integer', 'str': 'string', 'bool': 'boolean', 'float': 'number'}


class Kserve:
  """Schemas of its models by their names (V1beta1PredictorSpec)."""

  def __init__(self, directory: pathlib.Path, kubernetes: Kubernetes):
    self._kubernetes, self._texts = kubernetes, {}
    for path in directory.glob('kserve/kserve/models/v1*.py'):
      text = path.read_text()
      self._texts[re.search(r'^class (\w+)', text, re.M)[1]] = text

  def __call__(self, reference: str) -> dict:
    if reference.startswith('#/$defs/'):
      return self._kubernetes(reference)
    return self.model(reference)

  def model(self, name: str) -> dict:
    text = self._texts[name]
    types, names = (
      ast.literal_eval(re.search(rf'{what} = (\{{.*?\n    \}})', text, re.S)[1])
      for what in ('openapi_types', 'attribute_map')
    )
    required = re.findall(r'Invalid value for `(\w+)`, must not be `None`', text)
    return {
      'type': 'object',
      'additionalProperties': False,
      'properties': {names[field]: self._type(kind) for field, kind in types.items()},
      'required': sorted({names[field] for field in required}),
    }

  def _type(self, kind: str) -> dict:
    if kind in SIMPLE:
      return {'type': SIMPLE[kind]}
    if found := re.fullmatch(r'list\[(.*)\]', kind):
      return {'type': 'array', 'items': self._type(found[1])}
    if found := re.fullmatch(r'dict\(str, (.*)\)', kind):
      return {'type': 'object', 'additionalProperties': self._type(found[1])}
    if kind == 'ResourceQuantity':
      return {'type': ['string', 'number']}
    if kind in self._texts:
      return {'$ref': kind}
    if kind.startswith('V1') and kind[2].isupper():
      return {'$ref': self._kubernetes.core(kind[2:])}
    return {}  # of another library, which no file here uses


# 3. CloudFormation.


class Types:
  """Schemas of its resources, by their types."""

  def __init__(self, directory: pathlib.Path):
    [self._schemas] = directory.glob('cfn_lint/cfnlint/data/schemas')
    self._files = json.loads((self._schemas / 'providers/us-east-1.json').read_text())

  def of(self, kind: str, values: list) -> dict:
    text = (self._schemas / 'resources' / f'{self._files[kind]}.json').read_text()
    schema = json.loads(text)
    return excerpt(schema, values, lambda name: schema['definitions'][name.rpartition('/')[2]])


def main(directory: pathlib.Path) -> dict:
  kubernetes = Kubernetes(directory)
  made = {'$comment': SOURCES, 'kubernetes': {}, 'cloudformation': {}}
  for document in documents.kubernetes('kubernetes.yaml'):
    version, kind = document['apiVersion'], document['kind']
    schema = kubernetes.of(version, kind)
    made['kubernetes'][f'{version} {kind}'] = excerpt(schema, [document], kubernetes)
  kserve = Kserve(directory, kubernetes)
  [service] = documents.kubernetes('kserve.yaml')
  name = f'{service["apiVersion"]} {service["kind"]}'
  made['kubernetes'][name] = excerpt(kserve.model('V1beta1InferenceService'), [service], kserve)

  used = {}
  for template in documents.TEMPLATES:
    for resource in documents.Worked(documents.template(template)).resources.values():
      used.setdefault(resource['Type'], []).append(resource['Properties'])
  types = Types(directory)
  made['cloudformation'] = {kind: types.of(kind, used[kind]) for kind in sorted(used)}
  return made


if __name__ == '__main__':
  text = json.dumps(main(pathlib.Path(sys.argv[1])), separators=(',', ':'))
  (pathlib.Path(__file__).parent / 'serving_schemas.json').write_text(text + '\n')
