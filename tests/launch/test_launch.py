"""Are the files in launch/ what their clusters accept,
and do they start train.py with the flags they were given?
"""

import copy
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import time

import pytest
import yaml
from absl import flags

import train
from training import config as configs, overrides

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / 'launch'
TYPES = {'object': dict, 'array': list, 'string': str, 'integer': int, 'boolean': bool}
ODD = [
  '--config=configs/tiny.py',
  "--config.data.sources[0].path=a b/*.txt",
  "--workdir=runs/it's $HOME",
]


def problems(schema: dict, value, path: str = '') -> list[str]:
  """What in the value the OpenAPI schema does not allow."""
  if 'x-kubernetes-int-or-string' in schema:
    fine = (
      type(value) is int or isinstance(value, str) and re.search(schema.get('pattern', ''), value)
    )
    return [] if fine else [f'{path}: {value!r} is neither an integer nor a fitting string']
  kind = schema.get('type')
  if kind and type(value) is not TYPES[kind]:
    return [f'{path}: {value!r} is no {kind}']
  if value not in schema.get('enum', [value]):
    return [f'{path}: {value!r} is none of {schema["enum"]}']
  if isinstance(value, list):
    return [
      problem
      for i, item in enumerate(value)
      for problem in problems(schema['items'], item, f'{path}[{i}]')
    ]
  if not isinstance(value, dict):
    return []
  found = [f'{path}: {name} is missing' for name in schema.get('required', ()) if name not in value]
  known = schema.get('properties', {})
  for name, item in value.items():
    below = known.get(name, schema.get('additionalProperties'))
    if below is not None:
      found += problems(below, item, f'{path}.{name}')
    elif known:  # an object without properties is free, as metadata is here
      found.append(
        f'{path}: {name} is unknown; if it is in the published schema, keep it in excerpt.py'
      )
  return found


@pytest.fixture(params=['jobset.yaml', 'jobset_bucket.yaml'])
def jobset(request) -> dict:
  return yaml.safe_load((LAUNCH / request.param).read_text())


@pytest.fixture(scope='module')
def published() -> dict:
  return json.loads((pathlib.Path(__file__).parent / 'jobset.json').read_text())


def job_of(jobset) -> dict:
  return jobset['spec']['replicatedJobs'][0]['template']['spec']


def container_of(jobset) -> dict:
  return job_of(jobset)['template']['spec']['containers'][0]


def test_the_jobset_is_what_the_published_schema_allows(jobset, published):
  assert (jobset['apiVersion'], jobset['kind']) == (published['apiVersion'], published['kind'])
  assert problems(published['schema'], jobset) == []


@pytest.mark.parametrize(
  'plant, said',
  [
    (lambda j: j['spec'].update(replicas=2), 'replicas is unknown'),
    (lambda j: j['spec']['failurePolicy'].update(maxRestarts='many'), "'many' is no integer"),
    (lambda j: j['spec']['failurePolicy'].update(restartStrategy='Again'), "'Again' is none of"),
    (lambda j: j['spec']['replicatedJobs'][0].pop('name'), 'name is missing'),
    (
      lambda j: container_of(j)['resources']['limits'].update({'google.com/tpu': 'four chips'}),
      'neither an integer nor',
    ),
    (lambda j: container_of(j)['volumeMounts'][0].update(path='/runs'), 'path is unknown'),
  ],
  ids=lambda x: x if isinstance(x, str) else '',
)
def test_faults_in_it_are_found(jobset, published, plant, said):
  plant(planted := copy.deepcopy(jobset))
  assert any(said in problem for problem in problems(published['schema'], planted)), problems(
    published['schema'], planted
  )


def config_of(arguments: list[str], monkeypatch) -> configs.Config:
  """The config that these flags of train.py give; the other flags have to be known to it."""
  known = [argument for argument in arguments if argument.startswith('--config')]
  for argument in set(arguments) - set(known):
    assert argument[2:].split('=')[0] in flags.FLAGS, argument
  monkeypatch.setattr(sys, 'argv', ['train.py', *known])
  monkeypatch.chdir(ROOT)
  values = flags.FlagValues()
  holder = overrides.define_flag(values)
  values(sys.argv)
  return overrides.from_flag(holder.value)


