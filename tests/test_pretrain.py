"""pretrain.py as its users run it: packed text and synthetic examples, real processes killed in its middle, a growing pack."""

import json
import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from damage import list_again
from graph_runs import build, write_split
from graph_runs import train as pptrain_here
from packs import SEQ_LEN, SETTINGS, pretrain_here, publish, stream, write_pack
from safetensors.torch import load_file
from text import byte_level_bpe, documents
from training import ROOT, events, kill, outcome, output
from training import run as run_any
from training import start as start_any
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import pretrain
from lm.files import read_jsonl, sha256
from lm.loss import mixed_loss
from lm.models import build_model, load_model
from lm.pretraining import read_pretrainings
from lm.runlog import records
from lm.session import Session
from lm.shards import Pack

TOKENIZER = byte_level_bpe()
PPTRAIN = {"seq_len": 200, "max_steps": 2, "eval_subset_size": 2, "micro_batch": 3, "effective_batch": 3}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A scratch folder with held-out examples, a finished pack of 284 blocks and a pre-pretrained model; not to be changed."""
    folder = tmp_path_factory.mktemp("scratch")
    build(folder, max_input_size=12, max_lookahead=2, mixin_size=7)
    write_pack(folder / "data/c4_packed", TOKENIZER)
    TOKENIZER.save_pretrained(folder / "tokenizer")
    pptrain_here(folder / "pptrain", splits(folder), folder / "tokenizer", **PPTRAIN)
    return folder


def splits(scratch):
    return next((scratch / "data/nl_splits").glob("mis*"))


def options(scratch, **changes):
    return SETTINGS | {"scratch_dir": scratch} | changes


def start(folder, scratch, processes=1, **changes):
    return start_any(folder, splits(scratch), processes, ROOT / "pretrain.py", options(scratch, **changes))


def run(folder, scratch, processes=1, **changes):
    return run_any(folder, splits(scratch), processes, script=ROOT / "pretrain.py", settings=options(scratch, **changes))


@pytest.fixture
def here(scratch, tmp_path):
    """Run pretrain.main in this process and return the folder of the run, which ends with `code`."""

    def go(name="run", code=0, **changes):
        changes = {"data_dir": splits(scratch)} | changes
        assert pretrain_here(tmp_path / name, changes.pop("scratch_dir", scratch), **changes) == code
        return tmp_path / name

    return go


@pytest.fixture(scope="module")
def uninterrupted(scratch, tmp_path_factory):
    """Finished runs that nothing disturbed, on one process and on two."""
    folders = {processes: tmp_path_factory.mktemp("pretrain") / "run" for processes in (1, 2)}
    assert pretrain_here(folders[1], scratch, data_dir=splits(scratch)) == 0
    assert run(folders[2], scratch, processes=2) == 0, output(folders[2])
    return folders


@pytest.fixture
def batches(monkeypatch):
    """Every micro-batch that a run in this process trains on, in their order."""
    seen = []
    monkeypatch.setattr(pretrain, "mixed_loss", lambda model, batch: seen.append(batch) or mixed_loss(model, batch))
    return seen


@contextmanager
def stopping_after(step):
    """Runs in this process get a signal as they make this step, and hear of it before the next."""
    make_step = Session.make_step

    def at_step(session, *rest, look, **how):
        if now := session.progress.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_step(session, *rest, look=look or now, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "make_step", at_step)
        yield


def wait_for(file: Path, text: str, process) -> None:
    """Return as soon as the file has this text."""
    deadline = time.monotonic() + 90
    while not file.exists() or text not in file.read_text():
        assert process.poll() is None, f"it ended before {text}"
        assert time.monotonic() < deadline, f"no {text}"
        time.sleep(0.002)


def state_of(folder, step):
    return json.loads((folder / f"checkpoints/step_{step:08d}/state.json").read_text())


def text_of(batches):
    """The stream of tokens that the rows of text give together."""
    rows = [row for batch in batches for row in range(len(batch["synthetic"])) if not batch["synthetic"][row]]
    inputs = torch.cat([batch["input_ids"][~batch["synthetic"]] for batch in batches])
    targets = torch.cat([batch["targets"][~batch["synthetic"]] for batch in batches])
    assert len(inputs) == len(rows)
    assert torch.equal(inputs[1:, 0], targets[:-1, -1]), "each block goes on where the last one ended"
    return np.append(inputs.flatten(), targets[-1, -1])


def examples_of(batches):
    """The text of each synthetic row, without its padding and its end."""
    rows = [(batch, row) for batch in batches for row in batch["synthetic"].nonzero().flatten().tolist()]
    ends = [int(batch["answer"][row].nonzero()[-1]) for batch, row in rows]
    return [TOKENIZER.decode(batch["input_ids"][row, : end + 1]) for (batch, row), end in zip(rows, ends, strict=True)]


def test_a_run_logs_what_it_did_and_leaves_a_model_that_transformers_loads(uninterrupted, scratch):
    folder = uninterrupted[1]
    log, evaluations = records(folder, "train"), records(folder, "eval")
    assert [record["step"] for record in log] == list(range(3, 25, 3))
    keys = {"step", "loss", "lr", "loss_c4", "loss_synthetic", "synthetic_acc", "grad_norm", "c4_block_idx", "mixin_idx"}
    assert all(record.keys() == keys | {"tokens"} for record in log)
    raw = [json.loads(line) for line in (folder / "logs/train.jsonl").read_text().splitlines()]
    assert all(record.keys() - keys == {"tokens", "wait_sec", "timestamp", "tokens_per_sec"} for record in raw)
    assert [record["c4_block_idx"] + record["mixin_idx"] for record in log] == [6 * record["step"] for record in log]
    assert [round(record["lr"], 6) for record in log[:2]] == [0.00225, 0.002982]
    assert log[-1]["lr"] == pytest.approx(0.0003)
    assert [record["step"] for record in evaluations] == [0, 8, 16, 24]
    keys = {"step", "c4_loss", "heldout_acc", "heldout_loss", "num_examples", "tokens", "c4_block_idx", "mixin_idx"}
    assert all(record.keys() == keys and record["num_examples"] == 5 for record in evaluations)
    assert evaluations[-1]["c4_loss"] < evaluations[0]["c4_loss"] - 1
    derived = json.loads((folder / "run.json").read_text())["derived"]
    assert (derived["c4_blocks_needed"], derived["mixin_examples"]) == (log[-1]["c4_block_idx"], log[-1]["mixin_idx"])
    assert (derived["effective_batch"], derived["tokens_per_step"], derived["seq_len"]) == (6, 6 * SEQ_LEN, SEQ_LEN)
    assert derived["pptrain_checkpoint"] == str(scratch / "pptrain/final")
    assert derived["initial_weights"] == sha256(scratch / "pptrain/final/model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert (len(AutoTokenizer.from_pretrained(folder / "final")), model.config.vocab_size) == (300, 320)
    about = json.loads((folder / "final/about.json").read_text())
    assert about == {name: log[-1][name] for name in ("step", "tokens", "c4_block_idx", "mixin_idx")}


def test_every_block_trains_once_and_in_order_and_synthetic_rows_each_once_in_a_pass(scratch, here, batches):
    """On micro-batches of one row, and of all."""
    pack, rows = Pack(scratch / "data/c4_packed"), read_jsonl(splits(scratch) / "mixin.jsonl", "")
    texts = [f"{row['input_text']} {row['output_texts'][0]}" for row in rows]
    whole = stream(TOKENIZER, documents()[1:26])
    for micro_batch in (1, 6):
        batches.clear()
        folder = here(str(micro_batch), micro_batch=micro_batch, total_steps=12)
        (last,) = [record for record in records(folder, "train") if record["step"] == 12]
        assert np.array_equal(text_of(batches), whole[: last["c4_block_idx"] * SEQ_LEN + 1])
        examples = examples_of(batches)
        assert len(examples) == last["mixin_idx"] > 14
        assert sorted(examples[:7]) == sorted(examples[7:14]) == sorted(texts)
        assert examples[:7] != examples[7:14]
    assert pack.num_blocks == (len(whole) - 1) // SEQ_LEN > 200


def test_records_hold_the_means_of_all_steps_since_the_one_before(here, batches):
    """Before the update, each row counted; the loss is the mean over rows of each row's weighted mean."""
    often = {"checkpoint_interval_steps": 1, "max_step_checkpoints": 9, "total_steps": 6}
    folder = here(**often)
    found = []
    for step in range(6):
        model = load_model(folder / f"checkpoints/step_{step:08d}")
        with torch.no_grad():
            found.append([mixed_loss(model, batch) for batch in batches[2 * step : 2 * step + 2]])
    for record, steps in zip(records(folder, "train"), (found[:3], found[3:]), strict=True):
        sums = sum(measured for step in steps for _, _, measured in step).tolist()
        assert record["loss"] == pytest.approx(sum(float(loss) for loss, _, _ in steps[-1]) / (6 * SEQ_LEN), rel=1e-5)
        assert record["loss_c4"] == pytest.approx(sums[0] / sums[1], rel=1e-5)
        assert record["loss_synthetic"] == pytest.approx(sums[2] / sums[3], rel=1e-5)
        assert record["synthetic_acc"] == sums[4] / sums[5]
    assert [state_of(folder, step)["tokens"] for step in (3, 6)] == [record["tokens"] for record in records(folder, "train")]
    targets = sum(float(measured[1] + measured[3]) for step in found for _, _, measured in step)
    assert state_of(folder, 6)["tokens"] == targets


