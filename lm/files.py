"""Files that are whole or absent: atomic writing, checksums, and JSON that names its file and line when it is wrong."""

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DEEPEST = 100  # lists and objects within each other that JSON may have here
LONGEST = 40  # digits of an integer, enough for 128 bits


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal, read in bounded memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """{name in the folder: size and SHA-256} of these files of it."""
    return {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": sha256(p)} for p in paths}


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
    """Read one JSON document, as strictly as `parse_json` does.

    Raises: FileNotFoundError naming `made_by`, the script that makes the file; ValueError if it is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run {made_by}, or let it finish")
    return parse_json(path.read_bytes(), str(path), f"make it again with {made_by}")


def read_jsonl(path: Path | str, made_by: str) -> list[dict]:
    """Read a file of one JSON object per line, each line with its end. Raises as `read_json` does, naming the line."""
    path, remedy = Path(path), f"make it again with {made_by}"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: run {made_by}, or let it finish")
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            row = parse_json(line, f"{path} line {number}", remedy)
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} is {row!r:.80}, not an object: {remedy}")
            rows.append(row)
        if rows and not line.endswith(b"\n"):
            raise ValueError(f"{path} line {number} has no end, so the file may have been cut there: {remedy}")
    return rows


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write each row as a line of JSON."""
    with whole_file(path) as partial:
        partial.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")


def write_sealed(path: Path | str, value: dict[str, Any]) -> None:
    """Write an object as `write_json` does, with a last key "sha256": the SHA-256 of the rest, which `read_sealed` compares."""
    assert "sha256" not in value, "that key is the seal's"
    write_json(path, {**value, "sha256": _seal(value)})


def read_sealed(path: Path | str, made_by: str, format: str | None = None) -> dict[str, Any]:
    """Read what `write_sealed` wrote, without the seal.

    Raises: as `read_json` does; ValueError too if its "format" is not `format`, or if it is not what was written.
    """
    return unseal(read_json(path, made_by), str(path), f"make it again with {made_by}", format)


def unseal(value: Any, where: str, remedy: str, format: str | None = None) -> dict[str, Any]:
    """A sealed object without its seal. Raises: ValueError if it is none, of another format (said first), or changed."""
    there = value.get("format") if isinstance(value, dict) else value
    if format is not None and there != format:
        raise ValueError(f"{where} has format {there!r:.80}, {format!r} is needed: {remedy}")
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r:.80}, an object is needed: {remedy}")
    if "sha256" not in value:
        raise ValueError(f"{where} has no sha256 of itself (its format is {there!r:.80}), one is needed: {remedy}")
    rest = {key: part for key, part in value.items() if key != "sha256"}
    if (found := _seal(rest)) != value["sha256"]:
        raise ValueError(
            f"{where} has changed since it was written: its SHA-256 is {found}, {value['sha256']!r:.80} was written: {remedy}"
        )
    return rest


def _seal(value: dict[str, Any]) -> str:
    """The SHA-256 of an object as it is read back, however it is laid out in the file."""
    value = json.loads(json.dumps(value))  # a key that is a number sorts as a string from now on
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse_json(content: bytes, where: str, remedy: str) -> Any:
    """JSON as the standard has it: UTF-8, no key twice in an object, no NaN, no number or nesting that overflows its reader.

    Raises: ValueError beginning with `where` and ending with `remedy`.
    """
    try:
        text = content.decode()
        value = _DECODER.decode(text)
        if text.count("[") + text.count("{") > DEEPEST:
            _refuse_depth(value)
        if "\\u" in text:  # maybe half a surrogate pair, which nothing can be written with
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        error = "nested too deeply"
    except ValueError as found:  # JSONDecodeError, UnicodeDecodeError and UnicodeEncodeError too
        error = found
    raise ValueError(f"{where} is not JSON ({error!s:.200}): {remedy}")


def _refuse_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]:
        depth += 1
        if depth > DEEPEST:
            raise RecursionError


def _inside(value: dict | list) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {twice!r:.80} twice in an object")
    return value


def _integer(text: str) -> int:
    if len(text) > LONGEST:
        raise ValueError(f"number {text:.20}... of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"number {text:.20} is too large")
    return value


def _constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant)


def outside(names: Iterable[str]) -> list[str]:
    """Those of the names that are not plain relative ones of files within a folder, on any system."""
    return [name for name in names if not _is_plain(name)]


def _is_plain(name: str) -> bool:
    if not name.isprintable() or len(name) > 1024 or any(sign in name for sign in "\\:"):  # C:file is a drive's
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in name.split("/"))
