"""The shell scripts, run as they are."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from training import ROOT, TINY, events, flags, wait_for_step

PLAN = flags(
    **{name: value for name, value in TINY.items() if name != "K"}
    | {"token_budget": 24 * 12 * 400, "checkpoint_interval_steps": 100, "steps_per_eval_epoch": 100}
)


@pytest.fixture
def plan(papers_dir, tmp_path):
    """Start the plan of K = 1 and 2, two runs at once; its output goes to a file."""
    environment = os.environ | {"KS": "1 2", "SEEDS": "0", "WORKERS": "2", "RUNS_DIR": str(tmp_path / "runs"), "GPUS": ""}
    command = ["bash", str(ROOT / "scripts" / "run_multi_gpu_training_plan.sh"), *PLAN, f"--data_dir={papers_dir}"]

    def start(*more):
        with open(tmp_path / "out", "a") as out:
            return subprocess.Popen(
                [*command, *more], env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    return start


@pytest.mark.parametrize(("name", "send"), [("SIGTERM", os.kill), ("SIGINT", os.killpg)])
def test_a_plan_that_is_stopped_goes_on_where_it_was(name, send, plan, tmp_path):
    runs = [tmp_path / "runs" / f"K{K}_seed0" for K in (1, 2)]
    first = plan()
    for run in runs:
        wait_for_step(run, 20, first, tmp_path / "out")
    send(first.pid, signal.Signals[name])  # to the script alone, as a scheduler may, or to all, as Ctrl-C does
    assert first.wait(timeout=60) == 75, (tmp_path / "out").read_text()
    assert [events(run)[-1]["event"] for run in runs] == ["stopped", "stopped"]
    assert plan().wait(timeout=120) == 0, (tmp_path / "out").read_text()
    assert [[event["event"] for event in events(run)] for run in runs] == [["started", "stopped", "resumed", "finished"]] * 2
    report = json.loads((tmp_path / "runs" / "report" / "report.json").read_text())
    assert set(report["K"]) == {"1", "2"}
    assert "area" in report["K"]["2"]
    assert (tmp_path / "out").read_text().splitlines()[-1].startswith("Finding: mixing K = 2 categories")


def test_a_plan_names_the_runs_that_failed_and_finishes_the_others(plan, tmp_path):
    assert plan("--sequence_length=5000").wait(timeout=60) == 1
    said = (tmp_path / "out").read_text()
    assert "exit code 1: K1_seed0, see " in said
    assert "failed: K1_seed0 K2_seed0" in said or "failed: K2_seed0 K1_seed0" in said
    assert "has 5001 tokens" in (tmp_path / "runs" / "K1_seed0.log").read_text()


@pytest.fixture
def committed(tmp_path) -> Path:
    """This tree in a folder of its own where all of it is committed, as its users have it; it borrows the environment."""
    folder, listing = tmp_path / "tree", ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in names:
        if (ROOT / name).is_file():  # it may be removed and not committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    who = ("-c", "user.name=tests", "-c", "user.email=tests@localhost")
    for command in (("init", "-q"), ("add", "-A"), (*who, "commit", "-q", "-m", "all")):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def test_the_quickstart_runs_and_run_again_does_only_what_is_missing(samples, committed, tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "SAMPLES": str(samples), "TOKEN_BUDGET": str(1600 * 12)}
    environment |= {"GRAPH_STEPS": "20", "TEXT_STEPS": "4"}

    def quickstart():
        command = ["bash", str(committed / "scripts" / "quickstart.sh")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    first = quickstart()
    assert first.splitlines()[-1].startswith("Finding: mixing K = 4 categories costs")
    for name in ("context_loss.png", "excess.png", "loss_against_k.png", "report.json", "report.md"):
        assert (tmp_path / "runs" / "report" / name).stat().st_size > 500
    again = quickstart()
    for name in ("curriculum.png", "curriculum.json", "curriculum.jsonl"):
        assert (tmp_path / "graphs/pptrain/report" / name).exists()
    for name in ("pretrain.png", "pretrain.json", "pretrain.jsonl"):
        assert (tmp_path / "graphs/report" / name).exists()
    assert again.count("was finished before") == 8, "six curricula and mixtures, two of pretraining"
    assert again.count("has just this already") == 7
    assert again.count("nothing to do") == 6, "samples, two tokenizers, papers, held-out examples, packed text"
    assert again.splitlines()[-1] == first.splitlines()[-1]


def few_lines(source: Path, copy: Path, count: int) -> Path:
    """The first lines of a file, in another."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text("".join(source.read_text().splitlines(keepends=True)[:count]))
    return copy


def test_raw_text_becomes_a_chat_model_in_one_command_that_goes_on_where_it_was_stopped(samples, committed, tmp_path):
    texts = [few_lines(samples / name / "train.jsonl", tmp_path / f"{name}.jsonl", 400) for name in ("pubmed", "bible")]
    (tmp_path / "texts.txt").write_text("".join(f"{path}\n" for path in texts))
    chats = few_lines(samples / "conversations/train.jsonl", tmp_path / "train.jsonl", 200)
    few_lines(samples / "conversations/validation.jsonl", tmp_path / "validation.jsonl", 20)
    few_lines(samples / "tasks/piqa/validation.jsonl", tmp_path / "rows/piqa/validation.jsonl", 20)
    out = tmp_path / "psann"
    command = ["bash", str(committed / "scripts/train_psann_lm.sh"), "--size", "tiny", "--tokens", "163_840", "--out", str(out)]
    command += ["--data_manifest", str(tmp_path / "texts.txt"), "--chat_data", str(chats), "--rows", str(tmp_path / "rows")]
    command += ["--eval_decontaminate", "piqa", "--tasks", "piqa"]
    with open(tmp_path / "out", "w") as said:
        first = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
    wait_for_step(out / "pretrain", 20, first, tmp_path / "out", seconds=300)  # the stages before it are slow
    first.terminate()  # the script alone, as a scheduler may
    assert first.wait(timeout=60) != 0
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert [event["event"] for event in events(out / "pretrain")] == ["started", "stopped", "resumed", "finished"]
    assert again.stdout.count("\n> ") == 3, "questions, each with a reply"
    results = json.loads((out / "chat/results.json").read_text())
    assert results["after"]["loss"] < results["before"]["loss"] - 0.5
    assert json.loads((out / "chat/evaluation/final_tasks_chat.json").read_text())["tasks"].keys() == {"piqa"}
    assert {"config.json", "psann.py", "chat_template.jinja", "README.md"} <= {
        path.name for path in (out / "exported").iterdir()
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "7b"], "--size '7b' is none of tiny, 125m, 300m, 1b, 3b: pass one"),
        (["--size", "3b"], "--size 3b needs --data_manifest, a file of paths: pass it"),
        (["--size", "tiny", "--processes", "3"], "a step has 16 rows, which 3 processes x 8 rows do not divide"),
        (["--size", "tiny", "--shards", "x"], "no option --shards"),
        (["--size"], "--size has no value"),
    ],
)
def test_what_is_wrong_with_the_command_is_said_before_anything_is_done(options, said, tmp_path):
    command = ["bash", str(ROOT / "scripts/train_psann_lm.sh"), "--out", str(tmp_path / "out"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "out").exists()
