"""What does a run survive? Kills, signals, damage, poison, full disks, broken networks and preemption, tried many times.

    python -m benchmarks.faults                                   # all of it: an hour and a half on two cores
    python -m benchmarks.faults --faults kill nan --trials 20     # some of it

Every trial starts real processes of the real scripts on real files, harms them, lets them go on, and compares what they end
with, byte for byte, with a run that nothing happened to (tests/trials*.py are the trials, tests/test_faults.py makes a few).
A fault is drawn from (--seed, fault, number); when it strikes is up to the clock. Full disks need root, SLURM its packages.

Writes  OUTPUT_DIR/faults.jsonl, a line for each trial, and the folder of each trial that failed; prints a table
"""

import contextlib
import functools
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # the trials are what the tests make

from conftest import start_s3_server
from slurm import start_cluster, why_not
from trials import killed, poisoned, resized, signalled
from trials_damage import DATA, damaged_checkpoint, damaged_data, damages, interrupted
from trials_outside import S3_FAULTS, SLURM_FAULTS, can_mount, disk_full, packing_disk_full, requeued, s3_fault
from world import TRAINERS, World, newest_of

from lm.args import below, check, parse


@dataclass(frozen=True, kw_only=True)
class Args:
    """Harm runs, and see whether anything is lost."""

    faults: tuple[str, ...] = ()
    """Which of kill, signal, resize, checkpoint, data, nan, disk, shard, s3, slurm; all by default."""
    trials: int | None = None
    """Trials of each; by default as many as the table in notes.md has, and every damage there is."""
    seed: int = 0
    """Decides the faults."""
    output_dir: Path = Path(".cache/faults")
    """Folder of the records, and of what failed."""


class Fault(NamedTuple):
    """One kind of fault: what is tried, how often, and what of its details is worth a total."""

    what: str
    trials: int
    total: str = ""


FAULTS = {
    "kill": Fault("SIGKILL at random moments, again and again", 200, "kills"),
    "signal": Fault("SIGTERM, SIGUSR1, Ctrl-C to one process or all", 60, "stops"),
    "resize": Fault("other processes and micro-batches at each resume", 40, "resumes"),
    "checkpoint": Fault("each file of the newest checkpoint damaged", 10**6),
    "data": Fault("each file of the data damaged", 10**6, "refused"),
    "nan": Fault("NaN or inf on one process of two", 30, "rolled_back"),
    "disk": Fault("the disk of a run full", 14, "failed"),
    "shard": Fault("the disk of a pack full", 6, "failed"),
    "s3": Fault("S3: connection cut, server gone, bytes altered", 20, "cuts"),
    "slurm": Fault("SLURM: USR1, requeue, node killed", 5),
}
Trial = Callable[[random.Random, Path], dict[str, Any]]


def damages_of_checkpoints(world: World) -> Iterator[Trial]:
    """Every harm to every file of a checkpoint of every trainer."""
    for trainer in TRAINERS:
        for name, harm in damages(newest_of(interrupted(world, trainer))):
            yield lambda _, folder, case=(trainer, name, harm): damaged_checkpoint(world, *case, folder)


def damages_of_data(world: World) -> Iterator[Trial]:
    """Every harm to every file that a run reads, with --verify_data and without."""
    for kind, data in DATA.items():
        for name, harm in damages(world.folder / data.folder):
            for verify in (True, False):
                yield lambda _, folder, case=(kind, name, harm, verify): damaged_data(world, *case, folder)


def in_turn(trial: Trial, faults: tuple[str, ...], count: int) -> list[Trial]:
    """So many trials, of each fault in turn."""
    return [functools.partial(trial, fault=fault) for fault in itertools.islice(itertools.cycle(faults), count)]


@contextlib.contextmanager
def trials_of(fault: str, world: World) -> Iterator[list[Trial]]:
    """The trials of a fault, each of which is made once; of one function, as often as is asked for.

    Raises: RuntimeError if this machine cannot make them.
    """
    simple = {"kill": killed, "signal": signalled, "resize": resized, "nan": poisoned}
    simple |= {"disk": disk_full, "shard": packing_disk_full}
    if fault in ("disk", "shard") and not can_mount(world.folder):
        raise RuntimeError("a small disk cannot be mounted, root is needed")
    if fault == "checkpoint":
        yield list(damages_of_checkpoints(world))
    elif fault == "data":
        yield list(damages_of_data(world))
    elif fault == "s3":
        with start_s3_server(world.folder / "s3") as environment:
            import boto3

            os.environ.update(environment)
            yield in_turn(functools.partial(s3_fault, world, client=boto3.client("s3")), S3_FAULTS, FAULTS[fault].trials)
    elif fault == "slurm":
        if reason := why_not():
            raise RuntimeError(reason)
        with start_cluster() as cluster:
            yield in_turn(functools.partial(requeued, world, cluster=cluster), SLURM_FAULTS, FAULTS[fault].trials)
    else:
        yield [functools.partial(simple[fault], world)] * FAULTS[fault].trials


def make(args: Args, fault: str, world: World, record: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Make the trials of one fault; returns its line of the table."""
    failed, total, before = 0, 0, time.monotonic()
    with trials_of(fault, world) as made:
        if args.trials is not None:
            made = random.Random(f"{args.seed} {fault}").sample(made, min(args.trials, len(made)))
        for number, trial in enumerate(tqdm(made, desc=fault, disable=None)):
            folder, start = Path(tempfile.mkdtemp(prefix=f"{fault}_{number}_", dir=args.output_dir)), time.monotonic()
            row = {"fault": fault, "trial": number, "seed": args.seed}
            try:
                detail = trial(random.Random(f"{args.seed} {fault} {number}"), folder / "run")
                total += int(detail.get(FAULTS[fault].total, 0))
                record(row | {"ok": True, **detail, "seconds": round(time.monotonic() - start, 2)})
                shutil.rmtree(folder)
            except Exception as error:
                failed += 1
                print(f"{fault} {number} FAILED, see {folder}: {error!r:.2000}", flush=True)
                record(row | {"ok": False, "error": repr(error), "seconds": round(time.monotonic() - start, 2)})
    about = f"{total} {FAULTS[fault].total.replace('_', ' ')}" if FAULTS[fault].total else ""
    minutes = (time.monotonic() - before) / 60
    return {"fault": FAULTS[fault].what, "trials": len(made), "failed": failed, "about": about, "minutes": minutes}


def main(args: Args) -> int:
    unknown = [name for name in args.faults if name not in FAULTS]
    check([f"--faults {name}: one of {', '.join(FAULTS)} is needed" for name in unknown] + below(args, 1, "trials"))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows, left_out = [], []
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(args.output_dir / "faults.jsonl", "a", encoding="utf-8"))
        world = World(args.output_dir / f"world_{os.getpid()}")
        stack.callback(shutil.rmtree, world.folder)

        def record(row: dict[str, Any]) -> None:
            log.write(json.dumps(row, default=str) + "\n")
            log.flush()

        for fault in args.faults or FAULTS:
            try:
                rows.append(make(args, fault, world, record))
            except RuntimeError as error:
                left_out.append(f"{FAULTS[fault].what}: not tried, {error}")
    print("| fault | trials | failed | | minutes |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['fault']} | {row['trials']} | {row['failed']} | {row['about']} | {row['minutes']:.1f} |")
    print("\n".join(left_out))
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main(parse(Args)))
