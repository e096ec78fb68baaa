"""build_data_splits.py: three disjoint sets, the same bytes however they are made, killed and crowded on the way."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

import build_data_splits
from build_data_splits import CHUNK, Args, main, make_chunks, with_progress
from lm.files import locked, read_json, read_jsonl, read_sealed, sha256
from lm.graph_text import fingerprint, parse_prompt
from lm.splits import SETS, read_splits, splits_folder
from synthetic import SyntheticExamples

ROOT = Path(__file__).parents[1]
KNOWN_SHA256 = {
    "eval.jsonl": "69da5b1e1107884f429ee6c89b9bf1c37003e563d5bbc042cbc77dc80406e2d8",
    "mixin.jsonl": "808578c0e176ffb5c5658fd5391a8baaaa932aec4162157bf680789c37359b9b",
    "test.jsonl": "c3ee5e43bb9da79170b6821e551e41d0d3901673c6977631a8759c2b7f50f71e",
}

# What an external generator may be like. Its class gets a new seed for every attempt at every example.
FEW = """
import os, random, time
from types import SimpleNamespace

class Few:
    prompts = 400

    def __init__(self, max_input_size, seed):
        self.random = random.Random(seed)

    def generate_batch(self, task, batch_size, reserved_inputs, alpha, max_lookahead):
        prompt = f"prompt {self.random.randrange(self.prompts)}"
        return [SimpleNamespace(input_text=prompt, output_texts=["yes", "no"])]

class TooFew(Few):
    prompts = 40

class Dies(Few):
    def generate_batch(self, *args, **kwargs):
        os._exit(1)

class Counts(Few):
    prompts = 10**9

    def generate_batch(self, *args, **kwargs):
        with open(__file__ + ".calls", "a") as file:
            file.write("x")
        return super().generate_batch(*args, **kwargs)

class SleepsOnce(Counts):
    def generate_batch(self, *args, **kwargs):
        example = super().generate_batch(*args, **kwargs)
        if os.path.getsize(__file__ + ".calls") > 50:
            try:
                os.mkdir(__file__ + ".slept")
            except FileExistsError:
                return example
            time.sleep(600)
        return example