def test_two_processes_train_on_the_same_rows_as_one_also_when_they_take_over(uninterrupted, scratch, here):
    with stopping_after(13):
        changed = here(code=75)
    assert run(changed, scratch, processes=2, micro_batch=1) == 0, output(changed)
    for name, exact in (
        ("train", ("step", "lr", "tokens", "c4_block_idx", "mixin_idx", "synthetic_acc")),
        ("eval", ("step", "tokens", "c4_block_idx", "mixin_idx", "num_examples")),
    ):
        one, two, both = (records(folder, name) for folder in (uninterrupted[1], uninterrupted[2], changed))
        for other in (two, both):
            assert [[row[key] for key in exact] for row in other] == [[row[key] for key in exact] for row in one]
            for key in one[0].keys() - set(exact):
                assert [row[key] for row in other] == pytest.approx([row[key] for row in one], rel=1e-3), key


def test_the_step_from_which_a_run_begins_has_the_pre_pretrained_weights_and_no_moments(uninterrupted, scratch, here):
    folder = here(total_steps=1)
    begun = load_model(folder / "checkpoints/step_00000000").state_dict()
    trained = load_model(scratch / "pptrain/final").state_dict()
    assert begun.keys() == trained.keys()
    assert all(torch.equal(begun[name], trained[name]) for name in begun)
    assert load_file(folder / "checkpoints/step_00000000/optimizer.safetensors") == {}


