"""The stages of cleaning a corpus, each a number of tasks that depend on the stages before it alone.

    filter      one a piece     normalise, judge and sign every document; those that stay, with their keys, in runs
    plan        1 task          what the runs of all pieces are, and into how many ranges their keys are cut
    duplicates  column x range  which documents have a key of an earlier one (lm/deduplication.py)
    write       one a piece     leave out duplicates and what is contaminated; OUTPUT_DIR/part_*
    finish      1 task          manifest, removed.jsonl, report.json, removed.png, and meta.json last (lm/cleaning_report.py)

Before them, `prepare` looks up what must not be in the corpus. Whoever runs the tasks, in whatever order and number of
processes, gets the same bytes: a task writes OUTPUT_DIR/partial/STAGE/NUMBER, whole or not at all, and does nothing if that is
there. Pieces (lm/documents.py) are in the order of the files.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from lm.cleaning import Job, Signer, Tally, Tell, kept
from lm.cleaning_report import finish
from lm.contamination import Index, write_index
from lm.corpus import kind_of, open_bytes, open_stream
from lm.deduplication import RUN_DOCUMENTS, Runs, find_duplicates, first_duplicates, ranges_for, write_run
from lm.documents import Piece
from lm.files import listed, locked, whole_file, whole_folder, write_sealed

KNOWN_RUNS = 4  # whose duplicates are kept in memory, to follow them to where they come from
COMPRESSIONS = {"zst": "zstd", "gz": "gzip"}


def prepare(job: Job) -> None:
    """Write the index of the evaluation sets, unless it is there."""
    if not job.place("index").exists():
        write_index(job.evaluation, job.place("index"))


def filter_documents(job: Job, number: int, tell: Tell) -> None:
    """Write the documents of a piece that stay. Raises: ValueError for what is no document, unless such are left out."""
    tally, signer, sizes = Tally(job.examples), Signer(job.steps), []
    file_number = {file: at for at, file in enumerate(job.pieces[number].files)}
    with whole_folder(job.place("filter", number)) as folder:
        found = kept(job, number, tally, tell)
        document = next(found, None)
        while document is not None:
            run, keys, lines = folder / f"{len(sizes):05d}", [], []
            run.mkdir()
            with pa.CompressedOutputStream(str(run / "texts.zst"), "zstd") as out:
                while document is not None and len(lines) < RUN_DOCUMENTS:
                    file, line, text = document
                    out.write(orjson.dumps(text) + b"\n")
                    keys.append(signer.keys(text))
                    lines.append((file_number[file], line))
                    document = next(found, None)
            write_run(run, np.array(keys))
            np.save(run / "lines.npy", np.array(lines, np.int64))
            sizes.append(len(lines))
        facts = {"runs": sizes, "counts": tally.counts, "examples": tally.examples}
        write_sealed(folder / "report.json", facts | _lines_of_part(job.pieces[number]))


def _lines_of_part(piece: Piece) -> dict[str, Any]:
    """Of a part of a file how many lines or rows it has, and whether it begins within a line."""
    if piece.stop is None:
        return {"lines": 0, "within": False}
    with open_bytes(piece.files[0]) as stream:
        if kind_of(piece.files[0]) == "parquet":
            metadata = pq.ParquetFile(stream).metadata
            return {"lines": sum(metadata.row_group(i).num_rows for i in range(piece.start, piece.stop)), "within": False}
        stream.seek(max(piece.start - 1, 0))
        within = piece.start > 0 and stream.read(1) != b"\n"
        lines, left = 0, piece.stop - piece.start
        while left and (part := stream.read(min(left, 2**20))):
            lines, left = lines + part.count(b"\n"), left - len(part)
        return {"lines": lines, "within": within}


def plan(job: Job, number: int, tell: Tell) -> None:
    runs, before, lines = [], [], 0
    for at, piece in enumerate(job.pieces):
        report = job.report("filter", at)
        runs += [[at, size] for size in report["runs"]]
        lines = 0 if not piece.start else lines
        before.append(lines + report["within"])
        lines += report["lines"]
    num_ranges = ranges_for(sum(size for _, size in runs), job.memory)
    with whole_folder(job.place("plan", number)) as folder:
        write_sealed(folder / "report.json", {"runs": runs, "lines_before": before, "num_ranges": num_ranges})


class Plan:
    """All runs of a job, in the order of the corpus."""

    def __init__(self, job: Job):
        facts = job.report("plan")
        self.job, self.lines_before = job, facts["lines_before"]
        self.pieces, self.sizes = ([run[i] for run in facts["runs"]] for i in (0, 1))
        self.runs = Runs([self.folder(run) for run in range(len(self.sizes))], Signer(job.steps).columns, facts["num_ranges"])
        self._first: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def runs_of(self, piece: int) -> range:
        return range(bisect_left(self.pieces, piece), bisect_right(self.pieces, piece))

    def folder(self, run: int) -> Path:
        piece = self.pieces[run]
        return self.job.place("filter", piece) / f"{run - self.runs_of(piece).start:05d}"

    def first(self, run: int) -> tuple[np.ndarray, np.ndarray]:
        """For each document of a run 1 + the number of the first one that has its text, and one of its bands; 0 for none."""
        if run not in self._first:
            if len(self._first) == KNOWN_RUNS:
                self._first.pop(next(iter(self._first)))
            folders = [self.job.place("duplicates", task) for task in range(self.runs.num_tasks)]
            cut = self.runs.num_ranges * self.job.steps.exact
            size = self.sizes[run]
            self._first[run] = (first_duplicates(folders[:cut], run, size), first_duplicates(folders[cut:], run, size))
        return self._first[run]

    def origin(self, number: int) -> dict[str, Any]:
        """Where the document comes from that this one is a duplicate of, directly or through others."""
        while True:
            run, row = divmod(number, 2**32)
            earlier = [int(first[row]) for first in self.first(run) if first[row]]
            if not earlier:
                return self.where(run, row)
            number = min(earlier) - 1

    def where(self, run: int, row: int) -> dict[str, Any]:
        """Where a document comes from."""
        return self.place(self.pieces[run], *np.load(self.folder(run) / "lines.npy", mmap_mode="r")[row].tolist())

    def place(self, piece: int, file: int, line: int) -> dict[str, Any]:
        """The name of a file of a piece, and the line or row in all of it; null for a whole file."""
        return {"file": self.job.pieces[piece].files[file], "line": line + self.lines_before[piece] if line else None}


def duplicates(job: Job, number: int, tell: Tell) -> None:
    find_duplicates(Plan(job).runs, number, job.place("duplicates", number))


def write(job: Job, number: int, tell: Tell) -> None:
    """Write the part of a piece; none if nothing of it is left."""
    tally = Tally(job.examples)
    with whole_folder(job.place("write", number)) as folder:
        with (
            whole_file(job.part(number)) as partial,
            pa.CompressedOutputStream(str(partial), COMPRESSIONS[job.compression]) as out,
        ):
            for row in _left(job, number, tally, tell):
                out.write(orjson.dumps(row) + b"\n")
        if "kept" not in tally.counts:
            job.part(number).unlink()
        files = listed(job.folder, [path for path in [job.part(number)] if path.exists()])
        write_sealed(folder / "report.json", {"files": files, "counts": tally.counts, "examples": tally.examples})


def _left(job: Job, number: int, tally: Tally, tell: Tell) -> Iterator[dict[str, Any]]:
    """The rows of a piece that are neither duplicates nor contaminated."""
    plan, index = Plan(job), Index(job.place("index"))
    for run in plan.runs_of(number):
        exact, near = plan.first(run)
        lines = np.load(plan.folder(run) / "lines.npy")
        with open_stream(str(plan.folder(run) / "texts.zst")) as texts:
            for row, text in enumerate(map(orjson.loads, texts)):
                tell(1)
                at = plan.place(number, *lines[row].tolist())
                reason = "exact duplicate" if exact[row] else "near-duplicate" if near[row] else None
                if reason:
                    origin = plan.origin((run << 32) + row) if tally.wants(reason) else None
                    tally.remove(reason, text, {**at, "duplicate_of": origin})
                elif found := index.find(text):
                    tally.remove(f"contaminated: {found['in']}", text, {**at, "contains": found})
                else:
                    tally.count("kept", len(text))
                    yield {"text": text, "source": at["file"], "line": at["line"]}


@dataclass(frozen=True)
class Stage:
    """Tasks that can be done in any order once the stages before are done."""

    name: str
    run: Callable[[Job, int, Tell], None]
    num_tasks: Callable[[Job], int] | None = None  # known when the stages before are done; None: one
    reads_documents: bool = False


def _per_piece(job: Job) -> int:
    return len(job.pieces)


STAGES = (
    Stage("filter", filter_documents, _per_piece, True),
    Stage("plan", plan),
    Stage("duplicates", duplicates, lambda job: Plan(job).runs.num_tasks),
    Stage("write", write, _per_piece, True),
    Stage("finish", finish),
)


def run_task(job: Job, stage: Stage, number: int, tell: Tell) -> None:
    """Do one task, unless that was done. Raises: RuntimeError if another process is at it."""
    done = job.place(stage.name, number)
    with locked(done.with_name(f".{done.name}.lock"), f"making {done}"):
        if not done.exists():
            stage.run(job, number, tell)
