"""pptrain.py as its users run it: the curriculum, and real processes killed in its middle."""

import json
import string
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from graph_runs import CURRICULUM, STAGES, TOY, build, train, write_split
from text import byte_level_bpe
from tokenizers import Tokenizer, models
from training import ROOT, events, kill, outcome, output
from training import run as run_any
from training import start as start_any
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedTokenizerFast

import lm.session
import pptrain
from lm.files import sha256
from lm.heldout import encode_rows, encode_subset, teacher_forced
from lm.loss import packed_loss
from lm.models import build_model, load_model
from lm.runlog import records
from synthetic import SyntheticExamples, Task

TOKENIZER = byte_level_bpe()
ALONE = SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1, reduce=lambda x, _: x)
LEARN = {"generator": TOY, "curr_window": 30, "curr_check_every": 3, "curr_threshold": 0.98}  # stages that must be earned


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build(tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="module")
def toy_data(tmp_path_factory):
    return build(tmp_path_factory.mktemp("toy"), generator=TOY)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def start(tokenizer_dir):
    def go(folder, data, processes=1, **changes):
        settings = CURRICULUM | {"scratch_dir": folder.parent, "tokenizer": tokenizer_dir}
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
        settings = CURRICULUM | {"scratch_dir": folder.parent, "tokenizer": tokenizer_dir}
        assert run_any(folder, data, processes, script=ROOT / "pptrain.py", settings=settings) == 0, output(folder)
    return folders


@pytest.fixture
def in_process(data, tokenizer_dir, tmp_path):
    """Run pptrain.main here, which saves the imports, and return the folder of the finished run."""

    def go(folder="run", **changes):
        options = CURRICULUM | {"data": data, "tokenizer": tokenizer_dir} | changes
        return train(tmp_path / folder, **options)

    return go


@pytest.fixture
def batches(monkeypatch):
    """Every micro-batch that a run in this process makes a pass over, in their order."""
    seen = []
    monkeypatch.setattr(pptrain, "packed_loss", lambda model, batch: seen.append(batch) or packed_loss(model, batch))
    return seen


def texts(batch):
    """Prompt and answer of each example."""
    return [TOKENIZER.decode(batch["input_ids"][batch["example"] == number]) for number in range(len(batch["lengths"]))]


def rows_of(stage, data_step, **options):
    """Prompt and answer of the twelve examples that a data step asks for."""
    examples = SyntheticExamples(Task(36, STAGES), seed=0, stage=stage, **options)
    return [row["prompt"] + row["answer"] for row in examples.texts(12 * data_step, 12)]


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
    assert (len(tokenizer), model.config.vocab_size) == (300, 320)
    assert json.loads((uninterrupted[1] / "final/about.json").read_text())["step"] == 24


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


def test_answers_and_loss_are_those_before_the_update_and_answers_in_the_order_of_the_rows(toy_data, in_process, batches):
    """The loss of a step is the sum of its losses over the sum of its weights, whatever lies in which micro-batch."""
    often = {"checkpoint_interval_steps": 1, "max_step_checkpoints": 99, "max_steps": 15}
    run = in_process(**LEARN | often | {"curr_window": 999}, data=toy_data)

    def outcomes(model_of_step, step):
        model = load_model(run / f"checkpoints/step_{model_of_step:08d}")
        with torch.no_grad():
            return [packed_loss(model, batch) for batch in batches[4 * (step - 1) : 4 * step]]

    before, after = ([outcomes(step - 1 + late, step) for step in range(1, 16)] for late in (0, 1))
    answers = [[flag for step in steps for _, _, correct in step for flag in correct.tolist()] for steps in (before, after)]
    assert state_of(run, 15)["recent"] == answers[0]
    assert answers[0] != answers[1], "the update changes answers"
    weights = [sum(batch["weights"].sum() for batch in batches[4 * step : 4 * step + 4]) for step in range(15)]
    losses = [float(sum(loss for loss, _, _ in step) / weight) for step, weight in zip(before, weights, strict=True)]
    assert [record["loss"] for record in records(run, "train")] == pytest.approx(losses, rel=1e-5)


