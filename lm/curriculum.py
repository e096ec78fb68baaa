"""The course of a pre-pretraining run, read from its records: the stages it passed, and where it is."""

import math
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from lm.run_records import is_finished, read_run, whole_lines
from lm.search_evaluation import read_search

MADE_BY = "pptrain.py"


@dataclass(frozen=True)
class Course:
    """What is known of a run, be it finished or not."""

    folder: Path
    run: dict[str, Any]  # run.json
    train: list[dict[str, Any]]  # the records of steps
    held_out: list[dict[str, Any]]  # the records of evaluations: before step 1, and after the last step of every stage passed
    events: list[dict[str, Any]]  # starts, stops, ...
    searches: list[dict[str, Any]]  # what evaluate_model.py search measured, each with its file's name as "name"

    @property
    def last_step(self) -> int:
        """The last step that there is a record of."""
        return max([record["step"] for record in self.train + self.held_out], default=0)

    @property
    def passed(self) -> list[dict[str, Any]]:
        """The evaluations that ended a stage."""
        return [record for record in self.held_out if record["step"] > 0]


def read_course(folder: Path) -> Course:
    """Read a run's records as far as they go.

    Raises: FileNotFoundError if there is no run; ValueError if it is of another trainer, or a record cannot be read.
    """
    run = read_run(folder, MADE_BY)
    searches = [read_search(path) | {"name": path.stem} for path in sorted((folder / "evaluation").glob("*_search_*.json"))]
    train, held_out = (whole_lines(folder / "logs" / name, "step") for name in ("train.jsonl", "eval.jsonl"))
    return Course(folder, run, train, held_out, whole_lines(folder / "events.jsonl", "event"), searches)


def next_stage(stage: int, stage_step: int, last: int) -> int:
    """The stage after `stage`: `stage_step` further up but not past the last one, which every run trains; last + 1 after it."""
    return min(stage + stage_step, last) if stage < last else last + 1


def stages_passed(course: Course) -> list[dict[str, Any]]:
    """A row for each stage passed, with what it took; null where the records do not tell."""
    train, seconds = {record["step"]: record for record in course.train}, training_seconds(course)
    rows, before = [], {"step": 0, "tokens": 0, "seconds": 0.0}
    for record in course.passed:
        ending = train.get(record["step"], {})
        now = {"step": record["step"], "tokens": ending.get("tokens"), "seconds": seconds.get(record["step"])}
        took = {key: None if None in (now[key], before[key]) else now[key] - before[key] for key in now}
        rows.append(
            {
                "stage": record["stage"],
                "passed_at_step": record["step"],
                "steps": took["step"],
                "examples": took["step"] * course.run["derived"]["effective_batch"],
                "tokens": took["tokens"],
                "accuracy": ending.get("curr_acc"),
                "heldout_accuracy": record["heldout_acc"],
                "heldout_loss": record["heldout_loss"],
                "seconds": took["seconds"],
            }
        )
        before = now
    return rows


def training_seconds(course: Course) -> dict[int, float]:
    """Seconds of training up to each recorded step, its evaluation included; the time between a stop and going on is none."""
    begins = [event["timestamp"] for event in course.events if event["event"] in ("started", "resumed")]
    records = sorted(
        (record["timestamp"], record["step"]) for record in course.train + course.held_out if "timestamp" in record
    )
    seconds, total, before = {}, 0.0, -math.inf
    for timestamp, step in records:
        since = max([before, *(begin for begin in begins if begin <= timestamp)])
        total += timestamp - since if since > -math.inf else 0.0
        seconds[step], before = total, timestamp
    return seconds


def whereabouts(course: Course) -> dict[str, Any]:
    """Stage and step after the last record, whether the run has ended there, and how many examples were too long so far."""
    args, step, stages = course.run["args"], course.last_step, course.run["derived"]["stages"]
    stage = course.train[-1]["stage"] if course.train else args["start_stage"]
    if course.passed and course.passed[-1]["step"] == step:
        stage = next_stage(course.passed[-1]["stage"], args["stage_step"], stages)
    return {
        "stage": stage,
        "stages": stages,
        "step": step,
        "finished": is_finished(course.folder, step, MADE_BY),
        "too_long": course.train[-1]["too_long"] if course.train else 0,
    }


def where_line(course: Course) -> str:
    """The same in words."""
    now = whereabouts(course)
    done = now["stage"] > now["stages"]
    stage = f"all {now['stages']} stages passed" if done else f"in stage {now['stage']} of {now['stages']}"
    end = "finished" if now["finished"] else "not finished"
    return (
        f"{course.folder}: {stage}, step {now['step']:,}, {end};"
        f" {now['too_long']:,} examples were left out as longer than --seq_len {course.run['args']['seq_len']}"
    )


def rows_for_screen(course: Course) -> list[list[str]]:
    """The stages passed as cells of a table, its head first."""
    cells = [["stage", "steps", "examples", "tokens", "accuracy", "held-out accuracy", "held-out loss", "time"]]
    for row in stages_passed(course):
        counts = [_cell(row[key], ",") for key in ("steps", "examples", "tokens")]
        measured = [_cell(row[key], ".4f") for key in ("accuracy", "heldout_accuracy", "heldout_loss")]
        time = "-" if row["seconds"] is None else str(timedelta(seconds=round(row["seconds"])))
        cells.append([str(row["stage"]), *counts, *measured, time])
    return cells


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def search_lines(course: Course) -> list[str]:
    """A line for each evaluation of generated answers."""
    lines = []
    for found in course.searches:
        overall = found["overall"]
        chance = "" if overall["chance"] is None else f", a random child {overall['chance']:.4f}"
        accuracy = f"{overall['accuracy']:.4f} ± {overall['accuracy_se']:.4f}"
        lines.append(
            f"{course.folder}: {found['name']}: {accuracy} of {overall['count']:,} generated answers are right{chance}"
        )
    return lines
