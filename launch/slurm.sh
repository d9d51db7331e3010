#!/bin/bash
# Trains on GPU nodes: sbatch launch/slurm.sh --config=FILE --workdir=DIRECTORY [more flags of train.py]. launch/README.md tells more.
#SBATCH --job-name=tandem
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit with sbatch, from the root of the checkout}"

# One task a GPU, which is how jax divides the GPUs of a Slurm step. A task that fails ends the others; a run that was asked to stop,
# before its time is over, says so by its code and is queued again: it goes on from its last checkpoint.
code=0
# srun does not take it from sbatch by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-8}
srun --kill-on-bad-exit=1 --label "${PYTHON:-.venv/bin/python}" train.py --stopped_code=75 "$@" || code=$?
if ((code == 75)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
