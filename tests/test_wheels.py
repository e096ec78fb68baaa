"""lm/wheels.py: a wheel under its name has the pinned checksum; everything else is said. With real pip, without a network."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lm.files import sha256
from lm.wheels import Wheel, get_wheel


def build_wheel(folder: Path, content: str) -> Wheel:
    """A real wheel of one package with one file, in `folder`."""
    wheel = Wheel(name="tiny-data", version="1.2", sha256="")
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / wheel.file, "w") as members:
        members.writestr("tiny_data/data.txt", content)
        info = "tiny_data-1.2.dist-info"
        members.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.2\n")
        members.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        members.writestr(f"{info}/RECORD", "")
    return Wheel(name=wheel.name, version=wheel.version, sha256=sha256(folder / wheel.file))


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """The folder that is all pip knows."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def test_pip_downloads_what_is_missing_and_nothing_twice(index, tmp_path, capfd):
    wheel = build_wheel(index, "data")
    path = get_wheel(wheel, tmp_path / "wheels")
    assert path == tmp_path / "wheels/tiny_data-1.2-py3-none-any.whl"
    assert sha256(path) == wheel.sha256
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    (index / wheel.file).unlink()  # a second download would fail
    assert get_wheel(wheel, tmp_path / "wheels") == path


def test_a_damaged_wheel_is_named_and_downloaded_again(index, tmp_path, capfd):
    wheel = build_wheel(index, "data")
    path = get_wheel(wheel, tmp_path / "wheels")
    capfd.readouterr()
    path.write_bytes(path.read_bytes()[:-1])
    assert sha256(get_wheel(wheel, tmp_path / "wheels")) == wheel.sha256
    said = capfd.readouterr().out.splitlines()[0]
    assert said == f"{path} is damaged (its SHA-256 is not the pinned one): downloading it again"


def test_what_a_killed_download_left_does_not_matter(index, tmp_path):
    wheel = build_wheel(index, "data")
    (tmp_path / "wheels/.download").mkdir(parents=True)
    (tmp_path / "wheels/.download" / wheel.file).write_bytes(b"half of it")
    assert sha256(get_wheel(wheel, tmp_path / "wheels")) == wheel.sha256


def test_another_wheel_of_the_same_name_is_refused(index, tmp_path):
    wheel = build_wheel(index, "data")
    other = build_wheel(index, "other data")
    with pytest.raises(RuntimeError) as error:
        get_wheel(wheel, tmp_path / "wheels")
    assert str(error.value) == (
        f"pip got a tiny_data-1.2-py3-none-any.whl with SHA-256 {other.sha256}, {wheel.sha256} is needed: "
        f"use another package index (`{sys.executable} -m pip config list` shows the present one)"
    )
    assert list((tmp_path / "wheels").iterdir()) == []


def test_index_out_of_reach_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(RuntimeError) as error:
        get_wheel(Wheel(name="tiny-data", version="1.2", sha256=""), tmp_path / "wheels")
    assert str(error.value) == (
        "pip could not download tiny-data==1.2 (ERROR: No matching distribution found for tiny-data==1.2), a package "
        f"index is needed: check the network and `{sys.executable} -m pip config list`, or put "
        f"tiny_data-1.2-py3-none-any.whl into {tmp_path}/wheels yourself"
    )


def test_python_without_pip_says_how_to_get_it(tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv/bin/python")
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(RuntimeError) as error:
        get_wheel(Wheel(name="tiny-data", version="1.2", sha256=""), tmp_path / "wheels")
    assert str(error.value) == (
        f"pip could not download tiny-data==1.2 ({python}: No module named pip), a package index is needed: "
        f"run `{python} -m ensurepip`, or put tiny_data-1.2-py3-none-any.whl into {tmp_path}/wheels yourself"
    )
