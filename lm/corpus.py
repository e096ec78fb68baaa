"""The files of a corpus: found by pattern, in a manifest or on the hub, and opened as streams of bytes.

JSON Lines (.jsonl, .json), Parquet and text (.txt, .md), the first and the last also compressed (.gz, .zst).
"""

import functools
import glob
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "text", ".md": "text"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
HUB = "hf://"
_UNREADABLE = (
    f"is of no kind that can be read ({', '.join(KINDS)}, all but .parquet also with {' or '.join(COMPRESSIONS)}): leave it"
    " out, or name it for what it is"
)


@dataclass(frozen=True)
class File:
    """One file: a path or a hub address, and what tells whether it is still the same."""

    name: str
    size: int | None = None  # bytes; None on the hub, where the address names the commit
    modified_ns: int | None = None


@functools.lru_cache(maxsize=1024)  # asked for every document
def kind_of(name: str) -> str | None:
    """ "jsonl", "parquet" or "text", by a file's name without its compression; None for all others."""
    path = Path(name)
    if path.suffix in COMPRESSIONS:
        kind = KINDS.get(Path(path.stem).suffix)
        return None if kind == "parquet" else kind
    return KINDS.get(path.suffix)


def compression_of(name: str) -> str | None:
    """ "gzip", "zstd" or None, by a file's name."""
    return COMPRESSIONS.get(Path(name).suffix)


def find_files(patterns: Sequence[str]) -> list[File]:
    """The files that paths, folders (all files below them) and patterns (`*`, `**`) name, each once, in the order of the names.

    Raises: FileNotFoundError for each pattern that names none; ValueError for a file of an unknown kind that was named itself.
    """
    names: list[str] = []
    for pattern in patterns:
        if os.path.isfile(pattern):  # also one whose name has brackets
            found = [pattern]
        elif Path(pattern).is_dir():
            found = [str(path) for path in sorted(Path(pattern).rglob("*")) if path.is_file() and kind_of(path.name)]
        else:
            found = sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
        if not found:
            raise FileNotFoundError(
                f"no file {pattern}: pass files or folders of {', '.join(KINDS)} files, {' and '.join(COMPRESSIONS)} allowed"
            )
        names += map(os.path.normpath, found)
    return _local(dict.fromkeys(names))


def read_manifest(path: Path) -> list[File]:
    """The files that a manifest lists, a path on each line, relative to the manifest's folder.

    Raises: FileNotFoundError naming the line whose file is not there; ValueError if there is none, or one is listed twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no manifest {path}: pass a file with the path of one file on each line")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): pass a file with the path of one file on each line") from None
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name = os.path.normpath(path.parent / line.strip())
        if name in seen:
            raise ValueError(f"{path} line {number} lists {name} again, line {seen[name]} did: remove one")
        if not os.path.isfile(name):  # unlike Path.is_file, also False for a name that no file can have
            raise FileNotFoundError(f"{path} line {number}: no file {name:.400}: mend the line, or fetch the file")
        if not kind_of(name):
            raise ValueError(f"{path} line {number} lists {name}, which {_UNREADABLE}")
        seen[name] = number
    if not seen:
        raise ValueError(f"{path} lists no file, one at least is needed")
    return _local(seen)


def _local(names: Sequence[str]) -> list[File]:
    if unknown := [name for name in names if not kind_of(name)]:
        raise ValueError(f"{unknown[0]} {_UNREADABLE}")
    facts = {(stat.st_dev, stat.st_ino): (name, stat) for name, stat in ((n, Path(n).stat()) for n in reversed(list(names)))}
    return [File(name, stat.st_size, stat.st_mtime_ns) for name, stat in reversed(facts.values())]


def hub_files(dataset: str, config: str | None, revision: str | None, split: str, flag: str) -> list[File]:
    """The files of the split that `flag` asks for, as addresses that name the commit; nothing is downloaded yet.

    Raises: RuntimeError if the hub does not give the dataset; ValueError if it has no such split, or files of an unknown kind.
    """
    from datasets import load_dataset_builder  # takes a second

    try:
        files = load_dataset_builder(dataset, config, revision=revision).config.data_files or {}
    except Exception as error:  # of datasets, the hub's client, the network
        why = f"{type(error).__name__}: {str(error.__cause__ or error).strip()[:400]}"
        raise RuntimeError(
            f"the hub gave no dataset {dataset!r} ({config}) ({why}): connect to the hub (HF_ENDPOINT names another server), or"
            " pass local files with --documents"
        ) from error
    if split not in files:
        raise ValueError(f"{dataset} has no split {split} (found: {', '.join(files)}): pass another {flag}")
    names = [str(name) for name in files[split]]
    if unknown := [name for name in names if not kind_of(name)]:
        raise ValueError(f"{unknown[0]} is of no kind that can be read ({', '.join(KINDS)}): pass another --dataset")
    return [File(name) for name in names]


def digest(files: Sequence[File]) -> str:
    """A SHA-256 of the names, sizes and times of files, wherever they lie: what a pack that goes on later must find again."""
    facts = [[file.name if file.name.startswith(HUB) else Path(file.name).name, file.size, file.modified_ns] for file in files]
    return sha256(json.dumps(facts).encode()).hexdigest()


def open_bytes(name: str) -> Any:
    """The file as it lies there, still compressed."""
    if not name.startswith(HUB):
        return open(name, "rb")
    from huggingface_hub import HfFileSystem

    return HfFileSystem().open(name, "rb")


@contextmanager
def open_stream(name: str) -> Iterator[BinaryIO]:
    """The content of a file, decompressed; one that ends in the middle of a compressed member raises OSError there."""
    compression = compression_of(name)
    with open_bytes(name) as raw:
        if compression is None:
            yield raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw, 2**20)
        else:
            with pa.CompressedInputStream(pa.PythonFile(raw, "r"), compression) as stream:
                yield io.BufferedReader(stream, 2**20)
