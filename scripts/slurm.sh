# Sourced by the job scripts, in the folder from which sbatch was called: how a job runs, and how it goes on after its time.
#
# A job goes back into the queue when its time limit is near (USR1) and when its command stopped on request with a checkpoint
# (exit code 75), as a preempted one does. It ends with its command's exit code when that is finished or has failed, and for good
# when it is cancelled. After the failure of a node SLURM itself puts it back.
: "${SLURM_JOB_ID:?start this with sbatch}"
time_is_up=0 step=
trap 'time_is_up=1; pass_on_that_time_is_up' USR1
trap : TERM # of scancel, which the command gets too: wait for its end

if ! cmp -s requirements.txt .venv/requirements.txt; then # not made here: jobs begin together, and may reach no package index
    echo "$PWD/.venv does not have requirements.txt: call sbatch in the root of the repository," \
        "after \`source scripts/setup.sh\` there" >&2
    exit 1
fi
source scripts/setup.sh

train() { # a trainer and its arguments: on every process of every node
    run_and_requeue --kill-on-bad-exit=1 python scripts/launch_on_node.py "$@"
}

pack() { # arguments of build_pretrain.py: the share of this task of the array, if there is one
    local share=()
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        if [ "$SLURM_ARRAY_TASK_MIN" != 0 ] || [ "$SLURM_ARRAY_TASK_COUNT" != $((SLURM_ARRAY_TASK_MAX + 1)) ]; then
            echo "the array has $SLURM_ARRAY_TASK_COUNT tasks from $SLURM_ARRAY_TASK_MIN to $SLURM_ARRAY_TASK_MAX, all from 0 on" \
                "are needed to know what share each packs: submit --array=0-N (what is packed already is not packed again)" >&2
            exit 1
        fi
        share=(--task "$SLURM_ARRAY_TASK_ID" --num_tasks "$SLURM_ARRAY_TASK_COUNT")
    fi
    run_and_requeue python build_pretrain.py "${share[@]}" --num_workers "${SLURM_CPUS_PER_TASK:-1}" "$@"
}

run_and_requeue() { # arguments of srun
    local code
    srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$@" & step=$!
    pass_on_that_time_is_up # if it was before there was a step
    while :; do             # a trapped signal interrupts `wait`
        code=0
        wait "$step" || code=$?
        kill -0 "$step" 2>/dev/null || break
    done
    # 143: a command without a handler, which SIGTERM killed
    if [ $code -ne 0 ] && { [ $time_is_up = 1 ] || [ $code = 75 ] || [ $code = 143 ]; }; then requeue; fi
    exit $code
}

pass_on_that_time_is_up() {
    if [ $time_is_up = 1 ] && [ -n "$step" ]; then kill -USR1 "$step" 2>/dev/null || true; fi
}

requeue() { # unless SLURM has ended the job already: one that was cancelled would come back
    local job=$SLURM_JOB_ID
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi # not the whole array
    if [ "$(squeue --noheader --jobs "$job" --format %T)" = RUNNING ]; then
        echo "back into the queue, to go on later"
        scontrol requeue "$job"
    fi
}
