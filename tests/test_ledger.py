"""The ledger of real runs says what they trained on, and `report.py ledger` finds every way in which that can be wrong."""

import json
import shutil
import signal
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from graph_runs import build
from graph_runs import train as pptrain_here
from packs import SEQ_LEN, pretrain_here, write_pack
from text import byte_level_bpe
from training import TINY, events, flags, kill, output, run, start, wait_for_step

import pptrain
import report
import train
from lm import exactly_once
from lm.args import parse
from lm.files import listed, read_json, write_sealed
from lm.heldout import encode_rows
from lm.ledger import compare_ledgers
from lm.micro_batches import Loader
from lm.mixed_rows import MixedRows
from lm.papers import read_papers
from lm.redraw import Sample
from lm.session import Session
from lm.shards import Pack
from lm.splits import read_splits
from random_window_dataset import RandomWindowDataset
from synthetic import SyntheticExamples

TOKENIZER = byte_level_bpe()


@contextmanager
def signal_handlers_put_back():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def train_here(folder: Path, data: Path, ledger: bool = True, **changes) -> Path:
    """Run train.main in this process, which saves the imports."""
    with signal_handlers_put_back():
        options = TINY | ({"ledger": True} if ledger else {}) | changes
        assert train.main(parse(train.Args, flags(**options, data_dir=data, output_dir=folder, force_cpu=True))) == 0
    return folder


def file(folder: Path) -> Path:
    return folder / "logs/ledger.jsonl"


def ledger(folder: Path) -> list[dict]:
    return [json.loads(line) for line in file(folder).read_text().splitlines()]


def found(*folders: Path) -> tuple[int, dict]:
    """Exit code and results of the report, less what does not depend on the run."""
    code = report.main(["ledger", *map(str, folders)])
    written = read_json(folders[0] / "report/ledger.json", "report.py")
    return code, written


def faults(folder: Path) -> dict[str, list[str]]:
    """The faults that the report names, which then exits with 1."""
    code, written = found(folder)
    named = {kind: fault["first"] for kind, fault in written["faults"].items()}
    assert (code, written["exactly_once"]) == (int(bool(named)), not named)
    return named


def by_hand(ids: np.ndarray) -> str:
    """The digest of a row of T + 1 ids, as README says it is made."""
    ids = np.asarray(ids).astype("<i8")
    return blake2b(ids[:-1].tobytes() + ids[1:].tobytes(), digest_size=8).hexdigest()


@pytest.fixture(scope="module")
def whole(papers_dir, tmp_path_factory):
    """A run of 40 steps of 12 windows that nothing disturbed; not to be changed."""
    return train_here(tmp_path_factory.mktemp("whole") / "run", papers_dir)


@pytest.fixture
def edited(whole, tmp_path):
    """A copy of that run whose ledger is made of these lines, which an edit changed.

    Without checkpoints nothing says which data the rows are of, so that none is drawn again.
    """

    def go(edit, source=whole, checkpoints=False):
        folder = tmp_path / "edited"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder, ignore=None if checkpoints else shutil.ignore_patterns("checkpoints"))
        lines = ledger(folder)
        file(folder).write_text("".join(json.dumps(line) + "\n" for line in edit(lines) or lines))
        return folder

    return go


def test_a_line_says_where_each_row_came_from_and_hashes_it(whole, papers_dir):
    papers = read_papers(papers_dir)
    lines = ledger(whole)
    assert [line["step"] for line in lines] == list(range(1, 41))
    for line in lines:
        index = [papers.paper_ids.index(paper) for paper in line["paper"]]
        starts = papers.offsets[index] + line["first_token"]
        digests = [by_hand(papers.tokens[begin : begin + 25]) for begin in starts]
        rows = list(range(12 * line["step"] - 12, 12 * line["step"]))
        same = {"paper": line["paper"], "first_token": line["first_token"]}
        assert line == {"step": line["step"], "data_step": line["step"] - 1, "example": rows, **same, "digest": digests}


