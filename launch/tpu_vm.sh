#!/bin/bash
# Trains on all workers of a TPU VM slice; launch/README.md tells more.
#
#   launch/tpu_vm.sh NAME setup                                        copies the checkout, installs it; again after every change
#   launch/tpu_vm.sh NAME train --config=FILE --workdir=DIRECTORY ...  starts train.py, or goes on from its last checkpoint
#   launch/tpu_vm.sh NAME log                                          follows what the first worker prints
#   launch/tpu_vm.sh NAME stop                                         saves a checkpoint and stops
#
# gcloud's own configuration gives the project and the zone. PYTHON: the workers' interpreter, 3.11 or newer (python3).
set -euo pipefail
name=${1:?which TPU? Its name comes first} action=${2:?what to do? setup, train, log or stop}
shift 2
directory=tandem

remote() {
  local worker=$1 command=$2
  gcloud compute tpus tpu-vm ssh "$name" --worker="$worker" --command="$command"
}

case $action in
  setup)
    archive=$(mktemp --suffix=.tgz)
    trap 'rm -f "$archive"' EXIT
    # What git tracks and is there, of the whole checkout; what is there no more goes on the workers, too.
    cd "$(git rev-parse --show-toplevel)"
    git ls-files -z | while IFS= read -r -d '' file; do if [[ -e $file ]]; then printf '%s\0' "$file"; fi; done \
| tar --null --files-from=- -czf "$archive"
    gcloud compute tpus tpu-vm scp "$archive" "$name:$directory.tgz" --worker=all
    remote all "mkdir -p $directory && cd $directory && if [ -f .copied ]; then xargs -d '\\n' -r rm -f < .copied; fi \
&& tar -xzvf ../$directory.tgz > .copied \
&& ${PYTHON:-python3} -m venv .venv && .venv/bin/pip install -q -e .[tpu]"
    ;;
  train)
    # Detached, so that it outlives the connection.
    flags=$(printf '%q ' "$@")
    remote all "cd $directory || exit; if grep -qa train.py /proc/\$(cat pid 2>/dev/null)/cmdline 2>/dev/null; then echo 'train.py is running; stop it first' >&2; exit 1; fi
nohup .venv/bin/python train.py $flags >> train.log 2>&1 < /dev/null & echo \$! > pid"
    ;;
  log)
    remote 0 "tail -n 100 -F $directory/train.log"
    ;;
  stop)
    # Who tells the others. The number may be another program's by now.
    remote 0 "pid=\$(cat $directory/pid) && if grep -qa train.py /proc/\$pid/cmdline; then kill -TERM \$pid; else echo 'train.py is not running' >&2; exit 1; fi"
    ;;
  *)
    echo "action '$action' is none of setup, train, log, stop" >&2
    exit 1
    ;;
esac
