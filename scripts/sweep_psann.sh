#!/usr/bin/env bash
# Does a damped sine train better than GELU? The same model but for that, each at every learning rate, several seeds; continues
# after a kill. As it stands it takes two CPU cores about an hour; with GPUs, larger MODELS and TEXT.
#
#   OUT     where everything goes (sweep)               TEXT    JSON Lines to train on (PubMed abstracts, fetched)
#   MODELS  presets (psann-tiny psann-tiny-transformer) LRS     peak learning rates   SEEDS   of weights   STEPS   in a run
#   JOBS    runs at once, on CPUs (2); on GPUs one each  VOCAB   ids (2048)            SEQ_LEN targets in a row (256)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
OUT=${OUT:-sweep}
read -ra MODELS <<<"${MODELS:-psann-tiny psann-tiny-transformer}"
read -ra LRS <<<"${LRS:-1e-3 2e-3 4e-3 8e-3 1.6e-2}"
read -ra SEEDS <<<"${SEEDS:-0 1 2}"
export OUT STEPS=${STEPS:-250} BATCH=${BATCH:-16} PRECISION=${PRECISION:-fp32}
JOBS=${JOBS:-2}
GPUS=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, || true)}
export GPUS
[ -z "$GPUS" ] || JOBS=$(tr ',' '\n' <<<"$GPUS" | grep -c .)

if [ -z "${TEXT:-}" ]; then
    python fetch_samples.py --parts pubmed
    TEXT=samples/pubmed/train.jsonl
fi
python train_tokenizer.py --input "$TEXT" --vocab_size "${VOCAB:-2048}" --output_dir "$OUT/tokenizer"
python build_pretrain.py --scratch_dir "$OUT" --documents "$TEXT" --tokenizer "$OUT/tokenizer" --seq_len "${SEQ_LEN:-256}" \
    --total_steps "$STEPS" --effective_batch "$BATCH"

one() { # number of the job's place, model, learning rate, seed
    local name=$2-lr$3-seed$4
    [ -z "$GPUS" ] || export CUDA_VISIBLE_DEVICES=$(cut -d, -f"$1" <<<"$GPUS")
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python pretrain.py --scratch_dir "$OUT" --output_dir "$OUT/runs/$name" --model "$2" \
        --lr "$3" --seed "$4" --total_steps "$STEPS" --effective_batch "$BATCH" --micro_batch "$BATCH" --precision "$PRECISION" \
        --warmup_steps $((STEPS / 10)) --adam_beta2 0.98 --eval_every "$STEPS" --sample_every 0 --max_step_checkpoints 1 \
        >>"$OUT/$name.out" 2>&1 || { echo "failed: $name, see $OUT/$name.out" >&2; exit 1; }
    echo "done: $name"
}
export -f one
for seed in "${SEEDS[@]}"; do
    for lr in "${LRS[@]}"; do
        for model in "${MODELS[@]}"; do echo "$model $lr $seed"; done
    done
done | xargs -P "$JOBS" -L 1 --process-slot-var=PLACE bash -c 'one $((PLACE + 1)) "$@"' _ ||
    echo "some runs failed: the report says which are missing" >&2
python report.py sweep "$OUT"/runs/* --output_dir "$OUT/report"
