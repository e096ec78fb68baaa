import json

import pytest
from trials_outside import can_mount, fill, small_disk

from lm.runlog import RunLog, records


def written(folder, steps):
    log = RunLog(folder, True, 10)
    for step in steps:
        log.train(step, step * 100, loss=1.0 / step, lr=0.1)
        if step % 2 == 0:
            log.evaluation(step, val_loss=2.0 / step)
    log.close()
    return folder


def test_a_record_is_on_the_disk_when_the_call_returns(tmp_path):
    log = RunLog(tmp_path, True, 10)
    log.train(1, 100, loss=0.5, lr=0.1)
    (record,) = records(tmp_path, "train")
    assert record == {"step": 1, "loss": 0.5, "lr": 0.1, "tokens": 100}


def test_records_after_the_checkpoint_and_half_a_line_are_cut_off(tmp_path):
    written(tmp_path, range(1, 8))
    with open(tmp_path / "logs" / "train.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    log = RunLog(tmp_path, True, 10)
    log.cut_back(4)
    log.train(5, 500, loss=9.0, lr=0.1)
    assert [record["step"] for record in records(tmp_path, "train")] == [1, 2, 3, 4, 5]
    assert records(tmp_path, "train")[-1]["loss"] == 9.0
    assert [record["step"] for record in records(tmp_path, "eval")] == [2, 4]


def test_a_run_that_begins_anew_keeps_no_record(tmp_path):
    RunLog(tmp_path, True, 10).evaluation(0, val_loss=9.0)
    log = RunLog(written(tmp_path, range(1, 4)), True, 10)
    log.cut_back(0)
    assert records(tmp_path, "train") == records(tmp_path, "eval") == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('{"step": 2, "loss"', "{oops", r"line 2 is no record \(b'\{oops.*, an object with a step is needed"),
        ('"step": 2,', '"step": "2",', "line 2 is no record"),
        ('"step": 2,', '"step": null,', "line 2 is no record"),
        ('"step": 2,', '"step": 2.0,', "line 2 is no record"),
        ('"step": 1,', '"step": true,', "line 1 is no record"),
        ('"step": 1,', '"step": -1,', "line 1 is no record"),
        ('{"step": 3,', '["step"]\n{"step": 3,', "line 3 is no record"),
        ('{"step": 3,', '\n{"step": 3,', "line 3 is no record"),
        ('"step": 2,', '"step": 9,', "line 3 has step 3 after step 9, steps must rise"),
        ('"step": 2,', '"step": 1,', "line 2 has step 1 after step 1, steps must rise"),
    ],
)
def test_a_log_whose_steps_do_not_rise_is_refused_and_nothing_is_cut(tmp_path, old, new, said):
    written(tmp_path, range(1, 5))
    path, evaluations = (tmp_path / "logs" / name for name in ("train.jsonl", "eval.jsonl"))
    path.write_text(path.read_text().replace(old, new))
    before = path.read_bytes(), evaluations.read_bytes()
    for step in (0, 1, 3):
        with pytest.raises(ValueError, match=rf"train.jsonl {said}.*: mend or remove the line that is wrong, or move"):
            RunLog(tmp_path, True, 10).cut_back(step)
        assert (path.read_bytes(), evaluations.read_bytes()) == before


@pytest.mark.parametrize("size", [-1, -20])
def test_half_a_line_of_a_step_that_was_checkpointed_is_damage_and_not_what_a_kill_left(tmp_path, size):
    written(tmp_path, range(1, 4))
    path = tmp_path / "logs" / "train.jsonl"
    path.write_bytes(before := path.read_bytes()[:size])
    for step in (3, 7):
        with pytest.raises(ValueError, match=r"train.jsonl line 3 has no end \(b'\{\"step\": 3.*, as if cut there: mend"):
            RunLog(tmp_path, True, 10).cut_back(step)
        assert path.read_bytes() == before
    RunLog(tmp_path, True, 10).cut_back(2)
    assert [record["step"] for record in records(tmp_path, "train")] == [1, 2]


@pytest.mark.parametrize("half", ['{"step": 0, "val', '{"step": 0', '{"st', "", "\0\0"])
def test_whatever_a_kill_leaves_of_the_first_record_is_cut_off(tmp_path, half):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "eval.jsonl").write_text(half)
    RunLog(tmp_path, True, 10).cut_back(0)
    assert records(tmp_path, "eval") == []


def test_half_a_line_with_half_a_step_is_cut_off(tmp_path):
    written(tmp_path, range(9, 12))
    path = tmp_path / "logs" / "train.jsonl"
    path.write_bytes((before := path.read_bytes()) + b'{"step": 1')  # of 12
    RunLog(tmp_path, True, 20).cut_back(11)
    assert path.read_bytes() == before


def test_a_full_disk_lets_a_log_be_cut_and_says_to_make_room(tmp_path):
    if not can_mount(tmp_path):
        pytest.skip("mounting a small disk needs root")
    with small_disk(tmp_path / "disk", 0.25) as run:
        log = RunLog(written(run, range(1, 4)), True, 10)
        log.event("started", step=0)
        fill(run / "filler")
        with open(run / "events.jsonl", "r+b") as file:
            file.truncate(file.seek(0, 2) - 5)
        log = RunLog(run, True, 10)
        log.cut_back(2)
        assert (run / "events.jsonl").read_bytes() == b""
        assert [record["step"] for record in records(run, "train")] == [1, 2]
        said = r"cannot write .*events.jsonl \(.*No space left.*: make room or mend the disk, then run the same command again"
        with pytest.raises(RuntimeError, match=said):
            log.event("long", text="x" * 10_000)


def test_events_are_never_cut(tmp_path):
    log = RunLog(tmp_path, True, 10)
    log.event("started", step=0)
    log.event("rolled_back", step=9)
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"event": "half a li')  # which a kill may leave
    log.cut_back(0)
    log.event("finished", step=10)
    found = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert found == ["started", "rolled_back", "finished"]


def test_only_the_main_process_writes(tmp_path):
    log = RunLog(tmp_path, False, 10)
    log.train(1, 100, loss=0.5, lr=0.1)
    log.evaluation(1, val_loss=1.0)
    log.event("started")
    log.cut_back(0)
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_without_a_terminal_lines_tell_step_loss_rate_and_time_left(tmp_path, capsys):
    written(tmp_path, [1, 10])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1/10  loss 1  lr 0.1", "no rate is known yet"
    assert lines[1].startswith("step 10/10  loss 0.1")
    assert "tokens/s  0:00:00 left" in lines[1]
    assert lines[2] == "step 10  val_loss 0.2"
