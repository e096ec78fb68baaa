"""`report.py curriculum` says what the logs say: of logs written by hand, whose numbers are known, and of a real run."""

import json
from pathlib import Path

import pytest
from graph_runs import build, train
from text import byte_level_bpe

from lm.curriculum import next_stage, read_course, where_line
from lm.search_evaluation import write_search
from report import main

HELD_OUT = [(0, 1, 0.0, 6.0, 101), (10, 1, 0.25, 4.0, 112), (30, 3, 0.5, 2.0, 1013)]  # step, stage, accuracy, loss, when
TRAIN = [  # step, stage, accuracy of the latest examples, tokens so far, too long so far, when
    (5, 1, 0.5, 400, 0, 105),
    (10, 1, 0.99, 850, 0, 110),
    (20, 3, 0.75, 2000, 1, 122),
    (30, 3, 0.98, 3050, 3, 1010),
    (34, 5, None, 3500, 7, 1017),
]
EVENTS = [("started", 100), ("stopped", 125), ("resumed", 1000)]
SEARCH = {"overall": {"count": 5000, "accuracy": 0.75, "accuracy_se": 0.0061, "interval_95": [0.7, 0.8], "chance": 0.5}}


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_run(folder: Path, num_train: int = 5, num_held_out: int = 3, clock: bool = True, **args) -> Path:
    """A run of stages 1, 3, 5, ... of 16, stopped between steps 20 and 30, with the first of its records."""
    (folder / "logs").mkdir(parents=True)
    args = {"curr_threshold": 0.98, "curr_window": 30, "start_stage": 1, "stage_step": 2, "seq_len": 512} | args
    (folder / "run.json").write_text(json.dumps({"args": args, "derived": {"effective_batch": 8, "stages": 16}}))
    names = ("step", "stage", "curr_acc", "tokens", "too_long", "timestamp")
    rows = [dict(zip(names, row, strict=True)) | {"loss": 1.0} for row in TRAIN[:num_train]]
    names = ("step", "stage", "heldout_acc", "heldout_loss", "timestamp")
    held_out = [dict(zip(names, row, strict=True)) for row in HELD_OUT[:num_held_out]]
    for row in [] if clock else rows + held_out:
        del row["timestamp"]
    (folder / "logs/train.jsonl").write_text(lines(rows))
    (folder / "logs/eval.jsonl").write_text(lines(held_out))
    (folder / "events.jsonl").write_text(lines([{"event": event, "timestamp": when} for event, when in EVENTS]))
    return folder


def report(*command: object) -> None:
    main([str(word) for word in ("curriculum", *command)])


def written(folder: Path) -> tuple[dict, list[dict]]:
    rows = [json.loads(line) for line in (folder / "curriculum.jsonl").read_text().splitlines()]
    return json.loads((folder / "curriculum.json").read_text()), rows


