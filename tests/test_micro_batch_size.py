"""--micro_batch auto: the largest size that fits, on every process alike, and nothing else about a run changes with it."""

import contextlib
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import graph_runs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packs import pretrain_here
from test_estimate import SETUP
from test_pretrain import stopping_after
from training import events
from world import World, whole

import lm.micro_batch_size
import pptrain
import pretrain
import train
from lm.args import parse
from lm.estimate import Memory, gib
from lm.files import write_json
from lm.micro_batch_size import ROOM, choose, find, has_memory, kept
from lm.models import on_paper
from lm.run import start_accelerator

ARGS = pretrain.Args(scratch_dir="S", model="neox-64x2", precision="fp32", micro_batch="auto")
TEXT = {"model": "neox-64x2", "mixin_percent": 0.0, "pptrain_checkpoint": "none", "micro_batch": "auto", "dropout": 0.1}
TEXT |= {"total_steps": 12, "sample_every": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world") / "world")


@pytest.fixture(autouse=True)
def numerics():
    """As they were, after a test that changes them."""
    yield
    torch.use_deterministic_algorithms(False)


def needed(memory, size, rows=6):
    """Free memory in which this size fits just so, by the estimate."""
    parts = memory.needs(memory.activations(size, accumulates=size < rows)).device
    return sum(parts.values()) / ROOM["cpu"]


def of_text(**changes):
    """What a pretraining on the packs of these tests needs."""
    model = on_paper("neox-64x2", 300, 192, dropout=0.1)
    return Memory(model.config, replace(SETUP, seq_len=192, **changes))


def of_papers(processes):
    return Memory(on_paper("neox-64x2", 300, 24).config, replace(SETUP, seq_len=24, num_processes=processes))


def free(patch, size):
    patch.setattr("lm.estimate._free_memory", lambda: size)


@contextlib.contextmanager
def freely(size):
    with pytest.MonkeyPatch.context() as patch:
        free(patch, size)
        yield


@given(
    st.integers(1, 60),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.booleans()), min_size=1, max_size=3),
)
def test_the_choice_is_the_largest_that_fits_and_runs_on_every_process(rows, processes):
    """Each process has a size up to which all fit, one up to which all run, and maybe the whole step fits too."""
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]

    def fits(process, size):
        return size <= process[0] or (size == rows and process[2])

    barrier, numbers = threading.Barrier(len(processes)), {}

    def chosen(numbered):
        own, process = numbered

        def least(number):
            numbers[own] = number
            barrier.wait(10)
            found = min(numbers.values())
            barrier.wait(10)
            return found

        return choose(sizes, lambda size: fits(process, size), lambda size: size <= process[1], least)

    with ThreadPoolExecutor(len(processes)) as pool:
        found = list(pool.map(chosen, enumerate(processes)))
    good = [size for size in sizes if all(fits(process, size) and size <= process[1] for process in processes)]
    assert found == [max(good, default=0)] * len(processes)


def test_just_enough_memory_for_a_size_chooses_it_and_a_byte_less_the_next_smaller_one(monkeypatch):
    accelerator, memory = start_accelerator("fp32", force_cpu=True), of_text()
    for size, smaller in ((6, 3), (3, 2), (2, 1)):
        enough = needed(memory, size)
        free(monkeypatch, enough * (1 + 1e-9))
        number, said = find(ARGS, memory, 6, accelerator)
        assert number == size
        assert f"{gib(enough)} that are free for a process" in said
        free(monkeypatch, enough * (1 - 1e-9))
        assert find(ARGS, memory, 6, accelerator)[0] == smaller


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    accelerator, alone = start_accelerator("fp32", force_cpu=True), of_text()
    free(monkeypatch, 4 * needed(alone, 3) * (1 + 1e-9))
    assert find(ARGS, of_text(local_processes=4), 6, accelerator)[0] == 3


def test_if_nothing_fits_it_says_what_one_row_takes_of_what(monkeypatch):
    accelerator, memory = start_accelerator("fp32", force_cpu=True), of_text()
    free(monkeypatch, 2.0**28)
    with pytest.raises(ValueError, match=r"not one row of 192 targets fits .* about 0\.5\d* GiB \(weights .* of 0\.25 GiB"):
        find(ARGS, memory, 6, accelerator)


