import os

import pytest

from lm.files import read_json, read_jsonl, sha256, whole_file, whole_folder, write_json


def test_a_file_under_its_final_name_is_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert read_json(path, "it") == {"old": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_under_its_final_name_is_whole(tmp_path):
    path = tmp_path / "model"
    for content in ("old", "new"):
        with whole_folder(path) as partial:
            (partial / "file").write_text(content)
    with pytest.raises(KeyboardInterrupt), whole_folder(path) as partial:
        (partial / "file").write_text("half")
        raise KeyboardInterrupt
    assert (path / "file").read_text() == "new"
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


def test_a_folder_survives_a_kill_between_the_two_renames(tmp_path):
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old" / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "model"):
        raise KeyboardInterrupt
    assert (tmp_path / "model" / "file").read_text() == "old"


def test_what_stands_there_survives_a_failed_rename(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.mkdir()
    (path / "file").write_text("old")
    rename = os.rename

    def fails_the_second_time(source, target):
        if str(source).endswith(".partial"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails_the_second_time)
    with pytest.raises(KeyboardInterrupt), whole_folder(path) as partial:
        (partial / "file").write_text("new")
    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt), whole_folder(path):
        raise KeyboardInterrupt
    assert (path / "file").read_text() == "old"


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "a.json", float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_json_is_named_with_its_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .*a.json: run make.py, or let it finish"):
        read_json(tmp_path / "a.json", "make.py")
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a": \xff}\n')
    with pytest.raises(ValueError, match="a.jsonl line 2 is not JSON"):
        read_jsonl(tmp_path / "a.jsonl", "make.py")
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n[]\n')
    with pytest.raises(ValueError, match=r"a.jsonl line 2 is \[\], not an object"):
        read_jsonl(tmp_path / "a.jsonl", "make.py")
    (tmp_path / "empty").write_bytes(b"")
    assert sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