def test_the_table_equals_the_logs(tmp_path, capsys):
    """Stage 1 took 12 seconds; stage 3 took 10 before the stop, and 13 after."""
    run = write_run(tmp_path / "run")
    report(run)
    first = {"stage": 1, "passed_at_step": 10, "steps": 10, "examples": 80, "tokens": 850, "accuracy": 0.99}
    first |= {"heldout_accuracy": 0.25, "heldout_loss": 4.0, "seconds": 12.0}
    third = {"stage": 3, "passed_at_step": 30, "steps": 20, "examples": 160, "tokens": 2200, "accuracy": 0.98}
    third |= {"heldout_accuracy": 0.5, "heldout_loss": 2.0, "seconds": 23.0}
    found, rows = written(run / "report")
    assert rows == found["stages"] == [{"run": str(run)} | first, {"run": str(run)} | third]
    about = {"run": str(run), "stage": 5, "stages": 16, "step": 34, "finished": False, "too_long": 7, "searches": []}
    assert found["runs"] == [about]
    said = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in said if line.startswith("|")]
    assert cells[0] == ["stage", "steps", "examples", "tokens", "accuracy", "held-out accuracy", "held-out loss", "time"]
    assert cells[2:] == [
        ["1", "10", "80", "850", "0.9900", "0.2500", "4.0000", "0:00:12"],
        ["3", "20", "160", "2,200", "0.9800", "0.5000", "2.0000", "0:00:23"],
    ]
    where = "in stage 5 of 16, step 34, not finished; 7 examples were left out as longer than --seq_len 512"
    assert said[-1] == f"{run}: {where}"
    assert (run / "report/curriculum.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_in_the_next_stage_as_soon_as_one_is_passed(tmp_path):
    assert "in stage 3 of 16, step 10," in where_line(read_course(write_run(tmp_path / "a", num_train=2, num_held_out=2)))
    assert "in stage 3 of 16, step 20," in where_line(read_course(write_run(tmp_path / "b", num_train=3, num_held_out=2)))


def test_a_run_is_finished_if_its_final_model_is_of_its_last_step(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "final").mkdir()
    for step, said in ((30, "step 34, not finished;"), (34, "step 34, finished;")):
        (run / "final/about.json").write_text(json.dumps({"step": step}))
        assert said in where_line(read_course(run))


def test_without_times_the_rest_is_told(tmp_path, capsys):
    run = write_run(tmp_path / "run", clock=False)
    report(run)
    assert [row["seconds"] for row in written(run / "report")[1]] == [None, None]
    assert (
        "| 1     | 10    | 80       | 850    | 0.9900   | 0.2500            | 4.0000        | -    |" in capsys.readouterr().out
    )


def test_a_run_that_is_writing_is_reported_as_far_as_it_is(tmp_path, capsys):
    run = write_run(tmp_path / "run", num_train=1, num_held_out=1)
    with open(run / "logs/train.jsonl", "a") as log:
        log.write('{"step": 6, "sta')
    report(run)
    assert written(run / "report")[1] == []
    assert f"{run}: in stage 1 of 16, step 5, not finished; 0 examples" in capsys.readouterr().out.splitlines()[-1]
    for path in (run / "logs/train.jsonl", run / "logs/eval.jsonl", run / "events.jsonl"):
        path.unlink()
    report(run)
    assert f"{run}: in stage 1 of 16, step 0, not finished" in capsys.readouterr().out.splitlines()[-1]


def test_generated_answers_are_told_where_they_were_measured(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    write_search(run / "evaluation/final_search_test.json", SEARCH, [])
    (run / "evaluation/final_test.json").write_text("{}")  # of evaluate_model.py context
    report(run)
    share = "0.7500 ± 0.0061 of 5,000 generated answers are right, a random child 0.5000"
    assert f"{run}: final_search_test: {share}" in capsys.readouterr().out.splitlines()
    (found,) = written(run / "report")[0]["runs"][0]["searches"]
    assert (found["name"], found["overall"]) == ("final_search_test", SEARCH["overall"])


def test_several_runs_share_a_figure_and_a_file(tmp_path, capsys):
    runs = [write_run(tmp_path / name / "pptrain") for name in "ab"]
    with pytest.raises(ValueError, match=r"2 runs, --output_dir is needed"):
        report(*runs)
    report(*runs, "--output_dir", tmp_path / "out")
    found, rows = written(tmp_path / "out")
    assert [row["run"] for row in rows] == [str(run) for run in runs for _ in range(2)]
    assert [about["run"] for about in found["runs"]] == [str(run) for run in runs]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said[-2:]] == [str(run) for run in runs]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "curriculum.json",
        "curriculum.jsonl",
        "curriculum.png",
    ]


def test_what_is_no_run_of_pptrain_is_named_as_what_it_is(tmp_path):
    with pytest.raises(ValueError, match=r"0 runs, a folder of pptrain.py is needed"):
        report()
    with pytest.raises(FileNotFoundError, match=rf"no run in {tmp_path}: pass the folder that pptrain.py wrote"):
        report(tmp_path)
    with pytest.raises(ValueError, match=r"mixture is a run of train.py, one of pptrain.py is needed"):
        report(write_run(tmp_path / "mixture", K=4))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/run.json").write_text(json.dumps({"script": "other.py", "args": {}}))
    with pytest.raises(ValueError, match=r"other is a run of other.py, one of pptrain.py is needed"):
        report(tmp_path / "other")
    run = write_run(tmp_path / "damaged")
    path = run / "logs/train.jsonl"
    path.write_text(path.read_text().replace('"step": 10,', '"step" 10,'))
    with pytest.raises(ValueError, match=r"logs/train.jsonl line 2 is no record .*: mend or remove that line"):
        report(run)


def test_a_real_run_adds_up_to_its_own_account(tmp_path, capsys):
    """Every third step ends a stage, so that six stages take 18 steps."""
    byte_level_bpe().save_pretrained(tmp_path / "tokenizer")
    run = train(tmp_path / "run", build(tmp_path), tmp_path / "tokenizer", curr_threshold=0.0)
    report(run)
    found, rows = written(run / "report")
    about = json.loads((run / "final/about.json").read_text())
    assert [row["stage"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["passed_at_step"] for row in rows] == [3, 6, 9, 12, 15, 18]
    assert sum(row["tokens"] for row in rows) == about["tokens"]
    assert sum(row["examples"] for row in rows) == 18 * 12
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert 0 < sum(row["seconds"] for row in rows) <= events[-1]["timestamp"] - events[0]["timestamp"]
    assert found["runs"][0] == {
        "run": str(run),
        "stage": 7,
        "stages": 6,
        "step": 18,
        "finished": True,
        "too_long": about["too_long"],
        "searches": [],
    }
    assert f"{run}: all 6 stages passed, step 18, finished; 0 examples" in capsys.readouterr().out.splitlines()[-1]


def test_every_run_trains_the_last_stage():
    assert [next_stage(stage, 1, 6) for stage in (1, 5, 6)] == [2, 6, 7]
    assert [next_stage(stage, 4, 6) for stage in (1, 3, 5, 6)] == [5, 6, 6, 7]
