#!/usr/bin/env bash
# Train and evaluate every (K, seed) one after another, each on all GPUs of the machine; then the report.
#
#     KS="1 5 11" SEEDS="0 1" bash scripts/run_full_training_plan.sh --token_budget 200_000_000
#
# Arguments go to train.py. A plan that was stopped or killed continues where it stopped: run it again.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

RUNS_DIR=${RUNS_DIR:-runs}
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
launch=(python)
if [ "$gpus" -gt 1 ]; then launch=(torchrun --standalone --nproc-per-node "$gpus"); fi
for seed in ${SEEDS:-0}; do
    for K in ${KS:-1 3 5 8 11}; do
        "${launch[@]}" train.py --K "$K" --seed "$seed" --output_dir "$RUNS_DIR/K${K}_seed${seed}" "$@"
        python evaluate_model.py "$RUNS_DIR/K${K}_seed${seed}"
    done
done
python report.py ergodic "$RUNS_DIR"
