"""What a run has written so far, read also while it goes on: its run.json and the lines of its records."""

import json
from pathlib import Path
from typing import Any

from lm.files import read_json

TRAINERS = {  # an argument that only this trainer has, and the report that its runs are for
    "train.py": ("K", "ergodic"),
    "pptrain.py": ("curr_threshold", "curriculum"),
    "pretrain.py": ("mixin_percent", "pretrain"),
}


def read_run(folder: Path, trainer: str) -> dict[str, Any]:
    """The run.json of a run of `trainer`.

    Raises: FileNotFoundError if there is no run; ValueError if it is of another trainer, naming the report for that.
    """
    if not (folder / "run.json").is_file():
        default = f"SCRATCH_DIR/{Path(trainer).stem}"
        raise FileNotFoundError(f"no run in {folder}: pass the folder that {trainer} wrote, {default} by default")
    run = read_json(folder / "run.json", trainer)
    for name, (argument, report) in TRAINERS.items():
        if argument in run["args"] and name != trainer:
            raise ValueError(f"{folder} is a run of {name}, one of {trainer} is needed: pass its runs to report.py {report}")
    if TRAINERS[trainer][0] not in run["args"]:
        raise ValueError(f"{folder} is a run of {run.get('script')}, one of {trainer} is needed: pass another folder")
    return run


def whole_lines(path: Path, key: str) -> list[dict[str, Any]]:
    """The records of a file, if there is one, without the half line that a run leaves while it writes, or when it is killed.

    Raises: ValueError naming the line, if a whole one is not an object that has `key`.
    """
    rows = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            rows[-1][key]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} line {number} is no record ({line!r:.80}): mend or remove that line") from None
    return rows


def is_finished(folder: Path, last_step: int, trainer: str) -> bool:
    """Whether a run whose last record is of this step has ended there: its final model is of that step."""
    about = folder / "final/about.json"
    return about.is_file() and read_json(about, trainer)["step"] >= last_step
