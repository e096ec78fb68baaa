#!/usr/bin/env bash
# lm-eval's tasks on a run or a model, in the project's environment; all arguments go to evaluate_model.py tasks:
#
#   scripts/run_lm_eval_psann.sh RUN --tasks hellaswag,piqa,winogrande --num_fewshot 5 --apply_chat_template --fewshot_as_multiturn
#   scripts/run_lm_eval_psann.sh RUN --tasks hellaswag,lambada_openai --rows samples/tasks      # without a network
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
source scripts/setup.sh
cd "$OLDPWD" # paths are those of whoever calls
exec python "$root/evaluate_model.py" tasks "$@"