def test_a_run_stopped_in_the_middle_of_a_log_interval_goes_on_exactly(uninterrupted, here):
    with stopping_after(7):
        folder = here(code=75)
    assert here() == folder
    assert outcome(folder) == outcome(uninterrupted[1])


def test_a_run_keeps_what_it_began_with_though_pre_pretraining_goes_on(uninterrupted, scratch, here, tmp_path):
    """Even when its checkpoint is gone; another one that is named is refused."""
    other = tmp_path / "scratch"
    shutil.copytree(scratch / "pptrain", other / "pptrain")
    changes = {"scratch_dir": other, "c4_dir": scratch / "data/c4_packed"}
    with stopping_after(7):
        folder = here(code=75, **changes)
    pptrain_here(other / "pptrain", splits(scratch), scratch / "tokenizer", **PPTRAIN | {"max_steps": 4})
    for change in (other / "pptrain/checkpoints/step_00000004", scratch / "pptrain/checkpoints/step_00000000", "none"):
        with pytest.raises(ValueError, match=r"cannot resume .*initial_weights: saved \w+, now \w+"):
            here(**changes, pptrain_checkpoint=change, model="neox-64x2")
    shutil.rmtree(other / "pptrain")
    for step, named in ((9, "latest"), (11, other / "pptrain")):
        with stopping_after(step):
            here(code=75, **changes, pptrain_checkpoint=named)
    here(**changes, pptrain_checkpoint=other / "pptrain/final")
    found, whole = outcome(folder), outcome(uninterrupted[1])
    names = (
        "step_00000024/model.safetensors",
        "step_00000024/optimizer.safetensors",
        "final/model.safetensors",
        "train",
        "eval",
    )
    assert [found[name] for name in names] == [whole[name] for name in names]


