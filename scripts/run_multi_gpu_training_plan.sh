#!/usr/bin/env bash
# Train and evaluate every (K, seed) of a plan, one run per GPU, as many at once as there are GPUs; then the report.
#
#     KS="1 3 5" SEEDS="0 1" bash scripts/run_multi_gpu_training_plan.sh --token_budget 200_000_000
#
# Arguments go to train.py. A plan that was stopped or killed continues where it stopped: run it again. SIGTERM, SIGUSR1 or
# Ctrl-C stops every run with a checkpoint, and then the plan with exit code 75.
#   KS, SEEDS   what to train (1 3 5 8 11, seed 0)     RUNS_DIR   where (runs)
#   GPUS        ids of the GPUs, one run on each (CUDA_VISIBLE_DEVICES, or all that there are); "all": one run at a time on all
#   WORKERS     runs at once on a machine without a GPU (1)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

KS=${KS:-"1 3 5 8 11"}
SEEDS=${SEEDS:-"0"}
RUNS_DIR=${RUNS_DIR:-runs}
found=$(command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=index --format=csv,noheader | tr '\n' ' ' || true)
GPUS=${GPUS:-${CUDA_VISIBLE_DEVICES:-$found}}
if [ -z "${GPUS// /}" ]; then GPUS=$(printf 'cpu %.0s' $(seq "${WORKERS:-1}")); fi
read -ra free <<<"${GPUS//,/ }"
mkdir -p "$RUNS_DIR"

declare -A gpu_of name_of
failed=() stopping=0
trap 'stopping=1; kill -TERM "${!gpu_of[@]}" 2>/dev/null || true' TERM USR1 INT

one_run() { # K seed gpu name, and the arguments of train.py
    local K=$1 seed=$2 gpu=$3 run="$RUNS_DIR/$4" launch=(python)
    shift 4
    case $gpu in
        all)
            local count
            count=$(python -c 'import torch; print(torch.cuda.device_count())')
            if [ "$count" -gt 1 ]; then launch=(torchrun --standalone --nproc-per-node "$count"); fi
            ;;
        cpu) ;;
        *) export CUDA_VISIBLE_DEVICES=$gpu ;;
    esac
    trap 'kill -TERM "${child:-}" 2>/dev/null || true' TERM USR1 INT
    "${launch[@]}" train.py --K "$K" --seed "$seed" --output_dir "$run" "$@" & child=$!
    wait_for "$child" || return
    python evaluate_model.py context "$run" & child=$!
    wait_for "$child"
}

wait_for() { # a trapped signal interrupts `wait`: wait until the child has really ended
    local code
    while :; do
        code=0
        wait "$1" || code=$?
        kill -0 "$1" 2>/dev/null || return "$code"
    done
}

reap() { # wait for one run to end, and free its GPU
    local pid code=0
    wait -n -p pid "${!gpu_of[@]}" || code=$?
    if [ -z "${pid:-}" ] || kill -0 "$pid" 2>/dev/null; then return 0; fi # a signal interrupted the wait
    free+=("${gpu_of[$pid]}")
    if [ "$code" -eq 0 ]; then echo "done: ${name_of[$pid]}"; else
        failed+=("${name_of[$pid]}")
        echo "exit code $code: ${name_of[$pid]}, see $RUNS_DIR/${name_of[$pid]}.log"
    fi
    unset "gpu_of[$pid]"
}

for seed in $SEEDS; do
    for K in $KS; do
        while [ ${#free[@]} -eq 0 ] && [ $stopping = 0 ]; do reap; done
        [ $stopping = 0 ] || break 2
        name="K${K}_seed${seed}"
        echo "start: $name on ${free[0]}"
        one_run "$K" "$seed" "${free[0]}" "$name" "$@" >>"$RUNS_DIR/$name.log" 2>&1 &
        gpu_of[$!]=${free[0]} name_of[$!]=$name
        [ $stopping = 0 ] || kill -TERM "$!" 2>/dev/null || true # a signal came before the line above
        free=("${free[@]:1}")
    done
done
while [ ${#gpu_of[@]} -gt 0 ]; do reap; done

if [ $stopping = 1 ]; then
    echo "stopped: run the same command again to continue"
    exit 75
fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}; run the same command again to try them again"
    exit 1
fi
python report.py ergodic "$RUNS_DIR"