def test_one_process_two_with_another_split_loader_workers_and_a_killed_run_write_the_same_bytes(whole, papers_dir, tmp_path):
    two, workers, killed = (tmp_path / name for name in ("two", "workers", "killed"))
    assert run(two, papers_dir, processes=2, micro_batch=2, ledger=True) == 0, output(two)
    train_here(workers, papers_dir, num_workers=2, token_budget=24 * 12 * 8)
    process = start(killed, papers_dir, ledger=True)
    wait_for_step(killed, 18, process)
    kill(process)
    with open(file(killed), "a") as half:
        half.write('{"step": 19, "data_')
    assert faults(killed) == {}
    train_here(killed, papers_dir)
    assert [event["event"] for event in events(killed)] == ["started", "resumed", "finished"]
    expected = file(whole).read_bytes()
    assert file(two).read_bytes() == file(killed).read_bytes() == expected
    assert file(workers).read_bytes() == b"".join(expected.splitlines(keepends=True)[:8])


def test_without_the_flag_nothing_is_written_and_the_report_says_what_to_pass(papers_dir, tmp_path):
    train_here(tmp_path / "run", papers_dir, ledger=False, token_budget=24 * 12 * 2)
    assert not file(tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError, match="ledger.jsonl, the run was made without it: pass --ledger to the training"):
        report.main(["ledger", str(tmp_path / "run")])


def test_a_good_run_is_said_to_be_good(whole, capsys):
    code, written = found(whole)
    assert (
        capsys.readouterr().out
        == f"{whole}: steps 1 to 40, 480 rows: every example exactly once; 480 rows drawn again from seed and data\n"
    )
    assert code == 0
    assert written == {
        "run": str(whole),
        "trainer": "train.py",
        "first_step": 1,
        "last_step": 40,
        "effective_batch": 12,
        "rows": 480,
        "data_steps_stepped_over": [],
        "drawn_again": {"rows": 480, "why_no_more": None},
        "exactly_once": True,
        "faults": {},
    }


def test_a_ledger_that_begins_or_ends_within_the_run_is_checked_as_far_as_it_goes(papers_dir, tmp_path, capsys):
    folder, few = tmp_path / "run", 24 * 12
    train_here(folder, papers_dir, ledger=False, token_budget=5 * few)
    train_here(folder, papers_dir, token_budget=10 * few)
    assert faults(folder) == {}
    assert "begins at step 6, --ledger was not given before: checked from there" in capsys.readouterr().out
    train_here(folder, papers_dir, ledger=False, token_budget=12 * few)
    unrecorded = "the session that went on after step 10 had no --ledger, or its lines are lost"
    assert faults(folder) == {"not recorded": [f"steps 11 to 12: {unrecorded}"]}
    train_here(folder, papers_dir, token_budget=14 * few)
    assert faults(folder) == {"not recorded": [f"steps 11 to 12: {unrecorded}"]}
    lines = file(folder).read_text().splitlines(keepends=True)
    for lost, first, last in ((4, 10, 12), (5, 11, 13)):  # what is lost beside it is not excused
        file(folder).write_text("".join(lines[:lost] + lines[lost + 1 :]))
        assert faults(folder) == {
            "example left out": [f"examples {12 * (first - 1)} to {12 * last - 1} never came"],
            "step missing": [f"no line for steps {first} to {last}"],
        }