def test_the_newest_good_model_of_pre_pretraining_is_begun_with(scratch, here, tmp_path, capsys):
    def began(**changes):
        folder = here(
            str(len(list(tmp_path.iterdir()))), scratch_dir=other, c4_dir=scratch / "data/c4_packed", total_steps=1, **changes
        )
        return json.loads((folder / "run.json").read_text())["derived"]["pptrain_checkpoint"]

    other = tmp_path / "scratch"
    run = Path(shutil.copytree(scratch / "pptrain", other / "pptrain"))
    step = run / "checkpoints/step_00000002"
    assert began() == str(run / "final")
    assert began(pptrain_checkpoint=run) == str(run / "final")
    assert began(pptrain_checkpoint=step) == str(step)
    shutil.move(run / "final", tmp_path / "final")
    pptrain_here(run, splits(scratch), scratch / "tokenizer", **PPTRAIN | {"max_steps": 4})
    shutil.rmtree(run / "final")
    shutil.move(tmp_path / "final", run / "final")
    assert began() == str(run / "checkpoints/step_00000004")
    shutil.rmtree(run / "checkpoints/step_00000004")
    flip(run / "final/model.safetensors")
    assert began() == str(step)
    assert f"warning: {run}/final is damaged ({run}/final/model.safetensors has SHA-256" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"final is damaged .*model.safetensors has SHA-256.* pass another --pptrain_checkpoint"
    ):
        began(pptrain_checkpoint=run / "final")
    shutil.rmtree(run / "final")
    flip(step / "model.safetensors")
    assert began() == str(run / "checkpoints/step_00000000")
    shutil.rmtree(run / "checkpoints")
    message = rf"no checkpoint in {run}: run pptrain.py, or pass another --pptrain_checkpoint, or none for random weights"
    for asked in ("latest", run):
        with pytest.raises(FileNotFoundError, match=message):
            began(pptrain_checkpoint=asked)
    with pytest.raises(FileNotFoundError, match=r"no model in .*nowhere: pass another"):
        began(pptrain_checkpoint=tmp_path / "nowhere")


def flip(path):
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_without_a_checkpoint_the_weights_are_random_of_the_architecture_asked_for(here):
    runs = [here(str(seed), pptrain_checkpoint="none", model="neox-128x2", total_steps=1, seed=seed) for seed in (0, 0, 1)]
    derived = [json.loads((run / "run.json").read_text())["derived"] for run in runs]
    assert [(one["pptrain_checkpoint"], one["initial_weights"]) for one in derived] == [(None, None)] * 3
    assert load_model(runs[0] / "final").config.hidden_size == 128
    assert sha256(runs[0] / "checkpoints/step_00000000/model.safetensors") != sha256(
        runs[2] / "checkpoints/step_00000000/model.safetensors"
    )


def test_any_model_with_the_tokenizer_of_the_pack_may_be_begun_with(here, tmp_path, capsys):
    """A rotary one is extended; a table of positions must be long enough."""
    small = {"total_steps": 1, "pptrain_checkpoint": tmp_path / "model"}

    def save(model, tokenizer=TOKENIZER):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        model.save_pretrained(tmp_path / "model")
        if tokenizer:
            tokenizer.save_pretrained(tmp_path / "model")

    def gpt2(positions, vocab_size=300):
        return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=vocab_size, n_positions=positions))

    rotary = build_model("neox-64x2", 301, 8)
    rotary.config.max_position_embeddings = 8
    save(rotary)
    folder = here("rotary", **small)
    assert load_model(folder / "final").config.max_position_embeddings == SEQ_LEN
    assert load_model(folder / "final").config.vocab_size == 320, "rows too many are never used"
    assert f"the architecture is that of {tmp_path}/model" in capsys.readouterr().out
    save(gpt2(SEQ_LEN))
    here("table", **small)
    for model, tokenizer, message in (
        (gpt2(SEQ_LEN - 1), TOKENIZER, rf"/model has {SEQ_LEN - 1} positions, {SEQ_LEN} are needed"),
        (gpt2(SEQ_LEN, 299), TOKENIZER, r"/model has a vocabulary of 299, 300 are needed"),
        (rotary, byte_level_bpe(310), r"the tokenizer of .*/model is not that of .*/c4_packed \(tokenizer \w+, not \w+\)"),
        (rotary, None, r"/model has no tokenizer.json, its tokenizer must be known"),
    ):
        save(model, tokenizer)
        with pytest.raises(ValueError, match=message):
            here("refused", **small)
    (tmp_path / "model/model.safetensors").rename(tmp_path / "model/other.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no .*/model/model.safetensors: save the model in one file"):
        here("refused", **small)
    assert not (tmp_path / "refused").exists()


