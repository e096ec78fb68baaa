"""How a model answered questions of graph search: what is right, how often it would be by chance, and the results on disk.

NAME.json says what was measured: overall and for each lookahead the share of right answers beside that of guessing.
NAME.jsonl holds a line for each question: {"index": row of the split, "lookahead", "answer", "right"}.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lm.files import read_json, sha256, whole_file, write_json
from lm.questions import Question, first_word
from lm.tables import aligned

FORMAT = "search-1"
UNKNOWN = "unknown"  # the lookahead of a question that is not worded like ours
AGAIN = "run evaluate_model.py search --overwrite"


def score(questions: Sequence[Question], continuations: Sequence[str]) -> list[dict]:
    """A row for each question: an answer is right if it is any of the valid ones, letter by letter."""
    rows = []
    for asked, continuation in zip(questions, continuations, strict=True):
        answer = first_word(continuation)
        rows.append({"index": asked.index, "lookahead": asked.lookahead, "answer": answer, "right": answer in asked.answers})
    return rows


def search_record(questions: Sequence[Question], rows: Sequence[dict]) -> dict:
    """Accuracy and chance of all questions together ("overall"), and of those of each lookahead, the unknown last."""
    known = sorted({asked.lookahead for asked in questions if asked.lookahead is not None})
    groups: dict[str, list[int]] = {str(lookahead): [] for lookahead in known}
    for number, asked in enumerate(questions):
        groups.setdefault(UNKNOWN if asked.lookahead is None else str(asked.lookahead), []).append(number)
    right, chances = [row["right"] for row in rows], [asked.chance for asked in questions]
    of = {name: _share([right[n] for n in numbers], [chances[n] for n in numbers]) for name, numbers in groups.items()}
    return {"overall": _share(right, chances), "lookaheads": of}


def _share(right: Sequence[bool], chances: Sequence[float | None]) -> dict:
    """The standard error is binomial; the interval holds where few were asked, or all answers are right."""
    accuracy, count = float(np.mean(right)), len(right)
    return {
        "count": count,
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / count),
        "interval_95": wilson_interval(accuracy, count),
        "chance": None if None in chances else float(np.mean(chances)),
    }


def wilson_interval(share: float, count: int) -> list[float]:
    """The shares that `count` independent answers do not reject at 5 percent (Wilson, JASA 22, 1927, 209-212)."""
    z2 = 1.959964**2 / count
    half = math.sqrt(share * (1 - share) * z2 + z2**2 / 4)
    return [max(0.0, (share + z2 / 2 - half) / (1 + z2)), min(1.0, (share + z2 / 2 + half) / (1 + z2))]


def search_table(record: dict) -> str:
    """Accuracy beside chance for each lookahead and overall, for the screen."""
    rows = [("lookahead", "accuracy", "95 % interval", "chance", "questions")]
    for name, row in [*record["lookaheads"].items(), ("overall", record["overall"])]:
        chance = "-" if row["chance"] is None else f"{row['chance']:.4f}"
        accuracy, (low, high) = f"{row['accuracy']:.4f} ± {row['accuracy_se']:.4f}", row["interval_95"]
        rows.append((name, accuracy, f"{low:.4f} - {high:.4f}", chance, f"{row['count']:,}"))
    left_out = f"\n{record['num_too_long']:,} questions were left out: they are longer than the model takes"
    return aligned(rows) + (left_out if record["num_too_long"] else "")


def write_search(path: Path, record: dict, rows: Sequence[dict]) -> None:
    """Write `path` (NAME.json) and NAME.jsonl beside it; the JSON last, with the checksum of the other."""
    answers = path.with_suffix(".jsonl")
    with whole_file(answers) as partial:
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    write_json(path, {"format": FORMAT, **record, "answers": {"file": answers.name, "sha256": sha256(answers)}})


def read_search(path: Path) -> dict:
    """The record that `write_search` wrote.

    Raises: FileNotFoundError if there is none; ValueError if it is of another format, or the two files do not belong together.
    """
    record = read_json(path, "evaluate_model.py search")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is not in format {FORMAT}: {AGAIN}")
    answers = path.with_name(record["answers"]["file"])
    if not answers.is_file() or sha256(answers) != record["answers"]["sha256"]:
        raise ValueError(f"{answers} is not the file {path.name} was written with: {AGAIN}")
    return record
