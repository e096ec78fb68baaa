import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from training import ROOT

from lm.micro_batches import Loader, rows_of_step

SPLIT = {"micro_batch": 3, "grad_accum": 2}


def place(process=0, processes=1):
    """What a loader needs to know of an Accelerator."""
    return SimpleNamespace(device=torch.device("cpu"), process_index=process, num_processes=processes)


def make(rows, *what):
    """A micro-batch that says what was asked for, and who made it."""
    return rows, what, os.getpid()


def loader_of(workers, make=make):
    return Loader(make, *SPLIT.values(), workers, place())


def asked(made):
    return [(rows, what) for rows, what, _ in made]


@given(st.integers(0, 10**9), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_the_processes_share_out_the_rows_of_a_step(step, micro_batch, grad_accum, processes):
    parts = [rows_of_step(step, micro_batch, grad_accum, place(process, processes)) for process in range(processes)]
    in_turn = [row for micro_batches in zip(*parts, strict=True) for rows in micro_batches for row in rows]
    effective = micro_batch * grad_accum * processes
    assert in_turn == list(range(step * effective, (step + 1) * effective))


@settings(deadline=None, max_examples=200)
@example([(0, 1), (5, 1), (1, 1)])  # a jump, then what would have come without it
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 2)), min_size=1, max_size=12))
def test_whatever_step_is_asked_for_its_own_micro_batches_come(wanted):
    """Forwards, backwards and again, and of something else, without loader processes."""
    loader = loader_of(0)
    for step, what in wanted:
        assert asked(loader.step(step, what)) == [(rows, (what,)) for rows in rows_of_step(step, **SPLIT, accelerator=place())]


@pytest.mark.parametrize("workers", [1, 3])
def test_one_set_of_processes_makes_all_of_them(workers):
    """In order; a stage that changes; back and over a gap, as after a rollback; and the next step, made ahead before."""
    loader, makers = loader_of(workers), set()
    steps = [(0, 1), (1, 1), (2, 2), (3, 2), (1, 2), (3, 2), (4, 2), (5, 2), (5, 2), (4, 1)]
    for step, what in steps:
        made = loader.step(step, what)
        assert asked(made) == [(rows, (what,)) for rows in rows_of_step(step, **SPLIT, accelerator=place())]
        makers |= {pid for _, _, pid in made}
    assert len(makers) == workers
    assert os.getpid() not in makers


def test_what_is_made_ahead_is_asked_for_in_order_and_once():
    seen = []
    loader = loader_of(0, make=lambda rows: seen.append(rows) or rows)
    made = list(itertools.chain(*(loader.step(step) for step in range(7, 12))))
    assert seen == made == [rows for step in range(7, 12) for rows in rows_of_step(step, **SPLIT, accelerator=place())]


def test_no_work_of_the_processes_is_thrown_away_while_steps_come_in_order():
    number = itertools.count()
    loader = loader_of(1, make=lambda rows, stage: (rows, stage, next(number)))
    made = list(itertools.chain(*(loader.step(step, 1) for step in range(7, 12))))
    assert [number for _, _, number in made] == list(range(10))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_of_the_maker_reaches_the_trainer(workers):
    def faulty(rows):
        raise ValueError(f"no row {rows.start}")

    with pytest.raises(ValueError, match="no row 6"):
        loader_of(workers, make=faulty).step(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_micro_batch_for_a_gpu_lies_in_page_locked_memory(workers):
    accelerator = SimpleNamespace(device=torch.device("cuda"), process_index=0, num_processes=1)
    loader = Loader(lambda rows: ({"ids": torch.tensor(rows)}, {"example": rows}), 3, 1, workers, accelerator)
    ((batch, columns),) = loader.step(1)
    assert batch["ids"].is_pinned()
    assert batch["ids"].tolist() == list(columns["example"]) == [3, 4, 5]


def test_a_process_that_holds_a_loader_ends_when_its_loaders_are_killed():
    script = """
import time
from test_micro_batches import loader_of
from lm.run import kill_loaders
loader = loader_of(2)
loader.step(0)
kill_loaders()
time.sleep(0.2)
print("still well")
"""
    command, paths = [sys.executable, "-c", script], f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    environment = os.environ | {"PYTHONPATH": paths}
    ended = subprocess.run(command, env=environment, timeout=60, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "still well\n", "")
