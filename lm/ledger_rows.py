"""What the rows of a step must be beside their numbers: papers, stages, blocks and synthetic examples, for each trainer."""

import bisect
from collections import Counter
from typing import Any

import numpy as np

from lm.checks import COUNT
from lm.history import History
from lm.mixed_rows import Mixture

NAMED = 10  # faults of a kind


class Faults:
    """What is wrong: how often each kind of it, and the first ten in words."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.named: dict[str, list[str]] = {}

    def add(self, kind: str, text: str) -> None:
        """One more of a kind."""
        self.counts[kind] += 1
        if self.counts[kind] <= NAMED:
            self.named.setdefault(kind, []).append(text)


class Passes:
    """Items 0 .. length - 1 come once in each pass, in the first one in their order if `in_order`.

    Args:
        length: None if it is not known: then it is told by the first item that comes again.
    """

    def __init__(self, what: str, length: int | None, in_order: bool, faults: Faults):
        self.what, self.length, self.in_order, self.faults = what, length, in_order, faults
        self.current = 0
        self.seen, self.digests = np.zeros(0, bool), np.zeros(0, np.uint64)

    def take(self, step: int, rows: np.ndarray, numbers: np.ndarray, items: np.ndarray, digests: np.ndarray | None) -> None:
        """These rows of a step have these items, which are number `numbers` of the endless sequence of passes.

        Args:
            digests: of the rows, the same whenever an item comes; None compares none.
        """
        if self.length is None and self.in_order and (again := np.flatnonzero((items >= 0) & (items < numbers))).size:
            self.length = int(numbers[again[0]])
        passes = numbers // self.length if self.length else np.zeros_like(numbers)
        limit = self.length or int(numbers[-1]) + 1
        self.seen, self.digests = room(self.seen, limit), room(self.digests, limit)
        for number in np.unique(passes):
            if number != self.current:
                self.current, self.seen[:] = number, False
            own = passes == number
            self._once(step, rows[own], numbers[own], items[own], limit)
        if digests is not None:
            inside = (items >= 0) & (items < limit)
            self._compare(step, rows[inside], items[inside], digests[inside])

    def _once(self, step: int, rows: np.ndarray, numbers: np.ndarray, items: np.ndarray, limit: int) -> None:
        """These rows, all of the current pass, are right if their items are the next, or there and not seen yet."""
        ordered = self.in_order and self.current == 0
        wrong = items != numbers if ordered else (items < 0) | (items >= limit)
        for index in np.flatnonzero(wrong):
            right = f"{numbers[index]} is next" if ordered else f"there are {limit}"
            self.faults.add(self.what, f"step {step} row {rows[index]} has {self.what} {items[index]}, {right}")
        rows, items = rows[~wrong], items[~wrong]
        if self.seen[items].any() or not (ordered or len(np.unique(items)) == len(items)):
            for row, item in zip(rows.tolist(), items.tolist(), strict=True):
                if self.seen[item]:
                    text = f"step {step} row {row} has {self.what} {item} again in pass {self.current + 1}"
                    self.faults.add(f"{self.what} again", text)
                self.seen[item] = True
        self.seen[items] = True

    def _compare(self, step: int, rows: np.ndarray, items: np.ndarray, digests: np.ndarray) -> None:
        new = self.digests[items] == 0
        self.digests[items[new]] = digests[new]
        for index in np.flatnonzero(self.digests[items] != digests):
            text = f"step {step} row {rows[index]} has {self.what} {items[index]} with other token ids than before"
            self.faults.add("token ids", text)


class PaperRows:
    """Rows of train.py: with --sampling permutation every paper once an epoch."""

    columns = told_by = ("paper", "first_token")

    def __init__(self, history: History, faults: Faults):
        self.codes: dict[str, int] = {}
        permuted = history.args["sampling"] == "permutation"
        self.papers = Passes("paper", history.derived["eligible_papers"], False, faults) if permuted else None

    def take(self, step: int, values: dict[str, Any]) -> None:
        """One step, whose examples are the right ones."""
        if self.papers:
            items = np.array([self.codes.setdefault(paper, len(self.codes)) for paper in values["paper"]])
            self.papers.take(step, np.arange(len(items)), values["example"], items, None)


class StageRows:
    """Rows of pptrain.py: all of a step are of the stage that its log has, and that never falls."""

    columns, told_by = ("stage",), ("example",)

    def __init__(self, history: History, faults: Faults):
        self.log, self.faults = history.log, faults
        self.highest = 0
        self.begins: list[tuple[int, int]] = []  # first example of each stage, and the stage

    def take(self, step: int, values: dict[str, Any]) -> None:
        """One step, whose examples are the right ones."""
        stages = values["stage"]
        at = bisect.bisect_left(self.log, (step, 0))  # a stage ends with a record, so the next one is of the same stage
        if at < len(self.log) and (wrong := np.flatnonzero(stages != self.log[at][1])).size:
            text = f"step {step} row {wrong[0]} is of stage {stages[wrong[0]]}, the log has stage {self.log[at][1]}"
            self.faults.add("stage", text)
        if (stages != stages[0]).any() or stages[0] < self.highest:
            self.faults.add("stage", f"step {step} is of stages {sorted(set(stages.tolist()))} after stage {self.highest}")
        self.highest = max(self.highest, int(stages.max()))
        if not self.begins or self.begins[-1][1] != stages[0]:
            self.begins.append((int(values["example"][0]), int(stages[0])))

    def stage_of(self, example: int) -> int:
        """The stage of the steps around an example."""
        return self.begins[max(bisect.bisect_right(self.begins, (example, COUNT.stop)) - 1, 0)][1]


class TextRows:
    """Rows of pretrain.py: the draw says which are synthetic, and blocks and synthetic examples come once a pass each."""

    columns = told_by = ("block", "mixin")

    def __init__(self, history: History, faults: Faults):
        self.faults, self.mixture = faults, Mixture(history.args["seed"], history.args["mixin_percent"])
        self.blocks = Passes("block", history.state.get("pass_blocks"), not history.args.get("shuffle"), faults)
        self.mixin = Passes("synthetic example", history.derived["mixin_rows"] or None, False, faults)
        self.next, self.before = -1, (0, 0)  # a sample, and how many blocks and synthetic examples come before it

    def take(self, step: int, values: dict[str, Any]) -> None:
        """One step, whose examples are the right ones."""
        samples = range(int(values["example"][0]), int(values["example"][-1]) + 1)
        synthetic = self.mixture.is_synthetic(samples)
        for row in np.flatnonzero(((values["mixin"] >= 0) != synthetic) | ((values["block"] >= 0) == synthetic)):
            what = "a synthetic example" if synthetic[row] else "a block"
            self.faults.add("kind of row", f"step {step} row {row} has not {what} alone, which its draw says")
        text, mixin = self.before if samples.start == self.next else self.mixture.drawn(samples.start)
        for passes, rows, first, name in (
            (self.blocks, np.flatnonzero(~synthetic), text, "block"),
            (self.mixin, np.flatnonzero(synthetic), mixin, "mixin"),
        ):
            if len(rows):
                passes.take(step, rows, first + np.arange(len(rows)), values[name][rows], values["digest"][rows])
        count = int(synthetic.sum())
        self.next, self.before = samples.stop, (text + len(samples) - count, mixin + count)


def room(array: np.ndarray, length: int) -> np.ndarray:
    """The array, or a longer one of which `length` items can be used; new ones are zero."""
    if len(array) >= length:
        return array
    try:
        longer = np.zeros(max(length, 2 * len(array)), array.dtype)
    except MemoryError:
        raise ValueError(f"{length} rows are said to be in the run, more than memory holds: see its log and events") from None
    longer[: len(array)] = array
    return longer
