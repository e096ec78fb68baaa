#!/usr/bin/env bash
# Two experiments in small, without a hub or a GPU, in about 20 minutes on two cores; run again, it does only what is missing.
#
# The curriculum: how far does a model of 1.3 M parameters learn to search graphs, stage by stage?
# The ArXiv experiment, on real text: what does a model of four categories pay for not knowing which one it reads, and how soon
# does context tell it? One model of K = 4 categories, and for comparison one of K = 1 on each of them.
#
#   OUT   where everything goes (quickstart)            SAMPLES       where the text goes (samples)
#   TOKEN_BUDGET   of each model of text (1_500_000)    GRAPH_STEPS   optimizer steps of the curriculum (1000)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
export HF_HUB_OFFLINE=1

OUT=${OUT:-quickstart}
SAMPLES=${SAMPLES:-samples}
TOKEN_BUDGET=${TOKEN_BUDGET:-1_500_000}
GRAPH_STEPS=${GRAPH_STEPS:-1000}
CATEGORIES=(chemistry microbiology oncology surgery) # those with the most text

title() { printf '\n== %s\n' "$1"; }

GRAPHS=$OUT/graphs
title "graph search: held-out examples, and a vocabulary of 512 for its words"
python build_data_splits.py --scratch_dir "$GRAPHS" --max_input_size 36 --max_lookahead 6 \
    --eval_size 500 --test_size 1000 --mixin_size 2000
SPLITS=$GRAPHS/data/nl_splits/mis36_look6_seed12345
python train_tokenizer.py --input "$SPLITS/mixin.jsonl" --column input_text --vocab_size 512 --output_dir "$GRAPHS/tokenizer"
title "the curriculum: a stage is passed when 60 % of the latest answers are right (a random child: 49 %)"
python pptrain.py --scratch_dir "$GRAPHS" --data_dir "$SPLITS" --tokenizer "$GRAPHS/tokenizer" --model neox-128x6 \
    --seq_len 512 --max_steps "$GRAPH_STEPS" --micro_batch 32 --grad_accum 1 --precision fp32 --lr 1.5e-3 --adam_beta2 0.98 \
    --warmup_steps 100 --curr_check_every 10 --curr_threshold 0.6 --eval_subset_size 200 --num_workers 0
python evaluate_model.py search "$GRAPHS/pptrain" --split test
python report.py curriculum "$GRAPHS/pptrain"

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