def test_after_a_stage_no_example_of_the_old_stage_trains(toy_data, in_process, batches):
    """With three loader processes, which have made many micro-batches of the old stage ahead."""
    in_process(generator=TOY, data=toy_data, num_workers=3)
    trained = [text for batch in batches for text in texts(batch)]
    assert trained == [text for step in range(24) for text in rows_of(1 + step // 4, step, generator=TOY)]
    assert len({text.split("Number ")[1] for text in trained}) == 24 * 12, "no example twice"


def test_a_rollback_returns_to_the_stage_the_window_and_the_rows_of_the_checkpoint(toy_data, in_process, batches, monkeypatch):
    """Step 14 (stage 4) fails three times: back to step 10 (stage 3), and from there on with rows that nobody has seen."""
    clean = pptrain.packed_loss

    def poisoned(model, batch):
        loss, *rest = clean(model, batch)
        return (loss * float("nan"), *rest) if 4 * 13 < len(batches) <= 4 * 16 else (loss, *rest)

    monkeypatch.setattr(pptrain, "packed_loss", poisoned)
    run = in_process(generator=TOY, data=toy_data)
    (back,) = [event for event in events(run) if event["event"] == "rolled_back"]
    assert (back["from_step"], back["to_step"], back["data_steps_left_out"]) == (14, 10, [10, 13])
    stages = [1 + step // 4 for step in range(24)]
    assert [(record["step"], record["stage"]) for record in records(run, "train")] == list(enumerate(stages, 1))
    assert state_of(run, 24)["data_offset"] == 4
    failed = rows_of(4, 13, generator=TOY)
    expected = [rows_of(stages[step], step, generator=TOY) for step in range(13)] + [failed] * 3
    expected += [rows_of(stages[step], step + 4, generator=TOY) for step in range(10, 24)]
    assert [text for batch in batches for text in texts(batch)] == [text for step in expected for text in step]
    saved = torch.load(run / "problematic_batch.pt")
    assert [text for batch in saved["micro_batches"] for text in texts(batch)] == failed
    assert [[row["prompt"] + row["answer"] for row in rows] for rows in saved["source"]] == [
        texts(batch) for batch in saved["micro_batches"]
    ]


def test_no_held_out_prompt_trains(in_process, batches, tmp_path):
    """What would be drawn is held out, and so something else is drawn."""
    wanted = [text.rpartition(" ") for step in range(4) for text in rows_of(6, step)]
    held_out = [{"input_text": prompt, "output_texts": [answer]} for prompt, _, answer in wanted]
    last_stage = {"start_stage": 6, "max_steps": 4}
    in_process("free", **last_stage)
    in_process("reserved", **last_stage, data=write_split(tmp_path / "held_out", held_out, "eval"))
    trained = [text.rpartition(" ")[0] for batch in batches for text in texts(batch)]
    prompts = [prompt for prompt, _, _ in wanted]
    assert trained[:48] == prompts
    assert len(trained) == 96
    assert set(prompts).isdisjoint(trained[48:])


@pytest.mark.parametrize("loss", ["weighted", "answer_only"])
def test_the_loss_that_is_asked_for_decides_what_weighs(loss, in_process, batches):
    in_process(loss=loss, max_steps=1)
    assert len(batches) == 4
    for batch in batches:
        trained = batch["answer"] if loss == "answer_only" else batch["example"] < 3
        assert torch.equal(batch["weights"] > 0, trained)


def test_every_setting_of_the_optimizer_reaches_the_weights(in_process):
    changes = [{}, {"max_grad_norm": 0.1}, {"weight_decay": 0.2}, {"adam_eps": 1e-3}, {"adam_beta1": 0.8}]
    changes += [{"adam_beta2": 0.9}, {"lr": 1e-3}, {"warmup_steps": 2}]
    small = {"max_steps": 2, "effective_batch": 2, "micro_batch": 2, "eval_subset_size": 1}
    runs = [in_process(str(number), **small | change) for number, change in enumerate(changes)]
    assert len({sha256(run / "final/model.safetensors") for run in runs}) == len(changes)


def test_examples_share_rows_only_in_a_model_that_keeps_them_apart(in_process, batches, monkeypatch, capsys):
    monkeypatch.setattr(pptrain, "attention_reach", lambda _: 1e9)  # attention costs nothing: one row is cheapest

    def packed(folder):
        run = in_process(folder, max_steps=1)
        return json.loads((run / "run.json").read_text())["derived"]["packed"]

    assert packed("apart")
    assert [len(batch["input_ids"]) for batch in batches] == [1] * 4
    assert "see each other" not in capsys.readouterr().out
    monkeypatch.setattr(pptrain, "sees_only_itself", lambda _: False)
    assert not packed("mixed")
    assert [len(batch["input_ids"]) for batch in batches[4:]] == [3] * 4
    said = "lets packed examples see each other: every example gets a row of its own, padded"
    assert f"--model neox-64x2 {said}" in capsys.readouterr().out


def test_dropout_is_on_in_every_step_and_drawn_anew_as_it_was_after_a_stop(in_process, tmp_path, monkeypatch):
    modes, rates = [], {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=300, n_positions=512, **rates).save_pretrained(tmp_path / "gpt2")
    monkeypatch.setattr(pptrain, "packed_loss", lambda model, batch: modes.append(model.training) or packed_loss(model, batch))
    small = {"model": tmp_path / "gpt2", "effective_batch": 3}
    whole = in_process("whole", **small, max_steps=7)
    for max_steps in (5, 7):
        stopped = in_process("stopped", **small, max_steps=max_steps)
    assert sha256(stopped / "final/model.safetensors") == sha256(whole / "final/model.safetensors")
    assert modes == [True] * 2 * 7


def test_a_run_that_begins_at_the_checkpoint_of_another_has_it_in_its_own_folder(in_process):
    other = in_process("other", max_steps=5) / "checkpoints/step_00000005"
    own = in_process(max_steps=5, resume_from=other) / "checkpoints/step_00000005"
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert sha256(own / name) == sha256(other / name)


def test_a_run_goes_on_only_with_the_same_settings(in_process):
    small = {"max_steps": 1, "effective_batch": 6}
    run = in_process(**small)
    changes = {"loss": ("weighted", "answer_only"), "lr": (0.003, 0.001), "seed": (0, 1), "curr_window": (10, 11)}
    changes |= {"start_stage": (1, 2), "effective_batch": (6, 12), "curr_threshold": (0.0, 0.5), "stage_step": (1, 2)}
    for name, (saved, now) in changes.items():
        with pytest.raises(ValueError, match=rf"cannot resume .*\({name}: saved {saved}, now {now}\)"):
            in_process(**small | {name: now})
    harmless = {"checkpoint_interval_steps": 1, "num_workers": 1, "log_every": 2, "micro_batch": 6}
    in_process(**small | harmless | {"max_steps": 2})
    assert [event["event"] for event in events(run)] == ["started", "finished", "resumed", "finished"]


def test_a_run_goes_on_only_with_the_same_data_tokenizer_and_architecture(in_process, toy_data, tmp_path):
    """Whatever their folders are called."""
    config, small = build_model("neox-64x2", 300, 512).config, {"max_steps": 1, "effective_batch": 3}
    config.save_pretrained(tmp_path / "model")
    in_process(**small, model=tmp_path / "model")
    in_process(**small)  # the preset is the same architecture
    config.layer_norm_eps = 1e-3
    config.save_pretrained(tmp_path / "model")
    byte_level_bpe(310).save_pretrained(tmp_path / "larger")
    other_end = byte_level_bpe()
    other_end.eos_token = other_end.pad_token
    other_end.save_pretrained(tmp_path / "other_end")
    for change, message in (
        ({"data": build(tmp_path, seed=1)}, r"data: saved \{'eval.jsonl': '"),
        ({"tokenizer": tmp_path / "larger"}, r"tokenizer: saved \w+, now \w+"),
        ({"tokenizer": tmp_path / "other_end"}, "eos_token_id: saved 0, now 1"),
        ({"model": tmp_path / "model"}, r"\(architecture: saved \w+, now \w+\)"),
        ({"generator": TOY, "data": toy_data}, "generator: saved .*built-in"),
    ):
        with pytest.raises(ValueError, match=f"cannot resume .*{message}"):
            in_process(**small | change)


def test_records_come_every_few_steps_and_where_a_stage_or_the_run_ends(in_process, tmp_path):
    in_process(log_every=10, curr_check_every=7, max_steps=23)
    assert [record["step"] for record in records(tmp_path / "run", "train")] == [7, 10, 14, 20, 21, 23]


def test_examples_longer_than_seq_len_are_left_out_counted_and_reported(in_process, data, tmp_path, capsys):
    in_process(seq_len=170, max_left_out=1.0)
    in_process("other", seq_len=170, max_left_out=1.0, micro_batch=4, num_workers=2)
    log, other = records(tmp_path / "run", "train"), records(tmp_path / "other", "train")
    assert [record["too_long"] for record in log] == [record["too_long"] for record in other]
    assert log[0]["too_long"] == 0
    assert log[-1]["too_long"] > 10
    said = capsys.readouterr().out
    assert f"{log[-1]['too_long']} examples were left out because they are longer than --seq_len" in said
    assert "of the last stage's examples are longer than --seq_len 170 and will be left out" in said


def test_every_step_trains_on_the_effective_batch_whatever_was_left_out(in_process, batches):
    in_process(seq_len=170, max_left_out=1.0)
    lengths = [length + 1 for batch in batches for length in batch["lengths"].tolist()]
    assert len(lengths) == 24 * 12
    assert max(lengths) <= 170


def test_the_first_beta_mirrors_the_one_cycle_schedule(in_process, monkeypatch):
    betas, step = [], lm.session.train_step
    monkeypatch.setattr(lm.session, "train_step", lambda *rest: (betas.append(rest[-2]), step(*rest))[1])
    in_process(schedule="one_cycle", cycle_momentum=True, max_steps=8, curr_threshold=1.0)
    assert betas[0] == betas[-1] == pytest.approx(0.95)
    assert min(betas) == pytest.approx(0.85, abs=0.01)


def test_no_stage_is_passed_before_a_full_window_is_right_often_enough():
    args = SimpleNamespace(curr_window=4, curr_threshold=0.75)
    passed = [[], [True] * 3, [True, False, True, False], [True, True, False, True], [True] * 4]
    assert [pptrain.stage_is_passed(pptrain.Progress(recent=recent), args) for recent in passed] == [False] * 3 + [True] * 2


def test_heldout_accuracy_counts_any_valid_answer_and_loss_the_label(monkeypatch):
    rows = [{"input_text": "one is", "output_texts": ["a", "bb"]}, {"input_text": "two is", "output_texts": ["c"]}]
    held_out = encode_rows(rows, TOKENIZER, seq_len=100)
    assert (held_out.row, held_out.num_rows, held_out.num_too_long) == ([0, 0, 1], 2, 0)
    model = build_model("neox-64x2", 300, 100)

    def knows(*right):
        def loss(model, batch):
            flags = torch.tensor([text.endswith(right) for text in texts(batch)])
            return batch["weights"].sum() * 2.0, torch.tensor(True), flags

        return loss

    for right, accuracy in ((("is a",), 0.5), (("is bb",), 0.5), ((" bb", " c"), 1.0), ((), 0.0)):
        monkeypatch.setattr("lm.heldout.packed_loss", knows(*right))
        assert teacher_forced(model, held_out, ALONE, "fp32", 100.0) == (accuracy, 2.0)
    monkeypatch.undo()
    labels = encode_rows([{**row, "output_texts": row["output_texts"][:1]} for row in rows], TOKENIZER, 100)
    expected = teacher_forced(model, labels, ALONE, "fp32", None)[1]
    assert teacher_forced(model, held_out, ALONE, "fp32", 100.0)[1] == pytest.approx(expected, rel=1e-5)
    assert encode_rows(rows, TOKENIZER, seq_len=5).num_too_long == 2


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_mode_of_the_model_as_it_was(training):
    model = build_model("neox-64x2", 300, 100).train(training)
    held_out = encode_rows([{"input_text": "one is", "output_texts": ["a"]}], TOKENIZER, seq_len=100)
    teacher_forced(model, held_out, ALONE, "fp32", 100.0)
    assert {module.training for module in model.modules()} == {training}


def test_a_heldout_loss_that_is_not_finite_ends_the_run(in_process, monkeypatch):
    def infinite(model, batch):
        loss, *rest = packed_loss(model, batch)
        return loss * float("inf"), *rest

    monkeypatch.setattr("lm.heldout.packed_loss", infinite)
    with pytest.raises(RuntimeError, match="the held-out loss is inf, a finite one is needed"):
        in_process()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_input_size": 48}, r"--max_input_size 48, but .* was built with 36"),
        ({"max_lookahead": 8}, r"--max_lookahead 8, but .* was built with 6"),
        ({"seq_len": 100}, r"--seq_len 100 is too short for .*% of the last stage's examples .* pass a longer --seq_len"),
        ({"seq_len": 135, "max_left_out": 1.0}, r"--seq_len 135 is too short for all held-out examples"),
        ({"start_stage": 7}, r"--start_stage 7: .* has stages 1 to 6"),
        ({"generator": TOY}, r"was built with generator built-in, the run's is toy_generator:ToyGenerator"),
        ({"effective_batch": 13}, r"--effective_batch 13 is not a multiple"),
        ({"curr_threshold": 98}, r"--curr_threshold 98.0: a number in \[0, 1\] is needed"),
        ({"curr_window": 0, "lr": 0}, r"(?s)--lr 0.0: more than 0.*--curr_window 0: at least 1"),
    ],
)
def test_bad_input_is_said_before_anything_is_written(changes, message, in_process, tmp_path):
    with pytest.raises(ValueError, match=message):
        in_process(**changes)
    assert not (tmp_path / "run").exists()


def test_missing_things_are_named(in_process, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run build_data_splits.py"):
        in_process(data=tmp_path / "nothing")
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
    in_process(start_stage=6, max_steps=6)
    assert {record["stage"] for record in records(tmp_path / "run", "train")} == {6}


def test_a_step_over_stages_ends_at_the_last_one_and_does_not_pass_it_by(in_process):
    log = records(in_process(stage_step=4), "train")
    assert [(record["step"], record["stage"]) for record in log] == list(enumerate([1] * 4 + [5] * 4 + [6] * 4, 1))


def test_the_held_out_subset_is_random_of_the_asked_size_and_fixed_by_the_seed():
    rows = [{"input_text": f"{number} is", "output_texts": ["a"]} for number in range(30)]

    def chosen(seed):
        held_out = encode_subset(rows, 7, seed, TOKENIZER, seq_len=512)
        assert held_out.num_rows == 7
        return [int(TOKENIZER.decode(ids).split(" ")[0]) for ids in held_out.examples]

    subsets = [chosen(seed) for seed in range(100)]
    assert subsets == [chosen(seed) for seed in range(100)]
    assert all(len(set(subset)) == 7 for subset in subsets)
    times = np.bincount(np.concatenate(subsets), minlength=30)
    assert times.min() > 8, "of 23 expected"
    assert times.max() < 43
