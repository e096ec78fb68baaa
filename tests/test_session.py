"""Steps that are read late: the device is not waited for, and nothing that comes out of a run depends on when it was."""

import copy
import gc
import math
import signal

import pytest
import torch
from accelerate import Accelerator
from packs import pretrain_here, write_pack
from text import byte_level_bpe
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from training import TINY, events, flags, outcome
from transformers import AutoModelForCausalLM

import lm.session
import train
from lm.args import parse
from lm.loss import next_token_loss
from lm.models import build_model
from lm.optim import make_optimizer
from lm.presets import PRESETS
from lm.runlog import records
from lm.session import Session
from lm.step import can_hold, read, train_step

STEPS = 24


@pytest.fixture
def reading(monkeypatch):
    """Runs in this process read so many steps at once."""

    def set_to(most, within_sec=1e9):
        monkeypatch.setattr(lm.session, "MOST_UNREAD", most)
        monkeypatch.setattr(lm.session, "READ_WITHIN_SEC", within_sec)

    return set_to


@pytest.fixture
def sizes(monkeypatch):
    """How many steps each reading of a run in this process was of."""
    seen = []
    monkeypatch.setattr(lm.session, "read", lambda unread, *rest: seen.append(len(unread)) or read(unread, *rest))
    return seen


@pytest.fixture
def here(papers_dir, tmp_path):
    """Train in this process; the signal handlers are put back afterwards."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]

    def go(name, code=0, **changes):
        options = TINY | {"data_dir": papers_dir, "output_dir": tmp_path / name, "token_budget": 288 * STEPS} | changes
        assert train.main(parse(train.Args, flags(**options, force_cpu=True))) == code
        return tmp_path / name

    yield go
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def poison(monkeypatch, step, times):
    """From the first attempt at this step on, `times` attempts have a loss that is not finite."""
    left, meant, make_step, clean = [times], [], Session.make_step, lm.session.train_step

    def noting(session, micro_batches, *rest, **how):
        if session.progress.data_step == step - 1:
            meant[:] = [micro_batches]
        return make_step(session, micro_batches, *rest, **how)

    def poisoned(accelerator, model, optimizer, micro_batches, loss_sum, *rest):
        def bad(model, batch):
            loss, *others = loss_sum(model, batch)
            return loss * math.nan, *others

        hit = any(micro_batches is its for its in meant) and left[0] > 0
        left[0] -= hit
        return clean(accelerator, model, optimizer, micro_batches, bad if hit else loss_sum, *rest)

    monkeypatch.setattr(Session, "make_step", noting)
    monkeypatch.setattr(lm.session, "train_step", poisoned)


def what_happened(folder):
    without = ("timestamp", "commit", "uncommitted_diff")
    return [{key: value for key, value in event.items() if key not in without} for event in events(folder)]


def test_a_step_that_is_read_later_never_asks_for_a_number():
    """Tensors without numbers stand for those of a device: whoever asks such a one for its value gets an error."""
    accelerator = Accelerator(cpu=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        config = PRESETS["neox-64x2"].config()
        config.vocab_size = 64
        model = AutoModelForCausalLM.from_config(config)
        optimizer = accelerator.prepare(make_optimizer("adamw", model, 1e-3, (0.9, 0.95), 1e-8, 0.1))
        ids, held = torch.zeros(2, 9, dtype=torch.int64), torch.zeros((), dtype=torch.bool)
        unread = train_step(accelerator, model, optimizer, [ids, ids], next_token_loss, 32, 1e-3, 1.0, None, held)
        with pytest.raises(DataDependentOutputException):
            read([unread], model, 1.0)


@pytest.mark.parametrize("times", [0, 1, 2, 3])
def test_a_run_is_the_same_however_many_steps_are_read_at_once(times, here, reading, sizes, monkeypatch):
    """Also where a step is not finite: tried again, and left out with its stretch after three attempts."""
    runs = []
    for name, most in (("each", 1), ("many", 16)):
        with monkeypatch.context() as patch:
            poison(patch, 13, times)
            reading(most)
            sizes.clear()
            runs.append(here(name, steps_per_eval_epoch=12, checkpoint_interval_steps=11, ledger=True))
            assert max(sizes) == (1 if name == "each" else 10), "from one checkpoint or evaluation to the next"
    each, many = runs
    assert outcome(many) == outcome(each)
    assert records(many, "ledger") == records(each, "ledger")
    assert what_happened(many) == what_happened(each)
    faults = [event for event in what_happened(many) if event["event"] == "not_finite"]
    assert [(event["step"], event["attempt"]) for event in faults] == [(13, attempt) for attempt in range(1, times + 1)]
    assert all(event["faults"][0].startswith("loss of micro-batch") for event in faults)
    assert (many / "problematic_batch.pt").exists() == bool(times)


def test_synthetic_rows_and_their_means_are_the_same_however_many_steps_are_read_at_once(tmp_path, reading):
    tokenizer = byte_level_bpe()
    write_pack(tmp_path / "scratch/data/c4_packed", tokenizer)
    runs = []
    for most in (1, 5, 16):
        reading(most)
        settings = {"mixin_percent": 0.0, "model": "neox-64x2", "total_steps": 20, "eval_every": 20, "log_every": 10}
        assert pretrain_here(tmp_path / f"run{most}", tmp_path / "scratch", **settings) == 0
        runs.append(outcome(tmp_path / f"run{most}"))
    assert runs[0] == runs[1] == runs[2]


def test_slow_steps_are_read_at_once_and_fast_ones_together(here, reading, sizes):
    reading(16, within_sec=1e-9)
    here("slow")
    assert set(sizes) == {1}
    sizes.clear()
    reading(4)
    here("fast", checkpoint_interval_steps=100, steps_per_eval_epoch=100)
    assert sizes == [1, 4, 4, 4, 4, 4, 3], "the first alone, to know how long it takes"


def test_a_signal_is_heard_at_the_next_reading(here, reading, tmp_path, monkeypatch):
    reading(8)
    make_step = Session.make_step

    def signalled(session, *rest, **how):
        if session.progress.step == 10:
            signal.raise_signal(signal.SIGTERM)
        return make_step(session, *rest, **how)

    monkeypatch.setattr(Session, "make_step", signalled)
    rarely = {"checkpoint_interval_steps": 100, "steps_per_eval_epoch": 100}
    folder = here("run", code=75, **rarely)
    assert events(folder)[-1]["event"] == "stopped"
    assert events(folder)[-1]["step"] == 17, "steps 2 to 9, then 10 to 17"
    monkeypatch.setattr(Session, "make_step", make_step)
    assert outcome(here("run", **rarely)) == outcome(here("straight", **rarely))


def test_the_garbage_collector_rests_while_a_run_trains(here, monkeypatch):
    seen, make_step = [], Session.make_step
    monkeypatch.setattr(Session, "make_step", lambda *rest, **how: (seen.append(gc.isenabled()), make_step(*rest, **how))[1])
    here("run", token_budget=288 * 6)
    assert seen == [False] * 6
    assert gc.isenabled()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "sgd", "adamw8bit"])
def test_what_cannot_be_held_back_on_the_device_is_looked_at_before_its_update(name):
    accelerator, model = Accelerator(cpu=True), build_model("neox-64x2", 300, 8)
    optimizer = accelerator.prepare(make_optimizer(name, model, 1e-3, (0.9, 0.95), 1e-8, 0.1))
    assert can_hold(accelerator, optimizer, model) is (name == "adamw")


def test_a_step_that_is_held_back_changes_no_weight_and_no_moment_and_neither_do_those_after_it():
    torch.manual_seed(0)
    accelerator, model = Accelerator(cpu=True), build_model("neox-64x2", 300, 8)
    optimizer = accelerator.prepare(make_optimizer("adamw", model, 1e-2, (0.9, 0.95), 1e-8, 0.1))
    good, held = torch.arange(18).view(2, 9), torch.zeros((), dtype=torch.bool)

    def step(loss_sum=next_token_loss):
        return train_step(accelerator, model, optimizer, [good], loss_sum, 16, 1e-2, 1.0, None, held)

    def everything():
        return copy.deepcopy([*model.state_dict().values(), *(v for s in optimizer.state.values() for v in s.values())])

    first, before = step(), everything()
    bad = step(lambda model, ids: (next_token_loss(model, ids)[0] * math.inf, torch.tensor(True)))
    after = step()
    assert all(torch.equal(a, b) for a, b in zip(everything(), before, strict=True))
    assert [result.applied for result in read([first, bad, after], model, 1.0)] == [True, False, True]
    assert held
    held.zero_()
    step()
    assert not all(torch.equal(a, b) for a, b in zip(everything(), before, strict=True))
