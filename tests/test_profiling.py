"""--profile: where a step goes, of real runs, without changing what they end with."""

import gzip
import json
import signal

import pytest
import torch
from training import TINY, flags, outcome, output
from training import run as run_process

import train
from lm.args import parse
from lm.profiling import part
from lm.trace import PARTS, Stretches, lines_of, read_trace, summary


@pytest.fixture
def run(papers_dir, tmp_path, capsys):
    """Train in this process for so many steps; returns the folder and what was said."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]

    def go(steps, folder="run", **changes):
        options = TINY | {"data_dir": papers_dir, "output_dir": tmp_path / folder, "token_budget": 288 * steps} | changes
        assert train.main(parse(train.Args, flags(**options, force_cpu=True))) == 0
        return tmp_path / folder, capsys.readouterr().out

    yield go
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "profile/steps.jsonl").read_text().splitlines()]


def trace_of(folder, process=0):
    return json.loads(gzip.decompress((folder / f"profile/trace_{process}.json.gz").read_bytes()))["traceEvents"]


def test_a_profile_changes_nothing_of_the_run(run):
    plain, profiled = run(10, "plain")[0], run(10, "profiled", profile=True)[0]
    assert (profiled / "profile/profile.json").exists()
    assert outcome(profiled) == outcome(plain)
    assert not (plain / "profile").exists()


def test_the_parts_of_a_step_are_its_time(run):
    """By the log's clock, which is read once a step; without evaluations or checkpoints in between."""
    larger = {"micro_batch": 12, "sequence_length": 96, "token_budget": 12 * 96 * 9}
    folder, said = run(9, profile=True, steps_per_eval_epoch=100, checkpoint_interval_steps=100, **larger)
    rows = rows_of(folder)
    assert [(row["step"], row["part"]) for row in rows] == [(step, name) for step in range(4, 9) for name in PARTS]
    clock = [json.loads(line)["timestamp"] for line in (folder / "logs/train.jsonl").read_text().splitlines()]
    between = 1000 * (clock[7] - clock[3])  # from the middle of step 4 to that of step 8
    assert sum(row["ms"] for row in rows if row["step"] in (5, 6, 7, 8)) == pytest.approx(between, rel=0.05)
    for step in range(4, 9):
        assert sum(row["share"] for row in rows if row["step"] == step) == pytest.approx(1)
    assert all(row["ms"] > 0 for row in rows if row["part"] not in ("evaluate", "checkpoint", "log"))
    assert all(row["device_ms"] is None for row in rows)
    by_part = {name: sum(row["ms"] for row in rows if row["part"] == name) for name in PARTS}
    assert by_part["forward"] + by_part["backward"] > by_part["data"] + by_part["clip"] + by_part["log"] + by_part["other"]
    about = json.loads((folder / "profile/profile.json").read_text())
    assert (about["steps"], about["num_processes"], len(about["operators"])) == ([4, 5, 6, 7, 8], 1, 10)
    assert about["step_ms"] == pytest.approx(sum(row["ms"] for row in rows) / 5)
    assert about["tokens_per_sec"] == pytest.approx(12 * 96 / about["step_ms"] * 1000)
    assert "aten::addmm" in {row["name"] for row in about["operators"]}
    assert "a step of 4 to 8 took " in said
    assert all(f"\n{name:<40}" in said for name in PARTS)


def test_the_trace_has_five_steps_and_their_ranges(run):
    folder, _ = run(12, profile=True)
    ranges = [event["name"] for event in trace_of(folder) if event.get("cat") == "user_annotation"]
    assert [name for name in ranges if name.startswith("ProfilerStep#")] == [f"ProfilerStep#{n}" for n in range(3, 8)]
    counts = {name: ranges.count(name) for name in PARTS}
    assert 5 < counts.pop("wait") <= 10, "for the other processes at every step, for the device where it is read"
    assert 1 < counts.pop("log") <= 3 + 5 + 1, "of steps before them too, when these are read only now"
    assert counts == {
        "data": 5,
        "to_device": 5,
        "forward": 5 * 4,
        "backward": 5 * 4,
        "clip": 5 * 2,
        "optimizer": 5,
        "evaluate": 1,
        "checkpoint": 1,
        "other": 0,
    }


def test_a_run_that_goes_on_is_profiled_anew(run):
    run(10, profile=True)
    folder, _ = run(20, profile=True)
    assert {row["step"] for row in rows_of(folder)} == {14, 15, 16, 17, 18}


def test_a_run_too_short_for_a_profile_gives_what_there_is(run):
    folder, said = run(5, profile=True)
    assert "5 steps were made, 8 are needed for a whole profile: train for longer\n" in said
    assert {row["step"] for row in rows_of(folder)} == {4, 5}
    folder, said = run(3, "shorter", profile=True)
    assert "3 steps were made, 8 are needed for a whole profile: train for longer\n" in said
    assert not (folder / "profile").exists()