def edit_of(step: int, /, **changes):
    """An edit that sets a row, or all, of a column of one step."""

    def edit(lines):
        for name, change in changes.items():
            row, value = change if isinstance(change, tuple) else (None, change)
            if row is None:
                lines[step - 1][name] = value
            else:
                lines[step - 1][name][row] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (
            lambda lines: lines[:6] + lines[7:],
            {"example left out": ["examples 72 to 83 never came"], "step missing": ["no line for step 7"]},
        ),
        (lambda lines: lines[:-1], {"step missing": ["no line for step 40: the run has come to step 40"]}),
        (
            lambda lines: lines[:6] + lines[7:5:-1] + lines[8:],
            {
                "data step": ["step 7 trains on data step 6, one before did on 7"],
                "order of steps": ["step 7 (line 8) comes after step 8"],
            },
        ),
        (
            lambda lines: lines[:7] + lines[6:],
            {
                "data step": ["step 7 trains on data step 6, one before did on 6"],
                "example again": [f"step 7 row {j} is example {72 + j} again, with the same token ids" for j in range(10)],
                "step again": ["step 7 is there 2 times"],
            },
        ),
        (
            edit_of(7, example=(3, 74)),
            {
                "wrong example": ["step 7 row 3 is example 74, not 75"],
                "example again": ["step 7 row 3 is example 74 again, with other token ids"],
                "example left out": ["example 75 never came"],
            },
        ),
        (
            edit_of(7, example=list(range(72, 83)), paper=["x"] * 11, first_token=[0] * 11, digest=["0" * 15 + "1"] * 11),
            {"number of rows": ["step 7 has 11 rows, 12 are in a step"], "example left out": ["example 83 never came"]},
        ),
        (
            edit_of(7, digest=["0" * 15 + "1"] * 11),
            {
                "no record": ["line 7 is no record (the lists of step 7 have different lengths): "],
                "example left out": ["examples 72 to 83 never came"],
                "step missing": ["no line for step 7"],
            },
        ),
        (
            edit_of(7, data_step=7),
            {
                "data step": ["step 7 trains on data step 7, 6 is the last that it may be"],
                "example left out": ["examples 72 to 83 never came"],
            },
        ),
    ],
)
def test_every_fault_is_named(edit, named, edited):
    found = faults(edited(edit))
    if "no record" in found:
        found["no record"] = [text[: text.index(": b'") + 2] for text in found["no record"]]
    assert found == named


ELEVEN = range(72, 83)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", True),
        ("step", "7"),
        ("step", 0),
        ("data_step", 6.0),
        ("data_step", -1),
        ("example", [*ELEVEN, 83.0]),
        ("example", [*ELEVEN, 2**63]),
        ("example", [*ELEVEN, True]),
        ("example", [*ELEVEN, None]),
        ("example", [[index] for index in range(72, 84)]),
        ("example", None),
        ("paper", [["train_1"]] * 12),
        ("paper", "train_1 to 3"),
        ("first_token", [0] * 11 + [-1]),
        ("first_token", [0] * 11 + [2**48]),
        ("digest", ["0" * 15 + "1"] * 10 + ["1" * 14, "1" * 18]),
        ("digest", ["0" * 15 + "g"] * 12),
        ("digest", ["0" * 15 + " "] * 12),
        ("more", [0] * 12),
    ],
)
def test_a_value_that_cannot_be_makes_a_line_no_record(name, value, edited):
    named = faults(edited(edit_of(7, **{name: value})))
    assert named.pop("no record")[0].startswith("line 7 ")
    assert named == {"example left out": ["examples 72 to 83 never came"], "step missing": ["no line for step 7"]}


def test_a_key_twice_in_a_line_makes_it_no_record(edited):
    folder = edited(lambda lines: lines)
    file(folder).write_text(file(folder).read_text().replace('"data_step": 6,', '"data_step": 6, "data_step": 6,'))
    assert faults(folder)["no record"][0].startswith("line 7 is no record (the line is not JSON (key 'data_step' twice")


def test_a_step_far_beyond_the_run_is_named_and_takes_no_memory(edited):
    named = faults(edited(edit_of(40, step=2**40, data_step=2**40 - 1)))
    assert named == {
        "far step": [f"step {2**40} (line 40) is far beyond step 40, to which the run has come"],
        "step missing": ["no line for step 40: the run has come to step 40"],
    }


def put(folder: Path, name: str, change) -> None:
    path = folder / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def more(name: str, line: dict):
    """A change of a folder: one more line in a file."""

    def change(folder):
        with open(folder / name, "a") as lines:
            lines.write(json.dumps(line) + "\n")

    return change


