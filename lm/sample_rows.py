"""Rows of text into train, validation and test files, each identifier and each text once, by a hash of the identifier."""

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from lm.sources import SPLITS

SPLIT_OF_10 = {0: "validation", 1: "test"}  # the SHA-256 of the identifier modulo 10; all else is train: 80, 10, 10 percent

Row = dict[str, Any]


def split_of(identifier: str) -> str:
    """The split of a row, a function of its identifier alone."""
    return SPLIT_OF_10.get(int(hashlib.sha256(identifier.encode()).hexdigest(), 16) % 10, "train")


def write_splits(
    folder: Path, rows: Iterable[tuple[Row, str | None]], suffix: str = ".jsonl", group: str | None = None
) -> dict[str, Any]:
    """Write each usable row once to `split_of` its "id", in the order given; a row whose id or text was there is left out.

    Args:
        rows: objects with "id" and "text", each with the reason why it cannot be used, or None if it can.
        suffix: .jsonl, or .json.gz, which is the same compressed, without a date in it.
        group: the column by whose values rows are counted; all together if None.

    Returns "counts", {value of `group`: {split: rows}}, and "left_out", {reason: rows}.
    """
    counts: dict[str, dict[str, int]] = {}
    left_out: Counter[str] = Counter()
    seen: set[str | bytes] = set()
    with ExitStack() as stack:
        files = {split: stack.enter_context(_open(folder / f"{split}{suffix}")) for split in SPLITS}
        for row, reason in rows:
            digest = hashlib.sha256(row["text"].encode()).digest()
            if reason is None and (row["id"] in seen or digest in seen):
                reason = "repeated"
            if reason is not None:
                left_out[reason] += 1
                continue
            seen.update((row["id"], digest))
            split = split_of(row["id"])
            files[split].write(line_of(row))
            counts.setdefault(row[group] if group else "all", dict.fromkeys(SPLITS, 0))[split] += 1
    return {"counts": dict(sorted(counts.items())), "left_out": dict(left_out)}


def line_of(row: Row) -> bytes:
    """One line of JSON in UTF-8."""
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _open(path: Path) -> BinaryIO:
    return gzip.GzipFile(path, "wb", mtime=0) if path.suffix == ".gz" else open(path, "wb")