def test_a_checkpoint_of_a_step_is_known_by_the_tokenizer_it_was_trained_with(scratch, here, tmp_path):
    larger = byte_level_bpe(310)
    pack = write_pack(tmp_path / "larger", larger)
    step = scratch / "pptrain/checkpoints/step_00000002"
    with pytest.raises(
        ValueError, match=r"the tokenizer of .*step_00000002 is not that of .*larger \(tokenizer \w+, not \w+\)"
    ):
        here(c4_dir=pack, pptrain_checkpoint=step)
    other_end = byte_level_bpe()
    other_end.eos_token = other_end.pad_token
    pack = write_pack(tmp_path / "other_end", other_end)
    for asked in (step, scratch / "pptrain/final"):
        with pytest.raises(ValueError, match=r"is not that of .*other_end \(eos_token_id 0, not 1\): pack with the tokenizer"):
            here(c4_dir=pack, pptrain_checkpoint=asked)
    shutil.rmtree(pack / "tokenizer")
    TOKENIZER.save_pretrained(pack / "tokenizer")
    list_again(pack, *(f"tokenizer/{path.name}" for path in (pack / "tokenizer").iterdir()))
    with pytest.raises(ValueError, match=r"other_end/tokenizer did not make its shards: remove the folder and run build_pre"):
        here(c4_dir=pack)


def test_dropout_is_on_in_every_step_also_of_a_loaded_model(here, tmp_path, monkeypatch):
    modes = []
    rates = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=300, n_positions=SEQ_LEN, **rates)).save_pretrained(
        tmp_path / "gpt2"
    )
    TOKENIZER.save_pretrained(tmp_path / "gpt2")
    monkeypatch.setattr(pretrain, "mixed_loss", lambda model, batch: modes.append(model.training) or mixed_loss(model, batch))
    here(pptrain_checkpoint=tmp_path / "gpt2", total_steps=2, eval_every=1)
    assert modes == [True] * 4


def growing(scratch, folder, shards=1, **options):
    """A scratch folder whose pack has so many of its shards so far."""
    publish(scratch / "data/c4_packed", folder / "data/c4_packed", shards, **options)
    return folder


def test_a_run_waits_for_the_shards_of_a_pack_that_is_not_finished(uninterrupted, scratch, here, tmp_path, monkeypatch):
    """And ends as on the finished pack; what it says, and how long it waited, is on record."""
    monkeypatch.setattr("lm.supply.LOOK_EVERY_SEC", 0.05)
    monkeypatch.setattr("lm.supply.SAY_EVERY_SEC", 0.1)
    ahead = growing(scratch, tmp_path / "scratch", 1)

    def pack_on():
        while not (tmp_path / "run/events.jsonl").exists() or "waiting" not in (tmp_path / "run/events.jsonl").read_text():
            time.sleep(0.01)
        time.sleep(0.5)
        growing(scratch, ahead, 2, finished=True)

    packer = threading.Thread(target=pack_on)
    packer.start()
    folder = here(c4_dir=ahead / "data/c4_packed")
    packer.join()
    assert outcome(folder) == outcome(uninterrupted[1])
    seen = [event for event in events(folder) if event["event"] in ("waiting_for_shards", "going_on")]
    assert [event["event"] for event in seen] == ["waiting_for_shards", "going_on"]
    first = Pack(growing(scratch, tmp_path / "first", 1) / "data/c4_packed").num_blocks
    assert (seen[0]["blocks"], seen[1]["blocks"]) == (first, Pack(ahead / "data/c4_packed").num_blocks)
    counts = {record["step"]: record["c4_block_idx"] for record in records(folder, "train")}
    assert first <= seen[0]["block"] < min(count for count in counts.values() if count > first)
    waits = [json.loads(line)["wait_sec"] for line in (folder / "logs/train.jsonl").read_text().splitlines()]
    assert sum(wait > 0.5 for wait in waits) == 1


def test_two_processes_wait_together_stop_at_a_signal_meanwhile_and_go_on(uninterrupted, scratch, tmp_path):
    ahead, folder = growing(scratch, tmp_path / "scratch", 1), tmp_path / "run"
    process = start(folder, scratch, 2, c4_dir=ahead / "data/c4_packed", checkpoint_interval_steps=99)
    try:
        wait_for(folder / "events.jsonl", "waiting_for_shards", process)
        _, other = psutil.Process(process.pid).children()
        other.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) != 0
        assert "exitcode  : 75" in Path(f"{folder}.out").read_text()
    finally:
        kill(process)
    waiting, stopped = events(folder)[-2:]
    assert (stopped["event"], stopped["step"]) == ("stopped", waiting["step"]), output(folder)
    assert state_of(folder, stopped["step"])["c4_block_idx"] <= waiting["blocks"] <= waiting["block"]
    growing(scratch, ahead, 5, finished=True)
    assert run(folder, scratch, 2, c4_dir=ahead / "data/c4_packed") == 0, output(folder)
    assert outcome(folder) == outcome(uninterrupted[2])


