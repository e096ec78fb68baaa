"""Held-out sets of the graph-search task, which no training may use: eval, test and mixin, without a common prompt.

    python build_data_splits.py --scratch_dir scratch                                # 2,000 + 5,000 + 50,000 examples
    python build_data_splits.py --scratch_dir scratch --max_input_size 96 --max_lookahead 16
    python build_data_splits.py --scratch_dir scratch --generator my_module:MyGenerator

Writes  SCRATCH_DIR/data/nl_splits/mis384_look64_seed12345/  ("_MyGenerator" at its end for another generator)
            eval.jsonl, test.jsonl, mixin.jsonl  rows: input_text, output_texts, alpha, stage, seed, index
            meta.json                            sizes, generator, counts, checksums; written last

All examples are of the last stage. Row i of a set is the set's example i, drawn again until its prompt stands neither in an
earlier set nor in an earlier row, so the files are the same bytes for any number of processes. The folder appears whole or
not at all; a run that was killed starts again, and a second one has nothing to do. lm/splits.py reads it.
"""

import functools
import itertools
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from lm.args import below, check, parse
from lm.external_generator import load_class
from lm.files import locked, sha256, whole_folder, write_sealed
from lm.graph_search import Task
from lm.graph_text import describe, prompt_digest
from lm.splits import FORMAT, SETS, check_files, identify, read_meta, splits_folder
from lm.workers import worker_pool
from synthetic import SyntheticExamples

CHUNK = 100  # rows that a process makes at a time
LOG_EVERY_SEC = 5