def rolled_back(*stretch, step: int = 9) -> dict:
    return {"event": "rolled_back", "from_step": step, "to_step": 5, "data_steps_left_out": list(stretch)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: put(folder, "run.json", lambda _: []), r"run.json is \[\], an object is needed: pass another"),
        (lambda folder: put(folder, "run.json", lambda _: {}), "run.json has args None, dict is needed"),
        (lambda folder: put(folder, "run.json", lambda run: run | {"derived": {}}), "has effective_batch None, int is"),
        (
            lambda folder: put(folder, "run.json", lambda run: run | {"derived": {"effective_batch": 0}}),
            "effective_batch 0, 1 to",
        ),
        (lambda folder: put(folder, "run.json", lambda run: run | {"args": {"K": 1}}), "run.json args has seed None, int is"),
        (lambda folder: put(folder, "run.json", lambda run: run | {"args": {}}), "is a run of .*, one of train.py, pptrain.py"),
        (more("events.jsonl", {"event": "rolled_back"}), "events.jsonl line 3 has from_step None, int is needed: mend"),
        (
            more("events.jsonl", rolled_back(0, 10**12)),
            "line 3 leaves out data steps .*, the first and last of a",
        ),
        (more("events.jsonl", rolled_back("a", 7)), r"line 3 leaves out data steps \['a', 7\]"),
        (more("events.jsonl", rolled_back(5)), r"line 3 leaves out data steps \[5\]"),
        (more("events.jsonl", {"event": "resumed", "step": None}), "events.jsonl line 3 has step None, int is needed"),
        (more("logs/train.jsonl", {"step": 2**50}), r"train.jsonl line 41 has step 1125899906842624, 0 to \d+ is needed"),
    ],
)
def test_what_stands_beside_the_ledger_is_checked_before_it_is_believed(change, said, edited):
    folder = edited(lambda lines: lines)
    change(folder)
    with pytest.raises(ValueError, match=said):
        report.main(["ledger", str(folder)])


def swapped(values: list) -> list:
    return [values[1], values[0], *values[2:]]


def test_rows_that_are_not_those_of_the_data_are_named(whole, edited, papers_dir):
    lines = ledger(whole)
    folder = edited(edit_of(7, digest=swapped(lines[6]["digest"])), checkpoints=True)
    one, other = lines[6]["digest"][:2]
    assert faults(folder) == {
        "other row": [
            f"step 7 row 0 has digest {other}, not {one}, which seed and data give",
            f"step 7 row 1 has digest {one}, not {other}, which seed and data give",
        ]
    }
    before = {name: lines[5][name] for name in ("paper", "first_token", "digest")}
    folder = edited(edit_of(7, **before), checkpoints=True)
    assert found(folder)[1]["faults"]["other row"]["count"] == 12
    lines[6]["first_token"][0] = 10**9
    named = faults(edited(edit_of(7, first_token=(0, 10**9)), checkpoints=True))["other row"]
    assert named[0].startswith("step 7 row 0 has first_token 1000000000, not ")


def test_without_the_data_it_is_said_that_no_row_was_drawn_again(edited, papers_dir, tmp_path, capsys):
    folder = edited(lambda lines: lines, checkpoints=True)
    put(folder, "run.json", lambda run: run | {"args": run["args"] | {"data_dir": str(tmp_path / "gone")}})
    code, written = found(folder)
    assert (code, written["drawn_again"]["rows"]) == (0, 0)
    assert (
        f"exactly once; 0 rows drawn again from seed and data and no more: no {tmp_path}/gone/meta.json"
        in capsys.readouterr().out
    )
    other = shutil.copytree(papers_dir, tmp_path / "gone")
    meta = read_json(other / "meta.json", "fetch_arxiv.py")
    (other / "splits.json").write_text((other / "splits.json").read_text() + "\n")
    meta["files"] |= listed(other, [other / "splits.json"])
    del meta["sha256"]
    write_sealed(other / "meta.json", meta)
    assert found(folder)[1]["drawn_again"] == {"rows": 0, "why_no_more": "data of the run were others than are there now"}


def test_a_step_whose_rows_all_have_one_digest_is_named_without_the_data(edited):
    named = faults(edited(edit_of(7, digest=["0" * 15 + "1"] * 12)))
    assert named == {"digest again": ["all rows of step 7 have the digest of the first, and are others"]}


