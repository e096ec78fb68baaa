#!/usr/bin/env bash
# All benchmarks, then one table of them: bash benchmarks/run_all.sh      (an hour on two CPU cores, which nothing else should use)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
begun=$(date +%s)
for name in training_step packed_step window_sampling packing synthetic_generation road first_step memory ladder_sharing; do
    echo "== $name"
    python -m "benchmarks.$name"
done
for threads in 1 2; do
    echo "== checkpoint_stall, $threads threads"
    OMP_NUM_THREADS=$threads python -m benchmarks.checkpoint_stall --interval $((15 * threads))
done
python -m benchmarks.table --since "$begun"
