"""What a run has written so far, read also while it goes on: its run.json and the lines of its records."""

from pathlib import Path
from typing import Any

from lm.checks import COUNT, kind_faults
from lm.files import parse_json, read_json

TRAINERS = {  # an argument that only this trainer has, and the report that its runs are for
    "train.py": ("K", "ergodic"),
    "pptrain.py": ("curr_threshold", "curriculum"),
    "pretrain.py": ("mixin_percent", "pretrain"),
}
KEYS = {"step": int, "event": str}  # by which the records of a file are known


def read_run(folder: Path, trainer: str) -> dict[str, Any]:
    """The run.json of a run of `trainer`.

    Raises: FileNotFoundError if there is no run; ValueError if it is of another trainer, naming the report for that.
    """
    if not (folder / "run.json").is_file():
        default = f"SCRATCH_DIR/{Path(trainer).stem}"
        raise FileNotFoundError(f"no run in {folder}: pass the folder that {trainer} wrote, {default} by default")
    run = read_json(folder / "run.json", trainer)
    if faults := kind_faults(folder / "run.json", run, {"args": dict}):
        raise ValueError(f"{faults[0]}: pass another folder")
    for name, (argument, report) in TRAINERS.items():
        if argument in run["args"] and name != trainer:
            raise ValueError(f"{folder} is a run of {name}, one of {trainer} is needed: pass its runs to report.py {report}")
    if TRAINERS[trainer][0] not in run["args"]:
        found = f"{folder} is a run of {run.get('script')!s:.80}"
        raise ValueError(f"{found}, one of {trainer} is needed: pass another folder")
    return run


def whole_lines(path: Path, key: str) -> list[dict[str, Any]]:
    """The records of a file, if there is one, without the half line that a run leaves while it writes, or when it is killed.

    Raises: ValueError naming the line, if a whole one is not an object that has `key`, "step" or "event".
    """
    rows = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    for number, line in enumerate(lines, 1):
        here, remedy = f"{path} line {number}", "mend or remove that line"
        row = parse_json(line, f"{here} is no record as it", remedy)
        if not isinstance(row, dict) or type(row.get(key)) is not KEYS[key]:
            raise ValueError(f"{here} is no record with {key} ({line!r:.80}): {remedy}")
        rows.append(row)
    return rows


def is_finished(folder: Path, last_step: int, trainer: str) -> bool:
    """Whether a run whose last record is of this step has ended there: its final model is of that step."""
    path = folder / "final/about.json"
    if not path.is_file():
        return False
    about = read_json(path, trainer)
    if faults := kind_faults(path, about, {"step": COUNT}):
        raise ValueError(f"{faults[0]}: run {trainer} again")
    return about["step"] >= last_step