"""


@pytest.fixture
def external(tmp_path, monkeypatch) -> str:
    """The name of a module with generators that collide, die or count."""
    (tmp_path / "few_prompts.py").write_text(FEW)
    monkeypatch.syspath_prepend(tmp_path)
    yield "few_prompts"
    sys.modules.pop("few_prompts", None)


def small(scratch: Path, **changes) -> Args:
    defaults = {"max_input_size": 24, "max_lookahead": 4, "eval_size": 30, "test_size": 120, "mixin_size": 210}
    return Args(**{"scratch_dir": scratch, "num_processes": 1, **defaults, **changes})


def said(capsys) -> list[str]:
    """The lines but those of progress, which come every few seconds."""
    return [line for line in capsys.readouterr().out.splitlines() if "per second" not in line]


def folder_of(args: Args) -> Path:
    return splits_folder(args.scratch_dir, args.task, args.seed, args.generator)


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


def rows_of(args: Args) -> dict[str, list[dict]]:
    return {name: read_jsonl(folder_of(args) / f"{name}.jsonl", "") for name in SETS}


@contextmanager
def running(args: Args, path: Path, size: int) -> Iterator[tuple[subprocess.Popen, list[psutil.Process]]]:
    """The real command in a session of its own, once `path` has `size` bytes, and all processes below it."""
    values = {key: value for key, value in dataclasses.asdict(args).items() if value is not None}
    command = [sys.executable, ROOT / "build_data_splits.py", *(f"--{key}={value}" for key, value in values.items())]
    out = args.scratch_dir.with_suffix(".out")
    with open(out, "w") as file:
        environment = os.environ | {"PYTHONPATH": str(args.scratch_dir.parent)}
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    below = []
    try:
        deadline = time.monotonic() + 120
        while not (path.is_file() and path.stat().st_size >= size):
            assert process.poll() is None, out.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        below = psutil.Process(process.pid).children(recursive=True)
        yield process, below
    finally:
        for member in (process, *below):
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def one_at_a_time(args: Args) -> dict[str, list[dict]]:
    """The rows by their definition: row i is the first attempt at example i with a prompt that no row before it has."""
    seen: set[bytes] = set()
    rows: dict[str, list[dict]] = {name: [] for name in SETS}
    for name, size in args.sizes.items():
        for index in range(size):
            (example,) = SyntheticExamples(
                args.task, args.seed, args.max_lookahead, name, frozenset(seen), args.generator
            ).texts(index, 1)
            seen.add(build_data_splits.prompt_digest(example["prompt"]))
            row = {"input_text": example["prompt"], "output_texts": example["output_texts"], "alpha": 1.0}
            rows[name].append(row | {"stage": args.max_lookahead, "seed": args.seed, "index": index})
    return rows


def test_rows_are_examples_of_the_last_stage_and_meta_json_describes_them(tmp_path, capsys):
    args = small(tmp_path, seed=5)
    main(args)
    rows = rows_of(args)
    assert rows == one_at_a_time(args)
    folder = folder_of(args)
    assert folder == tmp_path / "data/nl_splits/mis24_look4_seed5"
    prompts = [row["input_text"] for found in rows.values() for row in found]
    meta = read_sealed(folder / "meta.json", "")
    lookaheads = meta.pop("lookaheads")
    assert {name: sum(counts.values()) for name, counts in lookaheads.items()} == args.sizes
    assert {tuple(counts) for counts in lookaheads.values()} == {("0", "1", "2")}
    assert meta == {
        "format": "splits-2",
        "max_input_size": 24,
        "max_lookahead": 4,
        "reachable_lookahead": 2,
        "alpha": 1.0,
        "seed": 5,
        "generator": {"name": "built-in", "fingerprint": fingerprint()},
        "mean_prompt_chars": round(np.mean([len(prompt) for prompt in prompts]), 1),
        "num_redrawn": 0,
        "files": {
            f"{name}.jsonl": {
                "count": len(found),
                "size": (folder / f"{name}.jsonl").stat().st_size,
                "sha256": sha256(folder / f"{name}.jsonl"),
            }
            for name, found in rows.items()
        },
    }
    assert said(capsys) == [
        "making 360 examples on 1 processes",
        str(folder),
        f"30 eval, 120 test, 210 mixin examples of {meta['mean_prompt_chars']} characters in the mean",
        "max_lookahead 4 reaches 2: one more step takes two branches of 3 vertices and the start, 7 in all, "
        "and --max_input_size 24 holds 6",
    ]


def test_a_task_that_reaches_its_max_lookahead_says_no_more(tmp_path, capsys):
    main(small(tmp_path, max_input_size=50, eval_size=1, test_size=1, mixin_size=1))
    assert said(capsys)[-1] == "max_lookahead 4 reaches 4"


def test_the_files_are_the_same_bytes_for_1_and_3_processes(tmp_path, external):
    for generator, mixin_size in ((None, 1_010), (f"{external}:Few", 210)):  # more chunks than may wait, and fewer
        changes = {"generator": generator, "mixin_size": mixin_size}
        one, three = (small(tmp_path / str(n), num_processes=n, **changes) for n in (1, 3))
        main(one)
        main(three)
        assert list(files_of(folder_of(one))) == ["eval.jsonl", "meta.json", "mixin.jsonl", "test.jsonl"]
        assert files_of(folder_of(one)) == files_of(folder_of(three))


def test_a_prompt_that_an_earlier_row_has_gives_way_to_the_next_attempt(tmp_path, external):
    args = small(tmp_path, generator=f"{external}:Few")  # 360 rows of 400 prompts
    main(args)
    rows = rows_of(args)
    assert rows == one_at_a_time(args)
    assert len({row["input_text"] for found in rows.values() for row in found}) == 360
    meta = read_splits(folder_of(args), generator=args.generator).meta
    fresh = (SyntheticExamples(args.task, args.seed, 4, name, generator=args.generator) for name in SETS)
    first = [made["prompt"] for name, made in zip(SETS, fresh, strict=True) for made in made.texts(0, args.sizes[name])]
    kept = [row["input_text"] for found in rows.values() for row in found]
    assert meta["num_redrawn"] == sum(one != other for one, other in zip(first, kept, strict=True)) > 100
    assert meta["lookaheads"] == {"eval": None, "test": None, "mixin": None}, "its prompts are worded in another way"
    source = {"name": "few_prompts:Few", "fingerprint": sha256(tmp_path / "few_prompts.py")}
    assert meta["generator"] == source
    assert folder_of(args).name == "mis24_look4_seed12345_Few"


def test_a_generator_with_too_few_prompts_is_named_with_how_many_it_has(tmp_path, external):
    args = small(tmp_path, generator=f"{external}:TooFew")
    message = (
        r"^40 distinct prompts were found, and no new one for row 10 of test \(no acceptable example 10 .*500 attempts.*\)"
    )
    with pytest.raises(RuntimeError, match=f"{message}: pass a smaller --eval_size, --test_size or --mixin_size, or a larger"):
        main(args)
    assert not folder_of(args).exists()


def test_every_row_is_one_graph_at_its_start_and_lookaheads_are_uniform(tmp_path):
    args = small(tmp_path, max_input_size=96, max_lookahead=16, eval_size=1500, test_size=200, mixin_size=1300, num_processes=2)
    main(args)
    rows = [row for found in rows_of(args).values() for row in found]
    facts = set()
    for row in rows:
        parsed = parse_prompt(row["input_text"])
        assert parsed.path == [parsed.start]
        facts.add(frozenset(parsed.edges))
        reaching = {parsed.goal}
        for _ in parsed.edges:
            reaching |= {source for source, target in parsed.edges if target in reaching}
        children = {target for source, target in parsed.edges if source == parsed.start}
        assert sorted(row["output_texts"]) == sorted(children & reaching)
    assert len(facts) == 3000, "no graph gave two rows"
    meta = read_json(folder_of(args) / "meta.json", "")
    counts = Counter({name: sum(found[name] for found in meta["lookaheads"].values()) for name in map(str, range(15))})
    assert counts.total() == 3000, "0 .. 14 are all there is"
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_square < 56, "the chance of 56 with 14 degrees of freedom is 6e-7"


def test_the_same_command_again_has_nothing_to_do(tmp_path, capsys):
    args = small(tmp_path)
    main(args)
    first = said(capsys)
    before = {path.name: path.stat().st_mtime_ns for path in folder_of(args).iterdir()}
    main(dataclasses.replace(args, num_processes=2))
    assert said(capsys) == [f"nothing to do: {folder_of(args)} is whole", *first[-2:]]
    assert {path.name: path.stat().st_mtime_ns for path in folder_of(args).iterdir()} == before


def test_damaged_sets_are_named_and_left_as_they_are(tmp_path):
    args = small(tmp_path)
    main(args)
    path = folder_of(args) / "test.jsonl"
    expected = sha256(path)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    again = "remove the folder and run build_data_splits.py again"
    with pytest.raises(ValueError, match=f"^{path} has SHA-256 {sha256(path)}, {expected} is needed: {again}$"):
        main(args)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"^{path} has {len(content) - 1} bytes, {len(content)} bytes are needed: {again}$"):
        main(args)
    assert path.read_bytes() == content[:-1]


def test_other_sizes_or_another_generator_in_the_same_folder_are_refused_naming_both(tmp_path, external):
    args = small(tmp_path, generator=f"{external}:Few")
    main(args)
    before = files_of(folder_of(args))
    with pytest.raises(
        ValueError,
        match="^"
        + re.escape(
            f"{folder_of(args)} holds other sets (--eval_size: 30 there, 31 now; --mixin_size: 210 there, 9 now): "
            "pass another --scratch_dir, the same arguments, or remove the folder"
        )
        + "$",
    ):
        main(dataclasses.replace(args, eval_size=31, mixin_size=9))
    shutil.copy(tmp_path / "few_prompts.py", tmp_path / "copied_prompts.py")
    with pytest.raises(
        ValueError, match=r"holds other sets \(--generator: .*few_prompts:Few.* there, .*copied_prompts:Few.* now"
    ):
        main(dataclasses.replace(args, generator="copied_prompts:Few"))
    assert files_of(folder_of(args)) == before


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    args = small(tmp_path)
    folder_of(args).mkdir(parents=True)
    (folder_of(args) / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ValueError, match=r"seed12345 was not made by build_data_splits.py: pass another --scratch_dir, or move"
    ):
        main(args)
    assert (folder_of(args) / "thesis.tex").read_text() == "years of work"


def test_all_bad_arguments_are_named_before_anything_is_written(tmp_path):
    (tmp_path / "file").write_text("")
    faults = [
        "--max_lookahead 0 is below 1: a search looks ahead at least one step",
        "--eval_size 0: at least 1 is needed",
        "--mixin_size -3: at least 1 is needed",
        "--num_processes 0: at least 1 is needed",
        "--seed -1: a number from 0 to 2**63 - 1 is needed",
        f"--scratch_dir {tmp_path / 'file'} is a file, a folder is needed: pass another",
        "--generator nothing names no class, 'module:Class' is needed: add what is missing",
    ]
    wrong = {"max_lookahead": 0, "eval_size": 0, "mixin_size": -3, "num_processes": 0, "seed": -1, "generator": "nothing"}
    with pytest.raises(ValueError, match="^" + re.escape("\n".join(faults)) + "$"):
        main(small(tmp_path / "file", **wrong))
    with pytest.raises(ValueError, match=r"^--seed 9223372036854775808: a number from 0 to 2\*\*63 - 1 is needed$"):
        main(small(tmp_path, seed=2**63))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_killed_build_leaves_nothing_that_looks_whole_and_the_next_ends_with_the_same_bytes(tmp_path):
    args = small(tmp_path / "killed", max_input_size=96, max_lookahead=16, mixin_size=6_000, num_processes=2)
    mixin = folder_of(args).with_name(f".{folder_of(args).name}.partial") / "mixin.jsonl"
    with running(args, mixin, 100_000) as (process, below):
        assert len(below) == 4, "the server, the two that it forked, and multiprocessing's tracker"
        process.kill()
        process.wait()
        assert psutil.wait_procs(below, timeout=10)[1] == [], "its processes end with it"
    assert not folder_of(args).exists()
    with pytest.raises(FileNotFoundError, match=r"run build_data_splits.py, or let it finish"):
        read_splits(folder_of(args))

    whole = dataclasses.replace(args, scratch_dir=tmp_path / "whole")
    main(args)
    main(whole)
    assert files_of(folder_of(args)) == files_of(folder_of(whole))
    assert sorted(path.name for path in folder_of(args).parent.iterdir()) == [
        ".mis96_look16_seed12345.lock",
        "mis96_look16_seed12345",
    ]


def test_ctrl_c_ends_all_processes_at_once_with_one_line(tmp_path, external):
    """One process is in the midst of an example, the other waits for work."""
    sizes = {"eval_size": 5, "test_size": 6, "mixin_size": 5_000}
    args = small(tmp_path / "scratch", generator=f"{external}:SleepsOnce", num_processes=2, **sizes)
    with running(args, tmp_path / "few_prompts.py.calls", 5 + 6 + 4 * CHUNK + 1) as (process, below):
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == 130, (tmp_path / "scratch.out").read_text()
        assert psutil.wait_procs(below, timeout=10)[1] == []
    lines = [line for line in (tmp_path / "scratch.out").read_text().splitlines() if "per second" not in line]
    assert lines == [
        "making 5,011 examples on 2 processes",
        "stopped, nothing was written: the same command starts again",
    ]
    assert [path.name for path in folder_of(args).parent.iterdir()] == [".mis24_look4_seed12345_SleepsOnce.lock"]


def test_a_process_that_dies_is_said_and_nothing_is_left(tmp_path, external):
    args = small(tmp_path, generator=f"{external}:Dies", num_processes=2)
    with pytest.raises(RuntimeError, match="^a worker was killed, as happens when memory runs out: pass a"):
        main(args)
    assert not folder_of(args).exists()


def test_two_builds_of_the_same_folder_do_not_meet(tmp_path):
    args = small(tmp_path)
    message = f"^another process is building {folder_of(args)}: wait for it, or stop it$"
    with (
        locked(folder_of(args).with_name(f".{folder_of(args).name}.lock"), "building"),
        pytest.raises(RuntimeError, match=message),
    ):
        main(args)
    main(args)
    assert read_splits(folder_of(args)).meta["seed"] == 12345


def test_processes_do_not_run_ahead_of_the_file(tmp_path, external):
    """What waits in memory is bounded, however slow the disk."""
    args = small(tmp_path, generator=f"{external}:Counts", num_processes=2, eval_size=5, test_size=6, mixin_size=5_000)
    calls = tmp_path / "few_prompts.py.calls"  # a byte for each example made
    with closing(make_chunks(args)) as chunks:
        assert len(next(chunks)) == 5
        deadline = time.monotonic() + 30
        while calls.stat().st_size < 5 + 6 + 3 * CHUNK:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.5)
        assert calls.stat().st_size == 5 + 6 + 3 * CHUNK, "the chunk handed out, and two for each process"


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 12.0, 14.0, 17.0])  # it begins, and each chunk comes; the first waits until processes have started
    monkeypatch.setattr(build_data_splits, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    sizes = [200, 100, 100, 110]
    assert [len(chunk) for chunk in with_progress((["row"] * size for size in sizes), 1_400)] == sizes
    lines = ["300/1,400 examples, 50 per second, 22 s left", "510/1,400 examples, 44 per second, 20 s left"]
    assert capsys.readouterr().out.splitlines() == lines


def test_the_bytes_of_a_seed_are_known(tmp_path):
    """A change of the built-in generator changes these, and every number that was measured on its sets."""
    main(small(tmp_path))
    found = {name: digest for name, digest in files_of(folder_of(small(tmp_path))).items() if name != "meta.json"}
    assert found == KNOWN_SHA256
