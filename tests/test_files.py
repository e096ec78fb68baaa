import hashlib
import json
import os

import pytest

from lm.checks import file_faults, kind_faults, list_faults
from lm.files import (
    listed,
    outside,
    read_json,
    read_jsonl,
    read_sealed,
    sha256,
    whole_file,
    whole_folder,
    write_json,
    write_sealed,
)


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


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "Expecting value"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b"[-Infinity]", "-Infinity is no number of JSON"),
        (b'{"a": 1e999}', "number 1e999 is too large"),
        (b"[" + b"9" * 5000 + b"]", "number 99999999999999999999... of 5000 digits"),
        (b'{"a": {"b": 1, "c": 2, "b": 1}}', "key 'b' twice in an object"),
        (b'"\\ud800"', "'utf-8' codec can't encode character"),
        (b'"\xff"', "'utf-8' codec can't decode byte 0xff"),
        (b'"\xed\xa0\x80"', "'utf-8' codec can't decode byte 0xed"),
        (b"\xef\xbb\xbf{}", "Expecting value"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 101 + b"1" + b"]" * 101, "nested too deeply"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nested too deeply"),
        (b"{} {}", "Extra data"),
    ],
)
def test_json_that_only_some_readers_take_is_refused(tmp_path, content, why):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_json(path, "make.py")
    assert str(caught.value).startswith(f"{path} is not JSON ({why}")
    assert str(caught.value).endswith("): make it again with make.py")
    if content:
        path.write_bytes(b'{"a": 1}\n' + content + b"\n")
        with pytest.raises(ValueError, match="a.json line 2 is not JSON"):
            read_jsonl(path, "make.py")


def test_json_may_be_as_deep_as_a_hundred_and_hold_every_character(tmp_path):
    value = "\U0001f600\u2028\x00é"
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        (tmp_path / "a.json").write_text("[" * 100 + text + "]" * 100, encoding="utf-8")
        found = read_json(tmp_path / "a.json", "")
        for _ in range(100):
            (found,) = found
        assert found == value


def test_a_line_that_is_blank_or_has_no_end_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}\n')
    with pytest.raises(ValueError, match="a.jsonl line 2 is not JSON"):
        read_jsonl(path, "make.py")
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    with pytest.raises(ValueError, match="a.jsonl line 2 has no end, so the file may have been cut there: make it again with"):
        read_jsonl(path, "make.py")
    path.write_bytes(b"")
    assert read_jsonl(path, "make.py") == []


def test_a_sealed_object_is_read_as_it_was_written_however_it_is_laid_out(tmp_path):
    path, value = tmp_path / "a.json", {"format": "a-2", "b": [1, 2.5, None], "a": {"\u00e9": {}}}
    write_sealed(path, value)
    assert read_sealed(path, "make.py") == read_sealed(path, "make.py", "a-2") == value
    seal = hashlib.sha256(b'{"a":{"\\u00e9":{}},"b":[1,2.5,null],"format":"a-2"}').hexdigest()
    assert json.loads(path.read_text()) == value | {"sha256": seal}
    path.write_text(json.dumps({"sha256": seal} | value))
    assert read_sealed(path, "make.py") == value
    write_sealed(path, {10: 1, 9: 2})  # keys that sort otherwise as strings
    assert read_sealed(path, "make.py") == {"10": 1, "9": 2}


def test_every_flipped_bit_of_a_sealed_file_is_named_or_changes_nothing(tmp_path):
    path, value = tmp_path / "a.json", {"format": "a-2", "tokens": 1234, "name": "shard", "last": True, "loss": 0.5}
    write_sealed(path, value)
    whole, unchanged = path.read_bytes(), 0
    for at in range(8 * len(whole)):
        path.write_bytes(whole[: at // 8] + bytes([whole[at // 8] ^ 1 << at % 8]) + whole[at // 8 + 1 :])
        try:
            assert read_sealed(path, "make.py") == value  # white space
            unchanged += 1
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
    assert unchanged < 40


def test_a_file_of_another_format_or_without_a_seal_is_named(tmp_path):
    path = tmp_path / "meta.json"
    for value, message in [
        ({"format": "a-1"}, "meta.json has format 'a-1', 'a-2' is needed: make it again with make.py"),
        ([3], r"meta.json has format \[3\], 'a-2' is needed"),
        ({"format": "a-2"}, r"meta.json has no sha256 of itself \(its format is 'a-2'\), one is needed: make it again"),
        ({"format": "a-2", "sha256": None}, "meta.json has changed since it was written: its SHA-256 is .*, None was written"),
    ]:
        write_json(path, value)
        with pytest.raises(ValueError, match=message):
            read_sealed(path, "make.py", "a-2")
    write_json(path, 3)
    with pytest.raises(ValueError, match="meta.json is 3, an object is needed"):
        read_sealed(path, "make.py")
    with pytest.raises(AssertionError):
        write_sealed(path, {"sha256": "of something else"})


def test_names_that_would_leave_a_folder_are_told():
    inside = ["a", "a.b/c d", "ä.bin", ".hidden", "a..b"]
    leaving = ["", "/a", "..", "../a", "a/../b", "a/..", "a//b", "a/", "./a", ".", "a\\b", "C:a", "a\0b", "a\nb", "\ud800"]
    leaving += ["x" * 256, "é" * 128, "/".join(["abc"] * 300)]
    assert outside([*leaving, *inside]) == leaving


def test_what_is_wrong_with_listed_files_is_said_together(tmp_path):
    for name in ("a", "b", "c", "d"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    files = listed(tmp_path / "in", [tmp_path / "in" / name for name in "abcd"])
    assert files["a"] == {"size": 1, "sha256": hashlib.sha256(b"a").hexdigest()}
    assert list_faults("meta", files, "abcd") == file_faults(tmp_path / "in", files) == []
    for name in "ab":
        (tmp_path / "in" / name).write_text("x")
    digest = hashlib.sha256(b"x").hexdigest()
    faults = [f"{tmp_path}/in/{name} has SHA-256 {digest}, {files[name]['sha256']} is needed" for name in "ab"]
    assert file_faults(tmp_path / "in", files) == faults
    assert file_faults(tmp_path / "in", files, unread=["a"]) == faults[1:]
    (tmp_path / "in/b").write_text("xx")
    (tmp_path / "in/c").unlink()
    (tmp_path / "d").write_text("d")
    (tmp_path / "in/d").unlink()
    (tmp_path / "in/d").symlink_to(tmp_path / "d")
    assert file_faults(tmp_path / "in", files) == [
        f"{tmp_path}/in/b has 2 bytes, 1 bytes are needed",
        f"{tmp_path}/in/c is missing, 1 bytes are needed",
        f"{tmp_path}/in/d is a link to {tmp_path}/d, a file inside the folder is needed",
    ]
    assert list_faults("meta", {"../a": {"size": -1, "sha256": ""}, "b": 3}, ["e"]) == [
        "meta names '../a', a file inside the folder is needed",
        "meta does not list e",
        "meta ../a has size -1, 0 to 281474976710655 is needed",
        "meta b is 3, an object is needed",
    ]


def test_a_bool_is_no_number_and_a_range_has_its_ends():
    kinds = {"a": int, "b": range(1, 4), "c": str}
    assert kind_faults("it", {"a": -1, "b": 3, "c": ""}, kinds) == []
    assert kind_faults("it", {"a": True, "b": 4}, kinds) == [
        "it has a True, int is needed",
        "it has b 4, 1 to 3 is needed",
        "it has c None, str is needed",
    ]
    assert kind_faults("it", [], kinds) == ["it is [], an object is needed"]
