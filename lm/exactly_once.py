"""Whether a run trained on every example exactly once, read from its ledger (lm/ledger.py).

Lines are read one at a time; what is kept is the digest, 8 bytes, of each example, and of each block and synthetic example.
"""

import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from lm.checks import COUNT
from lm.history import History
from lm.ledger import lines, read_line
from lm.ledger_rows import NAMED, Faults, PaperRows, StageRows, TextRows, room
from lm.redraw import Sample, draw_again

ROWS = {"train.py": PaperRows, "pptrain.py": StageRows, "pretrain.py": TextRows}
LOOKS = 5  # at a run that goes back or on again and again while it is looked at
SETTLE_SEC = 0.1  # what is cut back together is cut within this
FAR = 1000  # steps: a ledger that goes on so far beyond all that is known of the run is damaged


def check_ledger(folder: Path) -> dict[str, Any]:
    """What the ledger of a run says, with every fault of it, as far as the run has come.

    Raises: FileNotFoundError if there is no run, or it has no ledger; ValueError if what stands beside the ledger is damaged;
        RuntimeError if the run never stood still for as long as it took.
    """
    for _ in range(LOOKS):
        history = History(folder)
        found = _check(history)
        if not found["exactly_once"]:
            time.sleep(SETTLE_SEC)
        if not history.has_moved():
            return found
    raise RuntimeError(f"{folder} went back or on {LOOKS} times while its ledger was read: check it again in a while")


def _check(history: History) -> dict[str, Any]:
    effective_batch, faults = history.derived["effective_batch"], Faults()
    steps, examples = Steps(history.begins, faults), Examples(history, faults)
    rows_of, sample, num_rows = ROWS[history.trainer](history, faults), Sample(), 0
    for number, line in lines(history.folder):
        try:
            step, data_step, values = _values(line, number, rows_of.columns)
        except ValueError as error:
            faults.add("no record", str(error))
            continue
        if step > (come := max([history.last_step, *steps.order[-1:]])) + FAR:
            faults.add("far step", f"step {step} (line {number}) is far beyond step {come}, to which the run has come")
            continue
        count = len(values["example"])
        num_rows += count
        if steps.take(step, number):
            examples.skip_to(data_step)
        if count != effective_batch:
            faults.add("number of rows", f"step {step} has {count} rows, {effective_batch} are in a step")
        if examples.take(step, data_step, values["example"], values["digest"]) and count:
            rows_of.take(step, values)
            sample.take(step, values)
            alike = (values["digest"] == values["digest"][0]).all()
            if alike and len({*zip(*map(values.get, rows_of.told_by), strict=True)}) > 1:
                faults.add("digest again", f"all rows of step {step} have the digest of the first, and are others")
    stepped_over, missing = examples.finish()
    for first, last in missing:
        faults.add("example left out", f"{_span('example', first, last)} never came")
    steps.finish(history.last_step)
    return {
        "run": str(history.folder),
        "trainer": history.trainer,
        "first_step": steps.first,
        "last_step": max(steps.order, default=None),
        "effective_batch": effective_batch,
        "rows": num_rows,
        "data_steps_stepped_over": stepped_over,
        "drawn_again": draw_again(history, sample, rows_of, faults),
        "exactly_once": not faults.counts,
        "faults": {kind: {"count": count, "first": faults.named[kind]} for kind, count in faults.counts.items()},
    }


