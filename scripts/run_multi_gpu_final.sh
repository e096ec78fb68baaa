#!/usr/bin/env bash
# The final experiment: four seeds x five K, one run per GPU, windows of 256 tokens, constant learning rate (no plateau).
# Every run has at most MAX_EVAL_EPOCHS periods of STEPS_PER_EVAL_EPOCH steps, and ends when the validation loss has not
# fallen for 30 of them. Needs preprocessed_arxiv (fetch_arxiv.py --full_dataset). Continues after a kill: run it again.
set -euo pipefail
cd "$(dirname "$0")/.."
export KS=${KS:-"1 3 5 8 11"} SEEDS=${SEEDS:-"0 1 2 3"} RUNS_DIR=${RUNS_DIR:-runs/final}
exec bash scripts/run_multi_gpu_training_plan.sh --model pythia-70m --sequence_length 256 --effective_batch 512 \
    --reduce_lr_factor 1.0 --early_stopping_patience 30 --precision bf16 \
    --steps_per_eval_epoch "${STEPS_PER_EVAL_EPOCH:-100}" --max_eval_epochs "${MAX_EVAL_EPOCHS:-5000}" "$@"
