#!/usr/bin/env bash
# The curriculum of graph search on a SLURM cluster. From the root of the repository; arguments go to pptrain.py:
#
#     sbatch --nodes=2 scripts/pptrain_job.sh --scratch_dir S --data_dir S/data/nl_splits/... --max_steps 100000
#
# One process on each GPU, or PROCESSES_PER_NODE of them; without GPUs, --gres=none. scripts/slurm.sh says how a job goes on.
#SBATCH --job-name=pptrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gres=gpu:8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --mail-type=BEGIN,END,FAIL,REQUEUE
set -euo pipefail
source scripts/slurm.sh
S=${SCRATCH_DIR:-scratch} # without arguments, the published run
[ $# -gt 0 ] || set -- --scratch_dir "$S" --data_dir "$S/data/nl_splits/mis384_look64_seed12345" --max_steps 100000
train pptrain.py "$@"
