"""The paper store: one folder with the tokens of categorised papers, opened as one array after checking it.

tokens.bin     token ids of one paper after another, flat little-endian uint16 (uint32 for a vocabulary above 65,536)
index.jsonl    a line per paper: {"paper_id": "train_17", "category": "cs.CV", "offset": tokens, "length": tokens}
splits.json    {"train": [paper ids], ...}
tokenizer/     the tokenizer that made the ids
meta.json      sizes, checksums, source, counts; put in place last, so a folder without it is unfinished
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.files import read_json, read_jsonl, sha256

FORMAT = "papers-1"
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
MADE_BY = "fetch_arxiv.py"
META_KEYS = (
    "dtype",
    "vocab_size",
    "tokenizer",
    "source",
    "num_tokens",
    "num_papers",
    "categories",
    "left_out",
    "files",
)


@dataclass(frozen=True)
class Papers:
    """A finished store; paper i is `tokens[offsets[i] : offsets[i] + lengths[i]]`."""

    tokens: np.ndarray  # (num_tokens,) uint16 or uint32, read-only, mapped from the disk
    paper_ids: list[str]
    category_names: list[str]  # sorted
    categories: np.ndarray  # (papers,) int64 into category_names
    offsets: np.ndarray  # (papers,) int64, in tokens
    lengths: np.ndarray  # (papers,) int64, in tokens
    splits: dict[str, np.ndarray]  # name -> int64 paper indices
    meta: dict
    folder: Path


def read_papers(data_dir: Path | str, verify: bool = False) -> Papers:
    """Open a finished store after checking sizes and structure, and with `verify` the SHA-256 of every file.

    Raises: FileNotFoundError if it is missing or unfinished; ValueError naming the file and line that is wrong.
    """
    folder = Path(data_dir)
    meta = read_json(folder / "meta.json", MADE_BY)
    _check_meta(folder, meta)
    check_files(folder, meta["files"], verify)
    rows = read_jsonl(folder / "index.jsonl", MADE_BY)
    _check_index(folder / "index.jsonl", rows, meta)
    index_of = {row["paper_id"]: i for i, row in enumerate(rows)}
    names = sorted({row["category"] for row in rows})
    code = {name: i for i, name in enumerate(names)}
    return Papers(
        tokens=np.memmap(folder / "tokens.bin", DTYPES[meta["dtype"]], mode="r").view(np.ndarray),
        paper_ids=list(index_of),
        category_names=names,
        categories=np.array([code[row["category"]] for row in rows], np.int64),
        offsets=np.array([row["offset"] for row in rows], np.int64),
        lengths=np.array([row["length"] for row in rows], np.int64),
        splits=_read_splits(folder / "splits.json", index_of),
        meta=meta,
        folder=folder,
    )


def _wrong(found: str) -> ValueError:
    return ValueError(f"{found}: remove the folder and run {MADE_BY} again")


def _check_meta(folder: Path, meta: Any) -> None:
    path = folder / "meta.json"
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else meta
        raise _wrong(f"{path} has format {found!r:.80}, {FORMAT!r} is needed")
    if missing := [key for key in META_KEYS if key not in meta]:
        raise _wrong(f"{path} lacks {', '.join(missing)}")
    if meta["dtype"] not in DTYPES:
        raise _wrong(f"{path} has dtype {meta['dtype']!r}, one of {', '.join(DTYPES)} is needed")
    size, itemsize = meta["files"].get("tokens.bin", {}).get("size"), DTYPES[meta["dtype"]].itemsize
    if size != meta["num_tokens"] * itemsize:
        raise _wrong(f"{path} gives tokens.bin {size} bytes, {meta['num_tokens']} tokens need {itemsize} each")


def check_files(folder: Path, files: dict[str, dict], verify: bool) -> None:
    """Raises: ValueError naming every file whose size, or with `verify` whose SHA-256, is not as `files` says."""
    faults = []
    for name, expected in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected["size"]:
            found = "is missing" if size is None else f"has {size} bytes"
            faults.append(f"{path} {found}, {expected['size']} bytes are needed")
        elif verify and (found := sha256(path)) != expected["sha256"]:
            faults.append(f"{path} has SHA-256 {found}, {expected['sha256']} is needed")
    if faults:
        raise _wrong("; ".join(faults))


def _check_index(path: Path, rows: list[dict], meta: dict) -> None:
    """Every paper follows the one before it without a gap, and together they are all of tokens.bin."""
    kinds = {"paper_id": str, "category": str, "offset": int, "length": int}
    end, seen = 0, set()
    for number, row in enumerate(rows, 1):
        here = f"{path} line {number}"
        for key, kind in kinds.items():
            if type(row.get(key)) is not kind:  # bool is no int here
                raise _wrong(f"{here} has {key} {row.get(key)!r:.80}, {kind.__name__} is needed")
        if row["offset"] != end:
            raise _wrong(f"{here} has offset {row['offset']}, {end} is needed, where the paper before it ends")
        if row["length"] < 1:
            raise _wrong(f"{here} has length {row['length']}, at least 1 is needed")
        if row["paper_id"] in seen:
            raise _wrong(f"{here} has paper_id {row['paper_id']!r} again, each is needed once")
        seen.add(row["paper_id"])
        end += row["length"]
        if end > meta["num_tokens"]:
            raise _wrong(f"{here} ends at token {end}, tokens.bin has {meta['num_tokens']}")
    if end != meta["num_tokens"] or len(rows) != meta["num_papers"]:
        found, needed = f"{len(rows)} papers of {end} tokens", f"{meta['num_papers']} of {meta['num_tokens']}"
        raise _wrong(f"{path} lists {found}, {needed} are needed")


def _read_splits(path: Path, index_of: dict[str, int]) -> dict[str, np.ndarray]:
    splits = read_json(path, MADE_BY)
    if not isinstance(splits, dict) or not all(isinstance(ids, list) for ids in splits.values()):
        raise _wrong(f"{path} is not an object of lists of paper ids")
    split_of: dict[str, str] = {}
    for split, ids in splits.items():
        for paper_id in ids:
            if paper_id not in index_of:
                raise _wrong(f"{path} lists {paper_id!r} under {split}, which index.jsonl does not have")
            if paper_id in split_of:
                raise _wrong(f"{path} lists {paper_id!r} under {split_of[paper_id]} and under {split}, once is needed")
            split_of[paper_id] = split
    if unlisted := index_of.keys() - split_of.keys():
        raise _wrong(f"{path} lists {len(split_of)} papers, {min(unlisted)!r} of index.jsonl is not among them")
    return {split: np.array([index_of[paper_id] for paper_id in ids], np.int64) for split, ids in splits.items()}