def test_a_model_that_cannot_be_estimated_wants_a_number(monkeypatch):
    accelerator, memory = start_accelerator("fp32", force_cpu=True), of_text()
    monkeypatch.setattr("lm.activations.token_losses", lambda *_, **__: torch.zeros(()).item())
    with pytest.raises(ValueError, match="the memory of --model neox-64x2 cannot be reckoned .*: pass a number"):
        find(ARGS, memory, 6, accelerator)


@pytest.fixture
def tight(monkeypatch):
    """A device on which passes of more than so many rows find no memory; the sizes that were tried, rows of each pass."""
    tried, clean = [], lm.micro_batch_size.make_pass

    def make_pass(model, ids, packed):
        tried.append(len(ids))
        clean(model, ids, packed)
        if len(ids) > tight.most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    tight.most = 2
    monkeypatch.setattr(lm.micro_batch_size, "make_pass", make_pass)
    return tried


def test_on_a_gpu_a_real_pass_has_the_last_word_and_without_memory_goes_a_size_down(tight, capsys):
    accelerator, memory = start_accelerator("fp32", force_cpu=True), of_text(device_bytes=2.0**40)
    before = torch.random.get_rng_state()
    assert find(ARGS, memory, 6, accelerator)[0] == 2
    assert tight == [6, 3, 2, 2], "a size that accumulates is tried with gradients there"
    assert torch.equal(torch.random.get_rng_state(), before)
    tight.clear()
    assert find(ARGS, of_text(device_bytes=2.0**40, fsdp=True), 6, accelerator)[0] == 6
    assert not tight, "a divided model is not tried"