def test_the_jobsets_numbers_fit_together(jobset, monkeypatch):
  assert train.STOPPED_CODE.name in flags.FLAGS
  job, container = job_of(jobset), container_of(jobset)
  chips = math.prod(
    map(
      int, job['template']['spec']['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x')
    )
  )
  slices = jobset['spec']['replicatedJobs'][0]['replicas']
  assert (
    job['parallelism']
    == job['completions']
    == chips / container['resources']['limits']['google.com/tpu']
  )
  python, script, *arguments = container['command']
  assert (python, script) == ('python', 'train.py')
  config = config_of(arguments, monkeypatch)
  sizes = config.mesh.resolve(slices * chips)
  assert sizes['data'] % slices == 0
  config.check_mesh(sizes)
  volumes = {volume['name']: volume for volume in job['template']['spec']['volumes']}
  (mount,) = container['volumeMounts']
  if 'persistentVolumeClaim' in volumes[mount['name']]:
    shared = mount['mountPath'] + '/'
  else:
    shared = 'gs://BUCKET/'
    assert {'name': 'TANDEM_CACHE', 'value': mount['mountPath']} in container['env']
    assert 'ephemeral-storage' in container['resources']['requests']
  assert all(f'={shared}' in argument for argument in arguments if 'dir=' in argument), (
    'what has to be shared is where all pods see it'
  )


# Long options of sbatch, from its manual page in Slurm 26.05.
SBATCH = set(
  '''
account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment
consolidate-segments constraint container contiguous core-spec cores-per-socket cpu-freq
cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution error exclude exclusive
export export-file extra extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node
gpus-per-socket gpus-per-task gres gres-flags hint hold ignore-pbs input job-name
kill-on-invalid-dep licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu
mem-update mincpus network nice no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core
ntasks-per-gpu ntasks-per-node ntasks-per-socket oom-kill-step open-mode output overcommit
oversubscribe parsable partition prefer priority profile propagate qos quiet reboot requeue
reservation resources resv-ports runtime segment signal sockets-per-node spread-job spread-segments
stepmgr switches thread-spec threads-per-core time time-min tmp tres-bind tres-per-task uid
use-min-nodes verbose wait wait-all-nodes wckey wrap
'''.split()
)


@pytest.mark.parametrize('script', sorted(LAUNCH.glob('*.sh')), ids=lambda path: path.name)
def test_scripts_parse_and_can_be_run(script):
  subprocess.run(['bash', '-n', script], check=True)
  assert os.access(script, os.X_OK)
  assert 'set -euo pipefail' in script.read_text()


def test_slurm_knows_every_option():
  lines = (LAUNCH / 'slurm.sh').read_text().splitlines()
  first = next(i for i, line in enumerate(lines) if line and not line.startswith('#'))
  assert not [line for line in lines[first:] if line.startswith('#SBATCH')], (
    'after a command, Slurm reads none'
  )
  options = dict(
    (line.removeprefix('#SBATCH --') + '=').split('=')[:2]
    for line in lines
    if line.startswith('#SBATCH')
  )
  assert set(options) <= SBATCH
  assert options['ntasks-per-node'] == options['gpus-per-node'], (
    'jax gives a task of a Slurm step one GPU'
  )
  assert re.fullmatch(r'TERM@\d{2,5}', options['signal']), (
    'to the tasks, not only to the shell (B:), while there is time to save'
  )


def fakes(directory: pathlib.Path, **scripts: str) -> dict[str, str]:
  """An environment whose PATH begins with commands that append their arguments,
  as JSON, to COMMAND.log, and then do this.
  """
  path = directory / 'fakes'
  path.mkdir()
  for name, then in scripts.items():
    log = str(directory / f'{name}.log')
    record = f'import json, sys; print(json.dumps(sys.argv[1:]), file=open({log!r}, "a"))'
    (path / name).write_text(
      f"#!/bin/bash\n{sys.executable} - \"$@\" <<'END'\n{record}\nEND\n{then}\n"
    )
    (path / name).chmod(0o755)
  return os.environ | {'PATH': f'{path}:{os.environ["PATH"]}'}


def calls(directory, name) -> list[list[str]]:
  log = directory / f'{name}.log'
  return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.parametrize('code, requeued', [(0, []), (1, []), (75, [['requeue', '42']])])
def test_slurm_starts_train_and_queues_again_what_was_stopped(tmp_path, code, requeued):
  environment = fakes(tmp_path, srun=f'exit {code}', scontrol='') | {
    'SLURM_SUBMIT_DIR': str(ROOT),
    'SLURM_JOB_ID': '42',
  }
  assert (
    subprocess.run([LAUNCH / 'slurm.sh', *ODD], env=environment, cwd=tmp_path).returncode == code
  )
  [srun] = calls(tmp_path, 'srun')
  program = srun.index('train.py')
  assert srun[program - 1] == '.venv/bin/python' and srun[program + 1 :] == [
    '--stopped_code=75',
    *ODD,
  ]
  assert '--kill-on-bad-exit=1' in srun[:program]
  assert calls(tmp_path, 'scontrol') == requeued