def in_words(found: dict[str, Any]) -> list[str]:
    """What `check_ledger` found."""
    run, first, last = found["run"], found["first_step"], found["last_step"]
    said = []
    if first is None:
        said.append(f"{run}: the ledger has no step yet")
    elif first > 1:
        said.append(f"{run}: the ledger begins at step {first:,}, --ledger was not given before: checked from there")
    for begin, end in found["data_steps_stepped_over"]:
        count = (end - begin + 1) * found["effective_batch"]
        said.append(f"{run}: {_span('data step', begin, end)} stepped over, as events.jsonl says: {count:,} examples")
    for kind, fault in found["faults"].items():
        said += [f"{run}: {kind}: {text}" for text in fault["first"]]
        if fault["count"] > NAMED:
            said.append(f"{run}: {kind}: {fault['count'] - NAMED:,} more")
    if first is not None:
        verdict = "every example exactly once" if found["exactly_once"] else "NOT every example exactly once"
        again = found["drawn_again"]
        verdict += f"; {again['rows']:,} rows drawn again from seed and data"
        verdict += f" and no more: {again['why_no_more']}" if again["why_no_more"] else ""
        said.append(f"{run}: {_span('step', first, last)}, {found['rows']:,} rows: {verdict}")
    return said


def _values(line: bytes, number: int, columns: tuple[str, ...]) -> tuple[int, int, dict[str, Any]]:
    """Step, data step and columns of a line. Raises: ValueError, naming the line, if it is no record."""
    record = read_line(line, f"line {number}", ("example", *columns, "digest"))
    values = {name: _column(name, record[name]) for name in ("example", *columns, "digest")}
    if wrong := [name for name, column in values.items() if column is None]:
        raise ValueError(f"line {number} is no record (step {record['step']} has {wrong[0]} {record[wrong[0]]!r:.80})")
    return record["step"], record["data_step"], values


def _column(name: str, column: list) -> np.ndarray | list[str] | None:
    """Counts as int64, with -1 for null where there may be one; digests as uint64; or None if there is something else."""
    kinds = set(map(type, column))
    if name in ("paper", "digest"):
        return None if kinds - {str} else column if name == "paper" else _digests(" ".join(column), len(column))
    if kinds - {int, NoneType if name in ("block", "mixin") else int}:  # bool is no int here
        return None
    counts = [value for value in column if value is not None] if NoneType in kinds else column
    if counts and not (min(counts) >= 0 and max(counts) in COUNT):
        return None
    return np.array(column if counts is column else [-1 if value is None else value for value in column], np.int64)


def _digests(text: str, count: int) -> np.ndarray | None:
    """Those of a text of 16 digits, a space, 16 digits, ..."""
    try:
        found = np.frombuffer(bytes.fromhex(text), dtype=">u8").astype(np.uint64)
    except ValueError:  # other characters, or not a multiple of 16
        return None
    return found if len(found) == count and text[16::17] == " " * (count - 1) else None


class Steps:
    """Each step comes once, in order; those that a session without --ledger made are not recorded."""

    def __init__(self, begins: set[int], faults: Faults):
        self.begins, self.faults, self.order = begins, faults, []

    @property
    def first(self) -> int | None:
        """The first step of the ledger."""
        return self.order[0] if self.order else None

    def take(self, step: int, line: int) -> bool:
        """The next line is of this step; whether a session that is not recorded came before it."""
        before = self.order[-1] if self.order else step
        if self.order and step < self.order[-1]:
            self.faults.add("order of steps", f"step {step} (line {line}) comes after step {self.order[-1]}")
        self.order.append(step)
        return step > before + 1 and {before, step - 1} <= self.begins

    def finish(self, logged: int) -> None:
        """No line follows; the log, or a checkpoint, knows of step `logged`."""
        counts = Counter(self.order)
        for step, count in counts.items():
            if count > 1:
                self.faults.add("step again", f"step {step} is there {count} times")
        steps = sorted(counts) or [0]
        for before, after in pairwise([*steps, max(logged, steps[-1]) + 1]):
            if after > before + 1 and before in self.begins and (after - 1 in self.begins or after > steps[-1]):
                session = f"the session that went on after step {before:,} had no --ledger, or its lines are lost"
                self.faults.add("not recorded", f"{_span('step', before + 1, after - 1)}: {session}")
            elif after > before + 1:
                end = f": the run has come to step {logged:,}" if after > steps[-1] else ""
                self.faults.add("step missing", f"no line for {_span('step', before + 1, after - 1)}{end}")


