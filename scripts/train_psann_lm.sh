#!/usr/bin/env bash
# PSANN-LM: raw English text to a chat model: clean -> tokenizer -> pack (ahead of the training) -> pretrain -> chat SFT ->
# export -> evaluate. Run again, it goes on where it stopped (exit code 75: stopped by a signal, with a checkpoint).
#
#   scripts/train_psann_lm.sh --size tiny                            # two CPU cores, some minutes, real text out of packages
#   scripts/train_psann_lm.sh --size 3b --data_manifest shards.txt --chat_data chats.jsonl \
#       --eval_decontaminate hellaswag,piqa,winogrande,lambada,wikitext                                             # 8 GPUs
#
#   --size tiny|125m|300m|1b|3b    --base respsann (for tiny also transformer, waveresnet, sgrpsann, geosparse)
#   --data_manifest FILE  a path of text (.txt, .md, .jsonl, .parquet, ...) on each line     --chat_data  as sft.py --data
#   --tokens N   (20 for each parameter: Hoffmann et al., arXiv 2203.15556)                  --out DIR (psann_SIZE)
#   --eval_decontaminate TASKS   whose rows are kept out of the text      --tasks TASKS   to evaluate on at the end
#   --rows DIR   rows of the tasks, for no network   --processes N (the GPUs)   --device_batch N   rows in a forward pass
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

size='' base=respsann manifest='' chat='' tokens='' out='' decontaminate='' tasks='' rows='' processes='' device_batch=''
while [ $# -gt 0 ]; do
    [ $# -gt 1 ] || { echo "$1 has no value: see the head of $0" >&2; exit 2; }
    case $1 in # paths are those of whoever calls; chat data may be a dataset of the hub
    --data_manifest) manifest=$(realpath -m -- "$2") ;; --out) out=$(realpath -m -- "$2") ;; --rows) rows=$(realpath -m -- "$2") ;;
    --chat_data) [ -e "$2" ] && chat=$(realpath -- "$2") || chat=$2 ;;
    --size) size=$2 ;; --base) base=$2 ;; --tokens) tokens=${2//_/} ;; --eval_decontaminate) decontaminate=$2 ;;
    --tasks) tasks=$2 ;; --processes) processes=$2 ;; --device_batch) device_batch=$2 ;;
    *) echo "no option $1: see the head of $0" >&2; exit 2 ;;
    esac
    shift 2
done
cd "$root"
gpus=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)
case $size in # vocabulary, targets in a row, rows in a step, rows in a pass, learning rate, tokens
tiny) set -- 4096 256 16 8 4e-3 1600000 ;;
125m) set -- 50304 2048 256 16 2e-3 3200000000 ;;
300m) set -- 50304 2048 256 8 1.2e-3 6100000000 ;;
1b) set -- 50304 2048 512 4 8e-4 20000000000 ;;
3b) set -- 50304 2048 1024 4 4e-4 60000000000 ;;
*) echo "--size '$size' is none of tiny, 125m, 300m, 1b, 3b: pass one" >&2; exit 2 ;;
esac
vocab=$1 seq_len=$2 batch=$3 device_batch=${device_batch:-$4} lr=$5 tokens=${tokens:-$6}
model=psann-$size
[ "$base" = respsann ] || model=psann-$size-$base
out=${out:-psann_$size}
processes=${processes:-$((gpus > 0 ? gpus : 2))}
steps=$((tokens / (batch * seq_len)))
if [ $((batch % (processes * device_batch))) != 0 ]; then
    echo "a step has $batch rows, which $processes processes x $device_batch rows do not divide: pass another --processes or" \
        "--device_batch" >&2
    exit 2
fi
precision=bf16 divided=() sft_lr=3e-4 few=()
case $size in
tiny) precision=fp32 sft_lr=2e-3 few=(--limit 300) ;; # questions of each task
1b | 3b) divided=(--fsdp full_shard --grad_checkpoint) ;;
esac
if [ "$size" = tiny ]; then
    rows=${rows:-samples/tasks} chat=${chat:-samples/conversations/train.jsonl}
    decontaminate=${decontaminate:-hellaswag,piqa,winogrande} tasks=${tasks:-hellaswag,piqa,winogrande}
fi
tasks=${tasks:-hellaswag,piqa,winogrande}
[ -n "$manifest" ] || [ "$size" = tiny ] || { echo "--size $size needs --data_manifest, a file of paths: pass it" >&2; exit 2; }
[ -n "$chat" ] || { echo "--size $size needs --chat_data, conversations for the fine-tuning: pass it" >&2; exit 2; }
source scripts/setup.sh
mkdir -p "$out"