def test_each_of_several_processes_writes_its_trace(papers_dir, tmp_path):
    folder = tmp_path / "run"
    assert run_process(folder, papers_dir, 2, profile=True, token_budget=288 * 9) == 0, output(folder)
    for process in (0, 1):
        assert {event["name"] for event in trace_of(folder, process)} >= {"ProfilerStep#3", "forward", "backward", "wait"}
    assert {path.name for path in (folder / "profile").iterdir()} == {
        "trace_0.json.gz",
        "trace_1.json.gz",
        "profile.json",
        "steps.jsonl",
    }
    assert json.loads((folder / "profile/profile.json").read_text())["num_processes"] == 2
    assert rows_of(folder) == read_trace(folder / "profile/trace_0.json.gz", dict(enumerate(range(1, 9)))).rows


def test_a_part_is_a_block_or_a_function_and_may_be_within_itself():
    @part("outer")
    def down(levels):
        with part("inner"):
            return levels and 1 + down(levels - 1)

    assert down(2) == 2  # and is nothing without a profile
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        assert down(2) == 2
    ranges = sorted((event.time_range.start, event.time_range.end, event.name) for event in profiler.events())
    assert [name for _, _, name in ranges] == ["outer", "inner"] * 3
    ends = [end for _, end, _ in ranges]
    assert ends == sorted(set(ends), reverse=True)


def test_a_moment_belongs_to_the_innermost_range():
    stretches = Stretches([(10, 20, "step"), (12, 18, "data"), (14, 15, "log"), (18, 19, "wait"), (25, 30, "step")])
    assert stretches.stretches == [
        (10, 12, "step"),
        (12, 14, "data"),
        (14, 15, "log"),
        (15, 18, "data"),
        (18, 19, "wait"),
        (19, 20, "step"),
        (25, 30, "step"),
    ]
    assert [stretches.at(moment) for moment in (9, 10, 14.5, 18, 20, 24, 25, 30)] == [
        None,
        "step",
        "log",
        "wait",
        None,
        None,
        "step",
        None,
    ]


def test_work_on_a_device_counts_for_the_part_that_launched_it(tmp_path):
    """A trace as CUPTI fills it: the backward pass launches from another thread, and kernels run later than their launch."""

    def event(cat, name, ts, dur, tid=1, **args):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}

    events = [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", "ProfilerStep#0", 0, 1000),
        event("user_annotation", "forward", 100, 300),
        event("cpu_op", "aten::linear", 150, 100),
        event("cpu_op", "aten::mm", 160, 80),
        event("cuda_runtime", "cudaLaunchKernel", 170, 10, correlation=1),
        event("kernel", "gemm", 450, 200, tid=7, correlation=1),
        event("user_annotation", "backward", 500, 400),
        event("cpu_op", "MmBackward0", 550, 50, tid=2),
        event("cuda_driver", "cuLaunchKernelEx", 560, 10, tid=2, correlation=2),
        event("kernel", "gemm", 1100, 500, tid=7, correlation=2),
        event("gpu_memcpy", "Memcpy HtoD", 20, 30, tid=7, correlation=3),
        event("cuda_runtime", "cudaMemcpyAsync", 10, 20, correlation=3),
        event("kernel", "launched before the trace", 1, 5, tid=7, correlation=99),
        event("gpu_user_annotation", "forward", 450, 200, tid=7),
        event("user_annotation", "ProfilerStep#1", 1000, 500),  # which was not finished
        event("user_annotation", "forward", 1100, 300),
    ]
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    trace = read_trace(path, {0: 41})
    found = {row["part"]: (row["step"], row["ms"], row["share"], row["device_ms"]) for row in trace.rows}
    expected = dict.fromkeys(PARTS, (41, 0.0, 0.0, 0.0))
    expected |= {"forward": (41, 0.3, 0.3, 0.2), "backward": (41, 0.4, 0.4, 0.5), "other": (41, 0.3, 0.3, 0.03)}
    assert {name: pytest.approx(values) for name, values in expected.items()} == found
    assert trace.operators == [
        {"name": "MmBackward0", "calls": 1, "ms": pytest.approx(0.05), "device_ms": 0.5},
        {"name": "aten::mm", "calls": 1, "ms": pytest.approx(0.08), "device_ms": 0.2},
        {"name": "aten::linear", "calls": 1, "ms": pytest.approx(0.02), "device_ms": 0.0},
    ]
    lines = lines_of({"steps": [41], "tokens_per_sec": 1234.5} | summary(trace))
    assert lines[0] == "a step of 41 to 41 took 1.0 ms while it was traced (1,234 tokens/s on this process)"
    assert lines[4].split() == ["forward", "0.30", "30.0%", "0.20"]
