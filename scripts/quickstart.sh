#!/usr/bin/env bash
# The ArXiv experiment in small, on real text, without a hub or a GPU: what does a model of four categories pay for not
# knowing which one it reads, and how soon does context tell it? Ten minutes on two cores; run again, it does only what is
# missing. It trains one model of K = 4 categories, and for comparison one of K = 1 on each of them.
#
#   OUT   where everything goes (quickstart)    SAMPLES   where the text goes (samples)    TOKEN_BUDGET   per model (1_500_000)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
export HF_HUB_OFFLINE=1

OUT=${OUT:-quickstart}
SAMPLES=${SAMPLES:-samples}
TOKEN_BUDGET=${TOKEN_BUDGET:-1_500_000}
CATEGORIES=(chemistry microbiology oncology surgery) # those with the most text

title() { printf '\n== %s\n' "$1"; }

title "real text: PubMed abstracts in eleven categories, and the GPT-NeoX tokenizer"
python fetch_samples.py --output_dir "$SAMPLES"
title "a vocabulary of 4,096 (one of 50,277 is too wide for two cores)"
python train_tokenizer.py --input "$SAMPLES/pubmed/train.jsonl" --vocab_size 4096 --output_dir "$OUT/tokenizer"
title "papers to token ids"
python fetch_arxiv.py --dataset "$SAMPLES/pubmed" --tokenizer "$OUT/tokenizer" --full_dataset --output_dir "$OUT/data"

train_and_measure() { # name, categories
    local run="$OUT/runs/$1"
    shift
    title "K = $# ($*): train, then measure loss against context and test perplexity"
    python train.py --K $# --categories "$@" --category_weighting equal --data_dir "$OUT/data" --output_dir "$run" \
        --model neox-128x2 --token_budget "$TOKEN_BUDGET" --effective_batch 16 --micro_batch 16 --weight_decay 0.1 \
        --lr 6e-3 --lr_schedule cosine --warmup_steps 50 --steps_per_eval_epoch 150 --eval_windows 512
    python evaluate_model.py context "$run" --checkpoint best --num_windows 2048
}

train_and_measure K4 "${CATEGORIES[@]}"
for category in "${CATEGORIES[@]}"; do train_and_measure "K1_$category" "$category"; done

title "what was found"
python report.py ergodic "$OUT/runs" --checkpoint best
