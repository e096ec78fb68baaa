"""pptrain.py as its users run it: the curriculum, and real processes killed in its middle."""

import json
import random
import signal
import string
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from text import byte_level_bpe
from tokenizers import Tokenizer, models
from training import ROOT, events, flags, kill, outcome, output, wait_for_step
from training import run as run_any
from training import start as start_any
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import build_data_splits
import pptrain
from lm.args import parse
from lm.heldout import encode_rows
from lm.loss import packed_loss
from lm.models import build_model, load_model
from lm.runlog import records

TOY = "toy_generator:ToyGenerator"
STAGES = 6
SETTINGS = {  # a look every four steps at the last ten examples; each look ends a stage
    "model": "neox-64x2",
    "precision": "fp32",
    "seq_len": 512,
    "max_steps": 100,
    "effective_batch": 12,
    "micro_batch": 3,
    "lr": 3e-3,
    "warmup_steps": 5,
    "curr_window": 10,
    "curr_check_every": 4,
    "curr_threshold": 0.0,
    "checkpoint_interval_steps": 5,
    "eval_subset_size": 10,
    "log_every": 1,
}
LEARN = {"generator": TOY, "curr_window": 30, "curr_check_every": 3, "curr_threshold": 0.98}  # stages that must be earned


def build(folder, **changes):
    """Held-out sets of six stages, small."""
    sizes = {"eval_size": 30, "test_size": 5, "mixin_size": 20, "num_processes": 1}
    options = {"scratch_dir": folder, "max_input_size": 36, "max_lookahead": STAGES} | sizes | changes
    build_data_splits.main(parse(build_data_splits.Args, flags(**options)))
    return next((folder / "data/nl_splits").glob("mis*"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build(tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="module")
def toy_data(tmp_path_factory):
    return build(tmp_path_factory.mktemp("toy"), generator=TOY)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level_bpe().save_pretrained(folder)
    return folder


@pytest.fixture
def start(tokenizer_dir):
    def go(folder, data, processes=1, **changes):
        settings = SETTINGS | {"scratch_dir": folder.parent, "tokenizer": tokenizer_dir}
        paths = (ROOT, ROOT / "tests")
        return start_any(folder, data, processes, ROOT / "pptrain.py", settings, paths, **changes)

    return go


@pytest.fixture
def run(start):
    def go(folder, data, processes=1, **changes):
        process = start(folder, data, processes, **changes)
        try:
            return process.wait(timeout=180)
        finally:
            kill(process)

    return go


@pytest.fixture(scope="module")
def uninterrupted(data, tokenizer_dir, tmp_path_factory):
    """Finished runs that nothing disturbed, on one process and on two."""
    folders = {}
    for processes in (1, 2):
        folder = folders[processes] = tmp_path_factory.mktemp("pptrain") / "run"
        settings = SETTINGS | {"scratch_dir": folder.parent, "tokenizer": tokenizer_dir}
        assert run_any(folder, data, processes, script=ROOT / "pptrain.py", settings=settings) == 0, output(folder)
    return folders


@pytest.fixture
def in_process(data, tokenizer_dir, tmp_path):
    """Run pptrain.main here, which saves the imports; the signal handlers are put back afterwards."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]

    def go(folder="run", **changes):
        fixed = {"scratch_dir": tmp_path, "tokenizer": tokenizer_dir, "output_dir": tmp_path / folder, "force_cpu": True}
        return pptrain.main(parse(pptrain.Args, flags(**SETTINGS | {"data_dir": data, "num_workers": 0} | fixed | changes)))

    yield go
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def state_of(folder, step):
    return json.loads((folder / f"checkpoints/step_{step:08d}/state.json").read_text())


def test_the_run_passes_every_stage_and_logs_what_it_did(uninterrupted):
    folder = uninterrupted[1]
    log, evaluations = records(folder, "train"), records(folder, "eval")
    assert [(record["step"], record["stage"]) for record in log] == [(step, 1 + (step - 1) // 4) for step in range(1, 25)]
    keys = {"step", "loss", "lr", "curr_acc", "stage", "alpha", "grad_norm", "too_long", "tokens"}
    assert all(record.keys() == keys for record in log)
    assert [record["alpha"] for record in log] == [record["stage"] / 6 for record in log]
    assert [round(record["lr"], 6) for record in log[:6]] == [0.0006, 0.0012, 0.0018, 0.0024, 0.003, 0.003]
    assert [(record["step"], record["stage"]) for record in evaluations] == [(0, 1)] + [(4 * n, n) for n in range(1, 7)]
    keys = {"step", "stage", "alpha", "heldout_acc", "heldout_loss", "num_examples"}
    assert all(record.keys() == keys and record["num_examples"] == 10 for record in evaluations)
    assert evaluations[-1]["heldout_loss"] < evaluations[0]["heldout_loss"]
    assert all("timestamp" in json.loads(line) for line in (folder / "logs/eval.jsonl").read_text().splitlines())
    final = state_of(folder, 24)
    assert (final["stage"], final["recent"], final["step"]) == (7, [], 24)
    assert "stages 6  reachable_lookahead 4" in output(folder)
    assert "at --max_input_size 36 the longest lookahead is 4, and stage s asks for up to s - 1" in output(folder)


def test_the_final_model_loads_with_transformers(uninterrupted):
    model = AutoModelForCausalLM.from_pretrained(uninterrupted[1] / "final")
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted[1] / "final")
    assert model.config.vocab_size == len(tokenizer) == 300
    assert json.loads((uninterrupted[1] / "final/about.json").read_text())["step"] == 24


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_in_the_middle_of_the_curriculum_ends_bit_for_bit_as_if_it_had_not_been(
    processes, uninterrupted, data, start, run, tmp_path
):
    folder, draw = tmp_path / "run", random.Random(processes)
    for step in (2, 8, 17):  # before the first checkpoint but step 0; at a change of stage; in the middle of a stage
        process = start(folder, data, processes)
        wait_for_step(folder, step, process)
        time.sleep(draw.random() * 0.05)
        kill(process)
    assert run(folder, data, processes) == 0, output(folder)
    assert outcome(folder) == outcome(uninterrupted[processes])
    assert [event["event"] for event in events(folder)] == ["started", "resumed", "resumed", "resumed", "finished"]


def test_a_run_resumes_at_a_checkpoint_of_the_step_that_ended_a_stage(uninterrupted, data, run, tmp_path):
    """Checkpoints at steps 4, 8, ...: the new stage and its empty window are what they hold."""
    folder, changes = tmp_path / "run", {"checkpoint_interval_steps": 4, "max_step_checkpoints": 9}
    assert run(folder, data, max_steps=8, **changes) == 0, output(folder)
    assert (state_of(folder, 8)["stage"], state_of(folder, 8)["recent"]) == (3, [])
    assert run(folder, data, **changes, resume_from="latest") == 0, output(folder)
    assert records(folder, "train") == records(uninterrupted[1], "train")
    assert records(folder, "eval") == records(uninterrupted[1], "eval")


@pytest.mark.parametrize("workers", [0, 3])
def test_any_number_of_loader_processes_gives_the_same_run(workers, uninterrupted, data, run, tmp_path):
    assert run(tmp_path / "run", data, num_workers=workers) == 0, output(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(uninterrupted[1])


def test_two_processes_equal_one_with_twice_the_accumulation(uninterrupted):
    one, two = (records(uninterrupted[processes], "train") for processes in (1, 2))
    exact = ("step", "stage", "tokens", "too_long", "lr")
    assert [[record[key] for key in exact] for record in two] == [[record[key] for key in exact] for record in one]
    assert [record["loss"] for record in two] == pytest.approx([record["loss"] for record in one], rel=1e-4)


def test_two_processes_earn_the_same_stages_at_the_same_steps(toy_data, run, tmp_path):
    """On one process, on two, and from one to two in the middle; the answers come in the order of the rows on all."""
    one, two, changed = (tmp_path / name for name in ("one", "two", "changed"))
    changes = LEARN | {"curr_window": 31}  # not a whole number of steps
    changes |= {"checkpoint_interval_steps": 1, "max_step_checkpoints": 99}
    assert run(one, toy_data, **changes) == 0, output(one)
    assert run(two, toy_data, processes=2, **changes) == 0, output(two)
    assert run(changed, toy_data, max_steps=10, **changes) == 0, output(changed)
    assert run(changed, toy_data, processes=2, micro_batch=2, **changes) == 0, output(changed)
    stages = [(record["step"], record["stage"], record["curr_acc"]) for record in records(one, "train")]
    assert stages[0][2] == 0, "nothing is known at the start"
    assert stages[-1][1] == STAGES, "and all is learned at the end"
    assert 20 < stages[-1][0] < 100
    for folder in (two, changed):
        assert [(record["step"], record["stage"], record["curr_acc"]) for record in records(folder, "train")] == stages
        answers = [[state_of(run_folder, step)["recent"] for step in range(1, stages[-1][0])] for run_folder in (one, folder)]
        assert answers[0] == answers[1]
    assert any(True in recent and False in recent for recent in answers[0]), "or their order would not have been looked at"


def test_answers_are_judged_before_the_update_and_kept_in_the_order_of_the_rows(toy_data, in_process, monkeypatch, tmp_path):
    batches = []
    monkeypatch.setattr(pptrain, "packed_loss", lambda model, batch: batches.append(batch) or packed_loss(model, batch))
    often = {"checkpoint_interval_steps": 1, "max_step_checkpoints": 99, "max_steps": 15}
    assert in_process(**LEARN | often | {"curr_window": 999}, data_dir=toy_data) == 0

    def answers(model_of_step, step):
        model = load_model(tmp_path / f"run/checkpoints/step_{model_of_step:08d}")
        return [flag for batch in batches[4 * (step - 1) : 4 * step] for flag in packed_loss(model, batch)[2].tolist()]

    recent = state_of(tmp_path / "run", 15)["recent"]
    assert recent == [flag for step in range(1, 16) for flag in answers(step - 1, step)]
    assert recent != [flag for step in range(1, 16) for flag in answers(step, step)], "the update changes answers"


def test_after_a_stage_no_example_of_the_old_stage_trains(toy_data, in_process, monkeypatch, tmp_path, tokenizer_dir):
    """With three loader processes, which have made many micro-batches of the old stage ahead."""
    tokenizer, seen = AutoTokenizer.from_pretrained(tokenizer_dir), []

    def watched(model, batch):
        seen.append([tokenizer.decode(batch["input_ids"][batch["example"] == number]) for number in range(3)])
        return packed_loss(model, batch)

    monkeypatch.setattr(pptrain, "packed_loss", watched)
    assert in_process(generator=TOY, data_dir=toy_data, num_workers=3) == 0
    for step, stage in enumerate((stage for stage in range(1, 7) for _ in range(4)), 0):
        texts = [text for batch in seen[4 * step : 4 * step + 4] for text in batch]
        assert all(text.startswith(f"At {stage} of 6 we see") for text in texts)
    numbers = [text.split("Number ")[1] for batch in seen for text in batch]
    assert len(set(numbers)) == 24 * 12, "no example twice"


def test_a_rollback_returns_to_the_stage_and_the_window_of_the_checkpoint(in_process, monkeypatch, tmp_path):
    """Steps 14 to 16 fail for ever: back to step 10 (stage 3), and the stages go on from there."""
    clean, count = packed_loss, 0

    def poisoned(model, batch):
        nonlocal count
        count += 1
        loss, *rest = clean(model, batch)
        return (loss * float("nan"), *rest) if 4 * 13 <= count - 1 < 4 * 16 else (loss, *rest)

    monkeypatch.setattr(pptrain, "packed_loss", poisoned)
    assert in_process() == 0
    (back,) = [event for event in events(tmp_path / "run") if event["event"] == "rolled_back"]
    assert (back["from_step"], back["to_step"], back["data_steps_left_out"]) == (14, 10, [10, 13])
    log = records(tmp_path / "run", "train")
    assert [(record["step"], record["stage"]) for record in log] == [(step, 1 + (step - 1) // 4) for step in range(1, 25)]
    assert state_of(tmp_path / "run", 24)["data_offset"] == 4
    batch = torch.load(tmp_path / "run/problematic_batch.pt")
    assert batch["source"][0][0]["stage"] == 4
    assert batch["source"][0][0]["prompt"].startswith("Suppose we have the following facts:")
    assert batch["micro_batches"][0]["input_ids"].ndim == 2


def test_a_signal_stops_with_a_checkpoint_and_the_run_goes_on_from_it(uninterrupted, data, start, run, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, data, processes=2)
    wait_for_step(folder, 9, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) != 0
    assert events(folder)[-1]["event"] == "stopped", output(folder)
    assert run(folder, data, processes=2) == 0, output(folder)
    assert outcome(folder) == outcome(uninterrupted[2])


def test_another_effective_batch_is_refused_and_another_split_is_not(in_process, data, tmp_path):
    assert in_process(max_steps=5) == 0
    with pytest.raises(ValueError, match=r"cannot resume .*effective_batch: saved 12, now 24"):
        in_process(effective_batch=24)
    with pytest.raises(ValueError, match=r"curr_threshold: saved 0.0, now 0.5"):
        in_process(curr_threshold=0.5)
    assert in_process(micro_batch=6, max_steps=8) == 0
    assert [record["step"] for record in records(tmp_path / "run", "train")] == list(range(1, 9))


def test_records_come_every_few_steps_and_where_a_stage_or_the_run_ends(in_process, tmp_path):
    assert in_process(log_every=10, curr_check_every=7, max_steps=23) == 0
    assert [record["step"] for record in records(tmp_path / "run", "train")] == [7, 10, 14, 20, 21, 23]


def test_examples_longer_than_seq_len_are_left_out_counted_and_reported(in_process, data, tmp_path, capsys):
    assert in_process(seq_len=170, max_left_out=1.0) == 0
    assert in_process("other", seq_len=170, max_left_out=1.0, micro_batch=4, num_workers=2) == 0
    log, other = records(tmp_path / "run", "train"), records(tmp_path / "other", "train")
    assert [record["too_long"] for record in log] == [record["too_long"] for record in other]
    assert log[0]["too_long"] == 0
    assert log[-1]["too_long"] > 10
    said = capsys.readouterr().out
    assert f"{log[-1]['too_long']} examples were left out because they are longer than --seq_len" in said
    assert "of the last stage's examples are longer than --seq_len 170 and will be left out" in said


def test_every_step_trains_on_the_effective_batch_whatever_was_left_out(in_process, monkeypatch):
    lengths = []

    def watched(model, batch):
        lengths.extend((batch["lengths"] + 1).tolist())
        return packed_loss(model, batch)

    monkeypatch.setattr(pptrain, "packed_loss", watched)
    assert in_process(seq_len=170, max_left_out=1.0) == 0
    assert len(lengths) == 24 * 12
    assert max(lengths) <= 170


def test_no_stage_is_passed_before_a_full_window_is_right_often_enough():
    args = SimpleNamespace(curr_window=4, curr_threshold=0.75)
    passed = [[], [True] * 3, [True, False, True, False], [True, True, False, True], [True] * 4]
    assert [pptrain.stage_is_passed(pptrain.Progress(recent=recent), args) for recent in passed] == [False] * 3 + [True] * 2


def test_heldout_accuracy_counts_any_valid_answer_and_loss_the_label(tokenizer_dir, monkeypatch):
    tokenizer = byte_level_bpe()
    rows = [{"input_text": "one is", "output_texts": ["a", "bb"]}, {"input_text": "two is", "output_texts": ["c"]}]
    held_out = encode_rows(rows, tokenizer, seq_len=100)
    assert (held_out.row, held_out.num_rows, held_out.num_too_long) == ([0, 0, 1], 2, 0)
    model = build_model("neox-64x2", 300, 100)
    alone = SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1, reduce=lambda x, _: x)

    def knows(*right):
        def loss(model, batch):
            examples = [batch["input_ids"][batch["example"] == n].tolist() for n in range(len(batch["lengths"]))]
            flags = torch.tensor([tokenizer.decode(ids).endswith(right) for ids in examples])
            return batch["weights"].sum() * 2.0, torch.tensor(True), flags

        return loss

    for right, accuracy in ((("is a",), 0.5), (("is bb",), 0.5), ((" bb", " c"), 1.0), ((), 0.0)):
        monkeypatch.setattr("lm.heldout.packed_loss", knows(*right))
        assert pptrain.teacher_forced(model, held_out, alone, "fp32", 100.0) == (accuracy, 2.0)
    monkeypatch.undo()
    labels = encode_rows([{**row, "output_texts": row["output_texts"][:1]} for row in rows], tokenizer, 100)
    expected = pptrain.teacher_forced(model, labels, alone, "fp32", None)[1]
    assert pptrain.teacher_forced(model, held_out, alone, "fp32", 100.0)[1] == pytest.approx(expected, rel=1e-5)
    assert encode_rows(rows, tokenizer, seq_len=5).num_too_long == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_input_size": 48}, r"--max_input_size 48, but .* was built with 36"),
        ({"max_lookahead": 8}, r"--max_lookahead 8, but .* was built with 6"),
        ({"seq_len": 100}, r"--seq_len 100 is too short for .*% of the last stage's examples .* pass a longer --seq_len"),
        ({"start_stage": 7}, r"--start_stage 7: .* has stages 1 to 6"),
        ({"generator": TOY}, r"was built with generator built-in, the run's is toy_generator:ToyGenerator"),
        ({"effective_batch": 13}, r"--effective_batch 13 is not a multiple"),
        ({"curr_threshold": 98}, r"--curr_threshold 98.0: a number in \[0, 1\] is needed"),
        ({"curr_window": 0, "lr": 0}, r"(?s)--curr_window 0: at least 1.*--lr 0.0: more than 0"),
    ],
)
def test_bad_input_is_said_before_anything_is_written(changes, message, in_process, tmp_path):
    with pytest.raises(ValueError, match=message):
        in_process(**changes)
    assert not (tmp_path / "run").exists()


def test_missing_things_are_named(in_process, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run build_data_splits.py"):
        in_process(data_dir=tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"samples/tokenizer_neox"):
        in_process(tokenizer=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in"):
        in_process(resume_from="latest")


def test_a_tokenizer_that_splits_the_answer_differently_after_its_prompt_is_refused(in_process, tmp_path):
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), *((letter, -1.0) for letter in string.printable), (" is ", -1.0)], 0))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>").save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="splits the answer differently after a space"):
        in_process(tokenizer=tmp_path / "tokenizer")


def test_a_run_without_curriculum_stays_at_the_last_stage(in_process, tmp_path):
    assert in_process(start_stage=6, max_steps=6) == 0
    assert {record["stage"] for record in records(tmp_path / "run", "train")} == {6}


def test_the_held_out_subset_is_fixed_and_of_the_asked_size(data, tokenizer_dir):
    rows = [json.loads(line) for line in (data / "eval.jsonl").read_text().splitlines()]
    args = SimpleNamespace(seed=0, eval_subset_size=7, seq_len=512)
    first, again = (pptrain.choose_held_out(rows, args, byte_level_bpe()) for _ in range(2))
    assert first.num_rows == again.num_rows == 7
    assert all(np.array_equal(one, other) for one, other in zip(first.examples, again.examples, strict=True))
