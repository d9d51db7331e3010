"""How was jobset.json made? python tests/launch/excerpt.py CRD.yaml VERSION, of
config/components/crd/bases in kubernetes-sigs/jobset.

The custom resource's published schema without its prose, its status, and parts of a pod that no
training job here needs: what is left of it says which fields there are,
their types, and which are required.
"""

import json
import pathlib
import sys

import yaml

LEFT_OUT = {
  'status',
  'description',
  'affinity',
  'ephemeralContainers',
  'initContainers',
  'topologySpreadConstraints',
  'volumeClaimPolicies',
  'livenessProbe',
  'readinessProbe',
  'startupProbe',
  'lifecycle',
  'x-kubernetes-validations',
  'resourceClaims',
  'selector',
  'restartPolicyRules',
  'dnsConfig',
}
VOLUMES = {'name', 'nfs', 'hostPath', 'emptyDir', 'persistentVolumeClaim', 'csi'}


def excerpt(schema, path=()):
  if isinstance(schema, list):
    return [excerpt(item, path) for item in schema]
  if not isinstance(schema, dict):
    return schema
  if path[-3:] == ('volumes', 'items', 'properties'):
    schema = {name: schema[name] for name in VOLUMES & set(schema)}
  return {
    name: excerpt(value, (*path, name))
    for name, value in sorted(schema.items())
    if name not in LEFT_OUT and not name.startswith('x-kubernetes-list')
  }


if __name__ == '__main__':
  crd = yaml.safe_load(pathlib.Path(sys.argv[1]).read_text())
  version = crd['spec']['versions'][0]
  kept = {
    '$comment': 'Excerpt of the JobSet custom resource of github.com/kubernetes-sigs/jobset '
    f'{sys.argv[2]} (Copyright The Kubernetes Authors, Apache License 2.0), '
    'made by tests/launch/excerpt.py',
    'apiVersion': f'{crd["spec"]["group"]}/{version["name"]}',
    'kind': crd['spec']['names']['kind'],
    'schema': excerpt(version['schema']['openAPIV3Schema']),
  }
  (pathlib.Path(__file__).parent / 'jobset.json').write_text(
    json.dumps(kept, separators=(',', ':')) + '\n'
  )
