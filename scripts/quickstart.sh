#!/usr/bin/env bash
# The ArXiv experiment in small, on real text, without a hub or a GPU: does a model of four categories pay for not knowing
# which one it reads, and how soon does context tell it? Minutes on two cores. Run again, it does only what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true

OUT=${OUT:-quickstart}
SAMPLES=${SAMPLES:-samples}
TOKEN_BUDGET=${TOKEN_BUDGET:-1_600_000}

title() { printf '\n== %s\n' "$1"; }

title "real text: PubMed abstracts in eleven categories, and the GPT-NeoX tokenizer"
python fetch_samples.py --output_dir "$SAMPLES"
title "a vocabulary of 4,096 (one of 50,277 is too wide for two cores)"
python train_tokenizer.py --input "$SAMPLES/pubmed/train.jsonl" --vocab_size 4096 --output_dir "$OUT/tokenizer"
title "papers to token ids"
python fetch_arxiv.py --dataset "$SAMPLES/pubmed" --tokenizer "$OUT/tokenizer" --full_dataset --output_dir "$OUT/data"

for K in 1 4; do
    title "train on K = $K categories, then measure the loss at each context length and the test perplexity"
    python train.py --K "$K" --seed 3 --category_weighting equal --data_dir "$OUT/data" --output_dir "$OUT/runs/K$K" \
        --model neox-128x4 --token_budget "$TOKEN_BUDGET" --effective_batch 32 --micro_batch 32 \
        --lr 3e-3 --lr_schedule cosine --warmup_steps 50 --steps_per_eval_epoch 100 --eval_windows 512
    python evaluate_model.py "$OUT/runs/K$K"
done

title "what was found"
python report.py ergodic "$OUT/runs"
