"""The files of a corpus: found by pattern, in a manifest or on the hub, and opened as streams of bytes.

JSON Lines (.jsonl, .json), Parquet and text (.txt, .md), the first and the last also compressed (.gz, .zst).
"""

import functools
import glob
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from stat import S_ISDIR
from typing import Any, BinaryIO

import pyarrow as pa

from lm.args import check

KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "text", ".md": "text"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BESIDE_TEXT = ("meta.json", "progress.json", "report.json", "removed.jsonl", "submitted.json")
HUB = "hf://"
MOST_FAULTS = 20  # that are told of at once
_UNREADABLE = (
    f"is of no kind that can be read ({', '.join(KINDS)}, all but .parquet also with {' or '.join(COMPRESSIONS)}): leave it"
    " out, or name it for what it is"
)


@dataclass(frozen=True, slots=True)  # a corpus may have a million
class File:
    """One file: a path or a hub address, and what tells whether it is still the same."""

    name: str
    size: int | None = None  # bytes; None on the hub, where the address names the commit
    modified_ns: int | None = None


@functools.lru_cache(maxsize=1024)  # asked for every document
def kind_of(name: str) -> str | None:
    """ "jsonl", "parquet" or "text", by a file's name without its compression; None for all others."""
    stem, suffix = os.path.splitext(name)  # Path takes ten times as long
    if suffix in COMPRESSIONS:
        kind = KINDS.get(os.path.splitext(stem)[1])
        return None if kind == "parquet" else kind
    return KINDS.get(suffix)


def compression_of(name: str) -> str | None:
    """ "gzip", "zstd" or None, by a file's name."""
    return COMPRESSIONS.get(os.path.splitext(name)[1])


def find_files(patterns: Sequence[str]) -> list[File]:
    """The files that paths, folders (all files below them) and patterns (`*`, `**`) name, each once, in the order of the names.

    What our scripts write beside text in a folder (meta.json, report.json, ...) is not taken for text.
    Raises: FileNotFoundError for all patterns that name none; ValueError for files of an unknown kind that were so named.
    """
    names: list[str] = []
    faults = []
    for pattern in patterns:
        if os.path.isfile(pattern):  # also one whose name has brackets
            found = [pattern]
        elif Path(pattern).is_dir():
            found = [str(path) for path in sorted(Path(pattern).rglob("*")) if path.is_file() and _is_text(path.name)]
        else:
            found = sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
        if not found:
            faults.append(
                f"no file {pattern}: pass files or folders of {', '.join(KINDS)} files, {' and '.join(COMPRESSIONS)} allowed"
            )
        names += map(os.path.normpath, found)
    if faults:
        raise FileNotFoundError("\n".join(faults))
    names = list(dict.fromkeys(names))
    check([f"{name} {_UNREADABLE}" for name in names if not kind_of(name)][:MOST_FAULTS])
    return _once((name, os.stat(name)) for name in names)


def _is_text(name: str) -> bool:
    return kind_of(name) is not None and name not in BESIDE_TEXT


def read_manifest(path: Path) -> list[File]:
    """The files that a manifest lists, a path on each line, relative to the manifest's folder; each is looked at once.

    Raises: FileNotFoundError if there is no manifest; ValueError if it lists nothing, or with the first lines that name no text
    file, one that is empty, one listed before, or by a relative path one outside of the manifest's folder.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no manifest {path}: pass a file with the path of one file on each line")
    faults: list[str] = []
    try:
        found = _once(_listed(path, faults))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): pass a file with the path of one file on each line") from None
    if len(faults) > MOST_FAULTS:
        faults[MOST_FAULTS:] = [f"and {len(faults) - MOST_FAULTS:,} more lines"]
    check(faults)
    if not found:
        raise ValueError(f"{path} lists no file, one at least is needed")
    return found


def _listed(manifest: Path, faults: list[str]) -> Iterator[tuple[str, os.stat_result]]:
    """The files of a manifest; what is wrong with a line is added to `faults`."""
    seen: dict[str, int] = {}
    folder = str(manifest.parent)
    with open(manifest, encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not (written := line.strip()):
                continue
            name = os.path.normpath(os.path.join(folder, written))
            fault, stat = _fault_of(name, written, folder)
            if name in seen:
                fault = f"{name} again, line {seen[name]} lists it: remove one"
            if fault:
                faults.append(f"{manifest} line {number}: {fault}")
                continue
            seen[name] = number
            yield name, stat


def _fault_of(name: str, written: str, folder: str) -> tuple[str | None, os.stat_result | None]:
    """What is wrong with a file of a manifest in this folder, and what the system knows of it."""
    above = os.pardir + os.sep
    if os.path.normpath(written).startswith(above) and os.path.relpath(name, folder).startswith(above):
        return f"{written:.400} leaves the manifest's folder: write the whole path, or put the manifest above its files", None
    try:
        stat = os.stat(name)
    except (OSError, ValueError):  # also of a name that no file can have
        return f"no file {name:.400}: mend the line, or fetch the file", None
    if S_ISDIR(stat.st_mode):
        return f"{name} is a folder: list the files in it", None
    if not kind_of(name):
        return f"{name} {_UNREADABLE}", None
    if not stat.st_size:
        return f"{name} is empty: remove the line, or let what writes the file finish", None
    return None, stat


def _once(found: Iterable[tuple[str, os.stat_result]]) -> list[File]:
    """The files, one that has several names by its first."""
    files: dict[tuple[int, int], File] = {}
    for name, stat in found:
        files.setdefault((stat.st_dev, stat.st_ino), File(name, stat.st_size, stat.st_mtime_ns))
    return list(files.values())


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
    found, between = sha256(b"["), ""
    for file in files:  # the SHA-256 of a list of lists in JSON, of which there may be a million
        name = file.name if file.name.startswith(HUB) else os.path.basename(file.name)
        found.update((between + json.dumps([name, file.size, file.modified_ns])).encode())
        between = ", "
    found.update(b"]")
    return found.hexdigest()


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
