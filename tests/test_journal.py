"""What the small-GPT journal needs of pretrain.py: passes over the data, other schedules, texts, results, dropout."""

import html
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from packs import SETTINGS, pretrain_here, write_pack
from test_pretrain import stopping_after
from text import byte_level_bpe, documents
from torch.optim.lr_scheduler import OneCycleLR
from training import outcome
from transformers import GPT2Config

import lm.session
import pretrain
import report
from lm.files import read_json, read_jsonl
from lm.measure import window_losses
from lm.mixed_rows import Mixture
from lm.models import build_model, load_model
from lm.runlog import records
from lm.shards import Pack
from lm.writing import prompt_ids, write

TOKENIZER = byte_level_bpe()
PLAIN = {"mixin_percent": 0.0, "model": "neox-64x2", "total_steps": 12, "eval_every": 4, "sample_tokens": 8}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A scratch folder with a finished pack of 284 blocks, and files of other text; not to be changed."""
    folder = tmp_path_factory.mktemp("scratch")
    write_pack(folder / "data/c4_packed", TOKENIZER)
    (folder / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()[-3:]))
    return folder


@pytest.fixture
def here(scratch, tmp_path):
    def go(name="run", code=0, **changes):
        assert pretrain_here(tmp_path / name, scratch, **PLAIN | changes) == code
        return tmp_path / name

    return go


def arguments(**changes):
    return replace(pretrain.Args(scratch_dir="s", **{"mixin_percent": 0.0} | changes))


@pytest.mark.parametrize(
    ("epochs", "rows", "steps"), [(None, 6, 47), (1.0, 6, 47), (1.0, 4, 71), (0.5, 6, 23), (2.5, 6, 118), (3.0, 4, 213)]
)
def test_passes_over_the_pack_are_counted_in_whole_steps(epochs, rows, steps, scratch):
    pack = Pack(scratch / "data/c4_packed")
    assert pack.num_blocks == 284
    found = pretrain.with_steps(arguments(epochs=epochs), pack, rows)
    assert (found.total_steps, found.allow_epochs) == (steps, (epochs or 1) > 1)
    assert pretrain.with_steps(arguments(epochs=epochs, allow_epochs=True), pack, rows).allow_epochs


def test_a_part_of_a_pass_loses_no_block_to_rounding():
    pack = SimpleNamespace(num_blocks=100, finished=True)
    assert 0.29 * 100 < 29
    assert pretrain.with_steps(arguments(epochs=0.29), pack, 1).total_steps == 29


def test_passes_count_the_blocks_that_synthetic_examples_leave(scratch):
    pack = Pack(scratch / "data/c4_packed")
    for seed in range(8):
        steps = pretrain.with_steps(arguments(mixin_percent=0.25, data_dir="d", seed=seed), pack, 6).total_steps
        drawn = Mixture(seed, 0.25).drawn
        assert drawn(steps * 6)[0] <= 284 < drawn((steps + 1) * 6)[0]


def test_passes_that_cannot_be_counted_are_refused(scratch):
    pack = Pack(scratch / "data/c4_packed")
    with pytest.raises(ValueError, match="are not one step of 6: pass a lower --effective_batch"):
        pretrain.with_steps(arguments(epochs=0.01), pack, 6)
    with pytest.raises(ValueError, match="is not read with --mixin_percent 1, so that its passes cannot be counted"):
        pretrain.with_steps(arguments(mixin_percent=1.0, data_dir="d"), pack, 6)
    pack.finished = False
    with pytest.raises(ValueError, match="is not finished, so that its passes cannot be counted: pass --total_steps"):
        pretrain.with_steps(arguments(), pack, 6)
    with pytest.raises(ValueError, match="is not finished, which --shuffle needs"):
        pretrain.with_steps(arguments(shuffle=True, total_steps=3), pack, 6)


def test_what_a_run_begins_with_follows_from_its_data(tmp_path):
    plain, graphs = (pretrain.Args(scratch_dir=str(tmp_path), data_dir=data) for data in ("", "somewhere"))
    found = [pretrain.with_defaults(args) for args in (plain, graphs)]
    assert [(args.pptrain_checkpoint, args.mixin_percent) for args in found] == [("none", 0.0), ("latest", 0.02)]
    (tmp_path / "pptrain").mkdir()
    (tmp_path / "pptrain/run.json").write_text("{}")
    with pytest.raises(ValueError, match="pptrain is there: say with --pptrain_checkpoint latest or none"):
        pretrain.with_defaults(plain)
    assert pretrain.with_defaults(replace(plain, pptrain_checkpoint="none")).pptrain_checkpoint == "none"
    found = [pretrain.with_defaults(args) for args in (graphs, replace(graphs, pptrain_checkpoint="none", mixin_percent=0.0))]
    assert [(args.pptrain_checkpoint, args.mixin_percent) for args in found] == [("latest", 0.02), ("none", 0.0)]


def test_a_preset_of_the_journal_brings_its_batch_where_text_alone_is_trained_on():
    def rows(**changes):
        return pretrain.lay_out(arguments(**changes), 1)[1]

    assert rows(model="gpt-mini-v0") == 128
    assert rows(model="gpt-mini-v0", data_dir="d", mixin_percent=0.02) == 32
    assert (rows(model="pythia-160m"), rows(model="gpt-mini-v0", effective_batch=8)) == (32, 8)
    assert (rows(model="gpt3-125m"), rows(model="gpt-mini-v0", micro_batch=4, grad_accum=3)) == (32, 12)


def test_two_shuffled_passes_hold_every_block_twice_and_the_ledger_agrees(here):
    folder = here(total_steps=None, epochs=2.0, shuffle=True, ledger=True, eval_every=50, sample_every=0)
    blocks = [block for row in read_jsonl(folder / "logs/ledger.jsonl", "") for block in row["block"]]
    assert len(blocks) == 94 * 6
    assert sorted(blocks[:284]) == list(range(284)) != blocks[:284]
    assert len(set(blocks[284:])) == len(blocks[284:])
    assert blocks[284:] != blocks[:280], "each pass in an order of its own"
    assert report.main(["ledger", str(folder)]) == 0


def test_one_cycle_is_torchs_by_the_optimizer_step(here, monkeypatch):
    step, groups = lm.session.train_step, []

    def noting(accelerator, model, ours, *rest):
        result = step(accelerator, model, ours, *rest)
        groups.append([(group["lr"], group["betas"][0]) for group in ours.param_groups])
        return result

    monkeypatch.setattr(lm.session, "train_step", noting)
    folder = here(schedule="one_cycle", cycle_momentum=True, log_every=1, pct_start=0.25)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    theirs = OneCycleLR(optimizer, max_lr=SETTINGS["lr"], total_steps=12, pct_start=0.25)
    for record, ours in zip(records(folder, "train"), groups, strict=True):
        lr, momentum = (optimizer.param_groups[0][name] for name in ("lr", "momentum"))
        assert record["lr"] == pytest.approx(lr, rel=1e-12)
        assert ours == [pytest.approx((lr, momentum), rel=1e-12)] * 2
        optimizer.step()
        theirs.step() if record["step"] < 12 else None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cycle_momentum": True}, "--cycle_momentum with --schedule cosine: it belongs to one_cycle"),
        (
            {"schedule": "one_cycle", "cycle_momentum": True, "optimizer": "adafactor"},
            "--cycle_momentum with --optimizer adafactor, which has no momentum",
        ),
        ({"dropout": 1.0}, "--dropout 1.0: a probability from 0 to less than 1"),
        ({"pct_start": 1.5}, r"--pct_start 1.5: a number in \[0, 1\]"),
        ({"total_steps": 3, "epochs": 1.0}, "--total_steps 3 and --epochs 1: pass one of them"),
        ({"sample_prompt": "Q" * 192}, "--sample_prompt has 192 tokens, blocks 192: pass a shorter one"),
        ({"sample_prompt": "x" * 400}, r"--sample_prompt has \d+ tokens, blocks 192: pass a shorter one"),
        ({"schedule": "one_cycle", "three_phase": True, "pct_start": 0.6}, "--pct_start 0.6 with --three_phase"),
        ({"test_documents": "nowhere"}, "nowhere"),
        ({"dropout": 0.1, "model": "nobody"}, "--model nobody is no preset"),
    ],
)
def test_bad_input_is_said_before_anything_is_written(changes, message, here, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        here(**changes)
    assert not (tmp_path / "run").exists()


def test_texts_are_written_at_each_evaluation_and_change_nothing_else(here):
    with_texts, without = here("with"), here("without", sample_every=0)
    texts = read_jsonl(with_texts / "logs/samples.jsonl", "")
    assert [row["step"] for row in texts] == [0, 4, 8, 12]
    assert len({row["text"] for row in texts}) == 4
    assert not (without / "logs/samples.jsonl").exists()
    assert outcome(with_texts) == outcome(without)
    assert len({(run / "final/generation_config.json").read_text() for run in (with_texts, without)}) == 1
    assert [row["step"] for row in read_jsonl(here("often", sample_every=5) / "logs/samples.jsonl", "")] == [0, 5, 10, 12]


def test_a_text_goes_on_from_the_prompt_to_the_end_of_a_block_at_most(here, monkeypatch):
    asked = []

    def noting(model, tokenizer, prompt, num_tokens, seed, precision):
        asked.append((tokenizer.decode(prompt), num_tokens, seed))
        return ""

    monkeypatch.setattr(pretrain, "write", noting)
    settings = {"total_steps": 2, "eval_every": 1, "sample_tokens": 60}
    here("short", **settings, sample_prompt="Q")
    here("long", **settings, sample_prompt="Q" * 150)
    assert [each[:2] for each in asked] == [("Q", 60)] * 3 + [("Q" * 150, 42)] * 3
    assert len({seed for _, _, seed in asked}) == 3


def test_a_model_that_has_diverged_writes_something():
    model = build_model("neox-64x2", len(TOKENIZER), 192)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert isinstance(write(model, TOKENIZER, prompt_ids(TOKENIZER, "The"), 5, 1, "fp32"), str)


def test_texts_reach_weights_and_biases(here):
    folder = here(wandb_project="tests", total_steps=2, eval_every=2, sample_prompt="if a < b & c:")
    pages = [path.read_bytes().decode() for path in folder.glob("wandb/offline-run-*/files/media/html/*.html")]
    texts = [row["prompt"] + row["text"] for row in read_jsonl(folder / "logs/samples.jsonl", "")]
    assert len(texts) == len(pages) == 2
    assert all(any(html.escape(text) in page for page in pages) for text in texts)


@pytest.mark.parametrize("lost", [(), (6, 8)])
def test_a_resumed_run_has_each_text_once_and_the_same(lost, here):
    with stopping_after(8):
        stopped = here("stopped", code=75, checkpoint_interval_steps=3)
    for step in lost:  # as if killed: texts were written after the checkpoint that it goes on from
        shutil.rmtree(stopped / f"checkpoints/step_{step:08d}")
    runs = [here(name, checkpoint_interval_steps=3) for name in ("stopped", "straight")]
    assert outcome(runs[0]) == outcome(runs[1])
    texts = [[(row["step"], row["text"]) for row in read_jsonl(run / "logs/samples.jsonl", "")] for run in runs]
    assert texts[0] == texts[1]


def test_a_text_has_no_ids_that_the_tokenizer_has_not():
    torch.manual_seed(0)
    model = build_model("olmo-4m", len(TOKENIZER), 192)
    assert model.config.vocab_size == 384 > len(TOKENIZER)
    with torch.no_grad():
        model.lm_head.weight[len(TOKENIZER) :] *= 100  # which it would write all the time
    model.train()
    text = write(model, TOKENIZER, prompt_ids(TOKENIZER, "The"), 40, 1, "fp32")
    assert text == write(model, TOKENIZER, prompt_ids(TOKENIZER, "The"), 40, 1, "fp32")
    assert text != write(model, TOKENIZER, prompt_ids(TOKENIZER, "The"), 40, 2, "fp32")
    assert len(TOKENIZER(text).input_ids) > 20
    assert model.training
    assert prompt_ids(TOKENIZER, "") == [TOKENIZER.eos_token_id]


def test_a_text_is_drawn_from_all_ids_without_dropout_and_goes_on_after_an_eos(monkeypatch):
    monkeypatch.setattr(TOKENIZER, "decode", lambda ids: ids.tolist())
    model = build_model("neox-64x2", len(TOKENIZER), 192, dropout=0.5)
    before = model.generation_config
    texts = [write(model.train(training), TOKENIZER, [5, 6, 7], 20, 1, "fp32") for training in (True, False)]
    assert texts[0] == texts[1]
    with torch.no_grad():  # EOS is the most probable, e**2 to e**3 times as probable as any other
        model.base_model.final_layer_norm.weight.zero_()
        model.base_model.final_layer_norm.bias.fill_(1.0)
        model.lm_head.weight[:] = torch.linspace(0, 1 / 64, model.config.vocab_size)[:, None]
        model.lm_head.weight[TOKENIZER.eos_token_id] = 3 / 64
    ids = write(model, TOKENIZER, [5, 6, 7], 180, 1, "fp32")
    assert len(ids) == 180
    assert 1 < ids.count(TOKENIZER.eos_token_id) < 40
    assert len(set(ids)) > 80, "not of the most probable alone"
    assert model.generation_config is before


def test_results_say_perplexity_on_all_three_splits_time_and_memory(here, scratch, tmp_path):
    folder = here(test_documents=scratch / "test.jsonl")
    results = read_json(folder / "results.json", "")
    assert results["validation"]["loss"] == records(folder, "eval")[-1]["c4_loss"]
    for split in ("train", "validation", "test"):
        assert results[split]["perplexity"] == math.exp(results[split]["loss"])
        assert results[split]["loss"] < math.log(len(TOKENIZER))
    assert results["step"] == 12
    assert results["tokens"] == 12 * 6 * 192
    assert results["wall_sec"] > 0
    assert results["peak_memory_bytes"] > 2**26
    assert here() == folder
    assert "test" not in read_json(folder / "results.json", ""), "measured anew as asked for"
    assert read_json(here(test_documents=scratch / "test.jsonl") / "results.json", "")["test"] == results["test"]
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": documents()[0]}) + "\n")
    other = read_json(here(test_documents=tmp_path / "other.jsonl") / "results.json", "")["test"]
    assert other["num_documents"] == 1
    assert other["perplexity"] != results["test"]["perplexity"]


def test_results_are_of_blocks_that_were_trained_on_and_of_others_held_out(here, scratch):
    folder = here(shuffle=True, ledger=True, sample_every=0, total_steps=1, eval_blocks=9)
    pack, results = Pack(scratch / "data/c4_packed"), read_json(folder / "results.json", "")
    (row,) = read_jsonl(folder / "logs/ledger.jsonl", "")
    for split, blocks in (("train", pack.blocks(row["block"])), ("validation", pack.held_out_blocks()[:9])):
        losses = window_losses(load_model(folder / "final"), blocks, 3)
        assert results[split]["loss"] == pytest.approx(losses.mean(), rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adafactor", "muon", "sgd"])
def test_a_stopped_run_with_dropout_ends_as_if_it_had_not_been(optimizer, here, tmp_path):
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
    GPT2Config(**shape).save_pretrained(tmp_path / "gpt2")
    settings = {"model": tmp_path / "gpt2", "dropout": 0.2, "optimizer": optimizer, "checkpoint_interval_steps": 3}
    with stopping_after(7):
        here("stopped", code=75, **settings)
    assert outcome(here("stopped", **settings)) == outcome(here("straight", **settings))
    wet, dry = (records(here(name, **settings | own), "train") for name, own in (("straight", {}), ("dry", {"dropout": 0.0})))
    assert [row["loss"] for row in wet] != [row["loss"] for row in dry]


def test_every_step_draws_its_dropout_anew(here, monkeypatch):
    step, seeds = lm.session.train_step, []

    def noting(*arguments):
        seeds.append(torch.initial_seed())
        return step(*arguments)

    monkeypatch.setattr(lm.session, "train_step", noting)
    here("one", total_steps=4)
    here("other", total_steps=4, seed=1)
    assert len(set(seeds)) == 8
