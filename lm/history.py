"""What a run has written beside its ledger: run.json, log, events, and the state of its newest good checkpoint, all checked."""

from pathlib import Path
from typing import Any

from lm.checkpoint import Checkpoints, read_fields
from lm.checks import COUNT, Kinds, kind_faults
from lm.files import read_json
from lm.run_records import TRAINERS, whole_lines

SEED = {"seed": range(2**63)}
ARGS: dict[str, Kinds] = {  # what of a run's arguments decides its rows
    "train.py": SEED | {"data_dir": str, "sequence_length": COUNT, "sampling": str, "category_weighting": str},
    "pptrain.py": SEED | {"data_dir": str, "seq_len": COUNT, "tokenizer": str},
    "pretrain.py": SEED | {"data_dir": str, "c4_dir": str, "mixin_percent": float, "mixin_loss": str},
}
BEGUN = {"step": COUNT}
EVENTS: dict[str, Kinds] = {"started": BEGUN, "resumed": BEGUN}
EVENTS |= {"rolled_back": {"from_step": COUNT, "to_step": COUNT, "data_steps_left_out": list}}
SIZE = range(1, 2**31)
DERIVED = {"train.py": {"eligible_papers": SIZE}, "pptrain.py": {}, "pretrain.py": {"mixin_rows": range(SIZE.stop)}}


class History:
    """As much of a run as there is when it is looked at.

    Raises: FileNotFoundError if there is no run; ValueError naming the file, and line, that cannot be.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        where = folder / "run.json"
        run = read_json(where, "the training script, and pass the folder that it wrote")
        _refuse(kind_faults(where, run, {"args": dict, "derived": dict}), "pass another folder")
        self.args, self.derived = run["args"], run["derived"]
        trainer = next((name for name, (argument, _) in TRAINERS.items() if argument in self.args), None)
        if trainer is None:
            found = f"{folder} is a run of {run.get('script')!s:.80}"
            raise ValueError(f"{found}, one of {', '.join(TRAINERS)} is needed: pass another folder")
        faults = kind_faults(f"{where} args", self.args, ARGS[trainer])
        faults += kind_faults(f"{where} derived", self.derived, {"effective_batch": SIZE} | DERIVED[trainer])
        _refuse(faults, "pass another folder")
        self.trainer = trainer
        self._sizes = self._sizes_now()
        self.events = self._events()
        self.log = self._log()
        self.state = self._state()
        self.last_step = max([*self.begins, self.state.get("step", 0), *(step for step, _ in self.log[-1:])])

    @property
    def begins(self) -> set[int]:
        """The step after which each session went on."""
        return {0} | {event["step"] for event in self.events if "step" in event}

    @property
    def stretches(self) -> list[list[int]]:
        """First and last data step of each stretch that was stepped over."""
        return [event["data_steps_left_out"] for event in self.events if "to_step" in event]

    @property
    def most_offset(self) -> int:
        """How much further than its number in the data a step can be."""
        return _most_offset(self.events)

    def has_moved(self) -> bool:
        """Whether the run has gone back, or on in another session, since this was read."""
        smaller = any(now < then for then, now in zip(self._sizes, self._sizes_now(), strict=True))
        return smaller or self._events() != self.events

    def _sizes_now(self) -> list[int]:
        paths = [self.folder / "logs" / name for name in ("ledger.jsonl", "train.jsonl")]
        return [path.stat().st_size if path.is_file() else 0 for path in paths]

    def _events(self) -> list[dict[str, Any]]:
        """Those after which another session, or other data, follow."""
        path, found = self.folder / "events.jsonl", []
        for number, event in enumerate(whole_lines(path, "event"), 1):
            if event["event"] in EVENTS:
                _refuse(_event_faults(f"{path} line {number}", event, _most_offset(found)), "mend or remove that line")
                found.append(event)
        return found

    def _state(self) -> dict[str, Any]:
        """That of the newest good checkpoint, or nothing if there is none."""
        newest = Checkpoints(self.folder / "checkpoints", keep=1).newest_good()
        kinds = {"step": int, "identity": dict} | ({"pass_blocks": int | None} if self.trainer == "pretrain.py" else {})
        try:
            return read_fields(newest / "state.json", kinds) if newest else {}
        except FileNotFoundError:  # the run has just replaced it
            return {}

    def _log(self) -> list[tuple[int, int]]:
        """Step and stage (0 if there are no stages) of each record."""
        path, found = self.folder / "logs/train.jsonl", []
        kinds = {"step": COUNT} | ({"stage": COUNT} if self.trainer == "pptrain.py" else {})
        for number, record in enumerate(whole_lines(path, "step"), 1):
            _refuse(kind_faults(f"{path} line {number}", record, kinds), "mend or remove that line")
            found.append((record["step"], record.get("stage", 0)))
        return found


def _event_faults(where: str, event: dict[str, Any], offset: int) -> list[str]:
    """What in an event cannot be, when steps were at most `offset` further in the data than their number before it."""
    if (faults := kind_faults(where, event, EVENTS[event["event"]])) or event["event"] != "rolled_back":
        return faults
    stretch, first, last = event["data_steps_left_out"], event["to_step"], event["from_step"] - 1 + offset
    if [type(step) for step in stretch] == [int, int] and first <= stretch[0] <= stretch[1] <= last:
        return []
    return [f"{where} leaves out data steps {stretch!r:.80}, the first and last of a stretch from {first} to {last} are needed"]


def _most_offset(events: list[dict[str, Any]]) -> int:
    return max([event["data_steps_left_out"][1] + 1 - event["to_step"] for event in events if "to_step" in event], default=0)


def _refuse(faults: list[str], remedy: str) -> None:
    if faults:
        raise ValueError(f"{faults[0]}: {remedy}")