def test_another_error_than_of_memory_ends_the_run(monkeypatch):
    monkeypatch.setattr(lm.micro_batch_size, "make_pass", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        has_memory(ARGS, of_text(), 1, accumulates=False)


def run_json(folder):
    return json.loads((folder / "run.json").read_text())


def test_a_run_is_the_one_of_that_fixed_size_and_keeps_it_when_it_goes_on(world, tmp_path, capsys):
    """Bit for bit, with dropout, which depends on the size."""
    scratch = {"c4_dir": world.folder / "pack", "ledger": True}
    for name, size in (("fixed", 2), ("whole", 6)):
        assert pretrain_here(tmp_path / name, tmp_path, **scratch | TEXT | {"micro_batch": size}) == 0
    for stopped in (False, True):
        folder = tmp_path / f"auto{stopped}"
        with freely(needed(of_text(), 2) * (1 + 1e-9)), stopping_after(7) if stopped else contextlib.nullcontext():
            assert pretrain_here(folder, tmp_path, **scratch | TEXT) == 75 * stopped
        assert "--micro_batch auto: 2 rows in a pass of a process, passes in a step: 3; about" in capsys.readouterr().out
        if stopped:  # now it would take all six
            assert pretrain_here(folder, tmp_path, **scratch | TEXT) == 0
            assert "auto: 2 rows in a pass of a process, passes in a step: 3; as this run had it" in capsys.readouterr().out
        found = run_json(folder)
        assert (found["derived"]["micro_batch"], found["derived"]["grad_accum"], found["args"]["micro_batch"]) == (2, 3, 2)
        assert whole(folder) == whole(tmp_path / "fixed")
    assert whole(folder)["ledger"] == whole(tmp_path / "whole")["ledger"]
    assert whole(folder)["train"] != whole(tmp_path / "whole")["train"], "else the test would not see a change of size"


def test_of_another_number_of_processes_or_before_the_first_checkpoint_nothing_is_kept(tmp_path):
    write_json(tmp_path / "run.json", {"num_processes": 2, "derived": {"micro_batch": 4}})
    assert kept(tmp_path, 2, 8) is None
    (tmp_path / "checkpoints/step_00000005").mkdir(parents=True)
    assert kept(tmp_path, 2, 8) == 4
    assert kept(tmp_path, 1, 8) is None
    assert kept(tmp_path, 2, 6) is None, "another effective batch, which the run refuses elsewhere"
    write_json(tmp_path / "run.json", {"num_processes": 2, "derived": {}})
    assert kept(tmp_path, 2, 8) is None
    assert kept(tmp_path / "nothing", 2, 8) is None


class ByRank:
    """In a process that is about to begin: free memory for four rows on the first process, for two on the others."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __call__(self):
        import os

        import lm.estimate

        lm.estimate._free_memory = lambda: self.sizes[int(os.environ["RANK"])]


def test_processes_agree_on_what_fits_each_and_train_on_the_same_examples(world, tmp_path):
    memory = of_papers(2)
    sizes = [2 * needed(memory, size) * (1 + 1e-9) for size in (6, 2)]  # two processes share it
    launch = world.start("train", tmp_path / "run", 2, ByRank(sizes), micro_batch="auto", token_budget=24 * 12 * 8)
    assert launch.wait() == [0, 0], launch.said()
    assert (run_json(tmp_path / "run")["derived"]["micro_batch"], run_json(tmp_path / "run")["derived"]["grad_accum"]) == (2, 3)
    world.finish("train", tmp_path / "one", token_budget=24 * 12 * 8, micro_batch=12)
    one, two = whole(tmp_path / "one"), whole(tmp_path / "run")
    assert two["ledger"] == one["ledger"]
    assert [row["loss"] for row in two["train"]] == pytest.approx([row["loss"] for row in one["train"]], rel=1e-5)
    assert [event["event"] for event in events(tmp_path / "run")] == ["started", "finished"]


def test_the_curriculum_reckons_with_examples_as_long_as_seq_len_and_counts_its_steps_alike(world, tmp_path, capsys):
    data, course = (world.folder / "stages_splits", world.folder / "tokenizer"), graph_runs.CURRICULUM | {"ledger": True}
    config = on_paper("neox-64x2", 300, 512).config
    enough = needed(Memory(config, replace(SETUP, seq_len=512, packed=True)), 4, 12)
    with freely(enough * (1 + 1e-9)):
        folder = graph_runs.train(tmp_path / "auto", *data, **course | {"micro_batch": "auto"})
    fixed = graph_runs.train(tmp_path / "fixed", *data, **course | {"micro_batch": 4})
    assert run_json(folder)["derived"]["micro_batch"] == 4
    assert whole(folder) == whole(fixed)


@pytest.mark.parametrize("kind", [train.Args, pptrain.Args, pretrain.Args])
def test_what_does_not_go_with_it_is_refused(kind):
    given = {"output_dir": "r", "scratch_dir": "S", "data_dir": "D", "max_steps": 1, "K": 1, "micro_batch": "auto"}
    given = {name: value for name, value in given.items() if name in kind.__dataclass_fields__}
    assert kind(**given, effective_batch=8).faults() == []
    (fault, *rest) = kind(**given, grad_accum=2).faults()
    assert fault == "--grad_accum 2 with --micro_batch auto, from which it follows: leave it out"
    assert len(rest) == (kind is pptrain.Args)
    expected = ["--micro_batch auto without --effective_batch, of which it is a part: pass it"] * (kind is pptrain.Args)
    assert kind(**given).faults() == rest == expected
    assert kind(**given | {"micro_batch": 0}).faults() == ["--micro_batch 0: at least 1 is needed"]


def test_the_command_line_knows_a_number_and_auto():
    for word, found in (("auto", "auto"), ("7", 7)):
        assert parse(pretrain.Args, ["--scratch_dir=S", f"--micro_batch={word}"]).micro_batch == found
    with pytest.raises(SystemExit):
        parse(pretrain.Args, ["--scratch_dir=S", "--micro_batch=most"])


def test_rows_that_the_processes_cannot_share_are_refused(monkeypatch):
    accelerator = start_accelerator("fp32", force_cpu=True)
    monkeypatch.setattr(type(accelerator), "num_processes", property(lambda _: 4))
    with pytest.raises(ValueError, match="--effective_batch 6 is not a multiple of the 4 processes"):
        lm.micro_batch_size.with_micro_batch(ARGS, 6, "neox-64x2", 300, 192, accelerator)


def test_memory_without_a_limit_takes_the_whole_step(monkeypatch):
    accelerator, memory = start_accelerator("fp32", force_cpu=True), of_text()
    free(monkeypatch, math.inf)
    assert find(ARGS, memory, 6, accelerator)[0] == 6