def test_of_many_rows_a_thousand_or_two_are_drawn_again_evenly_from_all_places(capsys):
    sample, size, rows = Sample(), 512, 200_000
    for step in range(rows // size):
        examples = np.arange(step * size, step * size + size)
        sample.take(step, {"example": examples})
    drawn = np.array([int(said["example"]) for *_, said in sample.rows])
    assert 1000 <= len(drawn) <= 2000
    assert np.diff(drawn).max() < 2.7 * rows / len(drawn)
    assert np.histogram(drawn % size, 8)[0].min() > len(drawn) / 8 * 0.9


@pytest.mark.parametrize("event", ["resumed", "rolled_back"])
def test_a_run_that_goes_back_while_its_ledger_is_read_is_looked_at_again(event, edited, monkeypatch):
    folder = edited(lambda lines: lines)
    read, looks = exactly_once.lines, []

    def cut_before_it_is_read(run):
        looks.append(run)
        if len(looks) == 1:
            for name in ("ledger", "train"):
                path = folder / f"logs/{name}.jsonl"
                path.write_text("".join(path.read_text().splitlines(keepends=True)[:35]))
        if len(looks) == 2:  # the records are cut back at once, the event follows
            more("events.jsonl", {"event": "resumed", "step": 35} if event == "resumed" else rolled_back(38, 39, step=40))(
                folder
            )
        yield from read(run)

    monkeypatch.setattr(exactly_once, "lines", cut_before_it_is_read)
    assert faults(folder) == {}
    assert len(looks) == 3


def test_a_run_that_never_stands_still_is_said_to(edited, monkeypatch):
    folder, read = edited(lambda lines: lines), exactly_once.lines

    def resumed(run):
        more("events.jsonl", {"event": "resumed", "step": 40})(folder)
        yield from read(run)

    monkeypatch.setattr(exactly_once, "lines", resumed)
    with pytest.raises(RuntimeError, match="went back or on 5 times while its ledger was read: check it again in a while"):
        report.main(["ledger", str(folder)])


def test_the_same_row_with_other_token_ids_differs_from_another_run(whole, edited, capsys):
    other = edited(edit_of(7, digest=(3, "00000000000000ff")))
    code, written = found(whole, other)
    row = {name: values[3] for name, values in ledger(whole)[6].items() if isinstance(values, list)}
    changed = row | {"digest": "00000000000000ff"}
    first = {"step": 7, "row": 3, "run": row, "other": changed}
    assert (code, written["comparison"]) == (
        1,
        {"other": str(other), "from_step": 1, "same_steps": 6, "goes_on": None, "first_difference": first},
    )
    assert "differ at step 7, row 3 (run {'example': 75, " in capsys.readouterr().out


def test_runs_that_have_no_step_in_common_are_not_said_to_be_the_same(whole, edited, capsys):
    for lines in ([], ledger(whole)[20:]):
        part = edited(lambda _, lines=lines: lines or [{}])
        if not lines:
            file(part).write_text("")
        other = shutil.copytree(part, part.with_name("other"), dirs_exist_ok=True)
        first = edited(lambda lines: lines[:20])
        (first / "logs/train.jsonl").unlink()
        code, written = found(first, other)
        assert (code, written["exactly_once"], written["comparison"]["same_steps"]) == (1, True, 0)
        assert "no step is in both ledgers, so nothing was compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda line: line.replace('"step": 3', '"step": "a"'), "has step 'a', int is needed"),
        (lambda line: line.replace('"step": 3', '"step": 3, "step": 3'), "key 'step' twice in an object"),
        (lambda line: line.replace("[24, ", "["), "the lists of step 3 have different lengths"),
        (lambda line: "[]\n", r"is \[\], an object is needed"),
        (lambda line: "{]\n", "is no record"),
    ],
)
def test_a_line_of_the_other_run_that_is_no_record_is_named(change, said, whole, edited):
    folder = edited(lambda lines: lines)
    lines = file(folder).read_text().splitlines(keepends=True)
    file(folder).write_text("".join([*lines[:2], change(lines[2]), *lines[3:]]))
    with pytest.raises(ValueError, match=f"ledger.jsonl line 3 .*{said}.*: mend or remove that line"):
        compare_ledgers(whole, folder)


