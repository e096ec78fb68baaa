"""What a Chrome trace of torch.profiler says: which part of each step took how long, and which operators cost most."""

import bisect
import gzip
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

PARTS = ("data", "to_device", "forward", "backward", "wait", "clip", "optimizer", "log", "evaluate", "checkpoint", "other")
STEP = "ProfilerStep#"  # torch's name for its n-th step
ON_DEVICE, LAUNCHES = ("kernel", "gpu_memcpy", "gpu_memset"), ("cuda_runtime", "cuda_driver")
SHOWN = 10  # operators
Event = dict[str, Any]


@dataclass(frozen=True)
class Trace:
    """Times in milliseconds; those on the device are None without one."""

    rows: list[dict[str, Any]]  # for each step and each part of PARTS: step, part, ms, share (of the step), device_ms
    operators: list[dict[str, Any]]  # name, calls, ms (its own, without the operators that it calls), device_ms


class Stretches:
    """Ranges of one thread that lie within each other, as stretches of time, each with the innermost range that covers it."""

    def __init__(self, ranges: Iterable[tuple[float, float, Any]]):
        self.stretches: list[tuple[float, float, Any]] = []
        opened, at = [], 0.0
        for start, end, value in [*sorted(ranges, key=lambda r: (r[0], -r[1])), (float("inf"), 0.0, None)]:
            while opened and opened[-1][0] <= start:
                until, of = opened.pop()
                self._add(at, until, of)
                at = max(at, until)
            if opened:
                self._add(at, start, opened[-1][1])
            opened.append((end, value))
            at = start
        self.starts = [start for start, _, _ in self.stretches]

    def _add(self, start: float, end: float, value: Any) -> None:
        if end > start:
            self.stretches.append((start, end, value))

    def at(self, moment: float) -> Any:
        """The innermost range at a moment, or None."""
        number = bisect.bisect_right(self.starts, moment) - 1
        return self.stretches[number][2] if number >= 0 and moment < self.stretches[number][1] else None


def read_trace(path: Path, steps: Mapping[int, int]) -> Trace:
    """Read a trace (JSON, gzip).

    Args:
        steps: {torch's number of a step: the run's}; others are left out, such as one that was not finished.
    """
    events = [event for event in orjson.loads(gzip.decompress(path.read_bytes()))["traceEvents"] if event["ph"] == "X"]
    marks = [event for event in events if event.get("cat") == "user_annotation"]
    numbered = {int(mark["name"].removeprefix(STEP)): mark for mark in marks if mark["name"].startswith(STEP)}
    ranges = [(*_span(mark), (steps[number], "other")) for number, mark in numbered.items() if number in steps]
    outer, main = Stretches(ranges), {mark["tid"] for mark in numbered.values()}
    for mark in marks:
        within = outer.at(mark["ts"])
        if mark["name"] in PARTS and mark["tid"] in main and within:
            ranges.append((*_span(mark), (within[0], mark["name"])))
    parts = Stretches(ranges)
    launched = _launched(events)
    return Trace(_rows(parts, launched), _operators(events, parts, launched))


def _span(event: Event) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def _launched(events: list[Event]) -> list[tuple[float, int, float]] | None:
    """For what ran on a device: when and by which thread it was launched, and its milliseconds; None without a device."""
    device = [event for event in events if event.get("cat") in ON_DEVICE]
    launches = {event["args"]["correlation"]: event for event in events if event.get("cat") in LAUNCHES}
    pairs = [(launches.get(event["args"]["correlation"]), event["dur"] / 1000) for event in device]
    return [(by["ts"], by["tid"], ms) for by, ms in pairs if by] if device else None


def _rows(parts: Stretches, launched: list[tuple[float, int, float]] | None) -> list[dict[str, Any]]:
    """By the host's clock; work on the device counts for the part in which any thread launched it."""
    host, device = defaultdict(float), defaultdict(float)
    for start, end, of in parts.stretches:
        host[of] += (end - start) / 1000
    for moment, _, ms in launched or []:
        device[parts.at(moment)] += ms
    rows = []
    for step in sorted({step for step, _ in host}):
        whole = sum(host[step, part] for part in PARTS)
        for part in PARTS:
            ms, on_device = host[step, part], None if launched is None else device[step, part]
            rows.append({"step": step, "part": part, "ms": ms, "share": ms / whole, "device_ms": on_device})
    return rows


def _operators(events: list[Event], parts: Stretches, launched: list[tuple[float, int, float]] | None) -> list[dict[str, Any]]:
    threads = defaultdict(list)
    calls, host, device = (defaultdict(float) for _ in range(3))
    for event in events:
        if event.get("cat") == "cpu_op" and parts.at(event["ts"]):
            threads[event["tid"]].append((*_span(event), event["name"]))
            calls[event["name"]] += 1
    stretches = {thread: Stretches(ranges) for thread, ranges in threads.items()}
    for of_thread in stretches.values():
        for start, end, name in of_thread.stretches:
            host[name] += (end - start) / 1000
    for moment, thread, ms in launched or []:
        if thread in stretches and (name := stretches[thread].at(moment)):
            device[name] += ms
    cost = host if launched is None else device
    names = sorted(calls, key=lambda name: -cost[name])[:SHOWN]
    on_device = {name: None if launched is None else device[name] for name in names}
    return [{"name": name, "calls": calls[name], "ms": host[name], "device_ms": on_device[name]} for name in names]


def summary(trace: Trace) -> dict[str, Any]:
    """The same for a mean step: its milliseconds, its parts and the operators that cost most."""
    count = len(trace.rows) // len(PARTS)
    step_ms = sum(row["ms"] for row in trace.rows) / count

    def mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
        ms, device = (sum(row[key] or 0.0 for row in rows) / count for key in ("ms", "device_ms"))
        return {"ms": ms, "share": ms / step_ms, "device_ms": None if rows[0]["device_ms"] is None else device}

    parts = [{"part": part} | mean([row for row in trace.rows if row["part"] == part]) for part in PARTS]
    operators = [{"name": row["name"], "calls": row["calls"] / count} | mean([row]) for row in trace.operators]
    return {"step_ms": step_ms, "parts": parts, "operators": operators}


def lines_of(about: dict[str, Any]) -> list[str]:
    """The lines of a table for the screen."""
    steps, on_device = about["steps"], about["parts"][0]["device_ms"] is not None
    first = f"a step of {steps[0]} to {steps[-1]} took {about['step_ms']:.1f} ms while it was traced"
    lines = [f"{first} ({about['tokens_per_sec']:,.0f} tokens/s on this process)"]
    header = f"{'ms':>9}{'share':>8}" + (f"{'device ms':>11}" if on_device else "")
    for title, rows in (("part", about["parts"]), ("operator, without those it calls", about["operators"])):
        lines.append(f"{title:<40}{header}")
        for row in rows:
            device = f"{row['device_ms']:>11.2f}" if on_device else ""
            lines.append(f"{row.get('part') or row['name'][:39]:<40}{row['ms']:>9.2f}{row['share']:>8.1%}{device}")
    return lines
