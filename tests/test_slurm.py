"""The job scripts on a real SLURM: time limits, preemption, failing nodes and cancelled jobs."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import free_port
from graph_runs import SETTINGS, build
from packs import write_pack
from slurm import start_cluster, wait_until, why_not
from text import byte_level_bpe, documents
from training import ROOT, events, flags, kill, outcome, output, start

import build_pretrain
from lm.args import parse
from lm.files import sha256

SHARED = ("dirty", "model", "precision", "effective_batch", "lr", "warmup_steps", "eval_subset_size")
COMMON = {name: SETTINGS[name] for name in SHARED}
COMMON |= {"micro_batch": 3, "checkpoint_interval_steps": 5, "log_every": 1}
# Of 60 steps both.
CURRICULUM = {"seq_len": 512, "max_steps": 300, "curr_window": 10, "curr_check_every": 10, "curr_threshold": 0.0}
TEXT = {"total_steps": 60, "pptrain_checkpoint": "none", "mixin_percent": 0.1, "allow_epochs": True, "eval_every": 40}
ENDLESS = {"curr_threshold": 1.0, "max_steps": 1_000_000}
TWO_NODES, ONE_NODE = ("--nodes=2", "--gres=gpu:1"), ("--nodes=1", "--gres=gpu:2")  # of two processes both
NO_GPU = ("--nodes=1", "--gres=none")
REQUEUE_SEC = 6  # what slurm.conf asks for, and one


@pytest.fixture(scope="module")
def cluster():
    if reason := why_not():
        pytest.skip(reason)
    with start_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Arguments of each trainer, all but its output folder."""
    folder, tokenizer = tmp_path_factory.mktemp("graphs"), byte_level_bpe()
    tokenizer.save_pretrained(folder / "tokenizer")
    common = COMMON | {"scratch_dir": folder, "data_dir": build(folder)}
    pack = write_pack(folder / "data/c4_packed", tokenizer, seq_len=512)
    return {
        "pptrain": common | CURRICULUM | {"tokenizer": folder / "tokenizer"},
        "pretrain": common | TEXT | {"c4_dir": pack},
    }


@pytest.fixture(scope="module")
def uninterrupted(options, tmp_path_factory):
    """The outcome of a run of two processes that torchrun started here, of one trainer or the other."""

    @functools.cache
    def run(trainer="pptrain"):
        folder = tmp_path_factory.mktemp(trainer) / "run"
        settings = dict(options[trainer])
        process = start(folder, settings.pop("data_dir"), 2, ROOT / f"{trainer}.py", settings)
        try:
            assert process.wait(timeout=180) == 0, output(folder)
        finally:
            kill(process)
        return outcome(folder)

    return run


@pytest.fixture
def submit(cluster, options, tmp_path):
    """Submit the job of a trainer as its users do, and return its number."""
    jobs = []

    def go(*sbatch, trainer="pptrain", **changes):
        arguments = flags(**options[trainer] | {"output_dir": tmp_path / "run"} | changes)
        settings = (f"--output={tmp_path}/%x-%j.out", "--cpus-per-task=1", *sbatch)
        jobs.append(cluster.ask("sbatch", "--parsable", *settings, ROOT / f"scripts/{trainer}_job.sh", *arguments))
        return jobs[-1]

    yield go
    for job in jobs:
        cluster.ask("scancel", job)


@pytest.fixture
def said(tmp_path):
    """What the log of the job has."""
    return lambda: "".join(path.read_text() for path in tmp_path.glob("*.out"))


@pytest.fixture
def wait_for_step(tmp_path, said):
    def go(step):
        log = tmp_path / "run/logs/train.jsonl"
        wait_until(lambda: log.exists() and f'{{"step": {step}, ' in log.read_text(), 90, said)

    return go


@pytest.fixture
def wait_for_state(cluster, said):
    """Wait for one of these states, and return how often the job had been put back by then, and its exit code."""

    def go(job, *states):
        def explain():
            return f"{[cluster.job(job)[key] for key in ('JobState', 'Reason', 'Restarts', 'ExitCode')]}\n{said()}"

        wait_until(lambda: cluster.job(job)["JobState"] in states, 120, explain)
        return int(cluster.job(job)["Restarts"]), cluster.job(job)["ExitCode"]

    return go


def history(folder):
    return [(event["event"], event.get("signal")) for event in events(folder)]


