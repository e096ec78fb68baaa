"""train.py as its users run it: real processes, killed, stopped, continued and compared bit for bit."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from damage import change_meta, flip, list_again
from training import ROOT, TINY, events, flags, kill, outcome, output, run, start, wait_for_step
from transformers import AutoModelForCausalLM, AutoTokenizer

import lm.session
import train
from lm.args import parse
from lm.micro_batches import Loader
from lm.run import STOP_SIGNALS
from lm.runlog import records


@pytest.fixture(scope="module")
def uninterrupted(papers_dir, tmp_path_factory):
    """A run of 40 steps on one process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("train") / "run"
    assert run(folder, papers_dir) == 0, output(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted_on_two(papers_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("train2") / "run"
    assert run(folder, papers_dir, processes=2) == 0, output(folder)
    return folder


@pytest.fixture
def in_process(papers_dir, tmp_path):
    """Run train.main here, which saves the five seconds of imports; the signal handlers are put back afterwards."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]

    def go(folder="run", **changes):
        argv = flags(**TINY | {"data_dir": papers_dir} | changes, output_dir=tmp_path / folder, force_cpu=True)
        return train.main(parse(train.Args, argv))

    yield go
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def test_every_step_is_logged_once_with_its_diagnostics(uninterrupted):
    log = records(uninterrupted, "train")
    assert [record["step"] for record in log] == list(range(1, 41))
    assert all(
        record.keys() == {"step", "loss", "lr", "grad_norm", "grad_norm_clipped", "param_norm", "tokens"} for record in log
    )
    assert [record["tokens"] for record in log] == [288 * step for step in range(1, 41)]
    assert [round(record["lr"], 9) for record in log[:6]] == [0.0006, 0.0012, 0.0018, 0.0024, 0.003, 0.003]
    assert log[0]["loss"] == pytest.approx(math.log(300), abs=0.15)
    assert log[-1]["loss"] < log[0]["loss"] - 1
    assert all(record["grad_norm_clipped"] <= min(1.0, record["grad_norm"]) for record in log)
    assert [record["step"] for record in records(uninterrupted, "eval")] == [8, 16, 24, 32, 40]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which torch.compile needs on a CPU")
def test_compiled_blocks_train_alike(in_process, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    short = {"token_budget": 8 * 288}
    assert in_process("plain", **short) == 0
    assert in_process("compiled", **short, compile=True) == 0
    assert any((tmp_path / "compile_cache").iterdir())
    ours, theirs = ([record["loss"] for record in records(tmp_path / run, "train")] for run in ("plain", "compiled"))
    assert ours == pytest.approx(theirs, rel=1e-5)
    final = [AutoModelForCausalLM.from_pretrained(tmp_path / run / "final") for run in ("plain", "compiled")]
    assert [name for name, _ in final[0].named_parameters()] == [name for name, _ in final[1].named_parameters()]


def test_the_first_beta_mirrors_the_one_cycle_schedule(in_process, monkeypatch):
    betas, step = [], lm.session.train_step
    monkeypatch.setattr(lm.session, "train_step", lambda *rest: (betas.append(rest[-2]), step(*rest))[1])
    assert in_process(schedule="one_cycle", cycle_momentum=True, token_budget=8 * 288) == 0
    assert betas[0] == betas[-1] == pytest.approx(0.95)
    assert min(betas) == pytest.approx(0.85, abs=0.01)


def test_the_final_model_loads_with_transformers_and_predicts_as_logged(uninterrupted, papers_dir):
    model = AutoModelForCausalLM.from_pretrained(uninterrupted / "final")
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted / "final")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert (len(tokenizer), model.config.vocab_size) == (300, 320)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    data = train.make_plan(arguments(papers_dir), train.read_papers(papers_dir), 1).validation
    ids = torch.from_numpy(data.astype("int64"))
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(records(uninterrupted, "eval")[-1]["val_loss"], rel=1e-5)


def arguments(papers_dir, **changes) -> train.Args:
    return train.Args(**TINY | {"data_dir": str(papers_dir), "output_dir": "nowhere"} | changes)


def test_three_processes_add_gradients_in_the_same_order_after_a_resume(papers_dir, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {"processes": 3, "micro_batch": 2, "token_budget": 24 * 12 * 15}
    assert run(whole, papers_dir, **settings) == 0, output(whole)
    process = start(killed, papers_dir, **settings)
    wait_for_step(killed, 8, process)
    kill(process)
    assert run(killed, papers_dir, **settings) == 0, output(killed)
    assert outcome(killed) == outcome(whole)


def test_two_processes_equal_one_with_twice_the_accumulation(uninterrupted, uninterrupted_on_two):
    one, two = (records(folder, "train") for folder in (uninterrupted, uninterrupted_on_two))
    assert [record["loss"] for record in two] == pytest.approx([record["loss"] for record in one], rel=2e-5)
    assert [record["grad_norm"] for record in two] == pytest.approx([record["grad_norm"] for record in one], rel=2e-4)
    assert json.loads((uninterrupted_on_two / "run.json").read_text())["derived"]["grad_accum"] == 2


def test_a_signal_to_one_process_of_two_stops_both(uninterrupted_on_two, papers_dir, tmp_path):
    folder = tmp_path / "run"
    launcher = start(folder, papers_dir, processes=2)
    wait_for_step(folder, 11, launcher)
    pattern = ["pgrep", "-P", str(launcher.pid)]
    workers = [int(pid) for pid in subprocess.run(pattern, capture_output=True, text=True, check=True).stdout.split()]
    os.kill(workers[-1], signal.SIGUSR1)
    assert launcher.wait(timeout=40) == 1, "torchrun turns every worker's code into 1"
    assert "exitcode  : 75" in output(folder)
    assert events(folder)[-1]["event"] == "stopped"
    assert run(folder, papers_dir, processes=2) == 0, output(folder)
    assert outcome(folder) == outcome(uninterrupted_on_two)


def test_a_finished_run_is_not_touched_when_it_is_run_again(uninterrupted, papers_dir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    before = outcome(folder)
    assert run(folder, papers_dir) == 0
    assert "finished before" in output(folder)
    assert outcome(folder) == before


def test_a_final_model_that_was_damaged_is_set_aside_and_written_again(uninterrupted, tmp_path, in_process):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    flip(folder / "final/model.safetensors", 1000)
    damaged = (folder / "final/model.safetensors").read_bytes()
    assert in_process() == 0
    assert outcome(folder) == outcome(uninterrupted)
    assert (folder / "final.damaged_1/model.safetensors").read_bytes() == damaged


def test_an_older_checkpoint_is_gone_on_from_and_newer_ones_are_left(uninterrupted, papers_dir, tmp_path, in_process):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "final")
    assert in_process(resume_from=folder / "checkpoints" / "step_00000030", max_eval_epochs=4) == 0  # to step 32
    assert [record["step"] for record in records(folder, "train")] == list(range(1, 33))
    assert (folder / "checkpoints" / "step_00000040.left_1").is_dir()
    assert in_process() == 0
    assert [event["step"] for event in events(folder) if event["event"] == "resumed"] == [30, 32]
    assert outcome(folder) == outcome(uninterrupted)


def test_a_run_that_begins_at_another_runs_checkpoint_goes_on_with_its_own(uninterrupted, tmp_path, in_process):
    begin = uninterrupted / "checkpoints" / "step_00000030"
    assert in_process(resume_from=begin, max_eval_epochs=4) == 0
    assert in_process(resume_from=begin) == 0
    assert [event["step"] for event in events(tmp_path / "run") if event["event"] == "resumed"] == [30, 32]
    weights = [outcome(folder)["final/model.safetensors"] for folder in (tmp_path / "run", uninterrupted)]
    assert weights[0] == weights[1]


def test_a_longer_budget_continues_a_finished_run(uninterrupted, tmp_path, in_process):
    in_process(token_budget=24 * 12 * 16)
    assert in_process() == 0
    assert outcome(tmp_path / "run") == outcome(uninterrupted)


def test_a_checkpoint_that_was_asked_for_must_be_good_and_whole(uninterrupted, tmp_path, in_process):
    damaged = shutil.copytree(uninterrupted / "checkpoints" / "step_00000030", tmp_path / "step_00000030")
    (damaged / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="step_00000030 is damaged .*model.safetensors has 0 bytes"):
        in_process(resume_from=damaged)
    with pytest.raises(ValueError, match="final is a model without the state of its training"):
        in_process(resume_from=uninterrupted / "final")


def test_a_final_model_without_checkpoints_is_not_replaced(uninterrupted, tmp_path, in_process):
    shutil.copytree(uninterrupted / "final", tmp_path / "run" / "final")
    with pytest.raises(FileNotFoundError, match="final is there but no checkpoint"):
        in_process()


def test_another_schedule_or_other_data_is_another_run(in_process, papers_dir, tmp_path):
    in_process(token_budget=576, schedule="cosine")
    with pytest.raises(ValueError, match="total_steps: saved 2, now 3"):
        in_process(token_budget=864, schedule="cosine")
    other = shutil.copytree(papers_dir, tmp_path / "data")
    change_meta(other, lambda meta: meta["files"]["tokens.bin"].update(sha256="0" * 64))
    with pytest.raises(ValueError, match="data: saved"):
        in_process(token_budget=576, schedule="cosine", data_dir=other)
    with pytest.raises(ValueError, match="tokens.bin has SHA-256"):
        in_process(token_budget=576, schedule="cosine", data_dir=other, verify_data=True)


def test_a_tokenizer_that_did_not_make_the_tokens_is_refused(in_process, papers_dir, tmp_path):
    other = shutil.copytree(papers_dir, tmp_path / "data")
    tokenizer = json.loads((other / "tokenizer" / "tokenizer.json").read_text())
    merges = tokenizer["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    text = json.dumps(tokenizer, ensure_ascii=False, indent=2)
    (other / "tokenizer" / "tokenizer.json").write_text(text)
    list_again(other, "tokenizer/tokenizer.json")
    with pytest.raises(ValueError, match="tokenizer did not make .*tokens.bin"):
        in_process(data_dir=other)


def test_validation_windows_are_of_validation_papers(papers_dir):
    papers = train.read_papers(papers_dir)
    windows = train.make_plan(arguments(papers_dir), papers, 1).validation
    of_validation = [papers.tokens[papers.offsets[i] :][: papers.lengths[i]] for i in papers.splits["validation"]]
    text = b"|".join(paper.tobytes() for paper in of_validation)
    assert all(window.tobytes() in text for window in windows)


def test_another_run_in_the_same_folder_is_refused_naming_every_difference(in_process):
    in_process(token_budget=576)
    with pytest.raises(ValueError, match=r"lr: saved 0.003, now 0.001; effective_batch: saved 12, now 24"):
        in_process(token_budget=576, lr=0.001, effective_batch=24)


def test_a_transient_fault_changes_nothing(in_process, uninterrupted, tmp_path, monkeypatch):
    poison(monkeypatch, calls={30})
    assert in_process() == 0
    assert outcome(tmp_path / "run") == outcome(uninterrupted)
    fault = next(event for event in events(tmp_path / "run") if event["event"] == "not_finite")
    assert (fault["step"], fault["attempt"], fault["loss"]) == (8, 1, "nan")
    assert fault["faults"][0] == "loss of micro-batch 2 on process 0"
    assert any(name.startswith("gradient of gpt_neox.layers.0.") for name in fault["faults"])


def test_a_lasting_fault_rolls_back_and_steps_over_the_data(in_process, tmp_path, papers_dir, monkeypatch):
    plan = train.make_plan(arguments(papers_dir), train.read_papers(papers_dir), 1)
    bad_row = torch.from_numpy(plan.train.windows(12 * 17 + 4, 1)[0])  # in step 18, data step 17
    poison(monkeypatch, rows=[bad_row])
    assert in_process() == 0
    folder = tmp_path / "run"
    seen = events(folder)
    assert [event["attempt"] for event in seen if event["event"] == "not_finite"] == [1, 2, 3]
    (rolled_back,) = [event for event in seen if event["event"] == "rolled_back"]
    assert (rolled_back["from_step"], rolled_back["to_step"]) == (18, 15)
    assert rolled_back["data_steps_left_out"] == [15, 17]
    assert [record["step"] for record in records(folder, "train")] == list(range(1, 41))
    assert json.loads((folder / "checkpoints" / "step_00000040" / "state.json").read_text())["data_offset"] == 3
    batch = torch.load(folder / "problematic_batch.pt", weights_only=True)
    assert (batch["step"], batch["data_step"], len(batch["micro_batches"])) == (18, 17, 4)
    assert torch.equal(batch["micro_batches"][1][1], bad_row)
    assert batch["faults"][0] == "loss of micro-batch 1"
    assert len(batch["source"]) == 4
    assert len(batch["source"][0]) == 3


def test_stretches_that_are_stepped_over_add_up(in_process, tmp_path, papers_dir, monkeypatch):
    plan = train.make_plan(arguments(papers_dir), train.read_papers(papers_dir), 1)
    poison(monkeypatch, rows=[torch.from_numpy(plan.train.windows(12 * data_step, 1)[0]) for data_step in (17, 28)])
    assert in_process() == 0
    left_out = [e["data_steps_left_out"] for e in events(tmp_path / "run") if e["event"] == "rolled_back"]
    assert left_out == [[15, 17], [28, 28]]  # step 25 trains on data step 28
    assert json.loads((tmp_path / "run/checkpoints/step_00000040/state.json").read_text())["data_offset"] == 4


def test_a_fault_that_no_data_explains_ends_the_run_and_says_so(in_process, monkeypatch):
    poison(monkeypatch, calls=range(100, 10_000))
    with pytest.raises(RuntimeError, match="the data is not the cause"):
        in_process()


def poison(monkeypatch, calls=(), rows=()) -> None:
    """Make the loss NaN at the given calls, or whenever one of the given windows is in the micro-batch."""
    clean, count = train.next_token_loss, 0

    def poisoned(model, windows):
        nonlocal count
        count += 1
        loss, finite = clean(model, windows)
        hit = count - 1 in calls or any(bool((windows == row).all(dim=1).any()) for row in rows)
        return (loss * float("nan"), finite) if hit else (loss, finite)

    monkeypatch.setattr(train, "next_token_loss", poisoned)


def test_the_last_checkpoints_are_kept_and_the_rest_removed(uninterrupted):
    names = sorted(path.name for path in (uninterrupted / "checkpoints").iterdir())
    assert names == ["step_00000030", "step_00000035", "step_00000040"]


def test_early_stopping_ends_the_run_and_keeps_the_best_model(in_process, tmp_path):
    assert in_process(lr=0.3, steps_per_eval_epoch=1, early_stopping_patience=2) == 0
    losses = [record["val_loss"] for record in records(tmp_path / "run", "eval")]
    assert len(losses) < 40
    assert losses.index(min(losses)) == len(losses) - 3
    assert (tmp_path / "run" / "checkpoints" / f"step_{len(losses):08d}").exists(), "a checkpoint where it ended"
    assert json.loads((tmp_path / "run" / "best" / "about.json").read_text())["val_loss"] == min(losses)


def test_the_plateau_lowers_the_learning_rate_and_a_resumed_run_agrees(in_process, tmp_path):
    settings = {"lr": 0.1, "steps_per_eval_epoch": 2, "reduce_lr_factor": 0.5, "reduce_lr_patience": 0}
    in_process(**settings)
    rates = [record["lr"] for record in records(tmp_path / "run", "train")]
    assert min(rates[5:]) < 0.1
    begin = tmp_path / "run" / "checkpoints" / "step_00000030"
    in_process("continued", **settings, resume_from=begin)
    assert outcome(tmp_path / "continued")["final/model.safetensors"] == outcome(tmp_path / "run")["final/model.safetensors"]
    assert records(tmp_path / "continued", "train") == records(tmp_path / "run", "train")[30:]


def test_token_budget_wins_over_epochs(papers_dir):
    papers = train.read_papers(papers_dir)
    assert train.make_plan(arguments(papers_dir, epochs=3.0), papers, 1).total_steps == 40
    assert train.make_plan(arguments(papers_dir, token_budget=None), papers, 1).total_steps == 2  # one epoch
    assert train.make_plan(arguments(papers_dir, token_budget=None, max_eval_epochs=7), papers, 1).total_steps == 56
    assert train.make_plan(arguments(papers_dir, epochs=3.0, token_budget=None), papers, 1).total_steps == 6  # 24 papers
    assert train.make_plan(arguments(papers_dir, max_eval_epochs=2), papers, 1).total_steps == 16
    with pytest.raises(ValueError, match="less than one step of 12 windows x 24 targets"):
        train.make_plan(arguments(papers_dir, token_budget=287), papers, 1)


def test_named_categories_take_the_place_of_those_the_seed_chooses(papers_dir):
    papers = train.read_papers(papers_dir)
    assert train.make_plan(arguments(papers_dir), papers, 1).train.categories == ["expressions", "operators"]
    named = arguments(papers_dir, categories=("statements", "objects"))
    assert train.make_plan(named, papers, 1).train.categories == ["objects", "statements"]


def test_workers_load_the_same_examples(in_process, uninterrupted, tmp_path):
    assert in_process(num_workers=2) == 0
    assert outcome(tmp_path / "run") == outcome(uninterrupted)


def test_loader_processes_never_see_a_stop_signal_and_the_trainer_does():
    accelerator = SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1)
    loader = Loader(lambda rows: signal.pthread_sigmask(signal.SIG_BLOCK, []), 1, 1, 1, accelerator)
    assert loader.step(0) == [set(STOP_SIGNALS)]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_bf16_trains_with_float32_parameters(papers_dir, tmp_path):
    folder = tmp_path / "run"
    assert run(folder, papers_dir, precision="bf16") == 0, output(folder)
    log = records(folder, "train")
    assert log[-1]["loss"] < log[0]["loss"] - 1
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"K": 5}, "--K 5, but the data has 4 categories"),
        ({"K": 0}, "--K 0: at least 1 is needed"),
        ({"categories": "objects"}, "--categories objects with --K 2: name K different ones, or none"),
        ({"K": 1, "categories": "poetry"}, "category 'poetry' is not in .*: choose from expressions, objects"),
        ({"lr": "inf"}, "--lr inf: a finite number is needed"),
        ({"seed": -1}, "--seed -1: a number from 0 to"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"micro_batch": 5}, "--effective_batch 12 is not a multiple of micro_batch x processes = 5 x 1"),
        ({"sequence_length": 5000}, "has 5001 tokens"),
        ({"model": "no-such-model"}, "--model no-such-model is no preset"),
        ({"resume_from": "latest"}, "no checkpoint in"),
        ({"data_dir": "nowhere"}, r"no nowhere/meta.json: run fetch_arxiv.py"),
        ({"upload_results_to_s3": True}, "--upload_results_to_s3 without --s3_bucket"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(changes, message, in_process, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        in_process(**changes)
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_all_faults_of_the_arguments_are_named_together():
    args = train.Args(K=0, output_dir="x", lr=-1.0, adam_beta1=2.0, token_budget=0)
    assert len(args.faults()) == 4


def test_two_trainers_do_not_share_a_folder(papers_dir, tmp_path):
    folder = tmp_path / "run"
    first = start(folder, papers_dir, token_budget=10**9)
    wait_for_step(folder, 1, first)
    assert run(folder, papers_dir, token_budget=10**9) == 1
    assert "another process is training in" in output(folder)
    assert first.poll() is None
    kill(first)


def test_a_launcher_that_starts_fewer_processes_than_asked_is_refused(papers_dir, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", str(ROOT / "train.py")]
    options = flags(**TINY, data_dir=papers_dir, output_dir=tmp_path / "run")
    done = subprocess.run([*launch, *options], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "accelerate launch was asked for several processes and started one" in done.stderr


def test_accelerate_launch_trains_as_torchrun_does(uninterrupted_on_two, papers_dir, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", str(ROOT / "train.py")]
    options = flags(**TINY, data_dir=papers_dir, output_dir=tmp_path / "run", max_eval_epochs=1)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, *options], check=True, timeout=120, env=environment, capture_output=True)
    assert records(tmp_path / "run", "train") == records(uninterrupted_on_two, "train")[:8]


def test_detect_anomaly_names_the_operation(in_process, monkeypatch):
    poison(monkeypatch, calls={2})
    try:
        with pytest.raises(RuntimeError, match="MulBackward0.* returned nan values"):
            in_process(detect_anomaly=True)
    finally:
        torch.autograd.set_detect_anomaly(False)


def test_weights_and_biases_gets_every_step(papers_dir, tmp_path):
    folder = tmp_path / "run"
    assert run(folder, papers_dir, wandb_project="tests", token_budget=288 * 10) == 0, output(folder)
    (journal,) = folder.glob("wandb/offline-run-*/*.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(journal)]
    read = subprocess.run(inspect, capture_output=True, text=True, check=True)
    rows = [json.loads(line).get("history", {}).get("item", {}) for line in read.stdout.splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses == [record["loss"] for record in records(folder, "train")]


def test_results_are_uploaded_to_s3(in_process, s3, tmp_path):
    client, bucket = s3
    assert in_process(token_budget=288 * 10, upload_results_to_s3=True, s3_bucket=bucket) == 0
    names = {item["Key"] for item in client.list_objects_v2(Bucket=bucket)["Contents"]}
    assert {"runs/run/run.json", "runs/run/final/model.safetensors", "runs/run/logs/train.jsonl"} <= names
    assert not any("checkpoints" in name for name in names)