def test_two_runs_that_saw_the_same_are_said_to_as_far_as_both_go(whole, edited, capsys):
    assert found(whole, edited(lambda lines: lines))[0] == 0
    assert "the same 40 steps from step 1 on\n" in capsys.readouterr().out
    part = edited(lambda lines: lines[9:30])
    assert found(whole, part)[0] == 0
    assert compare_ledgers(part, whole)["same_steps"] == 21
    assert f"the same 21 steps from step 10 on; {whole} goes on\n" in capsys.readouterr().out


def poison(monkeypatch, papers_dir, *data_steps: int) -> None:
    """The first window of these data steps makes the loss NaN."""
    clean = train.next_token_loss
    args = train.Args(**TINY | {"data_dir": str(papers_dir), "output_dir": "nowhere"})
    windows = train.make_plan(args, read_papers(papers_dir), 1).train
    bad = [torch.from_numpy(windows.windows(12 * data_step, 1)[0]) for data_step in data_steps]

    def poisoned(model, batch):
        loss, finite = clean(model, batch)
        hit = any(bool((batch == row).all(dim=1).any()) for row in bad)
        return (loss * float("nan"), finite) if hit else (loss, finite)

    monkeypatch.setattr(train, "next_token_loss", poisoned)


def test_what_a_rollback_stepped_over_is_listed_and_not_in_the_ledger(papers_dir, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, papers_dir, 2, 17)
    folder = train_here(tmp_path / "run", papers_dir, token_budget=24 * 12 * 20)
    steps = [line["data_step"] for line in ledger(folder)]
    left_out = [event["data_steps_left_out"] for event in events(folder) if event["event"] == "rolled_back"]
    assert left_out == [[0, 2], [13, 17]]
    assert steps == [*range(3, 13), *range(18, 28)]
    assert faults(folder) == {}
    said = capsys.readouterr().out
    assert f"{folder}: data steps 0 to 2 stepped over, as events.jsonl says: 36 examples\n" in said
    assert f"{folder}: data steps 13 to 17 stepped over, as events.jsonl says: 60 examples\n" in said
    kept = [event for event in events(folder) if event["event"] != "rolled_back" or event["to_step"] == 0]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))
    assert "step 11 trains on data step 18, 13 is the last that it may be" in faults(folder)["data step"]


def test_a_loader_that_begins_at_the_wrong_place_after_a_rollback_is_seen(papers_dir, tmp_path, monkeypatch):
    poison(monkeypatch, papers_dir, 7)
    places = []

    class Late(Loader):
        def step(self, data_step):
            places.append(data_step)
            return super().step(data_step + (data_step >= 8))

    monkeypatch.setattr(train, "Loader", Late)
    named = faults(train_here(tmp_path / "run", papers_dir, token_budget=24 * 12 * 10))
    assert 8 in places
    assert named["wrong example"][0] == "step 6 row 0 is example 108, not 96"


def test_a_resume_that_leaves_out_a_step_is_seen(papers_dir, tmp_path, monkeypatch):
    folder, few = tmp_path / "run", 24 * 12
    train_here(folder, papers_dir, token_budget=5 * few)
    restore = Session._restore

    def one_too_far(session, path):
        restore(session, path)
        session.progress.data_offset += 1

    monkeypatch.setattr(Session, "_restore", one_too_far)
    train_here(folder, papers_dir, token_budget=8 * few)
    named = faults(folder)
    assert named["data step"][0] == "step 6 trains on data step 6, 5 is the last that it may be"


def test_each_paper_comes_once_an_epoch_with_permutation(papers_dir, tmp_path, edited):
    folder = train_here(tmp_path / "run", papers_dir, sampling="permutation", token_budget=24 * 12 * 6)  # 3 epochs of 24 papers
    assert faults(folder) == {}
    paper = ledger(folder)[2]["paper"][0]
    named = faults(edited(edit_of(4, paper=(5, paper)), folder))
    assert named == {"paper again": [f"step 4 row 5 has paper {ledger_code(folder, paper)} again in pass 2"]}