set -m # each stage has a process group of its own, to which signals are passed on
child='' packing=''
trap '[ -z "$packing" ] || kill "$packing" 2>/dev/null || true' EXIT
trap 'pass_on TERM 143' TERM
trap 'pass_on INT 130' INT
pass_on() { # a signal, and the exit code if no stage is there to take it
    [ -n "$child" ] || exit "$2"
    kill -s "$1" -- -"$child" 2>/dev/null || true
}

stage() { # name, command: runs it, and notes what it took
    local name=$1 begun code
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    begun=$(date +%s)
    "$@" & child=$!
    while :; do # a signal ends the waiting, not the stage
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    child=''
    printf '{"stage": "%s", "sec": %d, "code": %d}\n' "$name" $(($(date +%s) - begun)) $code >>"$out/stages.jsonl"
    [ $code = 0 ] || exit $code
}
launch() { # a trainer and its arguments, on every process
    if [ "$processes" = 1 ]; then
        python "$@"
    else
        local on_cpu=()
        [ "$gpus" -gt 0 ] || on_cpu=(ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1)
        env "${on_cpu[@]}" accelerate launch --multi_gpu --num_machines 1 --num_processes "$processes" --mixed_precision no \
            --dynamo_backend no --main_process_port 0 "$@"
    fi
}

stage estimate python estimate_run.py --model "$model" --vocab_size $vocab --seq_len $seq_len --micro_batch "$device_batch" \
    --tokens "$tokens" --num_processes "$processes" --precision $precision "${divided[@]}"
if [ -z "$manifest" ]; then
    stage samples python fetch_samples.py --parts pubmed papers bible conversations tasks
    manifest=$out/texts.txt
    printf '%s\n' "$root"/samples/pubmed/train.jsonl "$root"/samples/papers/train.json.gz "$root"/samples/bible/train.jsonl >"$manifest"
fi
own_rows=(${rows:+--rows "$rows"})
stage clean python clean_corpus.py --manifest "$manifest" --output_dir "$out/clean" --skip_bad_documents \
    ${decontaminate:+--eval_decontaminate "$decontaminate" "${own_rows[@]}"}
stage tokenizer python train_tokenizer.py --manifest "$out/clean/manifest.txt" --vocab_size $vocab --chat --output_dir "$out/tokenizer"

pack=$out/data/c4_packed
python build_pretrain.py --scratch_dir "$out" --manifest "$out/clean/manifest.txt" --tokenizer "$out/tokenizer" \
    --seq_len $seq_len --total_steps $steps --effective_batch $batch >>"$out/pack.log" 2>&1 & packing=$!
echo "packing in the background ($out/pack.log)"
until [ -e "$pack/progress.json" ] || [ -e "$pack/meta.json" ]; do # the first shard
    kill -0 $packing 2>/dev/null || { tail -n 5 "$out/pack.log" >&2; exit 1; }
    sleep 0.5
done
stage pretrain launch pretrain.py --scratch_dir "$out" --model "$model" --total_steps $steps --effective_batch $batch \
    --micro_batch "$device_batch" --lr $lr --schedule wsd --warmup_steps $((steps / 20 + 1)) --adam_beta2 0.95 --adam_eps 1e-8 \
    --eval_every $((steps / 4 + 1)) --precision $precision "${divided[@]}"
wait $packing || { tail -n 5 "$out/pack.log" >&2; exit 1; }
stage chat launch sft.py "$out/pretrain" --data "$chat" --output_dir "$out/chat" --seq_len $seq_len \
    --micro_batch "$device_batch" --lr $sft_lr --precision $precision "${divided[@]}"
[ -e "$out/exported/manifest.json" ] || stage export python export_model.py "$out/chat" --output_dir "$out/exported"
stage evaluate bash scripts/run_lm_eval_psann.sh "$out/chat" --tasks "$tasks" --apply_chat_template "${own_rows[@]}" "${few[@]}"
for question in "Hello! How are you?" "What do you like to eat?" "Tell me about your day."; do
    printf '\n> %s\n' "$question"
    python chat.py "$out/exported" --prompt "$question" --max_new_tokens 60
done
printf '\n%s\n' "minutes for each stage:"
python - "$out/stages.jsonl" <<'PYTHON'
import json, sys

total = {}
for line in open(sys.argv[1]):
    row = json.loads(line)
    total[row["stage"]] = total.get(row["stage"], 0) + row["sec"]
print("  ".join(f"{name} {sec / 60:.1f}" for name, sec in total.items()))
PYTHON
echo "talk to it: python chat.py $out/exported"