@dataclass(frozen=True, kw_only=True)
class Args:
    """Make the held-out sets of one graph-search task."""

    scratch_dir: Path
    """Folder that gets data/nl_splits/ (about 220 MB with the default sizes)."""
    max_input_size: int = 384
    """Size of the largest graph in the symbolic form: an edge takes three tokens."""
    max_lookahead: int = 64
    """Number of stages; a max_input_size of 6 times this, or more, is enough."""
    eval_size: int = 2_000
    """Examples for the evaluations during training."""
    test_size: int = 5_000
    """Examples for the final measurement."""
    mixin_size: int = 50_000
    """Examples at full difficulty to mix into other training."""
    seed: int = 12345
    """With a set's name and a row's number, decides the example."""
    generator: str | None = None
    """module:Class of a published generator to take instead of the built-in one."""
    num_processes: int = len(os.sched_getaffinity(0))
    """Processes that make examples, by default as many as there are cores; does not change the result."""

    @property
    def task(self) -> Task:
        return Task(self.max_input_size, self.max_lookahead)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of rows of each set."""
        return {name: getattr(self, f"{name}_size") for name in SETS}

    def faults(self) -> list[str]:
        """Everything that is wrong with the values themselves."""
        found = self.task.faults()
        found += below(self, 1, *(f"{name}_size" for name in SETS), "num_processes")
        if not 0 <= self.seed < 2**63:
            found.append(f"--seed {self.seed}: a number from 0 to 2**63 - 1 is needed")
        if self.scratch_dir.exists() and not self.scratch_dir.is_dir():
            found.append(f"--scratch_dir {self.scratch_dir} is a file, a folder is needed: pass another")
        if self.generator is not None:
            try:
                load_class(self.generator)
            except ValueError as error:
                found.append(str(error))
        return found


class Row(NamedTuple):
    """A row as its file gets it, and what is to be known about it."""

    digest: bytes  # of the prompt
    line: bytes
    prompt_chars: int
    lookahead: int | None  # None: the prompt is not worded like ours


def make_rows(examples: SyntheticExamples, start: int, count: int) -> list[Row]:
    """Rows start .. start + count - 1 of a set."""
    rows = []
    for example in examples.texts(start, count):
        prompt, answers = example["prompt"], example["output_texts"]
        row = {"input_text": prompt, "output_texts": answers, "alpha": examples.alpha, "stage": examples.stage}
        line = json.dumps(row | {"seed": examples.seed, "index": example["index"]}, ensure_ascii=False) + "\n"
        rows.append(Row(prompt_digest(prompt), line.encode(), len(prompt), lookahead_of(prompt, answers)))
    return rows


def lookahead_of(prompt: str, answers: list[str]) -> int | None:
    """The lookahead of a prompt, None if an external generator has words or graphs of its own."""
    try:
        return describe(prompt, answers)[0]
    except ValueError:
        return None


@functools.cache
def examples_of(args: Args, name: str) -> SyntheticExamples:
    """All examples of a set, those too that repeat a prompt."""
    return SyntheticExamples(args.task, args.seed, args.max_lookahead, purpose=name, generator=args.generator)


def make_chunk(args: Args, name: str, start: int) -> list[Row]:
    """One chunk of a set as it comes, in whichever process this runs."""
    return make_rows(examples_of(args, name), start, min(CHUNK, args.sizes[name] - start))


def make_chunks(args: Args) -> Iterator[list[Row]]:
    """The chunks of all sets, in order; of those made ahead no more than two for each process wait in memory."""
    tasks = ((args, name, start) for name in SETS for start in range(0, args.sizes[name], CHUNK))
    if args.num_processes == 1:
        yield from (make_chunk(*task) for task in tasks)
        return
    with worker_pool(args.num_processes, "--num_processes", preload="synthetic") as pool:
        waiting = deque()
        for task in tasks:
            waiting.append(pool.submit(make_chunk, *task))
            if len(waiting) > 2 * args.num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def with_progress(chunks: Iterable[list[Row]], total: int) -> Iterator[list[Row]]:
    """Hand on the chunks and say how far they are: a bar on a terminal, a line every 5 seconds elsewhere."""
    done, line_sec = 0, time.monotonic()
    with tqdm(total=total, unit=" examples", disable=not sys.stderr.isatty()) as bar:
        for chunk in chunks:
            now = time.monotonic()
            if done == 0:  # the rate is that of the chunks after the first, which waits until the processes have started
                first_sec, first = now, len(chunk)
            done += len(chunk)
            bar.update(len(chunk))
            if bar.disable and now - line_sec >= LOG_EVERY_SEC and done > first:
                line_sec, per_sec = now, (done - first) / (now - first_sec)
                left_sec = (total - done) / per_sec
                print(f"{done:,}/{total:,} examples, {per_sec:,.0f} per second, {left_sec:,.0f} s left", flush=True)
            yield chunk


@dataclass
class Written:
    """What is known of the rows so far."""

    seen: set[bytes] = field(default_factory=set)  # digests of the prompts of all sets
    num_redrawn: int = 0
    prompt_chars: int = 0
    lookaheads: dict[str, Counter] = field(default_factory=lambda: {name: Counter() for name in SETS})

    def facts(self) -> dict[str, Any]:
        """What meta.json says about the rows: of lookaheads a histogram for each set, null if a prompt could not be read."""
        histograms = {name: None if None in found else dict(sorted(found.items())) for name, found in self.lookaheads.items()}
        mean = round(self.prompt_chars / len(self.seen), 1)
        return {"mean_prompt_chars": mean, "num_redrawn": self.num_redrawn, "lookaheads": histograms}


def write_sets(args: Args, folder: Path) -> dict[str, Any]:
    """Write the three files, no prompt twice, and return what meta.json says about their rows.

    Raises: RuntimeError if the generator has not as many prompts.
    """
    written = Written()
    with closing(with_progress(make_chunks(args), sum(args.sizes.values()))) as chunks:
        for name, size in args.sizes.items():
            rows = itertools.chain.from_iterable(itertools.islice(chunks, -(-size // CHUNK)))
            write_set(args, name, rows, folder, written)
    return written.facts()


def write_set(args: Args, name: str, rows: Iterable[Row], folder: Path, written: Written) -> None:
    """Write one file; a row whose prompt is in `written` already gives way to a later attempt at its example."""
    unseen = SyntheticExamples(
        args.task, args.seed, args.max_lookahead, purpose=name, reserved=written.seen, generator=args.generator
    )
    with open(folder / f"{name}.jsonl", "wb") as file:
        for index, row in enumerate(rows):
            if row.digest in written.seen:
                row = redraw(unseen, name, index)
                written.num_redrawn += 1
            written.seen.add(row.digest)
            written.prompt_chars += row.prompt_chars
            written.lookaheads[name][row.lookahead] += 1
            file.write(row.line)


def redraw(unseen: SyntheticExamples, name: str, index: int) -> Row:
    """Row `index` of a set from the first attempt at it whose prompt is not in `unseen.reserved`."""
    try:
        return make_rows(unseen, index, 1)[0]
    except RuntimeError as error:
        raise RuntimeError(
            f"{len(unseen.reserved):,} distinct prompts were found, and no new one for row {index} of {name} ({error}): "
            "pass a smaller --eval_size, --test_size or --mixin_size, or a larger --max_input_size"
        ) from error


def is_done(args: Args, folder: Path) -> bool:
    """Whether `folder` holds, undamaged, what these arguments make.

    Raises: ValueError when it holds something else, or its files are damaged.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "meta.json").is_file():
        raise ValueError(f"{folder} was not made by build_data_splits.py: pass another --scratch_dir, or move it away")
    meta = read_meta(folder)
    there = {"generator": meta["generator"]} | {f"{name}_size": meta["files"][f"{name}.jsonl"]["count"] for name in SETS}
    asked = {"generator": identify(args.generator)} | {f"{name}_size": size for name, size in args.sizes.items()}
    if differ := [f"--{key}: {there[key]} there, {asked[key]} now" for key in asked if there[key] != asked[key]]:
        raise ValueError(
            f"{folder} holds other sets ({'; '.join(differ)}): pass another --scratch_dir, the same arguments, "
            "or remove the folder"
        )
    check_files(folder, meta["files"])
    return True


