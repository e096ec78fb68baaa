import json

import pytest

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
    log = RunLog(written(tmp_path, range(1, 4)), True, 10)
    log.evaluation(0, val_loss=9.0)
    log.cut_back(0)
    assert records(tmp_path, "train") == records(tmp_path, "eval") == []


def test_a_broken_line_in_the_middle_is_named_and_nothing_is_cut(tmp_path):
    written(tmp_path, range(1, 4))
    path = tmp_path / "logs" / "train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{oops", *lines[1:]]) + "\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"train.jsonl line 2 is no record \(b'\{oops"):
        RunLog(tmp_path, True, 10).cut_back(1)
    assert path.read_bytes() == before


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
