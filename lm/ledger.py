"""The ledger of a run: which examples formed each step, and a digest of each row as it was made.

RUN/logs/ledger.jsonl has a line for each finished step; its lists have an entry for each row of the step, in their order:

    {"step": 17, "data_step": 16, "example": [...], "paper": [...], "first_token": [...], "digest": [...]}     train.py
    {..., "example": [...], "stage": [...], "digest": [...]}                                                  pptrain.py
    {..., "example": [...], "block": [...], "mixin": [...], "digest": [...]}                                  pretrain.py

Row j of step s is example data_step * effective_batch + j. `digest` is the BLAKE2b, 8 bytes in hexadecimal, of the row's
inputs and then its targets, each id as 8 bytes with the lowest first, as they are before they go to the device.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch

from lm.checks import COUNT, kind_faults
from lm.files import parse_json
from lm.run import Run

Columns = dict[str, np.ndarray]  # int64, an entry for each row; -1 is null
RowIds = Callable[[Any], Iterable[tuple[np.ndarray, np.ndarray]]]


class Ledger:
    """Writes a line for each step, or does nothing at all.

    Args:
        on: if so, every micro-batch comes from its dataset as (micro-batch, columns).
        row_ids: a micro-batch in CPU memory -> inputs and targets of each of its rows.
        names: what the numbers of a column stand for, by column.
    """

    def __init__(self, run: Run, on: bool, row_ids: RowIds, names: dict[str, Sequence[str]] | None = None):
        self.run, self.on, self.row_ids, self.names = run, on, row_ids, names or {}
        self._noted: deque[list[Columns]] = deque()  # of each step that is not written yet

    def note(self, made: list) -> list:
        """The micro-batches of the next step alone; what came with them is kept until its turn to `write` it."""
        if not self.on:
            return made
        self._noted.append([columns | {"digest": digests(self.row_ids(batch))} for batch, columns in made])
        return [batch for batch, _ in made]

    def write(self, step: int, data_step: int) -> None:
        """Write down the rows of all processes, which have now made step `step` from the rows of data step `data_step`."""
        if not self.on:
            return
        accelerator, noted = self.run.accelerator, self._noted.popleft()
        own = np.stack([np.stack(list(columns.values()), axis=1) for columns in noted])
        everyone = accelerator.gather(torch.from_numpy(own)[None].to(accelerator.device)).cpu().numpy()
        # micro-batch m of process p holds the rows after those of process p - 1: see rows_of_step
        rows = everyone.swapaxes(0, 1).reshape(-1, own.shape[-1])
        values = dict(zip(noted[0], rows.T, strict=True))
        written = {name: self._plain(name, column) for name, column in values.items()}
        self.run.log.ledger(step, data_step=data_step, **written)

    def forget(self) -> None:
        """Nothing that was noted will be written: the run goes back."""
        self._noted.clear()

    def _plain(self, name: str, column: np.ndarray) -> list:
        if name == "digest":
            return [f"{value:016x}" for value in column.view(np.uint64).tolist()]
        names = self.names.get(name)
        return [None if value < 0 else names[value] if names else value for value in column.tolist()]


def digests(rows: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The digest of each row of inputs and targets, int64 (rows,)."""
    found = bytearray()
    for inputs, targets in rows:
        row = blake2b(np.ascontiguousarray(inputs, dtype="<i8"), digest_size=8)
        row.update(np.ascontiguousarray(targets, dtype="<i8"))
        found += row.digest()
    return np.frombuffer(found, dtype=">i8").astype(np.int64)


def lines(folder: Path) -> Iterator[tuple[int, bytes]]:
    """Number and content of each whole line of a run's ledger; half a last one is that of a step that is being written.

    Raises: FileNotFoundError if there is no ledger.
    """
    path = folder / "logs/ledger.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}, the run was made without it: pass --ledger to the training script")
    with open(path, "rb") as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.endswith(b"\n"))


def read_line(line: bytes, where: object, columns: Sequence[str] = ()) -> dict[str, Any]:
    """The record of a line: step, data step, and lists of one length, with `columns` these lists and no others.

    Raises: ValueError beginning with `where` if it is none.
    """
    try:
        record = orjson.loads(line)
        if isinstance(record, dict) and line.count(b":") != len(record):  # a key twice, or a colon in a name
            record = parse_json(line, "the line", "mend it")  # which costs five times as much
    except ValueError as error:
        raise ValueError(f"{where} is no record ({error}): {line[:60]!r}") from None
    kinds = {"step": range(1, COUNT.stop), "data_step": COUNT}
    own = record.keys() - kinds if isinstance(record, dict) else ()
    if faults := kind_faults(where, record, kinds | dict.fromkeys(columns or own, list)):
        raise ValueError(faults[0])
    if columns and (more := own - set(columns)):
        raise ValueError(f"{where} has {min(more)!r:.80}, {', '.join(columns)} are needed")
    if len({len(record[name]) for name in own}) > 1:
        raise ValueError(f"{where} is no record (the lists of step {record['step']} have different lengths): {line[:60]!r}")
    return record


def compare_ledgers(folder: Path, other: Path) -> dict[str, Any]:
    """The first step and row in which two runs did not train on the same, and in how many steps before it they did."""
    ours, theirs = (_from_step(run) for run in (folder, other))
    mine, its = next(ours, None), next(theirs, None)
    begun = max(mine[0], its[0]) if mine and its else 0
    while mine and mine[0] < begun:
        mine = next(ours, None)
    while its and its[0] < begun:
        its = next(theirs, None)
    same, first = 0, None
    while mine and its and first is None:
        first = None if mine == its else _difference(mine, its)
        same += first is None
        mine, its = (next(ours, None), next(theirs, None)) if first is None else (mine, its)
    longer = None if first or bool(mine) == bool(its) else str(folder if mine else other)
    return {"other": str(other), "from_step": begun, "same_steps": same, "goes_on": longer, "first_difference": first}


def comparison_in_words(run: str, found: dict[str, Any]) -> str:
    """What `compare_ledgers` found."""
    first, other, since = found["first_difference"], found["other"], f" from step {found['from_step']:,} on"
    same = f"the same {found['same_steps']:,} steps{since}"
    if not first and not found["same_steps"]:
        return f"{run} and {other}: no step is in both ledgers, so nothing was compared: pass runs that recorded the same steps"
    if first:
        values = "; ".join(f"{name} {first[name]}" for name in ("run", "other"))
        return f"{run} and {other}: differ at step {first['step']}, row {first['row']} ({values}) after {same}"
    return f"{run} and {other}: {same}" + (f"; {found['goes_on']} goes on" if found["goes_on"] else "")


def _from_step(folder: Path) -> Iterator[tuple[int, bytes]]:
    for number, line in lines(folder):
        try:
            yield read_line(line, f"{folder}/logs/ledger.jsonl line {number}")["step"], line
        except ValueError as error:
            raise ValueError(f"{error}: mend or remove that line") from None


def _difference(mine: tuple[int, bytes], its: tuple[int, bytes]) -> dict[str, Any] | None:
    """Where two lines differ; None if only their data step does."""
    if mine[0] != its[0]:
        return {"step": min(mine[0], its[0]), "row": 0, "run": f"step {mine[0]}", "other": f"step {its[0]}"}
    rows = []
    for _, line in (mine, its):
        record = orjson.loads(line)
        columns = {name: value for name, value in record.items() if isinstance(value, list)}
        rows.append([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])
    for row in range(max(map(len, rows))):
        own, other = (part[row] if row < len(part) else None for part in rows)
        if own != other:
            return {"step": mine[0], "row": row, "run": own, "other": other}
    return None
