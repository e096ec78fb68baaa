"""Whether a run trained on every example exactly once, read from its ledger (lm/ledger.py).

Lines are read one at a time; what is kept is the digest, 8 bytes, of each example, and of each block and synthetic example.
"""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from lm.files import read_json
from lm.ledger import lines
from lm.ledger_rows import NAMED, Faults, PaperRows, StageRows, TextRows, room
from lm.run_records import TRAINERS, whole_lines

COLUMNS = {"train.py": ("paper", "first_token"), "pptrain.py": ("stage",), "pretrain.py": ("block", "mixin")}


def check_ledger(folder: Path) -> dict[str, Any]:
    """What the ledger of a run says, with every fault of it, as far as the run has come.

    Raises: FileNotFoundError if there is no run, or it has no ledger.
    """
    run = read_json(folder / "run.json", "the training script, and pass the folder that it wrote")
    trainer = next((name for name, (argument, _) in TRAINERS.items() if argument in run["args"]), None)
    if trainer is None:
        raise ValueError(
            f"{folder} is a run of {run.get('script')}, one of {', '.join(COLUMNS)} is needed: pass another folder"
        )
    events = whole_lines(folder / "events.jsonl", "event")
    stretches = [event["data_steps_left_out"] for event in events if event["event"] == "rolled_back"]
    log = [(record["step"], record.get("stage")) for record in whole_lines(folder / "logs/train.jsonl", "step")]
    saved = [int(path.name[5:]) for path in (folder / "checkpoints").glob("step_*") if path.name[5:].isdigit()]
    effective_batch, faults = run["derived"]["effective_batch"], Faults()
    steps, examples = Steps(faults), Examples(effective_batch, stretches, faults)
    rows_of = {"train.py": PaperRows, "pptrain.py": StageRows, "pretrain.py": TextRows}[trainer](folder, run, log, faults)
    num_rows = 0
    for number, line in lines(folder):
        try:
            step, data_step, values = _values(line, COLUMNS[trainer])
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            faults.add("no record", f"line {number} is no record ({error}): {line[:60]!r}")
            continue
        count = len(values["example"])
        num_rows += count
        steps.take(step, number)
        if count != effective_batch:
            faults.add("number of rows", f"step {step} has {count} rows, {effective_batch} are in a step")
        if examples.take(step, data_step, values["example"], values["digest"]) and count:
            rows_of.take(step, values)
    stepped_over, missing = examples.finish()
    for first, last in missing:
        faults.add("example left out", f"{_span('example', first, last)} never came")
    steps.finish(max([step for step, _ in log] + saved, default=0))
    return {
        "run": str(folder),
        "trainer": trainer,
        "first_step": steps.first,
        "last_step": max(steps.order, default=None),
        "effective_batch": effective_batch,
        "rows": num_rows,
        "data_steps_stepped_over": stepped_over,
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
        said.append(f"{run}: {_span('step', first, last)}, {found['rows']:,} rows: {verdict}")
    return said


def _values(line: bytes, columns: tuple[str, ...]) -> tuple[int, int, dict[str, Any]]:
    """Step, data step and columns of a line. Raises: ValueError, KeyError, TypeError or OverflowError if it is no record."""
    record = orjson.loads(line)
    step, data_step = record["step"], record["data_step"]
    if not (isinstance(step, int) and isinstance(data_step, int)):
        raise TypeError(f"step {step!r}, data_step {data_step!r}")
    values = {name: record[name] for name in ("example", *columns)}
    digests = record["digest"]
    if len({len(column) for column in (digests, *values.values())}) > 1:
        raise ValueError(f"the lists of step {step} have different lengths")
    for name, column in values.items():
        if name != "paper":
            values[name] = np.array([-1 if value is None else value for value in column], dtype=np.int64)
    values["digest"] = np.frombuffer(bytes.fromhex("".join(digests)), dtype=">u8").astype(np.uint64)
    if len(values["digest"]) != len(digests):
        raise ValueError(f"a digest of step {step} has not 16 digits")
    return step, data_step, values


class Steps:
    """Each step comes once, in order."""

    def __init__(self, faults: Faults):
        self.faults, self.order = faults, []

    @property
    def first(self) -> int | None:
        """The first step of the ledger."""
        return self.order[0] if self.order else None

    def take(self, step: int, line: int) -> None:
        """The next line is of this step."""
        if self.order and step < self.order[-1]:
            self.faults.add("order of steps", f"step {step} (line {line}) comes after step {self.order[-1]}")
        self.order.append(step)

    def finish(self, logged: int) -> None:
        """No line follows; the log, or a checkpoint, knows of step `logged`."""
        counts = Counter(self.order)
        for step, count in counts.items():
            if count > 1:
                self.faults.add("step again", f"step {step} is there {count} times")
        steps = sorted(counts) or [0]
        for before, after in pairwise([*steps, max(logged, steps[-1]) + 1]):
            if after > before + 1:
                end = f": the run has come to step {logged:,}" if after > steps[-1] else ""
                self.faults.add("step missing", f"no line for {_span('step', before + 1, after - 1)}{end}")


class Examples:
    """Each example comes once, at its place, but for those of the stretches of data steps that were stepped over."""

    def __init__(self, effective_batch: int, stretches: list[list[int]], faults: Faults):
        self.effective_batch, self.faults = effective_batch, faults
        self.left_out = np.unique(np.concatenate([np.arange(0), *(np.arange(first, last + 1) for first, last in stretches)]))
        self.begin: int | None = None  # first example that counts
        self.data_step = -1  # the latest
        self.end = 0  # after the last example that may be there
        self.digests = np.zeros(0, np.uint64)  # of each example from `begin` on, 0 where it has not come

    def take(self, step: int, data_step: int, examples: np.ndarray, digests: np.ndarray) -> bool:
        """A step trained on these examples; whether they are those of its data step."""
        if self.begin is None:
            self._start(step, data_step)
        if data_step <= self.data_step:
            self.faults.add("data step", f"step {step} trains on data step {data_step}, one before did on {self.data_step}")
        most = step - 1 + len(self.left_out)
        if not 0 <= data_step <= most:
            self.faults.add("data step", f"step {step} trains on data step {data_step}, {most} is the last that it may be")
            return False
        self.data_step = max(self.data_step, data_step)
        self.end = max(self.end, (data_step + 1) * self.effective_batch)
        expected = data_step * self.effective_batch + np.arange(len(examples))
        for row in np.flatnonzero(examples != expected):
            self.faults.add("wrong example", f"step {step} row {row} is example {examples[row]}, not {expected[row]}")
        self._keep(step, examples, digests)
        return bool((examples == expected).all())

    def _start(self, step: int, data_step: int) -> None:
        """A ledger from step 1 on must have all examples; a later one those from its first data step on."""
        before = int(np.searchsorted(self.left_out, data_step))
        if step > 1 and not step - 1 <= data_step <= step - 1 + before:
            self.faults.add(
                "data step", f"step {step}, the first, trains on data step {data_step}, not {step - 1} to {step - 1 + before}"
            )
        self.begin = 0 if step == 1 else data_step * self.effective_batch

    def _keep(self, step: int, examples: np.ndarray, digests: np.ndarray) -> None:
        self.digests = room(self.digests, self.end - self.begin)
        place = examples - self.begin
        inside = (place >= 0) & (examples < self.end)
        if inside.all() and not self.digests[place].any() and len(np.unique(place)) == len(place):
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
        stepped_over = np.intersect1d(first + np.flatnonzero(by_step.all(axis=1)), self.left_out)
        by_step[stepped_over - first] = False
        return spans(stepped_over), spans(self.begin + np.flatnonzero(missing))


def spans(numbers: np.ndarray) -> list[list[int]]:
    """First and last of each run of consecutive numbers, which rise."""
    groups = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return [[int(group[0]), int(group[-1])] for group in groups if len(group)]


def _span(what: str, first: int, last: int) -> str:
    return f"{what} {first:,}" if first == last else f"{what}s {first:,} to {last:,}"
