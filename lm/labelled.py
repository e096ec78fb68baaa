"""Labelled documents from the hub or from local files: train, validation and test rows with `text` and `label`."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lm.sources import BATCH, SPLITS, explained, format_of, jsonl_rows, lines, tables

Raw = tuple[bytes | None, Any]  # text, None if it is not a string; label as it stands
Row = tuple[str | None, str | None, str | None]  # text, label, and why the row is left out (then both are None)


@dataclass(frozen=True)
class Split:
    """At most `size` rows of one split, read once from the start."""

    name: str
    rows: Iterable[Raw]
    size: int
    label_names: list[str]  # of integer labels; empty if the source does not name them
    labels_are_numbers: bool

    def batches(self, start: int, label_names: list[str]) -> Iterator[list[Row]]:
        """Rows `start` ... `size` - 1 in lists of up to 32.

        Raises: ValueError naming the row whose label is no string and no integer that has a name.
        """
        rows = enumerate(islice(self.rows, self.size))
        rows = (self._row(at, *raw, label_names) for at, raw in rows if at >= start)
        while batch := list(islice(rows, BATCH)):
            yield batch

    def _row(self, at: int, raw: bytes | None, label: Any, label_names: list[str]) -> Row:
        if raw is None:
            return None, None, "not a string"
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            return None, None, "not valid UTF-8"
        if not text.strip():
            return None, None, "empty"
        if label in (None, -1) or (isinstance(label, str) and not label.strip()):  # -1: what the hub uses for unknown
            return None, None, "label missing"
        if isinstance(label, str):
            return text, label.strip(), None
        if type(label) is not int:
            raise ValueError(f"{self.name}_{at} has label {label!r:.80}, an integer or a string is needed: mend the file")
        if not 0 <= label < len(label_names):
            names = f"{len(label_names)} label names ({', '.join(label_names)})"
            raise ValueError(f"{self.name}_{at} has label {label}, there are {names}: pass all with --label_names")
        return text, label_names[label], None


def open_labelled(dataset: str, config: str, files: dict[str, list[Path]] | None, limit: int | None) -> dict[str, Split]:
    """The splits of a hub dataset or of local files; with a limit no more is loaded than it needs.

    Raises: RuntimeError if the hub does not give the dataset; ValueError if a split, its rows or a column is missing.
    """
    if files is not None and format_of(files["train"][0]) == "JSONL":
        return {split: _open_jsonl(split, paths, limit) for split, paths in files.items()}
    import datasets  # takes a second: not for --help, wrong arguments or finished work

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if files is None:
        what = {"path": dataset, "name": config}
    else:
        what = {"path": "parquet", "data_files": {split: [str(path) for path in files[split]] for split in files}}
    with explained(what):
        loaded = datasets.load_dataset(**what, streaming=limit is not None)
    if missing := [split for split in SPLITS if split not in loaded]:
        raise ValueError(f"{dataset} has no split {', '.join(missing)} (found: {', '.join(loaded)}): give another --dataset")
    return {split: _open_arrow(split, loaded[split], limit, what) for split in SPLITS}


def _open_jsonl(name: str, paths: list[Path], limit: int | None) -> Split:
    """Look at the split's first rows before anything is written."""
    first = list(islice(jsonl_rows(paths), BATCH))
    if not first:
        raise ValueError(f"split {name} has no rows, at least one is needed: give another --dataset")
    _need_columns(name, list(dict.fromkeys(key for row in first for key in row)))
    size = sum(1 for _ in lines(paths)) if limit is None else limit
    rows = ((row.get("text"), row.get("label")) for row in jsonl_rows(paths))
    # lone surrogates, which stand for bytes that are no UTF-8, become such bytes again
    rows = ((text.encode(errors="surrogatepass") if isinstance(text, str) else None, label) for text, label in rows)
    return Split(name, rows, size, [], any(isinstance(row.get("label"), int) for row in first))


def _open_arrow(name: str, rows: Any, limit: int | None, what: dict) -> Split:
    """Look at the split's first rows before anything is written."""
    import pyarrow as pa

    pieces = tables(rows, what)
    first = next(pieces, None)
    if first is None:
        raise ValueError(f"split {name} has no rows, at least one is needed: give another --dataset")
    _need_columns(name, first.column_names)
    kinds = {column: first.schema.field(column).type for column in ("text", "label")}
    strings = (pa.string(), pa.large_string())
    if kinds["text"] not in (*strings, pa.binary(), pa.large_binary()):
        raise ValueError(f"column text of split {name} is {kinds['text']}, strings are needed: rename a column")
    if kinds["label"] not in strings and not pa.types.is_integer(kinds["label"]):
        raise ValueError(f"column label of split {name} is {kinds['label']}, integers or strings are needed")
    raws = (
        zip(table.column("text").cast(pa.large_binary()).to_pylist(), table.column("label").to_pylist(), strict=True)
        for table in chain([first], pieces)
    )  # the cast looks at no byte, so that invalid UTF-8 can be left out row by row
    names = getattr((rows.features or {}).get("label"), "names", None) or []
    size = len(rows) if limit is None else limit
    return Split(name, chain.from_iterable(raws), size, list(names), pa.types.is_integer(kinds["label"]))


def _need_columns(split: str, found: list[str]) -> None:
    if missing := [column for column in ("text", "label") if column not in found]:
        names = ", ".join(found)
        raise ValueError(f"split {split} has no column {', '.join(missing)} (found: {names}): rename a column")
