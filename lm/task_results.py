"""What a model made of benchmark tasks on disk, and as a table: NAME.json has the measures, NAME.jsonl every question.

NAME.jsonl has all that the measures are computed from, a line for each question: {"task", "subject" (of mmlu only), "doc_id",
"right": index of the right choice, "log_likelihoods": one for each choice, in nats, "num_chars", "num_tokens": of what they are
of, "unconditional": given "Answer:" alone, or null, "cut": whether the model takes less than all of the prompt}. Of a text it
has {"task", "doc_id", "log_likelihood": in nats, "num_tokens", "cut"}, of LAMBADA's last words "greedy": whether each of its
tokens was the likeliest, of whole documents "num_words" and "num_bytes".
"""

import json
from collections.abc import Sequence
from pathlib import Path

from lm.choice_measures import Choices, chance, macro_average, mean_measures
from lm.files import read_json, sha256, whole_file, write_json
from lm.tables import aligned

FORMAT = "tasks-1"
AGAIN = "run evaluate_model.py tasks --overwrite"
SHOWN = ("acc_raw", "acc_per_char", "norm_correct_prob_per_char")  # chance is the same for all of them


def choices_of(row: dict) -> Choices:
    """The question that a line of NAME.jsonl tells of."""
    return Choices(**{name: row[name] for name in ("right", "log_likelihoods", "num_chars", "num_tokens", "unconditional")})


def choice_summary(rows: Sequence[dict], primary: str) -> dict:
    """The measures of the questions of one task, or of one subject of it."""
    questions = [choices_of(row) for row in rows]
    return {
        "num_items": len(rows),
        "num_cut": sum(row["cut"] for row in rows),
        "chance": chance(questions),
        "measures": mean_measures(questions, primary),
    }


def over_subjects(subjects: dict[str, dict]) -> dict:
    """The summary of a task of several subjects, each of which counts alike."""
    parts = list(subjects.values())
    return {
        "num_items": sum(part["num_items"] for part in parts),
        "num_cut": sum(part["num_cut"] for part in parts),
        "chance": sum(part["chance"] for part in parts) / len(parts),
        "measures": macro_average([part["measures"] for part in parts]),
        "subjects": subjects,
    }


def task_table(record: dict) -> str:
    """Every score with its standard error and its chance level, for the screen.

    A line for each task of questions, subjects below their task, chance being that of all scores in the line; a line for each
    score of a text.
    """
    questions = {name: task for name, task in record["tasks"].items() if not _is_text(task)}
    rows: list[tuple[str, ...]] = [("task", "primary", "value", "chance", *SHOWN, "items")]
    for name, task in questions.items():
        rows.append(_line(name, task["primary"], task))
        rows += [_line(f"  {subject}", "", part) for subject, part in task.get("subjects", {}).items()]
    tables = [aligned(rows)] if questions else []
    scores = [("text", "score", "value", "chance", "items")]
    for name, task in record["tasks"].items():
        if name not in questions:
            shown = [(measure, found) for measure, found in task["measures"].items() if measure != "primary_metric"]
            scores += [(name, of, _value(found), f"{found['chance']:,.4g}", f"{task['num_items']:,}") for of, found in shown]
    tables += [aligned(scores)] if len(scores) > 1 else []
    if num_cut := sum(task["num_cut"] for task in record["tasks"].values()):
        tables.append(
            f"{num_cut:,} questions are longer than the {record['measured']['seq_len']} tokens that the model takes:"
            " their beginnings were cut off"
        )
    return "\n".join(tables)


def _is_text(task: dict) -> bool:
    return "chance" in task["measures"].get(task["primary"], {})


def _line(name: str, primary: str, part: dict) -> tuple[str, ...]:
    shown = [_value(part["measures"][measure]) for measure in ("primary_metric", *SHOWN)]
    return (name, primary, shown[0], f"{part['chance']:.4f}", *shown[1:], f"{part['num_items']:,}")


def _value(found: dict) -> str:
    """A score with its standard error, which a single item has none of."""
    digits = ".4f" if abs(found["value"]) < 1_000 else ",.4g"
    return f"{found['value']:{digits}}" + ("" if found["se"] is None else f" ± {found['se']:{digits}}")


def write_tasks(path: Path, record: dict, rows: Sequence[dict]) -> None:
    """Write `path` (NAME.json) and NAME.jsonl beside it; the JSON last, with the checksum of the other."""
    items = path.with_suffix(".jsonl")
    with whole_file(items) as partial:
        partial.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")
    write_json(path, {"format": FORMAT, **record, "items": {"file": items.name, "sha256": sha256(items)}})


def read_record(path: Path) -> dict:
    """The record that `write_tasks` wrote.

    Raises: FileNotFoundError if there is none; ValueError if it is of another format, or the two files do not belong together.
    """
    record = read_json(path, "evaluate_model.py tasks")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is not in format {FORMAT}: {AGAIN}")
    items = path.with_name(record["items"]["file"])
    if not items.is_file() or sha256(items) != record["items"]["sha256"]:
        raise ValueError(f"{items} is not the file {path.name} was written with: {AGAIN}")
    return record


def read_tasks(path: Path) -> dict[str, dict[str, float]]:
    """{task: {measure: value}} of the results in `path`; "primary_metric" is each task's own. Raises: as `read_record` does."""
    tasks = read_record(path)["tasks"]
    return {name: {measure: found["value"] for measure, found in task["measures"].items()} for name, task in tasks.items()}
