"""One table of what the benchmarks found: each question with its peer, its target and whether that was reached.

    python -m benchmarks.table                         # of the newest row of each case in benchmarks/results.jsonl
    python -m benchmarks.table --since 1795300000      # of what was measured after this time

Targets are those for two CPU cores. Beside the questions, the road of a token: what each part of it makes in a second.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.args import parse
from lm.files import read_jsonl
from lm.tables import aligned

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Args:
    """What the table is of."""

    results: Path = Path(__file__).parent / "results.jsonl"
    """What the benchmarks wrote."""
    since: float = 0.0
    """Seconds since 1970; rows from before are left out."""


def training_steps(row: Row) -> Iterator[tuple[str, str, float, float, bool]]:
    """(question, peer, found, target, more is better) of a row of this benchmark; so do those below."""
    question = f"step, {row['model']} {row['precision']}"
    yield question, "Trainer", row["faster"]["Trainer"], 1.3, True
    yield question, "plain loop", row["faster"]["plain loop"], 1.15, True
    yield f"memory of a {question}", "Trainer", row["memory"]["Trainer"], 0.6, False


def packed_steps(row: Row) -> Iterator[tuple[str, str, float, float, bool]]:
    if row["stage"] in (targets := {1: 4.0, 8: 1.5, 32: 1.0}):
        for peer, ratio in row["ratio"].items():
            yield f"curriculum step, stage {row['stage']}, {row['loss']}", peer, ratio, targets[row["stage"]], True


def packing(row: Row) -> Iterator[tuple[str, str, float, float, bool]]:
    rates = row["tokens_per_sec"]
    for name, peer in (("batches", "tokenizers' batches"), ("datatrove", "datatrove")):
        yield "text to shards", peer, round(rates["build_pretrain"] / rates[name], 1), 10.0, True


def window_sampling(row: Row) -> Iterator[tuple[str, str, float, float, bool]]:
    yield f"windows, {row['micro_batch']} x {row['sequence_length']}", "nanoGPT's get_batch", row["ratio"], 5.0, True


def first_steps(row: Row) -> Iterator[tuple[str, str, float, float, bool]]:
    for trainer, ratio in row["ratio"].items():
        yield f"first step, {trainer}.py {row['model']}", "run_clm", ratio, 1.0, False


def checkpoint_stalls(row: Row) -> Iterator[tuple[str, str, float, float, bool]]:
    for name, words in (("wait", "wait for a checkpoint"), ("stall", "the same and slower steps")):
        yield f"{words}, {row['model']}, {row['device']}", "torch.save", row["ratio"][name], 0.2, False


QUESTIONS: dict[str, Callable[[Row], Iterator[tuple[str, str, float, float, bool]]]] = {
    "training_step": training_steps,
    "packed_step": packed_steps,
    "packing": packing,
    "window_sampling": window_sampling,
    "first_step": first_steps,
    "checkpoint_stall": checkpoint_stalls,
}
NAMES = (
    "model",
    "trainer",
    "precision",
    "stage",
    "loss",
    "rows",
    "micro_batch",
    "sequence_length",
    "device",
    "max_lookahead",
)  # tell cases apart


def newest(path: Path, since: float) -> list[Row]:
    """The last row of each case, in the order of the file."""
    rows = {}
    for row in read_jsonl(path, "a benchmark"):
        if row["timestamp"] >= since:
            rows[row["benchmark"], *(str(row.get(name)) for name in NAMES)] = row
    return list(rows.values())


def road(row: Row) -> Iterator[tuple[str, str]]:
    """What this part of the road makes, in words."""
    if row["benchmark"] == "packing":
        yield "text to shards", f"{row['tokens_per_sec']['build_pretrain']:,} tokens/s, {row['processes']} processes"
    elif row["benchmark"] == "synthetic_generation":
        case = f"graph search, stage {row['stage']} of {row['max_lookahead']}, as ids"
        yield case, f"{row['examples_per_sec']['ids']:,} examples/s, one process"
    elif row["benchmark"] == "road":
        waited = row["ms"]["data"] + row["ms"]["to_device"]
        share = f"{waited / row['step_ms']:.2%} of a step of {row['step_ms']} ms"
        yield f"rows of {row['trainer']}.py, {row['model']}", f"{waited:.2f} ms, {share}"
    elif row["benchmark"] == "checkpoint_stall":
        stall = f"{row['stall_steps']['background']} steps of {row['step_sec']} s"
        yield f"checkpoint, {row['model']}", f"{stall}, {row['device']}"


def of_this_version(row: Row) -> bool:
    """Whether the row has what is asked of it here; says so if an earlier version of its benchmark wrote another."""
    name = row["benchmark"]
    try:
        _ = [*road(row), *QUESTIONS.get(name, lambda _: ())(row)]
    except KeyError as missing:
        print(f"a row of {name} has no {missing}, an earlier version wrote it: run python -m benchmarks.{name} again")
        return False
    return True


def main(args: Args) -> None:
    """Print both tables."""
    rows = [row for row in newest(args.results, args.since) if of_this_version(row)]
    cells = [["question", "peer", "ratio", "target", "reached"]]
    for row in rows:
        for question, peer, found, target, more in QUESTIONS.get(row["benchmark"], lambda _: ())(row):
            reached = found >= target if more else found <= target
            share = "yes" if reached else f"no, by {abs(found / target - 1):.0%}"
            cells.append([question, peer, str(found), f"{'>=' if more else '<='} {target:g}", share])
    print(aligned(cells))
    print()
    print(aligned([["the road", "makes"], *(list(part) for row in rows for part in road(row))]))


if __name__ == "__main__":
    main(parse(Args))
