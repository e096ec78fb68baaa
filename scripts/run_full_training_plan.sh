#!/usr/bin/env bash
# Train and evaluate every (K, seed) one after another, each on all GPUs of the machine; then the report.
#
#     KS="1 5 11" SEEDS="0 1" bash scripts/run_full_training_plan.sh --token_budget 200_000_000
#
# All else is as in run_multi_gpu_training_plan.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
GPUS=all exec bash scripts/run_multi_gpu_training_plan.sh "$@"
