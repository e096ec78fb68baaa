"""Small real data, runs on it that nothing disturbs, and what a disturbed one must not differ in."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import graph_runs
import packs
import safetensors
from launch import Launch, arguments
from text import byte_level_bpe, write_store
from training import TINY

import build_data_splits
from lm.args import parse
from lm.checkpoint import Checkpoints, damage
from lm.files import sha256
from lm.runlog import records

SCRIPTS = {"train": "train.py", "pptrain": "pptrain.py", "pretrain": "pretrain.py", "fsdp": "pretrain.py"}
TRAINERS = tuple(SCRIPTS)
Detail = dict[str, Any]  # what a trial did, for the record


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to."""

    folder: Path
    result: dict[str, Any]
    seconds: float


@dataclass
class World:
    """Small real data for every trainer, and runs on it that nothing disturbs, each made when it is first asked for."""

    folder: Path
    runs: dict[Any, Undisturbed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokenizer = byte_level_bpe()
        self.folder.mkdir(parents=True)
        write_store(self.folder / "papers")
        tokenizer.save_pretrained(self.folder / "tokenizer")
        sizes = {"eval_size": 20, "test_size": 40, "mixin_size": 7, "num_processes": 1}
        for name, task in {"stages": (36, 6), "mixin": (12, 2)}.items():
            options = sizes | {"scratch_dir": self.folder / name, "max_input_size": task[0], "max_lookahead": task[1]}
            build_data_splits.main(parse(build_data_splits.Args, arguments(**options)))
            next((self.folder / name / "data/nl_splits").glob("mis*")).rename(self.folder / f"{name}_splits")
        packs.write_pack(self.folder / "pack", tokenizer)

    def options(self, trainer: str) -> dict[str, Any]:
        """The arguments of a run of about forty steps, all but its folder."""
        here = self.folder
        graphs = {"scratch_dir": here, "tokenizer": here / "tokenizer", "data_dir": here / "stages_splits"}
        text = {"scratch_dir": here, "c4_dir": here / "pack", "data_dir": here / "mixin_splits", "pptrain_checkpoint": "none"}
        pretrain = packs.SETTINGS | text | {"total_steps": 36, "model": "neox-64x2"}
        own = {
            "train": TINY | {"data_dir": here / "papers"},
            "pptrain": graph_runs.CURRICULUM | graphs,
            "pretrain": pretrain,
            "fsdp": pretrain | {"fsdp": "full_shard"},
        }
        return own[trainer] | {"ledger": True, "force_cpu": True}

    def start(self, trainer: str, folder: Path, processes: int = 1, before: Callable | None = None, **changes: Any) -> Launch:
        """A run in `folder`, on its way."""
        options = self.options(trainer) | {"output_dir": folder} | changes
        return Launch(SCRIPTS[trainer], options, Path(f"{folder}.out"), processes, before)

    def finish(self, trainer: str, folder: Path, processes: int = 1, **changes: Any) -> None:
        """Run it to its end."""
        launch = self.start(trainer, folder, processes, **changes)
        assert launch.wait() == [0] * processes, launch.said()

    def undisturbed(self, trainer: str, processes: int = 1, name: str = "", prepare: Callable | None = None) -> Undisturbed:
        """The run that a trial's is compared with; `prepare` may put something into its folder, `name` tells it from others."""
        key = (trainer, processes, name)
        if key not in self.runs:
            folder = self.folder / "undisturbed" / f"{trainer}_{processes}{name}"
            folder.parent.mkdir(exist_ok=True)
            if prepare is None:  # the first process of all is slow: once for the clock
                self.finish(trainer, folder, processes)
                shutil.rmtree(folder)
            else:
                prepare(folder)
            before = time.monotonic()
            self.finish(trainer, folder, processes)
            self.runs[key] = Undisturbed(folder, whole(folder), time.monotonic() - before)
        return self.runs[key]


def whole(folder: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on what happened to it: its logs, its ledger, each file of its models."""
    models = [path for model in (newest_of(folder), folder / "final", folder / "best") for path in model.glob("*")]
    divided = any(path.name.startswith("shard-") for path in models)
    manifest = newest_of(folder) / "manifest.json"
    files = {str(path.relative_to(folder)): content_sha256(path) for path in models if not (divided and path == manifest)}
    logs = {"train": records(folder, "train"), "eval": records(folder, "eval")}
    return files | logs | {"ledger": (folder / "logs/ledger.jsonl").read_text()}


def content_sha256(path: Path) -> str:
    """Of a file's bytes; of a part of a divided model, whose header safetensors writes in any order, of what it holds."""
    if not path.name.startswith("shard-"):
        return sha256(path)
    with safetensors.safe_open(path, "np") as opened:
        held = [sorted(opened.metadata().items())] + [
            (name, opened.get_tensor(name).tobytes()) for name in sorted(opened.keys())
        ]
    return hashlib.sha256(repr(held).encode()).hexdigest()


def check_same(folder: Path, expected: dict[str, Any]) -> None:
    """Every part of the run's outcome is as expected, and its log has every step once."""
    found = whole(folder)
    differing = [name for name in expected | found if expected.get(name) != found.get(name)]
    assert not differing, f"{folder}: {', '.join(differing)} differ from the undisturbed run"
    steps = [record["step"] for record in found["train"]]
    assert steps == sorted(set(steps)), f"{folder}: the log has steps {steps}"


def check_checkpoints(folder: Path) -> None:
    """Whatever is under a final name is whole."""
    faults = {path.name: damage(path) for path in Checkpoints(folder / "checkpoints", 3).paths()}
    assert not any(faults.values()), f"{folder}: {faults}"


def newest_of(folder: Path) -> Path:
    """The newest checkpoint of a run, good or not."""
    return Checkpoints(folder / "checkpoints", 3).paths()[-1]


def count_steps(folder: Path) -> int:
    """Steps in the ledger."""
    path = folder / "logs/ledger.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def count_events(folder: Path, *names: str) -> int:
    """How many of these events a run has written."""
    lines = (folder / "events.jsonl").read_bytes().split(b"\n")[:-1] if (folder / "events.jsonl").exists() else []
    return sum(json.loads(line)["event"] in names for line in lines)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def until(true: Callable[[], bool], seconds: float) -> bool:
    """Wait until it is true, no longer than this; say whether it is."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True
