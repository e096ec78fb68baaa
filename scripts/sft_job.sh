#!/usr/bin/env bash
# Fine-tuning for chat on a SLURM cluster. From the root of the repository; arguments go to sft.py:
#
#     sbatch scripts/sft_job.sh S/pretrain --data chats.jsonl --output_dir S/chat
#
# One process on each GPU, or PROCESSES_PER_NODE of them; without GPUs, --gres=none. scripts/slurm.sh says how a job goes on.
#SBATCH --job-name=sft
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
train sft.py "$@"
