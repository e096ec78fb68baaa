"""Files that are whole or absent: atomic writing, checksums, and JSON that names its file and line when it is wrong."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal, read in bounded memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path | str) -> None:
    """Flush one file or folder to the disk, so that it survives a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, on error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success its files are synced and it is renamed to `path`.

    What stood at `path` before is moved aside first and removed only once the new folder is in place.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (path.with_name(f".{path.name}.{kind}") for kind in ("partial", "old"))
    if old.exists() and not path.exists():  # killed between the two renames below
        os.rename(old, path)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for item in sorted(partial.rglob("*")):
            sync(item)
        sync(partial)
        if path.exists():
            os.rename(path, old)
        os.rename(partial, path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked(path: Path | str, doing: str, how: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> Iterator[None]:
    """Hold the lock file `path`, which the system frees when the process dies.

    Raises: RuntimeError, saying what the other process is `doing`, if it is held and `how` does not wait.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            raise RuntimeError(f"another process is {doing}: wait for it, or stop it") from None
        yield


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused (`ValueError`): JSON has neither."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with whole_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path | str, made_by: str) -> Any:
    """Read one JSON document.

    Raises: FileNotFoundError naming `made_by`, the script that makes the file; ValueError if it is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run {made_by}, or let it finish")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} is not JSON ({error}): make it again with {made_by}") from None


def read_jsonl(path: Path | str, made_by: str) -> list[dict]:
    """Read a file of one JSON object per line. Raises as `read_json` does, naming the line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run {made_by}, or let it finish")
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number} is not JSON ({error}): make it again with {made_by}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} is {row!r:.80}, not an object: make it again with {made_by}")
            rows.append(row)
    return rows
