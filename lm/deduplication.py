"""Finding documents that share a key with an earlier one, in memory that does not grow with the corpus.

Documents come in runs of some 262,000, in the order of the corpus; the one in `row` of `run` has the number run * 2**32 + row.
A run has a folder with keys.npy, (columns, documents) uint64, each column sorted, and rows.npy, (columns, documents) uint32,
whose keys they are. The keys of a column are cut into ranges, and each range of each column is a task of its own: run by run,
it puts the keys into a table (lm/document_kernels.py) that fits into the memory allowed, and writes down which documents have
a key that is there already, and the first document that had it. Of a million documents all runs take 200 MB on the disk, and a
column 40 MB of memory.

A document goes if an earlier one has one of its keys, whatever else becomes of that one. So it takes no graph of all
duplicates, whose size nothing bounds, and no document goes for one that it shares no key with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm.document_kernels import put_first
from lm.files import whole_folder

RUN_DOCUMENTS = 2**18
RECORD_BYTES = 40  # of memory that a key of a range takes: two slots of a table, and what is read at a time


@dataclass(frozen=True)
class Runs:
    """The runs of a corpus, and into how many ranges their keys are cut."""

    folders: Sequence[Path]
    columns: int
    num_ranges: int

    @property
    def num_tasks(self) -> int:
        return self.columns * self.num_ranges


def ranges_for(num_documents: int, memory: int) -> int:
    """Into how many ranges the keys of so many documents are cut, that a range takes no more than `memory` bytes."""
    return max(1, math.ceil(num_documents * RECORD_BYTES / memory))


def write_run(folder: Path, keys: np.ndarray) -> None:
    """Write the keys of a run: (documents, columns) uint64, in the order of the documents."""
    keys = keys.T
    order = np.argsort(keys, axis=1, kind="stable")
    np.save(folder / "keys.npy", np.take_along_axis(keys, order, axis=1))
    np.save(folder / "rows.npy", order.astype(np.uint32))


def find_duplicates(runs: Runs, task: int, folder: Path) -> None:
    """Write what one range of one column shows: for each run, its documents that have the key of an earlier one.

    FOLDER/rows.bin (uint32) and first.bin (uint64, 1 + the number of the first document with that key); those of run i are from
    at.npy[i] to at.npy[i + 1].
    """
    column, part = divmod(task, runs.num_ranges)
    ends = [2**64 * end // runs.num_ranges for end in (part, part + 1)]
    slices = [_slice(run, column, ends) for run in runs.folders]
    slots = 2 * sum(stop - start for start, stop in slices) + 1
    if slots >= 2**32:
        raise ValueError(f"a range of keys has {slots // 2:,} documents, at most {2**31:,} can be: pass a smaller --memory_mb")
    table = np.zeros((2, slots), np.uint64)  # untouched parts of it take no memory
    at = [0]
    with (
        whole_folder(folder) as partial,
        open(partial / "rows.bin", "wb") as rows_file,
        open(partial / "first.bin", "wb") as file,
    ):
        for number, (run, (start, stop)) in enumerate(zip(runs.folders, slices, strict=True)):
            keys = np.array(np.load(run / "keys.npy", mmap_mode="r")[column, start:stop])
            rows = np.array(np.load(run / "rows.npy", mmap_mode="r")[column, start:stop])
            numbers = (np.uint64(number) << np.uint64(32)) + rows + np.uint64(1)
            first = put_first(*table, keys, numbers)
            again = first != numbers
            rows[again].tofile(rows_file)
            first[again].tofile(file)
            at.append(at[-1] + int(again.sum()))
        np.save(partial / "at.npy", np.array(at, np.int64))


def _slice(run: Path, column: int, ends: Sequence[int]) -> tuple[int, int]:
    """Where the keys from ends[0] on and below ends[1] are."""
    keys = np.load(run / "keys.npy", mmap_mode="r")[column]
    return tuple(len(keys) if end == 2**64 else int(np.searchsorted(keys, np.uint64(end))) for end in ends)


def first_duplicates(folders: Sequence[Path], run: int, num_documents: int) -> np.ndarray:
    """For each document of a run 1 + the number of the first document that shares a key, by these tasks; 0 for none."""
    first = np.zeros(num_documents, np.uint64)
    for folder in folders:
        start, stop = np.load(folder / "at.npy", mmap_mode="r")[run : run + 2]
        rows = np.fromfile(folder / "rows.bin", np.uint32, stop - start, offset=4 * start)
        found = np.fromfile(folder / "first.bin", np.uint64, stop - start, offset=8 * start)
        known = first[rows]
        first[rows] = np.where((known == 0) | (found < known), found, known)
    return first