def tpu_vm(environment, *arguments, cwd=ROOT) -> subprocess.CompletedProcess:
  return subprocess.run(
    [LAUNCH / 'tpu_vm.sh', *arguments], env=environment, cwd=cwd, text=True, capture_output=True
  )


def command_of(call: list[str], worker: str) -> str:
  """What a recorded `gcloud ... ssh` would run on that worker."""
  assert (
    call[:5] == ['compute', 'tpus', 'tpu-vm', 'ssh', 'pod']
    and call[5] == f'--worker={worker}'
    and len(call) == 7
  )
  return call[6].removeprefix('--command=')


def on_worker(directory: pathlib.Path, command: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    ['bash', '-c', command], cwd=directory, text=True, capture_output=True, timeout=60
  )


def until(condition) -> None:
  give_up = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < give_up
    time.sleep(0.01)


def test_tpu_vm_trains_with_the_flags_given_once_at_a_time_until_it_is_stopped(tmp_path):
  environment = fakes(tmp_path, gcloud='')
  for action in (('train', *ODD), ('stop',), ('log',)):
    assert tpu_vm(environment, 'pod', *action).returncode == 0
  start, stop, log = calls(tmp_path, 'gcloud')

  home = tmp_path / 'home'
  (home / 'tandem' / '.venv' / 'bin').mkdir(parents=True)
  python = home / 'tandem' / '.venv' / 'bin' / 'python'
  python.write_text(
    f'#!/bin/bash\nexec {sys.executable} -c "import json, sys, time; '
    'print(json.dumps(sys.argv[1:]), flush=True)\ntime.sleep(60)" "$@"\n'
  )
  python.chmod(0o755)
  output = home / 'tandem' / 'train.log'
  assert on_worker(home, command_of(start, 'all')).returncode == 0
  until(lambda: output.exists() and output.read_text())
  assert json.loads(output.read_text()) == ['train.py', *ODD]
  again = on_worker(home, command_of(start, 'all'))
  assert again.returncode == 1 and 'is running; stop it first' in again.stderr
  assert on_worker(home, command_of(stop, '0')).returncode == 0
  process = int((home / 'tandem' / 'pid').read_text())
  until(
    lambda: (
      subprocess.run(
        ['ps', '-o', 'stat=', '-p', str(process)], capture_output=True, text=True
      ).stdout.strip()
      in ('', 'Z')
    )
  )
  assert 'tandem/train.log' in command_of(log, '0')


def test_tpu_vm_copies_what_git_tracks_as_it_is_now(tmp_path):
  checkout = tmp_path / 'checkout'
  checkout.mkdir()

  def git(*arguments):
    return subprocess.run(['git', *arguments], cwd=checkout, check=True)

  git('init', '-q')
  for name in ('train.py', 'a b.py', 'gone.py', 'untracked.py'):
    (checkout / name).write_text('old')
  git('add', 'train.py', 'a b.py', 'gone.py')
  (checkout / 'train.py').write_text('new')
  (checkout / 'gone.py').unlink()
  (checkout / 'below').mkdir()
  environment = fakes(tmp_path, gcloud=f'if [ "$4" = scp ]; then cp "$5" {tmp_path}/sent.tgz; fi')
  done = tpu_vm(environment, 'pod', 'setup', cwd=checkout / 'below')
  assert done.returncode == 0, done.stderr
  scp, ssh = calls(tmp_path, 'gcloud')
  assert scp[:4] == ['compute', 'tpus', 'tpu-vm', 'scp'] and scp[5:] == [
    'pod:tandem.tgz',
    '--worker=all',
  ]
  assert not pathlib.Path(scp[4]).exists(), 'it tidies up'
  with tarfile.open(tmp_path / 'sent.tgz') as archive:
    assert sorted(archive.getnames()) == ['a b.py', 'train.py']
    assert archive.extractfile('train.py').read() == b'new'
  assert '.[tpu]' in command_of(ssh, 'all')


@pytest.mark.parametrize(
  'arguments, said',
  [
    ((), 'which TPU'),
    (('pod',), 'what to do'),
    (('pod', 'start'), "'start' is none of setup, train"),
  ],
)
def test_tpu_vm_says_what_is_missing(tmp_path, arguments, said):
  environment = fakes(tmp_path, gcloud='')
  done = tpu_vm(environment, *arguments)
  assert done.returncode != 0 and said in done.stderr
  assert not calls(tmp_path, 'gcloud')


def test_the_image_installs_what_is_offered():
  extra = re.search(r'ARG EXTRA=(\w+)', (LAUNCH / 'Dockerfile').read_text())[1]
  assert f'\n{extra} = ' in (ROOT / 'setup.cfg').read_text()