def test_a_launcher_passes_a_signal_on_to_trainers_that_do_not_listen_yet(options, tmp_path):
    """While they import; where SLURM tracks processes by cgroups it signals the launcher alone."""
    job = {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "PROCESSES_PER_NODE": "2", "SLURM_JOB_ID": str(free_port())}
    job |= {"SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    job["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [sys.executable, "scripts/launch_on_node.py", "pptrain.py"]
    command += flags(**options["pptrain"] | ENDLESS | {"output_dir": tmp_path / "run"})
    with open(tmp_path / "run.out", "w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | job, stdout=out, stderr=subprocess.STDOUT)
    try:
        launcher = psutil.Process(process.pid)
        wait_until(lambda: len(launcher.children()) == 2, 60, lambda: output(tmp_path / "run"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75, output(tmp_path / "run")
    finally:
        kill(process)
    assert history(tmp_path / "run") == [("started", None), ("stopped", "SIGTERM")]


def test_two_nodes_with_one_process_each_train_as_one_node_with_two(submit, wait_for_state, uninterrupted, tmp_path, said):
    """Bit for bit."""
    assert wait_for_state(submit(*TWO_NODES), "COMPLETED", "FAILED") == (0, "0:0"), said()
    assert outcome(tmp_path / "run") == uninterrupted()


@pytest.mark.parametrize("trainer", ["pptrain", "pretrain"])
def test_a_job_whose_time_is_up_goes_back_into_the_queue_and_on_from_its_checkpoint(
    trainer, cluster, submit, wait_for_step, wait_for_state, uninterrupted, tmp_path, said
):
    job = submit(*TWO_NODES, trainer=trainer)
    wait_for_step(8)
    cluster.ask("scancel", "--signal=USR1", "--batch", job)  # as --signal=B:USR1@180 does
    assert wait_for_state(job, "COMPLETED", "FAILED") == (1, "0:0"), said()
    assert history(tmp_path / "run") == [("started", None), ("stopped", "SIGUSR1"), ("resumed", None), ("finished", None)]
    assert outcome(tmp_path / "run") == uninterrupted(trainer)
    assert re.findall("^(started|stopped|resumed|finished) ", said(), re.MULTILINE) == [
        "started",
        "stopped",
        "resumed",
        "finished",
    ]
    mails = [line for line in (cluster.folder / "mails").read_text().splitlines() if f"Job_id={job} " in line]
    assert [re.search("Began|Requeued|Ended", line)[0] for line in mails] == ["Began", "Requeued", "Began", "Ended"]


def test_the_time_limit_of_a_job_is_announced_in_time(cluster, submit, wait_for_step, wait_for_state, tmp_path, said):
    """By the directive of the script, 180 seconds before: of three minutes at once, as soon as SLURM looks (twice a minute)."""
    job = submit(*NO_GPU, **ENDLESS)
    wait_for_step(8)
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=3")
    assert wait_for_state(job, "PENDING", "FAILED", "TIMEOUT")[0] == 1, said()
    assert history(tmp_path / "run") == [("started", None), ("stopped", "SIGUSR1")]


def test_a_preempted_job_saves_and_goes_on_after_the_other(
    cluster, submit, wait_for_step, wait_for_state, uninterrupted, tmp_path, said
):
    """Within its grace time, after which SLURM would kill it; the steps of the job are told, the script is not."""
    job = submit(*ONE_NODE, "--nodelist=n1")
    wait_for_step(8)
    other = cluster.ask(
        "sbatch", "--parsable", "--partition=high", "--exclusive", "--nodelist=n1", "--output=/dev/null", "--wrap=:"
    )
    wait_for_state(other, "COMPLETED")
    assert wait_for_state(job, "COMPLETED", "FAILED") == (1, "0:0"), said()
    assert history(tmp_path / "run") == [("started", None), ("stopped", "SIGTERM"), ("resumed", None), ("finished", None)]
    assert outcome(tmp_path / "run") == uninterrupted()


def test_a_job_goes_on_after_one_of_its_nodes_failed(
    cluster, submit, wait_for_step, wait_for_state, uninterrupted, tmp_path, said
):
    """The node that the script itself runs on; what runs on the other node must end before the job can run again."""
    job = submit(*TWO_NODES)
    wait_for_step(8)
    node = cluster.job(job)["BatchHost"]
    cluster.fail_node(node)
    try:
        assert wait_for_state(job, "COMPLETED", "FAILED") == (1, "0:0"), said()
    finally:
        cluster.start_node(node)
    assert [event for event, _ in history(tmp_path / "run")] == ["started", "resumed", "finished"]
    assert outcome(tmp_path / "run") == uninterrupted()


def test_a_cancelled_job_saves_and_does_not_come_back(cluster, submit, wait_for_step, wait_for_state, tmp_path, said):
    job = submit(*TWO_NODES, **ENDLESS)
    wait_for_step(8)
    cluster.ask("scancel", job)
    wait_for_state(job, "CANCELLED")
    time.sleep(REQUEUE_SEC + 3)
    assert wait_for_state(job, "CANCELLED")[0] == 0, said()
    assert history(tmp_path / "run") == [("started", None), ("stopped", "SIGTERM")]


def test_a_job_that_fails_ends_with_the_exit_code_of_its_trainer(submit, wait_for_state, said):
    jobs = [submit(*layout, lr=-1) for layout in (TWO_NODES, NO_GPU)]
    for job in jobs:
        assert wait_for_state(job, "COMPLETED", "FAILED") == (0, "1:0"), said()
    assert said().count("--lr -1.0: more than 0") == 3


def test_a_job_without_arguments_is_the_published_run(cluster, wait_for_state, tmp_path, said):
    settings = (f"--output={tmp_path}/%x.out", "--cpus-per-task=1", *NO_GPU, f"--export=ALL,SCRATCH_DIR={tmp_path}")
    job = cluster.ask("sbatch", "--parsable", *settings, ROOT / "scripts/pretrain_job.sh")
    assert wait_for_state(job, "FAILED", "COMPLETED") == (0, "1:0"), said()
    assert f"no {tmp_path}/data/c4_packed/meta.json" in said()


def test_an_array_packs_what_one_process_packs_though_a_task_is_preempted(cluster, wait_for_state, tmp_path, said):
    """At its beginning: a task that was told to end before it could listen comes back too."""
    byte_level_bpe().save_pretrained(tmp_path / "tokenizer")
    wide = " " * 500_000  # in another column, so that there is more than one piece of 64 MB to share
    text = "".join(json.dumps({"text": document, "wide": wide}) + "\n" for document in documents())
    (tmp_path / "text.jsonl").write_text(text)
    pack = {"scratch_dir": tmp_path, "documents": tmp_path / "text.jsonl", "tokenizer": tmp_path / "tokenizer", "seq_len": 64}
    pack |= {"held_out_blocks": 20, "blocks_per_shard": 100}
    one, array = ({**pack, "output_dir": tmp_path / name} for name in ("one", "array"))
    script = (ROOT / "scripts/pack_job.sh", *flags(**array))
    sbatch = ("sbatch", "--parsable", "--cpus-per-task=1", f"--output={tmp_path}/%x-%j.out")
    job = cluster.ask(*sbatch, "--array=0-1", *script)
    join = cluster.ask(*sbatch, f"--dependency=afterok:{job}", *script, "--join")

    def task_1_runs() -> bool:  # its process, not only its step: to one that has none yet a signal is lost
        lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
        return any(
            line[1:4] == ["build_pretrain.py", "--task", "1"] and str(tmp_path / "array") in "".join(line) for line in lines
        )

    wait_until(task_1_runs, 30, said)
    cluster.ask("scancel", "--signal=TERM", f"{job}_1")
    build_pretrain.main(parse(build_pretrain.Args, flags(**one, num_workers=1)))
    assert wait_for_state(join, "COMPLETED", "FAILED", "CANCELLED") == (0, "0:0"), said()
    assert cluster.job(f"{job}_1")["Restarts"] == "1"
    shards = [{path.name: sha256(path) for path in (tmp_path / name).glob("*.bin")} for name in ("one", "array")]
    assert shards[0] == shards[1]
    assert shards[0].keys() == {"shard_00000.bin", "shard_00001.bin", "held_out.bin"}


def test_an_array_that_lacks_tasks_is_refused(cluster, wait_for_state, tmp_path, said):
    script = (ROOT / "scripts/pack_job.sh", f"--scratch_dir={tmp_path}")
    job = cluster.ask("sbatch", "--parsable", "--cpus-per-task=1", f"--output={tmp_path}/%x-%j.out", "--array=1,3", *script)
    assert wait_for_state(f"{job}_3", "FAILED") == (0, "1:0")
    wait_for_state(f"{job}_1", "FAILED")
    (message,) = set(said().splitlines())
    assert message.startswith("the array has 2 tasks from 1 to 3, all from 0 on are needed to know what share each packs")


def test_a_ladder_is_an_array_whose_tasks_go_on_after_a_signal(cluster, tmp_path, said):
    for recipe in ("one", "other"):
        write_pack(tmp_path / "recipes" / recipe, byte_level_bpe(), source={"documents": recipe})
    ladder = [sys.executable, "ladder.py", "submit", "--sizes=neox-64x2", f"--recipes={tmp_path}/recipes", "--seeds=1"]
    ladder += [f"--ladder={tmp_path}/ladder", "--batch=8", f"--tokens={192 * 8 * 100}", "--allow_epochs", "--at_once=1"]
    ladder += [f"--sbatch=--gres=none --cpus-per-task=1 --output={tmp_path}/%A_%a.out"]
    ladder += ["--", "--dirty", "--micro_batch=8", "--precision=fp32", "--eval_every=1000", "--log_every=1", "--eval_blocks=2"]
    printed = cluster.ask(*ladder)
    assert "--array=0,1%1 --gres=gpu:1 --gres=none" in printed
    job = printed.split()[-1]
    log = tmp_path / "ladder/one/neox-64x2/seed0/logs/train.jsonl"
    wait_until(lambda: log.exists() and '{"step": 3, ' in log.read_text(), 120, said)
    write_pack(tmp_path / "recipes/a_third", byte_level_bpe())  # which must not change what a task is
    cluster.ask("scancel", "--signal=USR1", "--batch", f"{job}_0")  # what comes before the time limit
    cells = [tmp_path / f"ladder/{recipe}/neox-64x2/seed0/cell.json" for recipe in ("one", "other")]
    wait_until(lambda: all(cell.exists() for cell in cells), 240, said)
    told = [[event["event"] for event in events(cell.parent)] for cell in cells]
    assert told == [["started", "stopped", "resumed", "finished"], ["started", "finished"]]
    wait_until(lambda: not cluster.ask("squeue", "--noheader", "--jobs", job), 60, said)
    assert "nothing to do" in cluster.ask(*ladder[:3], "--only", "one", "other", *ladder[3:])
