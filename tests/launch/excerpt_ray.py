"""How was rayjob.json made? python -m tests.launch.excerpt_ray CRD.yaml VERSION, of
helm-chart/kuberay-operator/crds in ray-project/kuberay: of the custom resource's published schema,
all names at every place that launch/ray.yaml reaches, and what is said of the values there.
"""

import json
import pathlib
import sys

import yaml

from tests.launch.excerpt_serve import excerpt


def strict(schema):
  """The same, where names that a place does not have are wrong, as they are to the operator."""
  if isinstance(schema, list):
    return [strict(each) for each in schema]
  if not isinstance(schema, dict):
    return schema
  made = {name: strict(value) for name, value in schema.items()}
  if isinstance(schema.get('properties'), dict) and schema.get('type') == 'object':
    made.setdefault('additionalProperties', False)
  return made


HERE = pathlib.Path(__file__).parent

if __name__ == '__main__':
  crd = yaml.safe_load(pathlib.Path(sys.argv[1]).read_text())
  version = next(each for each in crd['spec']['versions'] if each['name'] == 'v1')
  job = yaml.safe_load((HERE.parents[1] / 'launch' / 'ray.yaml').read_text())
  kept = {
    '$comment': 'Excerpt of the RayJob custom resource of github.com/ray-project/kuberay '
    f'{sys.argv[2]} (Copyright The KubeRay Authors, Apache License 2.0), '
    'made by tests/launch/excerpt_ray.py',
    'apiVersion': f'{crd["spec"]["group"]}/{version["name"]}',
    'kind': crd['spec']['names']['kind'],
    'schema': strict(excerpt(version['schema']['openAPIV3Schema'], [job], None)),
  }
  text = json.dumps(kept, separators=(',', ':')) + '\n'
  (HERE / 'rayjob.json').write_text(text)