def test_a_run_whose_shards_do_not_come_gives_up_with_a_checkpoint(scratch, here, tmp_path, monkeypatch):
    monkeypatch.setattr("lm.supply.LOOK_EVERY_SEC", 0.05)
    ahead = growing(scratch, tmp_path / "scratch", 1)
    with pytest.raises(RuntimeError, match=r"got no new shard for 0.2 s and has \d+ blocks, \d+ are needed for the next step"):
        here(c4_dir=ahead / "data/c4_packed", max_wait_sec=0.2, checkpoint_interval_steps=99)
    steps = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert steps == ["step_00000000", f"step_{events(tmp_path / 'run')[-1]['step']:08d}"]


def test_a_pack_that_ends_too_early_ends_the_run_unless_it_may_go_round_again(scratch, here, tmp_path, monkeypatch):
    monkeypatch.setattr("lm.supply.LOOK_EVERY_SEC", 0.05)
    ahead = growing(scratch, tmp_path / "scratch", 1)
    here_ahead = {"c4_dir": ahead / "data/c4_packed"}

    def finish():
        while not (tmp_path / "run/events.jsonl").exists() or "waiting" not in (tmp_path / "run/events.jsonl").read_text():
            time.sleep(0.01)
        growing(scratch, ahead, 1, finished=True)

    packer = threading.Thread(target=finish)
    packer.start()
    with pytest.raises(
        RuntimeError, match=r"finds no text: .* has \d+ blocks, \d+ are needed: pack more \(python build_pretrain"
    ):
        here(**here_ahead)
    packer.join()
    here(**here_ahead, allow_epochs=True)


@pytest.mark.parametrize("unfinished", [True, False])
def test_too_short_a_pack_is_refused_before_training_naming_the_command(unfinished, scratch, here, tmp_path):
    short = growing(scratch, tmp_path / "scratch", 1, finished=not unfinished, target_blocks=80) / "data/c4_packed"
    has = "will have 80" if unfinished else f"has {Pack(short).num_blocks}"
    command = f"python build_pretrain.py --scratch_dir {scratch} --output_dir {short} --total_steps 24 --effective_batch 6"
    with pytest.raises(
        ValueError, match=rf"{short} {has} blocks, 10\d are needed: pack more \({command}, and else .*--allow_epochs"
    ):
        here(c4_dir=short, max_wait_sec=0.1)
    assert not (tmp_path / "run").exists()


def test_blocks_come_again_in_another_order_and_a_pack_that_grows_meanwhile_changes_nothing(scratch, here, tmp_path, batches):
    pack = growing(scratch, tmp_path / "short", 1, finished=True) / "data/c4_packed"
    blocks = Pack(pack).num_blocks
    assert blocks < 80, "so that the second pass begins within the run"
    whole = here("whole", c4_dir=pack, allow_epochs=True, max_step_checkpoints=9)
    trained = [tuple(row.tolist()) for batch in batches for row in batch["targets"][~batch["synthetic"]]]
    first, second = trained[:blocks], trained[blocks:]
    assert len(set(first)) == blocks
    assert len(second) > 20
    assert set(second) < set(first)
    assert len(set(second)) == len(second)
    assert second != first[: len(second)]
    assert [state_of(whole, step)["pass_blocks"] for step in (10, 15, 24)] == [None, blocks, blocks]
    with stopping_after(22):
        stopped = here("stopped", code=75, c4_dir=pack, allow_epochs=True)
    growing(scratch, tmp_path / "short", 3, finished=True)
    here("stopped", c4_dir=pack, allow_epochs=True)
    assert outcome(stopped) == outcome(whole)