def build(args: Args, folder: Path) -> None:
    """Make the sets in `folder`, which appears whole or not at all. Raises: RuntimeError as `write_sets` does."""
    lock = folder.with_name(f".{folder.name}.lock")
    with locked(lock, f"building {folder}"), whole_folder(folder) as partial:
        facts = write_sets(args, partial)
        files = {}
        for name, size in args.sizes.items():
            path = partial / f"{name}.jsonl"
            files[path.name] = {"count": size, "size": path.stat().st_size, "sha256": sha256(path)}
        meta = {
            "format": FORMAT,
            "max_input_size": args.max_input_size,
            "max_lookahead": args.max_lookahead,
            "reachable_lookahead": args.task.reachable_lookahead,
            "alpha": 1.0,
            "seed": args.seed,
            "generator": identify(args.generator),
            **facts,
            "files": files,
        }
        write_sealed(partial / "meta.json", meta)


def summary(args: Args, meta: dict) -> list[str]:
    """Lines that say how much there is, and how far ahead its examples look."""
    counts = ", ".join(f"{meta['files'][f'{name}.jsonl']['count']:,} {name}" for name in SETS)
    reached = meta["reachable_lookahead"]
    lines = [
        f"{counts} examples of {meta['mean_prompt_chars']:,} characters in the mean",
        f"max_lookahead {args.max_lookahead} reaches {reached}",
    ]
    if reached < args.max_lookahead:
        needed = 2 * (reached + 1) + 1
        lines[-1] += (
            f": one more step takes two branches of {reached + 1} vertices and the start, {needed} in all, "
            f"and --max_input_size {args.max_input_size} holds {args.task.largest_id}"
        )
    return lines


def main(args: Args) -> None:
    check(args.faults())
    folder = splits_folder(args.scratch_dir, args.task, args.seed, args.generator)
    if is_done(args, folder):
        print(f"nothing to do: {folder} is whole")
    else:
        print(f"making {sum(args.sizes.values()):,} examples on {args.num_processes} processes", flush=True)
        build(args, folder)
        print(folder)
    print(*summary(args, read_meta(folder)), sep="\n")


if __name__ == "__main__":
    try:
        main(parse(Args))
    except KeyboardInterrupt:
        print("stopped, nothing was written: the same command starts again", file=sys.stderr)
        sys.exit(130)
