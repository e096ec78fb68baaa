#!/usr/bin/env bash
# One run of a ladder in each task of a SLURM array; `python ladder.py submit ...` calls it:
#
#     sbatch --array=0-26 scripts/ladder_job.sh --sizes 4M,6M,8M --recipes recipes --seeds 3      # arguments of ladder.py run
#
# A task is the run of that number in LADDER/plan.json. scripts/slurm.sh says how it goes on after its time.
#SBATCH --job-name=ladder
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
set -euo pipefail
source scripts/slurm.sh
run_and_requeue python ladder.py run --cell "$SLURM_ARRAY_TASK_ID" "$@"