def test_a_rollback_steps_over_rows_says_where_they_came_from_and_may_run_out_of_text(
    scratch, here, batches, monkeypatch, tmp_path
):
    """Step 8 fails three times: back to step 5, and from there on with the rows of steps 9, 10, ..."""
    clean, fails = pretrain.mixed_loss, 8

    def poisoned(model, batch):
        loss, *rest = clean(model, batch)
        return (loss * float("nan"), *rest) if 2 * (fails - 1) < len(batches) <= 2 * (fails + 2) else (loss, *rest)

    monkeypatch.setattr(pretrain, "mixed_loss", poisoned)
    folder = here()
    (back,) = [event for event in events(folder) if event["event"] == "rolled_back"]
    assert (back["from_step"], back["to_step"], back["data_steps_left_out"]) == (8, 5, [5, 7])
    drawn, text = sum(int((~batch["synthetic"]).sum()) for batch in batches[:16]), text_of(batches[20:])  # after three attempts
    whole = stream(TOKENIZER, documents()[1:26])
    assert np.array_equal(text, whole[drawn * SEQ_LEN : drawn * SEQ_LEN + len(text)])
    counts = {record["step"]: record["c4_block_idx"] + record["mixin_idx"] for record in records(folder, "train")}
    assert [counts[step] for step in (3, 6, 24)] == [6 * 3, 6 * 9, 6 * 27]
    saved = torch.load(folder / "problematic_batch.pt")
    pack, rows = Pack(scratch / "data/c4_packed"), read_jsonl(splits(scratch) / "mixin.jsonl", "")
    for batch, sources in zip(saved["micro_batches"], saved["source"], strict=True):
        assert [source[0] == "mixin" for source in sources] == batch["synthetic"].tolist()
        of_text = [source for source in sources if source[0] == "c4"]
        blocks = pack.blocks([source[1] for source in of_text])
        assert np.array_equal(batch["targets"][~batch["synthetic"]], blocks[:, 1:])
        assert [source[2] for source in of_text] == [pack.where(source[1]) for source in of_text]
        examples = [rows[source[1]] for source in sources if source[0] == "mixin"]
        assert examples_of([batch]) == [f"{row['input_text']} {row['output_texts'][0]}" for row in examples]
    batches.clear()
    fails, short = 12, write_pack(tmp_path / "short", TOKENIZER, shards=1, per_shard=5)
    last = {"c4_dir": short, "total_steps": 12}  # long enough, but not with two steps stepped over
    with pytest.raises(RuntimeError, match=r"step 11 finds no text \(2 steps' rows were stepped over\): .* --allow_epochs"):
        here("short", **last)
    here("short", **last, allow_epochs=True)
    assert state_of(tmp_path / "short", 12)["data_offset"] == 2


def test_a_checkpoint_that_has_drawn_other_rows_is_refused(here, monkeypatch):
    with stopping_after(7):
        here(code=75)
    monkeypatch.setattr("lm.mixed_rows.MixedRows.is_synthetic", lambda self, samples: np.zeros(len(samples), dtype=bool))
    with pytest.raises(
        RuntimeError, match=r"of step 7 has drawn \(\d+, \d+\) .* seed and step give \(42, 0\): another version"
    ):
        here()


def test_a_run_goes_on_only_with_the_same_settings_and_data(scratch, here, tmp_path):
    small = {"total_steps": 1}
    folder = here(**small)
    changes = {"lr": (0.003, 0.001), "seed": (0, 1), "mixin_percent": (0.25, 0.5), "effective_batch": (6, 12)}
    changes |= {"mixin_loss": ("answer_only", "weighted"), "total_steps": (1, 2), "eval_blocks": (5, 6)}
    for name, (saved, now) in changes.items():
        with pytest.raises(ValueError, match=rf"cannot resume .*[(; ]{name}: saved {saved}, now {now}[;)]"):
            here(**small | {name: now})
    others = build(tmp_path, max_input_size=12, max_lookahead=2, mixin_size=7, seed=1)
    for change, message in (
        ({"data_dir": others}, r"data: saved \{'eval.jsonl': '"),
        ({"c4_dir": write_pack(tmp_path / "pack", TOKENIZER, source={"documents": "others"})}, r"pack: saved \w+, now \w+"),
    ):
        with pytest.raises(ValueError, match=f"cannot resume .*{message}"):
            here(**small | change)
    harmless = {"micro_batch": 2, "eval_every": 1, "log_every": 1, "allow_epochs": True, "verify_data": True, "max_wait_sec": 9}
    here(**small | harmless | {"seq_len": SEQ_LEN, "model": "pythia-70m"})
    assert [event["event"] for event in events(folder)] == ["started", "finished", "resumed"]