def ledger_code(folder: Path, paper: str) -> int:
    order = list(dict.fromkeys(paper for line in ledger(folder) for paper in line["paper"]))
    return order.index(paper)


def test_a_window_taken_instead_of_a_bad_one_is_told_with_its_own_paper(papers_dir, capsys):
    windows = RandomWindowDataset(papers_dir, "train", sequence_length=24, vocab_size=295)
    drawn, paper, first_token = windows.draw(0, 300)
    there = windows.locate(0, 300)
    moved = (paper != there[0]) | (first_token != there[1])
    assert 0 < capsys.readouterr().out.count("taking another paper") == moved.sum()
    begins = windows.papers.offsets[paper] + first_token
    assert drawn.tolist() == [windows.papers.tokens[begin : begin + 25].tolist() for begin in begins]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Held-out sets of six stages, and a tokenizer."""
    folder = tmp_path_factory.mktemp("graphs")
    TOKENIZER.save_pretrained(folder / "tokenizer")
    return build(folder), folder / "tokenizer"


COURSE = {"curr_threshold": 0.0, "ledger": True}  # a stage of three steps, then the next


def test_a_curriculum_names_stage_and_example_and_hashes_the_ids_however_they_are_packed(graphs, tmp_path):
    data, tokenizer = graphs
    folder = pptrain_here(tmp_path / "run", data, tokenizer, **COURSE)
    split = pptrain_here(tmp_path / "split", data, tokenizer, **COURSE, micro_batch=3, num_workers=1, log_every=5)
    assert file(folder).read_bytes() == file(split).read_bytes()
    splits = read_splits(data)
    examples = SyntheticExamples(splits.task, 0, reserved=splits.reserved, tokenizer=TOKENIZER, seq_len=512)
    lines = ledger(folder)
    assert [line["stage"][0] for line in lines] == [stage for stage in range(1, 7) for _ in range(3)]
    for step, line in enumerate(lines, 1):
        examples.stage = line["stage"][0]
        digests = [by_hand(ids) for ids in examples.examples(12 * step - 12, 12).ids]
        rows = {"example": list(range(12 * step - 12, 12 * step)), "stage": [examples.stage] * 12, "digest": digests}
        assert line == {"step": step, "data_step": step - 1, **rows}
    assert faults(folder) == faults(split) == {}
    assert found(folder)[1]["drawn_again"] == {"rows": 216, "why_no_more": None}
    lines[3]["digest"] = swapped(lines[3]["digest"])
    file(folder).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [text[:23] for text in faults(folder)["other row"]] == [f"step 4 row {row} has digest" for row in (0, 1)]
    lines[4]["stage"][7] = 1
    file(folder).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert faults(folder)["stage"] == [
        "step 5 row 7 is of stage 1, the log has stage 2",
        "step 5 is of stages [1, 2] after stage 2",
    ]


def test_examples_of_a_passed_stage_are_seen(graphs, tmp_path, monkeypatch):
    at_stage = pptrain.at_stage
    monkeypatch.setattr(pptrain, "at_stage", lambda examples, stage: at_stage(examples, min(stage, 2)))
    named = faults(pptrain_here(tmp_path / "run", *graphs, **COURSE, max_steps=8))
    assert named == {"stage": [f"step {step} row 0 is of stage 2, the log has stage 3" for step in (7, 8)]}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """Held-out examples and a pack of a few blocks."""
    folder = tmp_path_factory.mktemp("scratch")
    build(folder, max_input_size=12, max_lookahead=2, mixin_size=7)
    write_pack(folder / "data/c4_packed", TOKENIZER, shards=2, per_shard=1)
    return folder


TEXT = {"pptrain_checkpoint": "none", "model": "neox-64x2", "ledger": True, "allow_epochs": True, "total_steps": 12}


@pytest.fixture(scope="module")
def text_run(scratch, tmp_path_factory):
    """A run of 72 rows on 22 blocks and 7 synthetic examples; not to be changed."""
    folder = tmp_path_factory.mktemp("text") / "run"
    assert pretrain_here(folder, scratch, data_dir=splits_of(scratch), **TEXT) == 0
    return folder


def splits_of(scratch: Path) -> Path:
    return next((scratch / "data/nl_splits").glob("mis*"))


def test_a_pretraining_names_blocks_and_examples_into_the_next_pass_and_hashes_them(text_run, scratch):
    pack, rows = Pack(scratch / "data/c4_packed", None), read_splits(splits_of(scratch)).rows("mixin")
    mixed = MixedRows(pack, rows, TOKENIZER, 0, 0.25)
    blocks, mixin = [], []
    for step, line in enumerate(ledger(text_run), 1):
        assert {name: line[name] for name in ("step", "data_step", "example")} == {
            "step": step,
            "data_step": step - 1,
            "example": list(range(6 * step - 6, 6 * step)),
        }
        assert [number is not None for number in line["mixin"]] == mixed.is_synthetic(range(6 * step - 6, 6 * step)).tolist()
        for block, number, digest in zip(line["block"], line["mixin"], line["digest"], strict=True):
            if number is None:
                assert digest == by_hand(pack.blocks([block])[0])
                blocks.append(block)
            else:
                assert block is None
                ids = encode_rows([{**rows[number], "output_texts": rows[number]["output_texts"][:1]}], TOKENIZER).examples[0]
                padded = np.zeros((2, SEQ_LEN), "<i8")
                padded[:, : len(ids) - 1] = ids[:-1], ids[1:]
                assert digest == blake2b(padded.tobytes(), digest_size=8).hexdigest()
                mixin.append(number)
    count = pack.num_blocks
    assert blocks[:count] == list(range(count))
    assert sorted(blocks[count : 2 * count]) == list(range(count)) != blocks[count : 2 * count]
    assert len(blocks) > 2 * count
    assert sorted(mixin[:7]) == sorted(mixin[7:14]) == list(range(7))
    assert faults(text_run) == {}


def test_rows_of_text_that_are_not_those_of_the_data_are_named(text_run, edited):
    assert found(text_run)[1]["drawn_again"] == {"rows": 72, "why_no_more": None}
    folder = edited(edit_of(2, digest=swapped(ledger(text_run)[1]["digest"])), text_run, checkpoints=True)
    assert [text[:23] for text in faults(folder)["other row"]] == [f"step 2 row {row} has digest" for row in (0, 1)]


def place(folder: Path, of: str, number: int) -> tuple[int, int]:
    """Step and row of the `number`-th row that has a block, or a synthetic example."""
    where = [(line["step"], row) for line in ledger(folder) for row, value in enumerate(line[of]) if value is not None]
    return where[number]


def test_a_wrong_block_or_synthetic_example_is_seen(text_run, scratch, edited):
    count = read_json(text_run / "run.json", "pretrain.py")["derived"]["c4_blocks_packed"]

    def change(of, number, value):
        step, row = place(text_run, of, number)
        return faults(edited(edit_of(step, **{of: (row, value)}), text_run)), f"step {step} row {row}"

    named, here = change("block", 5, 6)
    assert named["block"] == [f"{here} has block 6, 5 is next"]
    assert list(named) == ["block", "token ids"]
    second = [block for line in ledger(text_run) for block in line["block"] if block is not None][count : 2 * count]
    named, here = change("block", count + 5, second[2])
    assert named["block again"] == [f"{here} has block {second[2]} again in pass 2"]
    named, here = change("digest", 0, "00000000000000ff")
    assert list(named) == ["token ids"]
    named, here = change("mixin", 3, 7)
    assert named["synthetic example"] == [f"{here} has synthetic example 7, there are 7"]
    named, here = change("block", 3, None)
    assert named["kind of row"] == [f"{here} has not a block alone, which its draw says"]
    step, row = place(text_run, "block", 3)
    named = faults(edited(edit_of(step, mixin=(row, 2)), text_run))
    assert named == {"kind of row": [f"step {step} row {row} has not a block alone, which its draw says"]}


def test_the_second_pass_is_known_before_a_checkpoint_tells_of_it(text_run, edited):
    folder = edited(lambda lines: lines, text_run)
    assert not (folder / "checkpoints").exists()
    assert faults(folder) == {}
