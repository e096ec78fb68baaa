#!/usr/bin/env bash
# Packing text on a SLURM cluster: each task of an array packs a share, and one more job puts the shares together. From the root
# of the repository; arguments go to build_pretrain.py:
#
#     sbatch --array=0-15 scripts/pack_job.sh --scratch_dir S --documents 'texts/*.jsonl.gz'
#     sbatch --dependency=afterok:ID scripts/pack_job.sh --scratch_dir S --documents 'texts/*.jsonl.gz' --join
#
# scripts/slurm.sh says how a job goes on.
#SBATCH --job-name=pack
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --mail-type=BEGIN,END,FAIL,REQUEUE
set -euo pipefail
source scripts/slurm.sh
S=${SCRATCH_DIR:-scratch} # without arguments, the published run
[ $# -gt 0 ] || set -- --scratch_dir "$S" --total_steps 10000
pack "$@"