def test_a_run_of_text_alone_needs_no_synthetic_examples(here, scratch):
    folder = here(mixin_percent=0.0, data_dir="", total_steps=2, pptrain_checkpoint="latest")
    (record,) = records(folder, "train")
    assert (record["loss_synthetic"], record["synthetic_acc"], record["mixin_idx"]) == (None, None, 0)
    assert record["loss_c4"] == pytest.approx(record["loss"], rel=0.2)
    for row in records(folder, "eval"):
        assert (row["heldout_acc"], row["heldout_loss"], row["num_examples"]) == (None, None, 0)


def test_a_run_of_synthetic_examples_alone_needs_no_blocks(here):
    folder = here(mixin_percent=1.0, total_steps=2)
    (record,) = records(folder, "train")
    assert (record["loss_c4"], record["c4_block_idx"], record["mixin_idx"]) == (None, 0, 12)


def test_every_setting_of_the_optimizer_and_the_mixture_reaches_the_weights(here):
    changes = [{}, {"max_grad_norm": 0.1}, {"weight_decay": 0.5}, {"adam_eps": 1e-3}, {"adam_beta1": 0.8}]
    changes += [{"adam_beta2": 0.9}, {"lr": 1e-3}, {"warmup_steps": 2}, {"min_lr_ratio": 0.5}, {"mixin_loss": "weighted"}]
    small = {"total_steps": 3, "effective_batch": 3, "eval_blocks": 1, "eval_subset_size": 1, "warmup_steps": 1}
    runs = [here(str(number), **small | change) for number, change in enumerate(changes)]
    assert len({sha256(run / "final/model.safetensors") for run in runs}) == len(changes)


@pytest.mark.parametrize("verify", [True, False])
def test_a_damaged_shard_is_named_before_training_or_when_it_is_read(verify, scratch, here, tmp_path):
    pack = Path(shutil.copytree(scratch / "data/c4_packed", tmp_path / "pack"))
    flip(pack / "shard_00001.bin")
    with pytest.raises(ValueError, match=r"pack/shard_00001.bin has changed: its SHA-256 is \w+, \w+ was written"):
        here(c4_dir=pack, **{"verify_data": True} if verify else {})
    assert (tmp_path / "run").exists() != verify


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixin_percent": 2.0}, r"^--mixin_percent 2.0: a probability is needed, for two percent pass 0.02$"),
        ({"mixin_percent": -0.1}, r"^--mixin_percent -0.1: a probability is needed"),
        (
            {"data_dir": ""},
            r"^--mixin_percent 0.25 without --data_dir: pass what build_data_splits.py wrote, or --mixin_percent 0$",
        ),
        ({"seq_len": 99}, r"--seq_len 99, but .* has blocks of 192 \+ 1 tokens"),
        ({"effective_batch": 7}, r"--effective_batch 7 is not a multiple"),
        ({"log_every": 0, "lr": 0}, r"(?s)--lr 0.0: more than 0.*--log_every 0: at least 1"),
    ],
)
def test_bad_input_is_said_before_anything_is_written(changes, message, here, tmp_path):
    with pytest.raises(ValueError, match=message):
        here(**changes)
    assert not (tmp_path / "run").exists()


def test_missing_things_are_named(here, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run build_pretrain.py"):
        here(c4_dir=tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"run build_data_splits.py"):
        here(data_dir=tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in"):
        here(resume_from="latest")


def test_a_synthetic_example_that_does_not_fit_is_refused_before_training(here, tmp_path):
    rows = [{"input_text": "one is" + " so" * 200, "output_texts": ["a"]}]
    with pytest.raises(
        ValueError, match=r"1 of the 1 rows of .*/mixin.jsonl do not fit into --seq_len 192 \(line 1 has \d+ tok"
    ):
        here(data_dir=write_split(tmp_path / "long", rows, "mixin"))
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_whatever_it_trains_on_gives_up_and_says_so(here, tmp_path):
    with pytest.raises(RuntimeError, match="all made the loss or gradient non-finite: the data is not the cause; lower --lr"):
        here("diverging", lr=1e30, warmup_steps=0, checkpoint_interval_steps=1)
    (found,) = read_pretrainings([tmp_path / "diverging"])
    assert found.diverged
    assert not found.finished
    assert [event["event"] for event in events(tmp_path / "diverging")][-1] == "diverged"
