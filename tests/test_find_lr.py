"""find_lr.py as its users run it, for each of the trainers, on real small data."""

import csv
import json
import math
import sys

import pytest
from launch import Launch, arguments
from world import World, content_of

import find_lr
from lm.lr_range import smooth
from lm.runlog import records

TRAINERS = ("train", "pptrain", "pretrain")
LENGTH = {"train": "token_budget", "pptrain": "max_steps", "pretrain": "total_steps"}  # what says how long a run is
FILES = ["lr_range.csv", "lr_range.json", "lr_range.png"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world") / "world")


def options(world, trainer, **changes):
    """A test of 30 steps from a learning rate that does nothing to one at which all is lost."""
    own = world.options(trainer) | {"num_workers": 0} if trainer != "pretrain" else world.options(trainer)
    return {**own, "min_lr": 1e-5, "max_lr": 30.0, "num_steps": 40, "smoothing": 0.8, **changes}


def find(world, trainer, **changes):
    return find_lr.main(find_lr.parse([trainer, *arguments(**options(world, trainer, **changes))]))


def table(folder):
    """The columns of the CSV as numbers."""
    rows = list(csv.reader((folder / "lr_range.csv").read_text().splitlines()))
    return {name: [float(value) for value in column] for name, *column in zip(*rows, strict=True)}


def about(folder):
    return json.loads((folder / "lr_range.json").read_text())


@pytest.mark.parametrize("trainer", TRAINERS)
def test_plot_table_and_three_suggestions_are_written_and_no_run(world, trainer, tmp_path, capsys):
    assert find(world, trainer, lr_dir=tmp_path / "lr", output_dir=tmp_path / "run") == 0
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["lr", *FILES]
    columns, found = table(tmp_path / "lr"), about(tmp_path / "lr")
    assert list(columns) == ["step", "lr", "loss", "smoothed", "grad_norm"]
    assert columns["step"] == list(range(1, found["steps_made"] + 1))
    assert columns["lr"] == pytest.approx([1e-5 * 3e6 ** (step / 39) for step in range(found["steps_made"])])
    assert columns["smoothed"] == pytest.approx(smooth(columns["loss"], 0.8).tolist())
    assert columns["loss"][0] == pytest.approx(math.log(300), abs=0.3)
    assert min(columns["smoothed"]) < columns["loss"][0] - 0.5
    assert all(1e-4 < lr < 3 for lr in found["suggestions"].values())
    assert (found["refusal"], found["trainer"], found["effective_batch"]) == (
        None,
        f"{trainer}.py",
        6 + 6 * (trainer != "pretrain"),
    )
    assert found["suggestions"].keys() == {"steepest", "valley", "minimum_tenth"}
    said = capsys.readouterr().out
    assert f"steepest descent {found['suggestions']['steepest']:.2g}" in said
    assert (tmp_path / "lr/lr_range.png").read_bytes().startswith(b"\x89PNG")


def test_without_bitsandbytes_it_falls_back_to_adamw_as_the_trainer_does_and_says_so_once(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    find(world, "train", lr_dir=tmp_path / "lr", optimizer="adamw8bit")
    assert capsys.readouterr().out.count("falling back to adamw") == 1
    find(world, "train", lr_dir=tmp_path / "adamw")
    assert table(tmp_path / "lr") == table(tmp_path / "adamw")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_micro_batch_auto_is_passed_on(world, trainer, tmp_path):
    """There is memory for all rows of a step."""
    whole = 6 if trainer == "pretrain" else 12
    for name, size in (("auto", "auto"), ("fixed", whole)):
        find(world, trainer, lr_dir=tmp_path / name, micro_batch=size, num_steps=20)
    assert table(tmp_path / "auto") == table(tmp_path / "fixed")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_its_steps_are_those_that_the_trainer_makes(world, trainer, tmp_path):
    """At one learning rate, the losses and norms are those of the trainer's log: rows, dropout, optimizer, clipping."""
    same = {"lr": 1e-2, "max_grad_norm": 0.5, "dropout": 0.1, "optimizer": "muon", "micro_batch": 3, "seed": 5}
    length = {"token_budget": 24 * 12 * 20} if trainer == "train" else {LENGTH[trainer]: 20}
    run = same | length | {"schedule": "constant", "warmup_steps": 0}
    every = {} if trainer == "train" else {"log_every": 1}
    stage = {"curr_threshold": 1.0} if trainer == "pptrain" else {}
    world.finish(trainer, tmp_path / "run", **run, **every, **stage)
    log = records(tmp_path / "run", "train")
    rate = {"min_lr": 1e-2, "max_lr": 1e-2 + 1e-11, "num_steps": 20}
    find(world, trainer, lr_dir=tmp_path / "lr", **same, **rate)
    columns = table(tmp_path / "lr")
    assert columns["loss"] == pytest.approx([record["loss"] for record in log], rel=1e-6)
    assert columns["grad_norm"] == pytest.approx([record["grad_norm"] for record in log], rel=1e-4)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_processes_find_what_one_finds(world, trainer, tmp_path):
    for count in (1, 2):
        shared = options(world, trainer, command=trainer, lr_dir=tmp_path / str(count))
        launch = Launch("find_lr.py", shared, tmp_path / f"{count}.out", count)
        assert launch.wait() == [0] * count, launch.said()
        assert launch.said().count("steepest descent") == 1
        assert sorted(content_of(tmp_path / str(count))) == FILES
    one, two = (table(tmp_path / str(count)) for count in (1, 2))
    assert len(one["loss"]) == len(two["loss"])
    before = one["loss"].index(min(one["loss"]))  # chaos follows
    assert two["loss"][:before] == pytest.approx(one["loss"][:before], rel=1e-4)
    suggested = [about(tmp_path / str(count))["suggestions"] for count in (1, 2)]
    assert suggested[0] == pytest.approx(suggested[1])


def test_without_a_word_it_is_pretrain_and_a_trainers_command_line_is_taken_as_it_is():
    whole = ["--scratch_dir", "S", "--total_steps", "9", "--output_dir", "S/run", "--checkpoint_interval_steps", "7"]
    args = find_lr.parse(whole)
    assert isinstance(args, find_lr.OfPretrain)
    assert (args.scratch_dir, args.total_steps, args.checkpoint_interval_steps) == ("S", 9, 7)
    assert find_lr.parse(["pretrain", *whole]) == args
    assert isinstance(find_lr.parse(["pptrain", "--scratch_dir", "S", "--data_dir", "D"]), find_lr.OfPptrain)
    assert isinstance(find_lr.parse(["train", "--K", "3"]), find_lr.OfTrain)


@pytest.mark.parametrize(
    ("argv", "folder"),
    [
        (["--scratch_dir", "S", "--model", "gpt-mini-v0"], "S/find_lr/gpt-mini-v0"),
        (["--scratch_dir", "S", "--output_dir", "runs/a/"], "runs/a_lr"),
        (["--scratch_dir", "S", "--output_dir", "runs/a", "--lr_dir", "L"], "L"),
        (["pptrain", "--scratch_dir", "S", "--data_dir", "D", "--model", "my/model"], "S/find_lr/model"),
        (["train", "--K", "3"], "find_lr/pythia-70m"),
    ],
)
def test_where_the_results_go(argv, folder):
    assert str(find_lr.results_folder(find_lr.parse(argv))) == folder


def test_the_folder_of_a_run_is_refused(world, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is the folder of a run, another one is needed: pass another --lr_dir"):
        find(world, "train", lr_dir=tmp_path)


def test_a_curve_that_never_falls_suggests_nothing_and_says_why_with_exit_code_1(world, tmp_path, capsys):
    assert find(world, "train", lr_dir=tmp_path, min_lr=1e-9, max_lr=1e-8) == 1
    found = about(tmp_path)
    assert found["suggestions"] == {"steepest": None, "valley": None, "minimum_tenth": None}
    assert found["refusal"].startswith("the smoothed loss never fell clearly (from 5.")
    assert f"no learning rate is suggested: {found['refusal']}" in capsys.readouterr().out
    assert sorted(content_of(tmp_path)) == FILES  # the plot shows it


def test_a_test_that_begins_too_high_suggests_nothing(world, tmp_path):
    assert find(world, "train", lr_dir=tmp_path, min_lr=1e3, max_lr=1e6, optimizer="sgd", max_grad_norm=0) == 1
    assert about(tmp_path)["refusal"].startswith("the loss diverged after ")


def test_all_faults_of_the_arguments_are_named_together(world):
    with pytest.raises(ValueError, match="at least 20 is needed") as raised:
        find(world, "train", num_steps=19, min_lr=1.0, max_lr=0.5, smoothing=1.0, diverged=1.0)
    assert [line.split()[0] for line in str(raised.value).splitlines()] == [
        "--num_steps",
        "--max_lr",
        "--smoothing",
        "--diverged",
    ]
    with pytest.raises(ValueError, match=r"--effective_batch 0: at least 1 is needed"):
        find(world, "train", effective_batch=0)


def test_a_pack_that_is_too_short_is_refused_unless_it_may_be_read_again(world, tmp_path):
    many = {"effective_batch": 12, "lr_dir": tmp_path, "mixin_percent": 0.0}
    with pytest.raises(ValueError, match=r"480 are needed: pack more .* or pass --allow_epochs"):
        find(world, "pretrain", **many)
    assert find(world, "pretrain", **many, allow_epochs=True) == 0


def test_a_divided_model_is_refused(world):
    with pytest.raises(ValueError, match="--fsdp is not for find_lr.py, which tries rates on whole models: leave it out"):
        find(world, "pretrain", fsdp="full_shard")