class Examples:
    """Each example comes once, at its place, but for those of the stretches of data steps that were stepped over."""

    def __init__(self, history: History, faults: Faults):
        self.effective_batch, self.faults = history.derived["effective_batch"], faults
        self.left_out, self.most_offset = history.stretches, history.most_offset
        self.skipped: list[list[int]] = []  # data steps that are not recorded
        self.begin: int | None = None  # first example that counts
        self.data_step = -1  # the latest
        self.end = 0  # after the last example that may be there
        self.digests = np.zeros(0, np.uint64)  # of each example from `begin` on, 0 where it has not come

    def skip_to(self, data_step: int) -> None:
        """Steps that are not recorded have trained on the data steps before this one."""
        self.skipped.append([self.data_step + 1, data_step - 1])

    def take(self, step: int, data_step: int, examples: np.ndarray, digests: np.ndarray) -> bool:
        """A step trained on these examples; whether they are those of its data step."""
        if self.begin is None:
            self._start(step, data_step)
        if data_step <= self.data_step:
            self.faults.add("data step", f"step {step} trains on data step {data_step}, one before did on {self.data_step}")
        most = step - 1 + self.most_offset
        if not 0 <= data_step <= most:
            self.faults.add("data step", f"step {step} trains on data step {data_step}, {most} is the last that it may be")
            return False
        self.data_step = max(self.data_step, data_step)
        self.end = max(self.end, (data_step + 1) * self.effective_batch)
        expected = data_step * self.effective_batch + np.arange(len(examples))
        wrong = np.flatnonzero(examples != expected)
        for row in wrong:
            self.faults.add("wrong example", f"step {step} row {row} is example {examples[row]}, not {expected[row]}")
        self._keep(step, examples, digests, bool(len(wrong)))
        return not len(wrong)

    def _start(self, step: int, data_step: int) -> None:
        """A ledger from step 1 on must have all examples; a later one those from its first data step on."""
        if step > 1 and data_step < step - 1:
            self.faults.add(
                "data step", f"step {step}, the first, trains on data step {data_step}, not {step - 1} or a later one"
            )
        self.begin = 0 if step == 1 else data_step * self.effective_batch

    def _keep(self, step: int, examples: np.ndarray, digests: np.ndarray, wrong: bool) -> None:
        self.digests = room(self.digests, self.end - self.begin)
        place = examples - self.begin
        inside = (place >= 0) & (examples < self.end)
        if not wrong and inside.all() and not self.digests[place].any():
            self.digests[place] = digests
            return
        for row in np.flatnonzero(inside):
            before = self.digests[place[row]]
            if before:
                same = "the same" if before == digests[row] else "other"
                text = f"step {step} row {row} is example {examples[row]} again, with {same} token ids"
                self.faults.add("example again", text)
            self.digests[place[row]] = digests[row]

    def finish(self) -> tuple[list[list[int]], list[list[int]]]:
        """First and last data step of each stretch that was stepped over; first and last of other examples that never came."""
        if self.begin is None:
            return [], []
        missing = self.digests[: self.end - self.begin] == 0
        by_step = missing.reshape(-1, self.effective_batch)
        first = self.begin // self.effective_batch
        empty = first + np.flatnonzero(by_step.all(axis=1))
        stepped_over = within(empty, self.left_out)
        by_step[within(empty, self.left_out + self.skipped) - first] = False
        return spans(stepped_over), spans(self.begin + np.flatnonzero(missing))


def within(numbers: np.ndarray, stretches: list[list[int]]) -> np.ndarray:
    """Those of the numbers that lie in a stretch."""
    inside = [any(first <= number <= last for first, last in stretches) for number in numbers.tolist()]
    return numbers[np.array(inside, bool)]


def spans(numbers: np.ndarray) -> list[list[int]]:
    """First and last of each run of consecutive numbers, which rise."""
    groups = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [[int(group[0]), int(group[-1])] for group in groups if len(group)]


def _span(what: str, first: int, last: int) -> str:
    return f"{what} {first:,}" if first == last else f"{what}s {first:,} to {last:,}"
