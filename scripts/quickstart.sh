#!/usr/bin/env bash
# Three experiments in small, without a hub or a GPU, in about half an hour on two cores; run again, it does only what is missing.
#
# The curriculum: how far does a model of 1.5 M parameters learn to search graphs, stage by stage?
# Pretraining: does it then need less text than one that begins with random weights? Text with some graphs among it.
# The ArXiv experiment: what does a model of four categories pay for not knowing which one it reads, and how soon does context
# tell it? One model of K = 4 categories, and for comparison one of K = 1 on each of them.
#
#   OUT   where everything goes (quickstart)            SAMPLES       where the text goes (samples)
#   GRAPH_STEPS   optimizer steps of the curriculum (600)             TEXT_STEPS   of pretraining (160)
#   TOKEN_BUDGET  of each model of the ArXiv experiment (1_500_000)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
export HF_HUB_OFFLINE=1

OUT=${OUT:-quickstart}
SAMPLES=${SAMPLES:-samples}
GRAPH_STEPS=${GRAPH_STEPS:-600}
TEXT_STEPS=${TEXT_STEPS:-160}
TOKEN_BUDGET=${TOKEN_BUDGET:-1_500_000}
CATEGORIES=(chemistry microbiology oncology surgery) # those with the most text

title() { printf '\n== %s\n' "$1"; }

title "real text: PubMed abstracts in eleven categories, and the GPT-NeoX tokenizer"
python fetch_samples.py --output_dir "$SAMPLES" --parts tokenizer_neox pubmed

S=$OUT/graphs
title "graph search: held-out examples, and a vocabulary of 1,024 for its words and those of the abstracts"
python build_data_splits.py --scratch_dir "$S" --max_input_size 36 --max_lookahead 6 \
    --eval_size 500 --test_size 1000 --mixin_size 2000
SPLITS=$S/data/nl_splits/mis36_look6_seed12345
python train_tokenizer.py --input "$SPLITS/mixin.jsonl" "$SAMPLES/pubmed/train.jsonl" --column input_text text \
    --vocab_size 1024 --output_dir "$S/tokenizer"
title "the curriculum: a stage is passed when 60 % of the latest answers are right (a random child: 49 %)"
python pptrain.py --scratch_dir "$S" --data_dir "$SPLITS" --tokenizer "$S/tokenizer" --model neox-128x6 \
    --seq_len 512 --max_steps "$GRAPH_STEPS" --micro_batch 32 --grad_accum 1 --precision fp32 --lr 1.5e-3 --adam_beta2 0.98 \
    --warmup_steps 100 --curr_check_every 10 --curr_threshold 0.6 --eval_subset_size 200 --num_workers 0
python evaluate_model.py search "$S/pptrain" --split test
python report.py curriculum "$S/pptrain"

title "abstracts to packed blocks of token ids"
python build_pretrain.py --scratch_dir "$S" --documents "$SAMPLES/pubmed/train.jsonl" \
    --held_out_documents "$SAMPLES/pubmed/validation.jsonl" --tokenizer "$S/tokenizer" --seq_len 320
pretrain() { # name, what it begins with
    python pretrain.py --scratch_dir "$S" --data_dir "$SPLITS" --output_dir "$S/$1" --pptrain_checkpoint "$2" --model neox-128x6 \
        --total_steps "$TEXT_STEPS" --effective_batch 16 --micro_batch 16 --mixin_percent 0.05 --precision fp32 --lr 3e-3 \
        --adam_beta2 0.98 --warmup_steps 30 --eval_every 40 --eval_subset_size 200
}
title "text with 5 % graphs, from random weights"
pretrain random none
title "the same from the end of the curriculum"
pretrain pretrain latest
title "what is left of graph search, and what the curriculum saved in text"
python evaluate_model.py search "$S/pretrain" --split test
python report.py pretrain "$S/random" "$S/pretrain" --output_dir "$S/report"

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
        --lr 6e-3 --schedule cosine --warmup_steps 50 --steps_per_eval_epoch 150 --eval_windows 512
    python evaluate_model.py context "$run" --checkpoint best --num_windows 2048
}

train_and_measure K4 "${CATEGORIES[@]}"
for category in "${CATEGORIES[@]}"; do train_and_measure "K1_$category" "$category"; done

title "what was found"
python report.py ergodic "$OUT/runs" --checkpoint best
