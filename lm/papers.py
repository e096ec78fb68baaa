"""The paper store: one folder with the tokens of categorised papers, opened as one array after checking it.

tokens.bin     token ids of one paper after another, flat little-endian uint16 (uint32 for a vocabulary above 65,536)
index.jsonl    a line per paper: {"paper_id": "train_17", "category": "cs.CV", "offset": tokens, "length": tokens}
splits.json    {"train": [paper ids], ...}
tokenizer/     the tokenizer that made the ids
meta.json      sizes, checksums, source, counts; put in place last, so a folder without it is unfinished
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.checks import COUNT, Kinds, count_faults, file_faults, kind_faults, list_faults, refuse
from lm.files import read_json, read_jsonl, read_sealed

FORMAT = "papers-2"
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
MADE_BY = "fetch_arxiv.py"
HEADER: Kinds = {"dtype": str, "vocab_size": range(1, 2**32 + 1), "tokenizer": dict, "source": dict}
META = HEADER | {"num_tokens": range(1, COUNT.stop), "num_papers": COUNT, "categories": dict, "left_out": dict, "files": dict}
LISTS = ("tokens.bin", "index.jsonl", "splits.json")


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
    """Open a finished store after checking all of it, of tokens.bin only the size unless `verify` asks for its SHA-256 too.

    Raises: FileNotFoundError if it is missing or unfinished; ValueError naming the file and line that is wrong.
    """
    folder = Path(data_dir)
    meta = read_meta(folder)
    _refuse(*file_faults(folder, meta["files"], unread=() if verify else ("tokens.bin",)))
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


def read_meta(folder: Path) -> dict[str, Any]:
    """What meta.json says. Raises: FileNotFoundError if there is none; ValueError if it is none of this format, or changed."""
    path = folder / "meta.json"
    meta = read_sealed(path, MADE_BY, FORMAT)
    _refuse(*kind_faults(path, meta, META))
    faults = header_faults(path, meta) + kind_faults(f"{path} tokenizer", meta["tokenizer"], {"name": str})
    faults += list_faults(path, meta["files"], LISTS) + count_faults(f"{path} left_out", meta["left_out"])
    _refuse(*faults)
    size, itemsize = meta["files"]["tokens.bin"]["size"], DTYPES[meta["dtype"]].itemsize
    if size != meta["num_tokens"] * itemsize:
        _refuse(f"{path} gives tokens.bin {size} bytes, {meta['num_tokens']} tokens need {itemsize} each")
    return meta


def header_faults(path: Path, header: dict[str, Any]) -> list[str]:
    """A line for each value of a header, whose kinds are right, that cannot be."""
    if header["dtype"] not in DTYPES:
        return [f"{path} has dtype {header['dtype']!r:.80}, one of {', '.join(DTYPES)} is needed"]
    faults = kind_faults(f"{path} tokenizer", header["tokenizer"], {"fingerprint": str})
    if header["vocab_size"] > (most := np.iinfo(DTYPES[header["dtype"]]).max + 1):
        faults.append(f"{path} has vocab_size {header['vocab_size']}, {header['dtype']} holds {most} ids")
    return faults


def _refuse(*faults: str) -> None:
    refuse(faults, MADE_BY)


def _check_index(path: Path, rows: list[dict], meta: dict) -> None:
    """Every paper follows the one before it without a gap, and together they are what meta.json counts, all of tokens.bin."""
    kinds = {"paper_id": str, "category": str, "offset": int, "length": int}
    end, seen, papers, tokens = 0, set(), Counter(), Counter()
    for number, row in enumerate(rows, 1):
        here = f"{path} line {number}"
        if [type(row.get(key)) for key in kinds] != list(kinds.values()):
            _refuse(*kind_faults(here, row, kinds))
        if row["offset"] != end:
            _refuse(f"{here} has offset {row['offset']}, {end} is needed, where the paper before it ends")
        if row["length"] < 1:
            _refuse(f"{here} has length {row['length']}, at least 1 is needed")
        if row["paper_id"] in seen:
            _refuse(f"{here} has paper_id {row['paper_id']!r} again, each is needed once")
        seen.add(row["paper_id"])
        papers[row["category"]] += 1
        tokens[row["category"]] += row["length"]
        end += row["length"]
        if end > meta["num_tokens"]:
            _refuse(f"{here} ends at token {end}, tokens.bin has {meta['num_tokens']}")
    if end != meta["num_tokens"] or len(rows) != meta["num_papers"]:
        found, needed = f"{len(rows)} papers of {end} tokens", f"{meta['num_papers']} of {meta['num_tokens']}"
        _refuse(f"{path} lists {found}, {needed} are needed")
    if (found := {name: {"papers": papers[name], "tokens": tokens[name]} for name in papers}) != meta["categories"]:
        _refuse(f"{path} has categories {found!r:.200}, {meta['categories']!r:.200} are needed")


def _read_splits(path: Path, index_of: dict[str, int]) -> dict[str, np.ndarray]:
    splits = read_json(path, MADE_BY)
    if not isinstance(splits, dict) or not all(isinstance(ids, list) for ids in splits.values()):
        _refuse(f"{path} is not an object of lists of paper ids")
    split_of: dict[str, str] = {}
    for split, ids in splits.items():
        for paper_id in ids:
            if not isinstance(paper_id, str) or paper_id not in index_of:
                _refuse(f"{path} lists {paper_id!r:.80} under {split:.80}, which index.jsonl does not have")
            if paper_id in split_of:
                _refuse(f"{path} lists {paper_id!r} under {split_of[paper_id]} and under {split}, once is needed")
            split_of[paper_id] = split
    if unlisted := index_of.keys() - split_of.keys():
        _refuse(f"{path} lists {len(split_of)} papers, {min(unlisted)!r} of index.jsonl is not among them")
    return {split: np.array([index_of[paper_id] for paper_id in ids], np.int64) for split, ids in splits.items()}
