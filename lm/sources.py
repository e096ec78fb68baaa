"""Where documents come from: finding local files, reading JSON Lines and Arrow tables, and saying what is wrong."""

import errno
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SPLITS = ("train", "validation", "test")
FORMATS = {".parquet": "parquet", ".jsonl": "JSONL", ".json": "JSONL", ".jsonl.gz": "JSONL", ".json.gz": "JSONL"}
BATCH = 32  # rows handed on together


def format_of(path: Path) -> str | None:
    """By a file's name "parquet" or "JSONL", None if it is neither."""
    return FORMATS.get(path.suffix) or FORMATS.get("".join(path.suffixes[-2:]))


def local_files(dataset: tuple[str, ...], subfolder: str) -> dict[str, list[Path]] | None:
    """The local files of each split, by the start of their names; None if `dataset` is no local path.

    Raises: ValueError if a split has no file, or the files are of two formats.
    """
    paths = [Path(name) for name in dataset]
    if not paths[0].exists():
        return None
    if paths[0].is_dir():
        nested = paths[0] / subfolder
        paths = sorted((nested if nested.is_dir() else paths[0]).rglob("*"))
    found = [path for path in paths if format_of(path)]
    files = {split: [path for path in found if re.match(rf"{split}(?![a-zA-Z])", path.name)] for split in SPLITS}
    if missing := [split for split in SPLITS if not files[split]]:
        raise ValueError(
            f"--dataset {' '.join(dataset)} has no file for {', '.join(missing)} (found: "
            f"{', '.join(path.name for path in found) or 'none'}), .parquet or .jsonl files whose names start with "
            f"{', '.join(SPLITS)} are needed: rename them, or let fetch_samples.py make some"
        )
    kinds = sorted({format_of(path) for paths in files.values() for path in paths})
    if len(kinds) > 1:
        raise ValueError(f"--dataset {' '.join(dataset)} has {' and '.join(kinds)} files: name those of one format")
    return files


def jsonl_rows(paths: list[Path]) -> Iterator[dict]:
    """JSON Lines, read here because `datasets` turns good texts near a text that is no string into quoted JSON."""
    for path, number, line in lines(paths):
        try:
            row = json.loads(line.decode(errors="surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number} is not JSON ({error}): mend or remove the line") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is {row!r:.80}, an object is needed: write one object in each line")
        yield row


def lines(paths: list[Path]) -> Iterator[tuple[Path, int, bytes]]:
    """Each line that is not blank with its file and number."""
    for path in paths:
        try:
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
                yield from ((path, number, line) for number, line in enumerate(file, 1) if line.strip())
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is damaged ({error}): fetch or compress it again") from None


def tables(rows: Any, what: dict) -> Iterator:
    """The rows of a `datasets` split as Arrow tables of up to 32."""
    with explained(what):
        yield from rows.with_format("arrow").iter(batch_size=BATCH)


@contextmanager
def explained(what: dict) -> Iterator[None]:
    """Say what to do about what `datasets` raises; a full disk is left to the caller."""
    try:
        yield
    except Exception as error:
        if disk_full(error):
            raise
        why = f"{type(error).__name__}: {str(error.__cause__ or error).strip()[:400]}"
        if "data_files" in what:
            raise ValueError(f"the files of --dataset cannot be read ({why}): mend or remove the one at fault") from error
        raise RuntimeError(
            f"the hub gave no dataset {what['path']!r} ({what['name']}), and there is no such local file or folder ({why}): "
            "connect to the hub (HF_ENDPOINT names another server), or set HF_HUB_OFFLINE=1 and --full_dataset to use what "
            "an earlier --full_dataset left in its cache (HF_HOME), or give --dataset a folder of train*, validation* and "
            "test* .parquet or .jsonl files with columns text and label (fetch_samples.py makes some)"
        ) from error


def disk_full(error: BaseException | None) -> bool:
    """Whether a full disk (or quota) is behind the error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
